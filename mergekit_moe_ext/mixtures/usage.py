"""Expert usage: how often each expert of each layer was chosen on some data, counted once and kept
in a file.

Every token counts that is no padding, in every MoE layer, encoder and decoder apart. What is
counted is what the router chose. Switch Transformers then drops a token whose expert is full; how
many it drops is counted beside, and `dispatched` counts only what it does not drop. In a sequence
MoE every text counts, once, with the coefficients that its first `routing_tokens` tokens lead to.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, PretrainedConfig

from _mergekit_moe_ext_common.checkpoints import Stored, first_line
from _mergekit_moe_ext_common.data import (
    Source,
    collate,
    decoder_inputs,
    fingerprint,
    load,
    parse_sources,
    real_tokens,
    tokenise,
)
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import (
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    padding_token,
    silence,
    vocabulary_of,
)
from _mergekit_moe_ext_common.options import Columns, Reading
from _mergekit_moe_ext_common.positions import check_positions
from _mergekit_moe_ext_common.staging import new_file
from _mergekit_moe_ext_common.token_page import ShownTexts
from mergekit_moe_ext.merging.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.merging.manifest import hub_state
from mergekit_moe_ext.merging.wrappers import language_config, language_model
from mergekit_moe_ext.mixtures.experts import experts_per_token
from mergekit_moe_ext.mixtures.routers import (
    PER_SEQUENCE,
    Choice,
    coefficients_of_sequences,
    recorded,
    router_names,
    routes_sequences,
    tokens_routed_by,
)
from mergekit_moe_ext.mixtures.shown import show_sequences, show_tokens
from mergekit_moe_ext.modeling import find_architecture
from mergekit_moe_ext.recipes import Counted

# Of one router, by the names of LayerUsage's fields: `tokens`, `counts`, `weights`, and `dropped`
# where it has an expert capacity.
Sums = dict[str, torch.Tensor]


class LayerUsage(BaseModel):
    """One router's choices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: NonNegativeInt  # that passed the router; texts, in a sequence MoE
    # How often each expert was chosen, or had a token dispatched to it.
    counts: list[NonNegativeInt]
    weights: list[NonNegativeFloat]  # the sum of the weights with which each was
    # How often each was chosen when it was full; None for a router without an expert capacity.
    dropped: list[NonNegativeInt] | None = None


class TaskUsage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    fingerprint: str  # sha256 of the token ids
    samples: int
    # By the router's name in the model, in order; a sequence MoE has one, `sequence`.
    layers: dict[str, LayerUsage]


class Usage(BaseModel):
    """The content of a usage file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mergekit-moe-ext usage 1"] = "mergekit-moe-ext usage 1"
    model: str
    checkpoint: str  # its fingerprint: tells fine-tunes of one model apart, and knows a renamed one
    architecture: str
    experts_per_token: int
    # Files of earlier versions do not say: they counted what was dispatched.
    count: Counted = "dispatched"
    tasks: dict[str, TaskUsage]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. `UserError` where it cannot be written."""
        with new_file(path) as partial:
            partial.write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")


def read_usage(path: Path) -> Usage:
    """`UserError` for a file that is none, or that counted nothing."""
    try:
        usage = Usage.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the usage file {path}: {error.strerror}") from error
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        reason = first_line(error)
        if isinstance(error, pydantic.ValidationError):
            first = error.errors(include_url=False)[0]
            reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise UserError(
            f"{path} is no usage file of this version ({reason}); "
            "`mergekit-moe-ext usage MODEL --data SOURCE -o FILE` makes one"
        ) from error
    for name, task in usage.tasks.items():
        if any(layer.tokens == 0 for layer in task.layers.values()) or not task.layers:
            raise UserError(f"{path} counted nothing for the task {name!r}")
    if not usage.tasks:
        raise UserError(f"{path} counted nothing")
    return usage


