"""Linear CKA of two models, layer by layer (Kornblith et al., 2019; CAEM-MoE 5.2, figures 2 and 4).

Both models read the same texts. What is compared is the output of each layer, encoder and decoder
apart, at every token that is not padding. Nothing is kept of a token but sums: three matrices of
(features, features) for each pair of layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from _mergekit_moe_ext_common.data import (
    collate,
    decoder_inputs,
    load,
    parse_sources,
    real_tokens,
    tokenise,
)
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.figures import check_new_figure, heat_map, pyplot
from _mergekit_moe_ext_common.loading import (
    load_config,
    load_model,
    load_tokenizer,
    padding_token,
    silence,
    vocabulary_of,
)
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.merging.layers import checkpointed_layers
from mergekit_moe_ext.mixtures.routers import routes_sequences, stack_of, tokens_routed_by

FEWEST_SAMPLES = 4  # of a batch that has an unbiased estimate


class LinearCKA:
    """Linear CKA of two sets of features of the same samples, which come in batches.

    Without `unbiased` the result is that of all samples at once, whatever the batches. With it,
    each batch has an unbiased estimate of the three HSIC, of which the means are taken (Nguyen et
    al., 2021): it does not grow with the number of features, and needs batches of 4 samples or
    more.
    """

    def __init__(self, *, unbiased: bool = False) -> None:
        self._unbiased = unbiased
        self._samples = 0
        self._sums: dict[str, Tensor] = {}
        self._origins: tuple[Tensor, Tensor] | None = None

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add a batch: features of shape (samples, features) of each model, in the same order."""
        if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
            raise ValueError(
                "features are (samples, features) of the same samples, not "
                f"{tuple(first.shape)} and {tuple(second.shape)}"
            )
        first = first.detach().double()
        second = second.detach().double()
        if not len(first):
            return
        # A shift does not matter. By that of the first sample, features that are all alike are
        # exactly 0, and not what rounding leaves of them.
        if self._origins is None:
            self._origins = (first[0], second[0])
        first = first - self._origins[0]
        second = second - self._origins[1]
        if self._unbiased:
            self._add("first", _unbiased_hsic(first, first))
            self._add("second", _unbiased_hsic(second, second))
            self._add("both", _unbiased_hsic(first, second))
            return
        self._samples += len(first)
        self._add("first", first.T @ first)
        self._add("second", second.T @ second)
        self._add("both", first.T @ second)
        self._add("first mean", first.sum(dim=0))
        self._add("second mean", second.sum(dim=0))

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def value(self) -> float:
        """The CKA of all batches so far; NaN where the features of a model are all alike."""
        if not self._sums:
            raise ValueError("there are no samples to compare")
        if self._unbiased:
            own = self._sums["first"] * self._sums["second"]
            return float(self._sums["both"] / own.sqrt())
        # HSIC with linear kernels is the squared norm of the covariance, up to a factor that
        # cancels.
        first = self._covariance("first", "first mean", "first mean").norm()
        second = self._covariance("second", "second mean", "second mean").norm()
        both = self._covariance("both", "first mean", "second mean").norm() ** 2
        return float(both / (first * second))

    def _covariance(self, products: str, first: str, second: str) -> Tensor:
        """The sum of the products of centred features, (features, features)."""
        means = torch.outer(self._sums[first], self._sums[second]) / self._samples
        return self._sums[products] - means


def _unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """The unbiased estimate of HSIC with linear kernels (Song et al., 2012, equation 5), a scalar.

    first, second: features of the same n samples, (n, features). No matrix of (n, n) is made: with
    the diagonal of a kernel left out, sums over it are those over all of it less the diagonal's.
    """
    number = len(first)
    if number < FEWEST_SAMPLES:
        raise UserError(f"unbiased: batches have {FEWEST_SAMPLES} tokens or more, not {number}")
    first_diagonal = (first * first).sum(dim=1)
    second_diagonal = (second * second).sum(dim=1)
    # Of both kernels, without the diagonal: the trace of their product, and the sums of the rows.
    trace = (first.T @ second).square().sum() - (first_diagonal * second_diagonal).sum()
    first_rows = first @ first.sum(dim=0) - first_diagonal
    second_rows = second @ second.sum(dim=0) - second_diagonal
    of_means = first_rows.sum() * second_rows.sum() / ((number - 1) * (number - 2))
    of_rows = 2 * (first_rows * second_rows).sum() / (number - 2)
    return (trace + of_means - of_rows) / (number * (number - 3))


