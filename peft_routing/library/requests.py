"""A name per request: which adapter of a library a text is served with.

Two stages: the adapters whose centroids are nearest to a text are its shortlist, and of these, and
the base model, the one with the least perplexity is named. So the cost per text does not grow with
the library.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.staging import check_new_file, new_file
from peft_routing.fusion.cache import Subject, Texts, measure
from peft_routing.fusion.subjects import base_alone, one_expert
from peft_routing.library.catalogue import Library
from peft_routing.library.centroids import Base, embeddings, nearest, read_centroids

SHORTLIST = 8


@dataclass(frozen=True)
class Request:
    """What a text is served with.

    name: the adapter; None for the base model alone, which is also named where a text has no token
    to predict.
    losses: the mean loss per token of the base model ("") and of each adapter of the shortlist.
    weights: their posterior by the whole text, from equal priors, which sums to 1.
    """

    name: str | None
    losses: dict[str, float]
    weights: dict[str, float]


def route(
    directory: str,
    texts: str,
    output: str,
    reading: Reading,
    *,
    only: Sequence[str] = (),
    shortlist: int = SHORTLIST,
    serve_map: str | None = None,
    max_samples: int | None = None,
    batch_size: int = 8,
) -> list[Request]:
    """Names an adapter for each text, and writes `output`, a line of JSON per text.

    Args:
        directory: the library's.
        texts: `SOURCE[:SPLIT]`.
        only: the adapters to choose from; all if there is none.
        shortlist: the number of adapters that read a text.
        serve_map: a JSON file to write with what vLLM and LoRAX take of each adapter that is named.
        max_samples: the first so many rows; all if None.
        batch_size: rows at a time.

    `UserError` for texts that cannot be read, for outputs that exist, and for an adapter without a
    centroid where there are more than the shortlist has.
    """
    for path in (output, serve_map):
        if path is not None:
            check_new_file(Path(path).expanduser())
    library = Library.open(directory)
    for name in only:
        library.check_name(name)
    names = list(only or library.entries)
    if not names:
        raise UserError(f"{directory} has no adapter")
    base = Base(library.base, reading)
    rows = base.read(texts, max_samples)
    counts = Texts.of(texts, "all", rows, is_encoder_decoder=False).counts
    centroids = read_centroids(library, names) if len(names) > shortlist else None

    model = base.model()
    if centroids is None:
        candidates = torch.arange(len(names)).expand(len(rows), -1)
    else:
        of_texts = embeddings(model, rows, base.pad_token_id, batch_size)
        candidates = nearest(of_texts, centroids, shortlist)
    # Whether files are those that were added is looked up for adapters that read a text: to read
    # the files of all would take longer with every adapter of the library.
    experts = library.experts(tuple(names[number] for number in candidates.unique().tolist()))
    subjects = {name: one_expert(name, path) for name, path in experts.items()}
    in_order = [subjects.get(name) for name in names]
    scores = _scores(
        model, in_order, rows, counts, candidates, base.pad_token_id, batch_size, reading.quiet
    )
    requests = [_request(names, own, count) for own, count in zip(scores, counts, strict=True)]
    with new_file(Path(output).expanduser()) as partial:
        lines = [_line(number, request) for number, request in enumerate(requests)]
        partial.write_text("".join(lines), encoding="utf-8")
    if serve_map is not None:
        with new_file(Path(serve_map).expanduser()) as partial:
            content = _served(library, experts, requests)
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return requests


def _scores(
    model: Any,
    subjects: Sequence[Subject | None],
    rows: Dataset,
    counts: Sequence[int],
    candidates: Tensor,
    pad_token_id: int,
    batch_size: int,
    quiet: bool,
) -> Tensor:
    """(texts, adapters + 1): the log-probability of each text, the base model's last, and minus
    infinity where an adapter is not in its shortlist.

    Each adapter is put on once and reads its texts together. `subjects` are None where no text has
    the adapter in its shortlist.
    """
    scores = torch.full((len(rows), len(subjects) + 1), float("-inf"), dtype=torch.float64)
    passes = candidates.numel() + len(rows)
    with tqdm(total=passes, unit="rows", disable=quiet) as bar:
        for number, subject in enumerate([*subjects, base_alone()]):
            is_base = number == len(subjects)
            in_shortlist = (candidates == number).any(dim=1)
            places = list(range(len(rows))) if is_base else in_shortlist.nonzero()[:, 0].tolist()
            if subject is None or not places:
                continue
            on = subject.put_on(model).eval()
            measured = measure(on, rows.select(places), pad_token_id, batch_size, bar)
            values = measured.log_probabilities.double()
            if not torch.isfinite(values).all():
                raise UserError(f"{subject.name} gives a log-probability that is NaN or infinite")
            of_rows = values.split([counts[place] for place in places])
            for place, value in zip(places, of_rows, strict=True):
                scores[place, number] = value.sum()
            if not is_base:
                model = on.unload()
    return scores


def _request(names: Sequence[str], scores: Tensor, count: int) -> Request:
    """What a text of `count` scored tokens is served with, by its scores (adapters + 1,)."""
    called = [*names, ""]
    posterior = torch.softmax(scores, dim=0)
    losses = {}
    weights = {}
    for number, score in enumerate(scores.tolist()):
        if score > float("-inf"):  # else the adapter has not read the text
            losses[called[number]] = -score / max(count, 1)
            weights[called[number]] = posterior[number].item()
    best = called[int(scores.argmax())] if count else ""
    return Request(best or None, losses, weights)


def _line(number: int, request: Request) -> str:
    values = {
        "row": number,
        "name": request.name,
        "losses": request.losses,
        "weights": request.weights,
    }
    return json.dumps(values, allow_nan=False) + "\n"


def _served(
    library: Library, experts: dict[str, str], requests: Sequence[Request]
) -> dict[str, Any]:
    """What servers take of each adapter that is named.

    vllm: a list for `--lora-modules`, whose names are a request's `model`, and the least
    `--max-lora-rank`. lorax: the `parameters` of a request, by name.
    """
    named = {request.name for request in requests} - {None}
    used = [name for name in experts if name in named]
    modules = []
    parameters = {}
    for name in used:
        entry = library.entries[name]
        modules.append({"name": name, "path": experts[name], "base_model_name": library.base})
        parameters[name] = {
            "adapter_id": experts[name],
            "adapter_source": "local" if entry.revision is None else "hub",
        }
    highest = max((max(library.entries[name].ranks) for name in used), default=0)
    return {"vllm": {"lora_modules": modules, "max_lora_rank": highest}, "lorax": parameters}