@torch.inference_mode()
def _usage_of_source(
    model: Any,
    data: Dataset,
    source: Source,
    *,
    count: Counted,
    pad_token_id: int,
    batch_size: int,
    accelerator: Accelerator,
    quiet: bool,
    shown: ShownTexts | None = None,
) -> TaskUsage:
    """Run the model over tokenised `data` and count. Under `accelerate launch` each process takes
    its part. The first texts of this process go to `shown`.
    """
    model.eval()
    with accelerator.split_between_processes(list(range(len(data)))) as mine:
        rows = data.select(mine)
    starts = range(0, len(rows), batch_size)
    bar = tqdm(
        starts, desc=source.name, unit="batch", disable=quiet or not accelerator.is_main_process
    )

    def batch_from(start: int) -> dict[str, torch.Tensor]:
        end = min(start + batch_size, len(rows))
        return collate([rows[index] for index in range(start, end)], pad_token_id)

    batches = map(batch_from, bar)
    if routes_sequences(model.config):
        of_batches = _sums_of_sequences(model, batches, source.name, shown)
    else:
        of_batches = _sums_of_tokens(model, batches, count, source.name, shown)
    sums: dict[str, Sums] = {}
    for name, of_batch in of_batches:
        sums[name] = _added([sums[name], of_batch]) if name in sums else of_batch
    return TaskUsage(
        data=str(source),
        fingerprint=fingerprint(data),
        samples=len(data),
        layers=_reduced(sums, model, accelerator),
    )


def _sums_of_tokens(
    model: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    count: Counted,
    task: str,
    shown: ShownTexts | None,
) -> Iterator[tuple[str, Sums]]:
    """The name of each router and its sums, once for every batch. `shown` gets the first texts."""
    with recorded(model) as choices:
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            real = real_tokens(batch)
            targets = batch.get("labels")
            if "labels" in batch:
                batch["decoder_input_ids"] = decoder_inputs(model, batch.pop("labels"))
                model(**batch, use_cache=False)
            else:
                # Without the head, whose logits nobody looks at.
                language_model(model).base_model(**batch, use_cache=False)
            for name, choice in choices.items():
                _check_scores(name, choice.logits, choice.weights)
                yield name, _sums_of_choice(choice, tokens_routed_by(name, real), count)
            if shown is not None and shown.has_room(task):
                show_tokens(shown, task, choices, batch["input_ids"], targets, real)


def _sums_of_choice(choice: Choice, real: torch.Tensor, count: Counted) -> Sums:
    """The sums of one router's choices for the tokens (tokens,) that are `real`."""
    real = real.to(choice.experts.device)
    num_experts = choice.logits.shape[-1]
    experts = choice.experts[real]
    weights = choice.weights[real]
    if choice.dropped is None:
        return _sums(experts, weights, num_experts)
    dropped = choice.dropped[real]
    counted = experts.masked_fill(dropped, -1) if count == "dispatched" else experts
    sums = _sums(counted, weights, num_experts)
    sums["dropped"] = torch.bincount(experts[dropped].cpu(), minlength=num_experts)
    return sums


def _sums_of_sequences(
    model: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    task: str,
    shown: ShownTexts | None,
) -> Iterator[tuple[str, Sums]]:
    """The sums of the mixture's one router, once for every batch. A row is a text. `shown` gets the
    first texts.
    """
    for batch in batches:
        weights = coefficients_of_sequences(
            model, {name: tensor.to(model.device) for name, tensor in batch.items()}
        )
        _check_scores(PER_SEQUENCE, weights)
        number = weights.shape[-1]
        experts = torch.arange(number, device=weights.device).expand_as(weights)
        yield PER_SEQUENCE, _sums(experts.masked_fill(weights == 0, -1), weights, number)
        if shown is not None and shown.has_room(task):
            is_real = batch["attention_mask"].bool()
            show_sequences(shown, task, batch["input_ids"], is_real, weights)


