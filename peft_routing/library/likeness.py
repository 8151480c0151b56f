"""Which adapters of a library are alike: duplicates, and clusters."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.figures import check_new_figure
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.staging import check_new_file, check_output, new_file
from peft_routing.library.adding import reader
from peft_routing.library.catalogue import Library
from peft_routing.library.clusters import AVERAGE, MTTL, Clusters, cluster, draw, mttl_rows
from peft_routing.library.retraining import training_sets, write_recipes
from peft_routing.library.sketches import (
    cosines,
    exact_products,
    sketch_file,
    sketched_products,
)

WITHIN = 0.02


@dataclass(frozen=True)
class Duplicate:
    """An adapter whose update points as that of an earlier one does.

    distance: 1 less the cosine of the two.
    norm: the norm of its update over that of the other.
    """

    name: str
    of: str
    distance: float
    norm: float


def products(library: Library, reading: Reading, *, exact: bool) -> Tensor:
    """(adapters, adapters): the inner products of the updates, by sketches or `exact`.

    `UserError` for what is missing or damaged.
    """
    if exact:
        return exact_products(len(library.entries), reader(library, reading))
    files = [sketch_file(library.index, entry.sha256) for entry in library.entries.values()]
    return sketched_products(files)


def dedupe(
    directory: str, reading: Reading, *, within: float = WITHIN, exact: bool = False
) -> list[Duplicate]:
    """The adapters that are within a distance of an earlier one, each with the nearest of these.

    Nothing is removed. `UserError` for what is missing or damaged.
    """
    library = Library.open(directory)
    names = list(library.entries)
    if not names:
        raise UserError(f"{directory} has no adapter")
    inner = products(library, reading, exact=exact)
    distances = 1 - cosines(inner, names)
    norms = inner.diagonal().sqrt()
    duplicates = []
    for place in range(1, len(names)):
        nearest = int(distances[place, :place].argmin())
        distance = distances[place, nearest].item()
        if distance <= within:
            ratio = (norms[place] / norms[nearest]).item()
            duplicates.append(Duplicate(names[place], names[nearest], distance, ratio))
    return duplicates


def cluster_library(
    directory: str,
    reading: Reading,
    *,
    method: str = AVERAGE,
    k: int | None = None,
    exact: bool = False,
    output: str | None = None,
    plot: str | None = None,
    retrain: str | None = None,
    seed: int = 42,
) -> Clusters:
    """Clusters the adapters of a library, and writes `output` (JSON) and the picture `plot`.

    `retrain` is a directory to write with a file for each cluster, by which TRL trains one adapter
    on the texts of all its adapters.
    `UserError` for what is missing or damaged, and for outputs that exist.
    """
    if output is not None:
        check_new_file(Path(output).expanduser())
    if plot is not None:
        check_new_figure(Path(plot).expanduser())
    library = Library.open(directory)
    sets: dict[str, dict[str, Any]] = {}
    if retrain is not None:
        check_output(retrain)
        sets = training_sets(library)
    names = list(library.entries)
    similar = cosines(products(library, reading, exact=exact), names)
    rows = None
    if method == MTTL:
        read = reader(library, reading)
        rows = mttl_rows(read(number) for number in range(len(names)))
    clusters = cluster(names, similar, method=method, k=k, rows=rows, seed=seed)
    if output is not None:
        _write(clusters, library, Path(output).expanduser())
    if plot is not None:
        draw(clusters, names, similar, Path(plot).expanduser())
    if retrain is not None:
        write_recipes(clusters, library, sets, retrain)
    return clusters


def _write(clusters: Clusters, library: Library, path: Path) -> None:
    content = {
        "method": clusters.method,
        "silhouette": clusters.silhouette,
        "clusters": clusters.of,
        "order": clusters.order,
        "data": {number: _data(library, names) for number, names in clusters.members.items()},
    }
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _data(library: Library, names: Sequence[str]) -> list[str]:
    """The texts to train one adapter for a cluster on: those of its adapters, where known."""
    sources = [library.entries[name].data for name in names]
    return [source for source in sources if source is not None]
