"""The `peft-route` command: routed adapters from the shell."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.figures import check_new_figure
from _mergekit_moe_ext_common.options import (
    TRUST_REMOTE_CODE,
    DeferredCommand,
    FiniteRange,
    Reading,
    counting_options,
    fields_as_options,
    in_order,
    numbers_by_name,
    options_of,
    training_options,
    values_by_name,
)
from _mergekit_moe_ext_common.staging import check_new_file
from peft_routing import commands
from peft_routing.cli_library import library as library_group
from peft_routing.expert_options import (
    EXPERTS,
    EXPERTS_FROM,
    LIBRARY,
    ONLY,
    TASKS,
    experts_written,
)
from peft_routing.recipes import LEARNING_RATES, Distilling, Recipe

_ROUTING = (
    "top_k",
    "granularity",
    "routing_tokens",
    "router_granularity",
    "mixing",
    "router_temperature",
    "init",
    "score",
    "mlp_layers",
    "init_lambda",
    "head",
)
_CLUSTERS_FROM = click.option(
    "--clusters-from",
    metavar="FILE",
    help="File of `peft-route library cluster`: the cluster of each expert, for the router "
    "hierarchical.",
)
_LEARNING_RATES = click.option(
    "--learning-rate",
    "learning_rates",
    type=FiniteRange(min=0, min_open=True),
    multiple=True,
    default=LEARNING_RATES,
    show_default=True,
    help="Learning rate of a router's AdamW. May be repeated: the one with the lowest held-out "
    "loss is kept. (The default is the paper's three.)",
)
_BASE = click.option("--base", help="Base model. [default: the one that the adapter names]")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mergekit-moe-ext")
def main() -> None:
    """Put many LoRA adapters on one model, and a router over them."""
    # PEFT 0.21 asks transformers 5.24 for it whenever it puts an adapter on a model. Nobody who
    # runs a command can change that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def compose(
    base: str,
    experts: tuple[str, ...],
    experts_from: str | None,
    library: str | None,
    only: tuple[str, ...],
    general: tuple[str, ...],
    router: str,
    router_options: tuple[str, ...],
    output: str,
    weights: tuple[str, ...],
    clusters: tuple[str, ...],
    clusters_from: str | None,
    seed: int,
    trust_remote_code: bool,
    **routing: Any,
) -> None:
    """Put LoRA adapters and a router into one adapter for the model BASE, of which only the
    configuration is read.

    DIR is a directory or a repository on the Hub. The result loads with PeftModel.from_pretrained.
    """
    if not experts and not experts_from and not library:
        raise UserError(
            "there are no experts: name them with --expert, --experts-from or --library"
        )
    composed = commands.compose(
        base,
        experts_written("--expert", experts),
        output,
        experts_from=experts_from,
        library=library,
        only=only,
        clusters_from=clusters_from,
        router=router,
        general_experts=experts_written("--general-expert", general),
        seed=seed,
        trust_remote_code=trust_remote_code,
        weights=numbers_by_name("--weight", weights) or None,
        clusters=values_by_name("--cluster", clusters) or None,
        router_options=_router_options(router, router_options),
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

    add_options = in_order(
        click.argument("base"),
        EXPERTS,
        EXPERTS_FROM,
        LIBRARY,
        ONLY,
        click.option(
            "--general-expert",
            "general",
            multiple=True,
            metavar="[NAME=]DIR",
            help="LoRA adapter of general knowledge. May be repeated: the mean of all is "
            "subtracted from each expert (GenKnowSub).",
        ),
        click.option(
            "--router",
            metavar=f"[{'|'.join(all_routers())}]",
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
        _CLUSTERS_FROM,
        click.option(
            "--router-option",
            "router_options",
            multiple=True,
            metavar="NAME=VALUE",
            help="Option of the router, by its name. May be repeated. A list or a dictionary is "
            "written in JSON.",
        ),
        click.option(
            "--seed",
            type=int,
            default=42,
            show_default=True,
            help="Seed of a router that starts at random, as mlp does.",
        ),
        TRUST_REMOTE_CODE,
    )
    return click.command("compose")(add_options(compose))


main.add_command(DeferredCommand("compose", compose, _compose_command))
main.add_command(library_group)


@main.command()
@click.argument("adapter")
@training_options("Directory of the trained adapter. [default: ADAPTER-trained]")
@_LEARNING_RATES
@_BASE
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
    device_map: Any,
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
        weights=numbers_by_name("--weight", weights),
        eval_data=eval_data,
        resume=resume,
        device_map=device_map,
    )
    for result in results:
        if not result.losses:  # nothing was held out, and so there was one learning rate
            continue
        click.echo(f"learning rate {result.learning_rate:g}: held-out loss {result.mean:.4f}")
    if results and results[0].losses:
        click.echo(before_and_after(results[0].losses))


@main.command()
@click.argument("adapter")
@training_options("Directory of the LoRA. [default: ADAPTER-distilled]", device_map=False)
@click.option(
    "--coefficient",
    "coefficients",
    multiple=True,
    metavar="NAME=NUMBER",
    help="Coefficient of an expert in the ensemble. May be repeated; 0 for those not named. "
    "[default: all alike]",
)
@click.option(
    "--beta",
    type=FiniteRange(min=0),
    default=0.0,
    show_default=True,
    help="How much the coefficients follow each text; 1 is Bayes' rule.",
)
@click.option(
    "--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of the LoRA."
)
@click.option(
    "--learning-rate",
    type=FiniteRange(min=0, min_open=True),
    default=2e-4,
    show_default=True,
    help="Learning rate of AdamW.",
)
@click.option(
    "--on-the-fly",
    is_flag=True,
    help="Ensemble reads the texts of each step in that step, and nothing of it is kept: for many "
    "texts of few epochs. Then the base model is in memory twice.",
)
@_BASE
@options_of(Distilling, "recipe")
@options_of(Reading, "reading")
def distil(
    adapter: str,
    data: tuple[str, ...],
    weights: tuple[str, ...],
    eval_data: tuple[str, ...],
    output_dir: str | None,
    resume: bool,
    coefficients: tuple[str, ...],
    beta: float,
    rank: int,
    learning_rate: float,
    on_the_fly: bool,
    base: str | None,
    recipe: Distilling,
    reading: Reading,
) -> None:
    """Train one plain LoRA to predict what the ensemble of the experts in the routed adapter
    ADAPTER predicts, so that one pass does for a pass of each.
    """
    from _mergekit_moe_ext_common.runs import before_and_after

    losses = commands.distil(
        adapter,
        data,
        output=output_dir,
        coefficients=numbers_by_name("--coefficient", coefficients) or None,
        beta=beta,
        rank=rank,
        learning_rate=learning_rate,
        recipe=recipe,
        reading=reading,
        base=base,
        weights=numbers_by_name("--weight", weights),
        eval_data=eval_data,
        resume=resume,
        on_the_fly=on_the_fly,
    )
    if losses:
        click.echo("divergence from the ensemble, in nats per held-out token:")
        click.echo(before_and_after(losses))


@main.command()
@click.argument("adapter")
@counting_options(
    data="Texts to run. May be repeated.",
    output="File to keep the means in: *.json.",
    plot="Figure to draw of the means: *.png, *.pdf or *.svg.",
)
@_BASE
@options_of(Reading, "reading")
def inspect(
    adapter: str,
    data: tuple[str, ...],
    base: str | None,
    output: Path | None,
    plot: Path | None,
    html: Path | None,
    max_samples: int | None,
    batch_size: int,
    reading: Reading,
) -> None:
    """Show who is chosen where: each expert's mean coefficient per source of texts, and per module
    with --plot or -o.

    ADAPTER is a directory that `compose` or `train` wrote. A SOURCE is a file, a directory or a
    dataset on the Hub.
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
        html=html,
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
    help="Write one LoRA adapter; only where the router does not depend on the input.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Rank of the one adapter, with --merged: its update is the closest of that rank. "
    "[default: as many as make it exact]",
)
@_BASE
@TRUST_REMOTE_CODE
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
    from peft_routing.exporting import folder_of

    exported = commands.export(
        adapter,
        output,
        merged=merged,
        rank=rank,
        base=base,
        trust_remote_code=trust_remote_code,
    )
    if not merged:
        click.echo(f"{output}: {', '.join(map(folder_of, exported.names))}")
        return
    accuracy = f", relative error of the updates {exported.error:.4f}" if rank else ""
    click.echo(f"{output}: one LoRA adapter{accuracy}")