def _check_scores(router: str, *scores: torch.Tensor) -> None:
    """`UserError` where a router's scores are no numbers: the largest of them mean nothing."""
    if any(each.isnan().any() for each in scores):
        raise UserError(
            f"the scores of the router {router} are NaN on these texts, though no weight of the "
            "model is: load it in a wider dtype (`dtype` in config.json)"
        )


def _sums(experts: torch.Tensor, weights: torch.Tensor, num_experts: int) -> Sums:
    """The sums of experts (tokens, k), of which -1 is none, and their weights; on the CPU."""
    is_expert = experts >= 0
    indices = experts[is_expert].cpu()
    weights = weights[is_expert].cpu().double()
    return {
        "tokens": torch.tensor(len(experts)),
        "counts": torch.bincount(indices, minlength=num_experts),
        "weights": torch.zeros(num_experts, dtype=torch.float64).index_add_(0, indices, weights),
    }


def _added(parts: Sequence[Sums]) -> Sums:
    """The sums of several parts of the data, all of one router."""
    total = {}
    for key in parts[0]:
        of_parts = [part[key] for part in parts]
        total[key] = torch.stack(of_parts).sum(dim=0)
    return total


def _reduced(
    sums: Mapping[str, Sums], model: Any, accelerator: Accelerator
) -> dict[str, LayerUsage]:
    """The sums of all processes. A process without rows has none of its own."""
    of_processes = gather_object([sums])
    layers = {}
    for name in router_names(model):
        total = _added([process[name] for process in of_processes if name in process])
        layers[name] = LayerUsage.model_validate(
            {key: tensor.tolist() for key, tensor in total.items()}
        )
    return layers


def routing_probability(task: TaskUsage) -> list[float]:
    """Per expert the weight that a token gives it, averaged over layers and tokens: MergeME's
    figure 5.

    Of a sequence MoE the mean coefficient over texts: its table 2 and figures 6, 8 and 9.

    The paper says "routing probability averaged from each layer and token". We take the weights
    with which experts are combined, softmax after top-k, which sum to one per token in most
    families. Layers must have equally many experts.
    """
    per_layer = []
    for layer in task.layers.values():
        per_layer.append([weight / layer.tokens for weight in layer.weights])
    return [sum(values) / len(per_layer) for values in zip(*per_layer, strict=True)]


def share_of_choices(layer: LayerUsage) -> list[float]:
    """Per expert its share of all choices of this layer; zeros if there were none."""
    total = sum(layer.counts) or 1
    return [number / total for number in layer.counts]


def share_dropped(layers: Iterable[LayerUsage], count: Counted) -> float | None:
    """The share of all choices in these layers whose expert was full; None where routers have no
    expert capacity, and in a file of an earlier version.
    """
    counted = 0
    dropped = 0
    for layer in layers:
        if layer.dropped is None:
            return None
        counted += sum(layer.counts)
        dropped += sum(layer.dropped)
    chosen = counted + dropped if count == "dispatched" else counted
    return dropped / chosen


def table(usage: Usage) -> str:
    """A line per task and a column per expert: the routing probability, the highest marked. Below,
    where routers have an expert capacity, the share of choices that each task lost to it.
    """
    rows = {name: routing_probability(task) for name, task in usage.tasks.items()}
    text = format_table([f"expert {i}" for i in range(len(next(iter(rows.values()))))], rows)
    shares = []
    for name, task in usage.tasks.items():
        share = share_dropped(task.layers.values(), usage.count)
        if share is not None:
            shares.append(f"{name} {share:.1%}")
    if not shares:
        return text
    return f"{text}\ncounted: {usage.count}; dropped by the expert capacity: {', '.join(shares)}"


def format_table(columns: Sequence[str], rows: Mapping[str, Sequence[float]]) -> str:
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{column:>11}" for column in columns)]
    for name, values in rows.items():
        cells = [f"{value:.3f}" + ("*" if value == max(values) else " ") for value in values]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells).rstrip())
    return "\n".join(lines)