@dataclass(frozen=True)
class LayerSimilarity:
    """The CKA of the layers of two models, by stack (`encoder`, `decoder`): a row per layer of the
    first model and a column per layer of the second. NaN stands for layers that were not compared.
    """

    stacks: Mapping[str, tuple[tuple[float, ...], ...]]

    def same_layers(self, stack: str) -> list[float]:
        """The CKA of each layer of a stack with that at its place in the other model."""
        return [row[layer] for layer, row in enumerate(self.stacks[stack]) if layer < len(row)]


@torch.no_grad()
def cka(
    model_a: str | Path,
    model_b: str | Path,
    texts: Sequence[str],
    *,
    reading: Reading | None = None,
    max_samples: int | None = None,
    batch_size: int = 8,
    all_pairs: bool = False,
    unbiased: bool = False,
) -> LayerSimilarity:
    """The linear CKA of the layers of two models on texts.

    Args:
        model_a: a directory, or a name on the Hub.
        model_b: the same. Its tokenizer must make the same tokens.
        texts: `[NAME=]SOURCE[:SPLIT]`, each a file, a directory or a dataset on the Hub, with a
            column `text`, or `input` and `target` for encoder-decoders.
        reading: how texts are read; `Reading(quiet=True)` if None.
        max_samples: the number of rows of each source, from the first on; all if None.
        batch_size: the number of rows at a time.
        all_pairs: whether each layer is compared with each, and not only with that at its place.
        unbiased: whether the estimate is the unbiased one of minibatches.

    Layers of different widths can be compared. `UserError` for models that do not read the same
    tokens, or are not of one kind.

    >>> cka("merged", "baseline", ["news.jsonl"]).same_layers("decoder")
    """
    reading = reading or Reading(quiet=True)
    silence(reading)
    paths = [str(model_a), str(model_b)]
    configs = [load_config(path, reading) for path in paths]
    is_pair = configs[0].is_encoder_decoder
    if is_pair != configs[1].is_encoder_decoder:
        raise UserError("cka: one of the two is an encoder-decoder, and the other is none")
    if any(routes_sequences(config) for config in configs):
        raise UserError("cka: the layers of a sequence MoE's experts have no order among them")
    tokenizers = [load_tokenizer(path, reading) for path in paths]
    rows_of_models = [
        list(_rows(texts, tokenizer, config, reading, max_samples))
        for tokenizer, config in zip(tokenizers, configs, strict=True)
    ]
    rows = rows_of_models[0]
    if rows != rows_of_models[1]:
        raise UserError(f"cka: the tokenizers of {paths[0]} and {paths[1]} make different tokens")
    if unbiased:
        _check_batches(rows, batch_size)
    first = load_model(paths[0], configs[0], reading, dtype="auto").eval()
    second = load_model(paths[1], configs[1], reading, dtype="auto").eval()
    pad_token_id = padding_token(tokenizers[0], vocabulary_of(configs[0]))
    comparisons: dict[tuple[str, int, int], LinearCKA] = {}
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="comparing layers", disable=reading.quiet):
        batch = collate(rows[start : start + batch_size], pad_token_id)
        features = _features(first, batch)
        others = _features(second, batch)
        for stack, row, column in _compared(features, others, all_pairs):
            place = (stack, row, column)
            comparison = comparisons.setdefault(place, LinearCKA(unbiased=unbiased))
            comparison.update(features[stack][row], others[stack][column])
    return _similarity(comparisons, features, others)


def _rows(
    texts: Sequence[str], tokenizer: Any, config: Any, reading: Reading, max_samples: int | None
) -> Iterator[dict[str, list[int]]]:
    """The rows of all sources as token ids."""
    for source in parse_sources(texts):
        yield from tokenise(
            load(source, max_samples),
            source,
            tokenizer,
            columns=reading.columns,
            max_length=reading.max_length,
            vocabulary=vocabulary_of(config),
            encoder_decoder=config.is_encoder_decoder,
        )


