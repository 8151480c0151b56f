"""The `peft-route` command: routed adapters from the shell."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from _mergekit_moe_ext_common.figures import check_new_figure, check_new_file
from _mergekit_moe_ext_common.options import Reading, fields_as_options, options_of
from peft_routing.config import RoutedLoraConfig
from peft_routing.recipes import LEARNING_RATES, Recipe
from peft_routing.routers import all_routers

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


@main.command()
@click.argument("base")
@click.option("--expert", "experts", multiple=True, required=True, metavar="[NAME=]DIR", help="A LoRA adapter.")
@click.option(
    "--general-expert",
    "general",
    multiple=True,
    metavar="[NAME=]DIR",
    help="A LoRA adapter of general knowledge; the mean of these is subtracted from each expert (GenKnowSub).",
)
@click.option(
    "--router", type=click.Choice(list(all_routers())), default="arrow", show_default=True, help="Who decides."
)
@click.option("-o", "--output", type=click.Path(), required=True, help="The routed adapter's directory.")
@fields_as_options(RoutedLoraConfig, _ROUTING)
@click.option("--weight", "weights", multiple=True, metavar="NAME=NUMBER", help="For fixed: an expert's coefficient.")
@click.option("--cluster", "clusters", multiple=True, metavar="NAME=ID", help="For hierarchical: an expert's cluster.")
@click.option("--seed", type=int, default=42, show_default=True, help="Of mlp's random start.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the base model (danger).")
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
    """Put LoRA adapters and a router into one adapter for the model BASE, of which only the configuration is read.

    DIR is a directory or a repository on the Hub. The result loads with PeftModel.from_pretrained after
    `import peft_routing`.
    """
    from peft import get_peft_model
    from transformers import set_seed

    from _mergekit_moe_ext_common.loading import load_config
    from _mergekit_moe_ext_common.staging import check_output, staged
    from peft_routing.loading import empty_model

    reading = Reading(trust_remote_code=trust_remote_code)
    out = check_output(output)
    try:
        config = RoutedLoraConfig(
            experts=_experts("--expert", experts),
            general_experts=_experts("--general-expert", general),
            router=router,
            weights={name: _number("--weight", name, number) for name, number in _pairs("--weight", weights)} or None,
            clusters=dict(_pairs("--cluster", clusters)) or None,
            **routing,
        )
        model = empty_model(load_config(base, reading), reading)
        set_seed(seed)
        model = get_peft_model(model, config)
    except (ValueError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error
    with staged(out) as directory:
        model.save_pretrained(str(directory))
    composed = model.peft_config["default"]
    less = f" less the mean of {', '.join(composed.general_experts)}" if general else ""
    click.echo(
        f"{output}: {len(composed.experts)} experts ({', '.join(composed.names)}){less} on {len(composed.sites)} "
        f"modules, router {router}, mixing {composed.mixing}"
    )


@main.command()
@click.argument("adapter")
@click.option("--data", multiple=True, required=True, metavar="[NAME=]SOURCE", help="Texts to train on.")
@click.option(
    "--learning-rate",
    "learning_rates",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    default=LEARNING_RATES,
    show_default=True,
    help="AdamW's. Of several, the one with the lowest held-out loss is kept (the paper's three).",
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    metavar="NAME=NUMBER",
    help="How likely a source is drawn, next to 1 for the others. Without any, all rows of all sources are read.",
)
@click.option(
    "--eval-data",
    multiple=True,
    metavar="[NAME=]SOURCE",
    help="Texts to measure on; instead of the held-out rows of the source of that name.",
)
@click.option("-o", "--output-dir", type=click.Path(), help="The trained adapter. [default: ADAPTER-trained]")
@click.option("--base", help="The base model, where it is not the one that the adapter names.")
@click.option("--resume", is_flag=True, help="Go on after the last checkpoint of an interrupted training.")
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
    """Train the router of the routed adapter in the directory ADAPTER; its experts stay as they are.

    SOURCE is a file (jsonl, csv, parquet, txt …), a directory, or a dataset on the Hub, with a split if you like:
    math=math.jsonl, owner/name:train[:1%]. The result is written whole, and ADAPTER is left as it is. Runs on many
    processes under `accelerate launch -m peft_routing train`.
    """
    from _mergekit_moe_ext_common.runs import before_and_after
    from peft_routing.train import train as run_training

    results = run_training(
        adapter,
        output_dir,
        data,
        reading,
        recipe,
        learning_rates=tuple(dict.fromkeys(learning_rates)),
        base=base,
        weights={name: _number("--weight", name, number) for name, number in _pairs("--weight", weights)},
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
@click.option("--base", help="The base model, where it is not the one that the adapter names.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Keep the means: *.json.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw them: *.png, *.pdf or *.svg.")
@click.option("--max-samples", type=click.IntRange(min=1), help="Use the first so many rows of each source.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows at a time.")
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
    """Show who is chosen where: each expert's mean coefficient per source, and per module with --plot or -o."""
    from peft_routing import inspection

    if plot:
        check_new_figure(plot)
    if output:
        check_new_file(output)
    found = inspection.inspect_adapter(
        adapter, data, reading, base=base, max_samples=max_samples, batch_size=batch_size
    )
    if output:
        found.write(output)
    click.echo(inspection.table(found))
    if plot:
        inspection.plot(found, plot)


@main.command()
@click.argument("adapter")
@click.option("-o", "--output", type=click.Path(), required=True, help="The directory to write.")
@click.option("--merged", is_flag=True, help="One LoRA adapter, where the router does not depend on the input.")
@click.option("--rank", type=click.IntRange(min=1), help="With --merged: the closest update of this rank.")
@click.option("--base", help="The base model, where it is not the one that the adapter names.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the base model (danger).")
def export(
    adapter: str, output: str, merged: bool, rank: int | None, base: str | None, trust_remote_code: bool
) -> None:
    """Write the experts of the routed adapter in ADAPTER back as LoRA directories, or their mixture as one.

    PEFT reads those without this package. Of the base model only the configuration is read.
    """
    from peft_routing.loading import base_of, load_adapter_config, load_on_empty

    if rank is not None and not merged:
        raise click.ClickException("--rank goes with --merged")
    reading = Reading(trust_remote_code=trust_remote_code)
    config = load_adapter_config(adapter)
    model = load_on_empty(adapter, config, *base_of(base, config, reading), reading)
    if not merged:
        model.export_experts(output)
        click.echo(f"{output}: {', '.join([*config.names, *config.general_experts])}")
        return
    try:
        error = model.to_lora(output, rank=rank)
    except ValueError as complaint:
        raise click.ClickException(str(complaint)) from complaint
    click.echo(f"{output}: one LoRA adapter" + (f", relative error of the updates {error:.4f}" if rank else ""))


def _experts(option: str, texts: Sequence[str]) -> Any:
    """By name where names are given, else a list, which is named by its directories."""
    named = [(text, "", "") if Path(text).exists() else text.partition("=") for text in texts]
    if all(separator for _, separator, _ in named):
        experts = {name: path for name, _, path in named}
        if len(experts) < len(named):
            raise ValueError(f"{option}: two have the same name")
        return experts
    if any(separator for _, separator, _ in named):
        raise ValueError(f"{option}: name all experts, or none")
    return list(texts)


def _pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    for text in texts:
        if "=" not in text:
            raise click.ClickException(f"{option} {text}: write NAME=VALUE")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in texts]


def _number(option: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.ClickException(f"{option} {name}={text}: {text} is no number") from None