@dataclass(frozen=True)
class Texts:
    """What usage is counted on, tokenised for a model, whose tensors were checked."""

    headers: Mapping[str, Stored]
    tokenizer: Any
    by_source: Mapping[Source, Dataset]


def read_texts(
    model_path: str,
    data: Sequence[str],
    reading: Reading,
    max_samples: int | None = None,
    *,
    columns: Columns | None = None,
    tokenizer_path: str | None = None,
) -> Texts:
    """`data` as `--data` names it. `UserError` for what cannot be read, the model included.

    columns: the columns that are read, in place of those of `reading`.
    tokenizer_path: the model whose tokenizer is used; by default this model.
    """
    silence(reading)
    config = load_config(model_path, reading)
    headers = check_model(model_path, config, reading, architecture=_auto_class(config))
    _check_mixture(config)
    tokenizer = load_tokenizer(tokenizer_path or model_path, reading)
    by_source = {
        source: tokenise(
            load(source, max_samples),
            source,
            tokenizer,
            columns=columns or reading.columns,
            max_length=reading.max_length,
            vocabulary=vocabulary_of(config),
            encoder_decoder=config.is_encoder_decoder,
        )
        for source in parse_sources(data)
    }
    return Texts(headers, tokenizer, by_source)


def _auto_class(config: PretrainedConfig) -> Any:
    """The class with which a model is loaded; None for that of decoders and encoder-decoders.

    A multimodal model is loaded whole, so that its routers have the names that a merge knows.
    """
    is_multimodal = language_config(config) is not config
    if is_multimodal and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return None


def _check_mixture(config: PretrainedConfig) -> None:
    """`UserError`, before any text is read, for a model whose experts could not be counted."""
    architecture = (config.architectures or [""])[0]
    # Of an architecture that comes with the model nothing is known before it is loaded.
    if hasattr(transformers, architecture) or find_architecture(architecture):
        model, _ = hub_state(config)
        router_names(model)
        experts_per_token(config)


def count_usage(
    model_path: str,
    texts: Texts,
    reading: Reading,
    *,
    count: Counted = "chosen",
    batch_size: int = 8,
    device: str = "auto",
    shown: ShownTexts | None = None,
) -> Usage | None:
    """The usage of a model on each of the sources. None in all but the main process. The first
    texts of this process go to `shown`.

    Where there are several processes, their group is gone afterwards.
    """
    silence(reading)
    config = load_config(model_path, reading)
    checkpoint = checkpoint_fingerprint(ModelReference.model_validate(model_path), MergeOptions())
    accelerator = Accelerator(cpu=device == "cpu")
    spread = (
        device == "auto" and accelerator.num_processes == 1 and accelerator.device.type != "cpu"
    )
    device_map = "auto" if spread else None
    model = load_model(
        model_path,
        config,
        reading,
        architecture=_auto_class(config),
        headers=texts.headers,
        dtype="auto",
        device_map=device_map,
    )
    router_names(model)  # is it a mixture of experts?
    check_positions(model, texts.by_source, reading.max_length)
    if not spread:
        model.to(accelerator.device if device == "auto" else device)
    tasks = {
        source.name: _usage_of_source(
            model,
            tokens,
            source,
            count=count,
            pad_token_id=padding_token(texts.tokenizer, vocabulary_of(config)),
            batch_size=batch_size,
            accelerator=accelerator,
            quiet=reading.quiet,
            shown=shown,
        )
        for source, tokens in texts.by_source.items()
    }
    is_main = accelerator.is_main_process
    accelerator.end_training()
    if not is_main:
        return None
    return Usage(
        model=model_path,
        checkpoint=checkpoint,
        architecture=type(model).__name__,
        experts_per_token=experts_per_token(config),
        count=count,
        tasks=tasks,
    )
