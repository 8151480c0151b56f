"""The group `peft-route library`: a library of adapters from the shell."""

from pathlib import Path
from typing import Any

import click

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import (
    TRUST_REMOTE_CODE,
    Decorator,
    FiniteRange,
    Reading,
    in_order,
    options_of,
    values_by_name,
)
from peft_routing import commands
from peft_routing.expert_options import EXPERTS, EXPERTS_FROM, ONLY, TASKS, experts_written

_LIBRARY = click.argument("library")
_EXACT = click.option(
    "--exact",
    is_flag=True,
    help="Compare the updates themselves, not their sketches: minutes for hundreds of adapters.",
)
_SEED = click.option(
    "--seed",
    type=int,
    default=42,
    show_default=True,
    help="Seed of whatever is drawn at random.",
)


def _passes(samples: str) -> Decorator:
    """The options of a command that runs texts. `samples` is the help text of --max-samples."""
    return in_order(
        click.option("--max-samples", type=click.IntRange(min=1), help=samples),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=8,
            show_default=True,
            help="Number of rows at a time.",
        ),
    )


@click.group()
def library() -> None:
    """Keep many LoRA adapters of one base model in a list: find duplicates and clusters among
    them, select few, and name one per request. Adapters are referenced, never copied.
    """


@library.command()
@_LIBRARY
@EXPERTS
@EXPERTS_FROM
@click.option("--base", help="Base model of a new library. [default: the one that the first names]")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME=TASK",
    help="Task that an adapter was trained on. May be repeated. [default: the adapter's name]",
)
@click.option(
    "--data",
    multiple=True,
    metavar="NAME=SOURCE",
    help="Texts that an adapter was trained on. May be repeated. The base model reads them, so "
    "that `route` finds the adapters whose texts are like a request.",
)
@_passes("Number of rows of each source that are read, from the first. [default: all]")
@options_of(Reading, "reading")
def add(
    library: str,
    experts: tuple[str, ...],
    experts_from: str | None,
    base: str | None,
    tasks: tuple[str, ...],
    data: tuple[str, ...],
    max_samples: int | None,
    batch_size: int,
    reading: Reading,
) -> None:
    """Add LoRA adapters to the directory LIBRARY, which is made where there is none."""
    from peft_routing import library as functions

    added = commands.named_experts(experts_written("--expert", experts), experts_from=experts_from)
    grown = functions.add(
        library,
        added,
        reading,
        base=base,
        tasks=values_by_name("--task", tasks, "NAME=TASK"),
        data=values_by_name("--data", data, "NAME=SOURCE"),
        max_samples=max_samples,
        batch_size=batch_size,
    )
    click.echo(f"{library}: {len(added)} added, {len(grown.entries)} adapters for {grown.base}")


@library.command("list")
@_LIBRARY
def list_adapters(library: str) -> None:
    """List the adapters of LIBRARY: name, ranks, task, and the mean of its scores."""
    from peft_routing.library import Library

    opened = Library.open(library)
    for name, entry in opened.entries.items():
        ranks = ", ".join(str(rank) for rank in entry.ranks)
        scores = list(entry.scores.values())
        score = f", mean loss {sum(scores) / len(scores):.4f}" if scores else ""
        click.echo(f"{name}: rank {ranks}, task {entry.task}{score}")


@library.command()
@_LIBRARY
@click.argument("name")
def show(library: str, name: str) -> None:
    """Show all that LIBRARY has of the adapter NAME, as JSON."""
    import json
    from dataclasses import asdict

    from peft_routing.library import Library

    opened = Library.open(library)
    opened.check_name(name)
    values = {"location": opened.location(name), **asdict(opened.entries[name])}
    click.echo(json.dumps(values, indent=1))


@library.command()
@_LIBRARY
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove(library: str, names: tuple[str, ...]) -> None:
    """Take adapters out of LIBRARY. Their own files stay as they are."""
    from peft_routing import library as functions

    left = functions.remove(library, names)
    click.echo(f"{library}: {len(set(names))} removed, {len(left.entries)} adapters left")


@library.command()
@_LIBRARY
@click.option(
    "--within",
    type=FiniteRange(min=0, max=2),
    default=0.02,
    show_default=True,
    help="Greatest distance: 1 less the cosine of two updates.",
)
@_EXACT
@TRUST_REMOTE_CODE
def dedupe(library: str, within: float, exact: bool, trust_remote_code: bool) -> None:
    """Name the adapters of LIBRARY whose update is nearly that of an earlier one. Nothing is
    removed.
    """
    from peft_routing import library as functions

    reading = Reading(trust_remote_code=trust_remote_code)
    duplicates = functions.dedupe(library, reading, within=within, exact=exact)
    for each in duplicates:
        click.echo(
            f"{each.name} is within {each.distance:.4f} of {each.of}, its norm {each.norm:.3f} of "
            "the other's"
        )
    if not duplicates:
        click.echo(f"no two adapters are within {within:g} of each other")