@main.command()
@click.argument("base")
@EXPERTS
@EXPERTS_FROM
@LIBRARY
@ONLY
@TASKS
@click.option(
    "--own",
    "own",
    multiple=True,
    metavar="TASK=NAME",
    help="Adapter that was trained on a task, where neither its name nor the library says so. May "
    "be repeated, for an adapter of several tasks, too.",
)
@click.option(
    "--fusion",
    "fusions",
    multiple=True,
    metavar="NAME=DIR",
    help="Other adapter to measure beside them: a trained routed one, say. May be repeated.",
)
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    metavar="NAME",
    help="Fusion to compare, beside the base model, such as own_expert, uniform_ensemble or "
    "arrow_top1; an unknown name lists them all. May be repeated. [default: all that need no "
    "training]",
)
@click.option(
    "--trained",
    is_flag=True,
    help="Compare routers, too, that are trained first, on the train texts of all tasks: global, "
    "layer, linear, linear_arrow and, with --clusters-from, hierarchical and hierarchical_arrow. "
    "Each takes a training per learning rate. --strategy names single ones.",
)
@_CLUSTERS_FROM
@fields_as_options(Recipe, ("num_train_epochs", "max_steps"))
@_LEARNING_RATES
@click.option("-o", "--output", type=click.Path(), required=True, help="Directory of the report.")
@click.option(
    "--cache",
    type=click.Path(),
    help="Directory that keeps what was measured, so that it is not measured again. [default: that "
    "of the library, or OUTPUT.cache]",
)
@click.option(
    "--beside",
    "besides",
    multiple=True,
    metavar="NAME=REPORT",
    help="Report of other adapters on the same tasks, to set beside this one: a directory that "
    "this command wrote. May be repeated.",
)
@click.option(
    "--metric",
    help="Measure of generated answers, beside the loss: accuracy, exact_match, rouge_l, or a "
    "function of your own, package.module:function, which is run. Needs --completions-only.",
)
@click.option(
    "--lm-eval",
    "lm_eval",
    multiple=True,
    metavar="TASK",
    help="Task of lm_eval to measure each fusion on, too: its name, or a YAML file of your own, "
    "whose code is run. May be repeated.",
)
@click.option(
    "--completions-only",
    is_flag=True,
    help="Score answers alone: the last turn of a chat, or a target after its input.",
)
@click.option(
    "--max-samples",
    type=click.IntRange(min=1),
    help="Number of rows of each source that are read, from the first, and of documents of each "
    "task of lm_eval. [default: all]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Number of rows at a time, in training, too.",
)
@click.option(
    "--seed",
    type=int,
    default=42,
    show_default=True,
    help="Seed of the split of a task that has one source, of what a DARE merge drops, and of the "
    "order of the rows in training.",
)
@options_of(Reading, "reading")
def compare(
    base: str,
    experts: tuple[str, ...],
    experts_from: str | None,
    library: str | None,
    only: tuple[str, ...],
    tasks: tuple[str, ...],
    own: tuple[str, ...],
    fusions: tuple[str, ...],
    strategies: tuple[str, ...],
    trained: bool,
    clusters_from: str | None,
    num_train_epochs: float,
    max_steps: int,
    learning_rates: tuple[float, ...],
    output: str,
    cache: str | None,
    besides: tuple[str, ...],
    metric: str | None,
    lm_eval: tuple[str, ...],
    completions_only: bool,
    max_samples: int | None,
    batch_size: int,
    seed: int,
    reading: Reading,
) -> None:
    """Compare what can be done with LoRA adapters for the model BASE: serve one of them, merge
    them, route over them, or ensemble them.

    SOURCE is a file, a directory or a dataset on the Hub, as for `train`. The report has a table,
    figures and JSON. An interrupted command goes on where it was when it is given again. Runs on
    many processes under `accelerate launch -m peft_routing compare`.
    """
    from peft_routing.fusion.cache import processes

    is_main = processes().is_main_process  # asked now: the group of processes is gone afterwards
    compared = commands.compare(
        base,
        experts_written("--expert", experts),
        values_by_name("--task", tasks, "NAME=SOURCE"),
        output,
        experts_from=experts_from,
        library=library,
        only=only,
        own=values_by_name("--own", own, "TASK=NAME"),
        fusions=values_by_name("--fusion", fusions, "NAME=DIR"),
        strategies=strategies,
        trained=trained,
        clusters_from=clusters_from,
        num_train_epochs=num_train_epochs,
        max_steps=max_steps,
        learning_rates=learning_rates,
        cache=cache,
        beside=values_by_name("--beside", besides, "NAME=REPORT"),
        metric=metric,
        lm_eval=lm_eval,
        reading=reading,
        completions_only=completions_only,
        max_samples=max_samples,
        batch_size=batch_size,
        seed=seed,
    )
    if not is_main:
        return
    from peft_routing.fusion import report

    click.echo(report.table(compared))
    for line in (*report.notes(compared), *compared.sentences):
        click.echo(line)
    recommended = Path(output).expanduser() / "recommended"
    if recommended.exists():
        click.echo(f"{recommended}: {compared.best}, the best on validation")


@main.command("import-mttl")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(), required=True, help="Directory to write.")
def import_mttl(files: tuple[str, ...], output: str) -> None:
    """Write the experts of a library of mttl as LoRA directories, for `compose --experts-from`.

    FILE is NAME.ckpt, with NAME.meta beside it, or a directory of these. No code in them is run.
    All experts get the scaling of the first by name, as in mttl.
    """
    scalings = commands.import_mttl(files, output)
    first, scaling = next(iter(scalings.items()))
    click.echo(f"{output}: {len(scalings)} experts, scaling {scaling:g}")
    others = [name for name, own in scalings.items() if own != scaling]
    if others:
        click.echo(
            f"{len(others)} experts, {others[0]} among them, were trained with another scaling; in "
            f"mttl, too, they have that of {first}"
        )


def _router_options(router: str, texts: Sequence[str]) -> dict[str, Any]:
    """The values of --router-option by name, each in the type that the router declares for it."""
    from peft_routing.routers import find_router
    from peft_routing.routers.options import value_of_text

    options = find_router(router).options
    values = values_by_name("--router-option", texts)
    return {name: value_of_text(options, name, text) for name, text in values.items()}
