"""The `peft-route` command: routed adapters from the shell."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.figures import check_new_figure
from _mergekit_moe_ext_common.options import DeferredCommand, Reading, fields_as_options, options_of
from _mergekit_moe_ext_common.staging import check_new_file
from peft_routing import commands
from peft_routing.recipes import LEARNING_RATES, Recipe

_ROUTING = (
    "top_k",
    "granularity",
    "routing_tokens",
    "mixing",
    "router_temperature",
    "init",
    "score",
    "mlp_layers",
    "init_lambda",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mergekit-moe-ext")
def main() -> None:
    """Put many LoRA adapters on one model, and a router over them."""


def compose(
    base: str,
    experts: tuple[str, ...],
    general: tuple[str, ...],
    router: str,
    output: str,
    weights: tuple[str, ...],
    clusters: tuple[str, ...],
    seed: int,
    trust_remote_code: bool,
    **routing: Any,
) -> None:
    """Put LoRA adapters and a router into one adapter for the model BASE, of which only the
    configuration is read.

    DIR is a directory or a repository on the Hub. The result loads with PeftModel.from_pretrained
    after `import peft_routing`.
    """
    by_expert = {
        name: _number("--weight", name, number) for name, number in _pairs("--weight", weights)
    }
    composed = commands.compose(
        base,
        _experts("--expert", experts),
        output,
        router=router,
        general_experts=_experts("--general-expert", general),
        seed=seed,
        trust_remote_code=trust_remote_code,
        weights=by_expert or None,
        clusters=dict(_pairs("--cluster", clusters)) or None,
        **routing,
    )
    less = f" less the mean of {', '.join(composed.general_experts)}" if general else ""
    click.echo(
        f"{output}: {len(composed.experts)} experts ({', '.join(composed.names)}){less} on "
        f"{len(composed.sites)} modules, router {router}, mixing {composed.mixing}"
    )


def _compose_command() -> click.Command:
    """`compose`, whose options are fields of the adapter's configuration, and with it PEFT's."""
    from peft_routing.config import RoutedLoraConfig
    from peft_routing.routers import all_routers

    parameters = (
        click.argument("base"),
        click.option(
            "--expert",
            "experts",
            multiple=True,
            required=True,
            metavar="[NAME=]DIR",
            help="LoRA adapter; give several.",
        ),
        click.option(
            "--general-expert",
            "general",
            multiple=True,
            metavar="[NAME=]DIR",
            help="LoRA adapter of general knowledge; the mean of these is subtracted from each "
            "expert (GenKnowSub).",
        ),
        click.option(
            "--router",
            type=click.Choice(list(all_routers())),
            default="arrow",
            show_default=True,
            help="Router that the coefficients come from.",
        ),
        click.option(
            "-o",
            "--output",
            type=click.Path(),
            required=True,
            help="Directory of the routed adapter.",
        ),
        fields_as_options(RoutedLoraConfig, _ROUTING),
        click.option(
            "--weight",
            "weights",
            multiple=True,
            metavar="NAME=NUMBER",
            help="Coefficient of an expert, for the router fixed.",
        ),
        click.option(
            "--cluster",
            "clusters",
            multiple=True,
            metavar="NAME=ID",
            help="Cluster of an expert, for the router hierarchical.",
        ),
        click.option(
            "--seed", type=int, default=42, show_default=True, help="Seed of mlp's random start."
        ),
        click.option(
            "--trust-remote-code",
            is_flag=True,
            help="Run code that comes with the base model (danger).",
        ),
    )
    command: Any = compose
    for parameter in reversed(parameters):
        command = parameter(command)
    return click.command("compose")(command)


main.add_command(DeferredCommand("compose", compose, _compose_command))


@main.command()
@click.argument("adapter")
@click.option(
    "--data", multiple=True, required=True, metavar="[NAME=]SOURCE", help="Texts to train on."
)
@click.option(
    "--learning-rate",
    "learning_rates",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    default=LEARNING_RATES,
    show_default=True,
    help="Learning rate of AdamW. Of several, the one with the lowest held-out loss is kept (the "
    "paper's three).",
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    metavar="NAME=NUMBER",
    help="Likelihood that a source is drawn, next to 1 for the others. [default: all rows of all "
    "sources are read]",
)
@click.option(
    "--eval-data",
    multiple=True,
    metavar="[NAME=]SOURCE",
    help="Texts to measure on, in place of the held-out rows of the source of that name.",
)
@click.option(
    "-o",
    "--output-dir",
    type=click.Path(),
    help="Directory of the trained adapter. [default: ADAPTER-trained]",
)
@click.option("--base", help="Base model, where it is not the one that the adapter names.")
@click.option(
    "--resume", is_flag=True, help="Go on after the last checkpoint of an interrupted training."
)
@options_of(Recipe, "recipe")
@options_of(Reading, "reading")
def train(
    adapter: str,
    data: tuple[str, ...],
    learning_rates: tuple[float, ...],
    weights: tuple[str, ...],
    eval_data: tuple[str, ...],
    output_dir: str | None,
    base: str | None,
    resume: bool,
    recipe: Recipe,
    reading: Reading,
) -> None:
    """Train the router of the routed adapter in the directory ADAPTER; its experts stay as they
    are.

    SOURCE is a file (jsonl, csv, parquet, txt …), a directory, or a dataset on the Hub, with a
    split if you like: math=math.jsonl, owner/name:train[:1%]. The result is written whole, and
    ADAPTER is left as it is. Runs on many processes under
    `accelerate launch -m peft_routing train`.
    """
    from _mergekit_moe_ext_common.runs import before_and_after

    results = commands.train(
        adapter,
        data,
        output=output_dir,
        recipe=recipe,
        reading=reading,
        learning_rates=learning_rates,
        base=base,
        weights={
            name: _number("--weight", name, number) for name, number in _pairs("--weight", weights)
        },
        eval_data=eval_data,
        resume=resume,
    )
    for result in results[:1] if not any(result.losses for result in results) else results:
        click.echo(f"learning rate {result.learning_rate:g}: held-out loss {result.mean:.4f}")
    if results and results[0].losses:
        click.echo(before_and_after(results[0].losses))


@main.command()
@click.argument("adapter")
@click.option("--data", multiple=True, required=True, metavar="[TASK=]SOURCE", help="Texts to run.")
@click.option("--base", help="Base model, where it is not the one that the adapter names.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to keep the means in: *.json.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Figure to draw of the means: *.png, *.pdf or *.svg.",
)
@click.option(
    "--max-samples",
    type=click.IntRange(min=1),
    help="Number of rows of each source that are read, from the first. [default: all]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Number of rows at a time.",
)
@options_of(Reading, "reading")
def inspect(
    adapter: str,
    data: tuple[str, ...],
    base: str | None,
    output: Path | None,
    plot: Path | None,
    max_samples: int | None,
    batch_size: int,
    reading: Reading,
) -> None:
    """Show who is chosen where: each expert's mean coefficient per source, and per module with
    --plot or -o.
    """
    if plot:
        check_new_figure(plot)
    if output:
        check_new_file(output)
    inspected = commands.inspect(
        adapter,
        data,
        reading=reading,
        base=base,
        max_samples=max_samples,
        batch_size=batch_size,
    )
    from peft_routing import inspection

    click.echo(inspection.table(inspected))  # first, so that it is seen even where the file fails
    if output:
        inspected.write(output)
    if plot:
        inspection.plot(inspected, plot)


@main.command()
@click.argument("adapter")
@click.option("-o", "--output", type=click.Path(), required=True, help="Directory to write.")
@click.option(
    "--merged",
    is_flag=True,
    help="Write one LoRA adapter, where the router does not depend on the input.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Rank of the adapter, with --merged: the closest update. [default: exact]",
)
@click.option("--base", help="Base model, where it is not the one that the adapter names.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the base model (danger)."
)
def export(
    adapter: str,
    output: str,
    merged: bool,
    rank: int | None,
    base: str | None,
    trust_remote_code: bool,
) -> None:
    """Write the experts of the routed adapter in ADAPTER back as LoRA directories, or their mixture
    as one.

    PEFT reads those without this package. Of the base model only the configuration is read.
    """
    exported = commands.export(
        adapter,
        output,
        merged=merged,
        rank=rank,
        base=base,
        trust_remote_code=trust_remote_code,
    )
    if not merged:
        click.echo(f"{output}: {', '.join(exported.names)}")
        return
    accuracy = f", relative error of the updates {exported.error:.4f}" if rank else ""
    click.echo(f"{output}: one LoRA adapter{accuracy}")


def _experts(option: str, texts: Sequence[str]) -> Any:
    """Experts by name where names are given, else a list, which is named by its directories."""
    named = [(text, "", "") if Path(text).exists() else text.partition("=") for text in texts]
    if all(separator for _, separator, _ in named):
        experts = {name: path for name, _, path in named}
        if len(experts) < len(named):
            raise UserError(f"{option}: two have the same name")
        return experts
    if any(separator for _, separator, _ in named):
        raise UserError(f"{option}: name all experts, or none")
    return list(texts)


def _pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    for text in texts:
        if "=" not in text:
            raise UserError(f"{option} {text}: write NAME=VALUE")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in texts]


def _number(option: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} {name}={text}: {text} is no number") from None