@library.command()
@_LIBRARY
@click.option(
    "--as",
    "method",
    type=click.Choice(["average", "kmeans", "mttl"]),
    default="average",
    show_default=True,
    help="Way to cluster: average linkage or k-means of the updates' cosines, or mttl's recipe, "
    "k-means by the factors.",
)
@click.option(
    "-k",
    "k",
    type=click.IntRange(min=1),
    help="Number of clusters. [default: that of the largest silhouette]",
)
@_EXACT
@click.option("-o", "--output", type=click.Path(), help="File to write: *.json.")
@click.option("--plot", type=click.Path(), help="Picture of the cosines: *.png, *.pdf or *.svg.")
@click.option(
    "--retrain",
    type=click.Path(),
    help="Directory to write with a file per cluster, by which TRL trains one adapter on the texts "
    "of all its adapters.",
)
@_SEED
@TRUST_REMOTE_CODE
def cluster(
    library: str,
    method: str,
    k: int | None,
    exact: bool,
    output: str | None,
    plot: str | None,
    retrain: str | None,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Group the adapters of LIBRARY by the similarity of their updates.

    `peft-route compose --router hierarchical --clusters-from` takes the file.
    """
    from peft_routing import library as functions

    clusters = functions.cluster_library(
        library,
        Reading(trust_remote_code=trust_remote_code),
        method=method,
        k=k,
        exact=exact,
        output=output,
        plot=plot,
        retrain=retrain,
        seed=seed,
    )
    for number, names in clusters.members.items():
        click.echo(f"{number}: {', '.join(names)}")
    click.echo(f"{len(clusters.members)} clusters, silhouette {clusters.silhouette:.3f}")
    if retrain is not None:
        for number in clusters.members:
            click.echo(functions.retraining_command(retrain, number))


@library.command()
@_LIBRARY
@TASKS
@click.option(
    "-k", "k", type=click.IntRange(min=1), required=True, help="Number of adapters to select."
)
@ONLY
@click.option(
    "--completions-only",
    is_flag=True,
    help="Score answers alone: the last turn of a chat, or a target after its input.",
)
@_passes("Number of rows of each source that are read, from the first. [default: all]")
@_SEED
@options_of(Reading, "reading")
def select(
    library: str,
    tasks: tuple[str, ...],
    k: int,
    only: tuple[str, ...],
    reading: Reading,
    **measuring: Any,
) -> None:
    """Select the adapters of LIBRARY that together are best for tasks, one after the other.

    Each is measured on the tasks' texts, and its losses become its scores in the library. An
    interrupted command goes on where it was when it is given again.
    """
    from peft_routing import library as functions

    chosen = functions.select(
        library,
        values_by_name("--task", tasks, "NAME=SOURCE"),
        k,
        reading,
        only=only,
        **measuring,
    )
    click.echo(f"the base model: validation {chosen.validation[0]:.4f}, test {chosen.test[0]:.4f}")
    for place, name in enumerate(chosen.names, start=1):
        click.echo(
            f"{place}. {name}: validation {chosen.validation[place]:.4f}, test "
            f"{chosen.test[place]:.4f}"
        )


@library.command()
@_LIBRARY
@click.argument("texts", metavar="SOURCE")
@click.option("-o", "--output", type=click.Path(), required=True, help="File to write: *.jsonl.")
@click.option(
    "--serve-map",
    type=click.Path(),
    help="File to write with what vLLM and LoRAX take of the adapters that are named: *.json.",
)
@click.option(
    "--shortlist",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Number of adapters that read a text: those whose texts are most like it.",
)
@ONLY
@_passes("Number of rows that are read, from the first. [default: all]")
@options_of(Reading, "reading")
def route(
    library: str,
    texts: str,
    output: str,
    serve_map: str | None,
    shortlist: int,
    only: tuple[str, ...],
    max_samples: int | None,
    batch_size: int,
    reading: Reading,
) -> None:
    """Name an adapter of LIBRARY for each text of SOURCE: the one that finds it least surprising.

    A server that loads one plain LoRA per request takes the names.
    """
    from peft_routing import library as functions

    for option, path in (("-o", output), ("--serve-map", serve_map)):
        if path is not None and Path(path).is_dir():
            raise UserError(f"{option} {path} is a directory; name a file")
    requests = functions.route(
        library,
        texts,
        output,
        reading,
        only=only,
        shortlist=shortlist,
        serve_map=serve_map,
        max_samples=max_samples,
        batch_size=batch_size,
    )
    counts: dict[str, int] = {}
    for request in requests:
        name = request.name or "the base model"
        counts[name] = counts.get(name, 0) + 1
    for name, count in sorted(counts.items(), key=lambda each: -each[1]):
        click.echo(f"{name}: {count} of {len(requests)} texts")