def _check_batches(rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int) -> None:
    """`UserError` for a batch with too few tokens for an unbiased estimate, mostly the last one."""
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        # An encoder-decoder's labels are the tokens of its decoder.
        for name in batch[0]:
            tokens = sum(len(row[name]) for row in batch)
            if tokens < FEWEST_SAMPLES:
                raise UserError(
                    f"cka: the rows from {start} on are a batch of {tokens} tokens, and unbiased "
                    f"needs {FEWEST_SAMPLES} or more: take another batch_size or max_samples"
                )


def _features(model: Any, batch: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The outputs of all layers, by stack: (real tokens, features) each.

    A stack that is not said to be an encoder is the decoder.
    """
    real = real_tokens(batch)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if "labels" in inputs:
        inputs["decoder_input_ids"] = decoder_inputs(model, inputs.pop("labels"))
    features: dict[str, list[Tensor]] = {}
    with _layer_outputs(model) as outputs:
        model(**inputs, use_cache=False)
    for name, output in outputs.items():
        is_real = tokens_routed_by(name, real).to(output.device)
        of_tokens = output.flatten(0, 1)[is_real]
        features.setdefault(stack_of(name) or "decoder", []).append(of_tokens.cpu())
    return features


@contextmanager
def _layer_outputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """A context with what each layer returns, (texts, length, features), by the layer's name."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_layer: Any, _inputs: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return keep

    layers = checkpointed_layers(model)
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield outputs
    finally:
        for each in hooks:
            each.remove()


def _compared(
    first: Mapping[str, Sequence[Tensor]], second: Mapping[str, Sequence[Tensor]], all_pairs: bool
) -> Iterator[tuple[str, int, int]]:
    """What is compared: a stack, and the places of a layer in the first and the second model."""
    for stack, layers in first.items():
        for row in range(len(layers)):
            for column in range(len(second[stack])):
                if all_pairs or row == column:
                    yield stack, row, column


def _similarity(
    comparisons: Mapping[tuple[str, int, int], LinearCKA],
    first: Mapping[str, Sequence[Tensor]],
    second: Mapping[str, Sequence[Tensor]],
) -> LayerSimilarity:
    stacks = {}
    for stack, layers in first.items():
        rows = []
        for row in range(len(layers)):
            values = []
            for column in range(len(second[stack])):
                comparison = comparisons.get((stack, row, column))
                values.append(comparison.value() if comparison else float("nan"))
            rows.append(tuple(values))
        stacks[stack] = tuple(rows)
    return LayerSimilarity(stacks)


def plot_layers(similarities: Mapping[str, LayerSimilarity], path: Path) -> None:
    """Draw a line per pair of models, by the names to write beside them: the CKA of layers at the
    same place (figures 2 and 4 of CAEM-MoE). `UserError` where the figure cannot be written.
    """
    check_new_figure(path)
    stacks = list(next(iter(similarities.values())).stacks)
    figure, panels = pyplot().subplots(
        1, len(stacks), squeeze=False, sharey=True, figsize=(4.5 * len(stacks), 3.2)
    )
    for stack, axes in zip(stacks, panels[0], strict=True):
        for name, similarity in similarities.items():
            axes.plot(similarity.same_layers(stack), marker="o", markersize=3, label=name)
        axes.set_title(stack)
        axes.set_xlabel("layer")
    panels[0][0].set_ylabel("linear CKA")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def plot_pairs(similarity: LayerSimilarity, path: Path) -> None:
    """Draw a heat map per stack: a row per layer of the first model, a column per layer of the
    second. `UserError` where the figure cannot be written.
    """
    check_new_figure(path)
    figure, panels = pyplot().subplots(
        1, len(similarity.stacks), squeeze=False, figsize=(4 * len(similarity.stacks), 3.4)
    )
    for (stack, rows), axes in zip(similarity.stacks.items(), panels[0], strict=True):
        image = heat_map(axes, rows, 1.0)
        axes.set_title(stack)
        axes.set_xlabel("layer of the second model")
        axes.set_ylabel("layer of the first model")
    figure.colorbar(image, ax=list(panels[0]), label="linear CKA")
    figure.savefig(path, dpi=150, bbox_inches="tight")
