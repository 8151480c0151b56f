"""Models some of whose linear modules are the base's weights plus a routed sum of task vectors (WEMoE and E-WEMoE).

`WEMoE<X>` is made of transformers' `<X>` when it is asked for: the same class, the same names, with those linear
modules swapped and a router for each group of them. By linearity (W + sum of c_i T_i) x is either one product with
merged weights or a sum of products; which is cheaper depends on how many tokens share a set of coefficients.
Or every parameter has constants of its own (AdaMerging), and is merged whenever a forward pass reads it.

A model that does not generate has one set of coefficients per sample, the mean over its tokens. One that does takes
the mean over a prefix (`frozen`: the prompt in `generate`, else the first `routing_tokens` tokens; labels among them
are left out of the loss) or, at every position, over what is there up to it (`running`).
"""

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .configuration_wemoe import Ensembling, config_class, vectors_of
from .host_cache import begin_sequences, cache_in, generating, with_cache_renamed

_PREFIX = "WEMoE"
_OUTSIDE = "an ensembled module must be called through its model, which knows about samples and padding"
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds")
# Measured by `benchmarks/wemoe.py` on a CPU.
_MERGING = 8  # so many tokens or more that share a set of coefficients get merged weights
_FEW = 128  # up to so many tokens in all, products with sparse vectors are faster than making these dense
_TILE = 2**20  # elements of merged weights, or of vectors, that are held at the same time: they stay in a cache
_LARGE_TILE = 2**27  # off the CPU (not measured), where launches cost, and in compiled code, where loops are unrolled
_ROWS = 32  # a tile has a multiple of it; products with fewer are slow

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


class Current(threading.local):
    """The forward pass that is running, for every module that takes part; each thread has its own."""

    call: "Call | None" = None
    encoding: "Call | None" = None  # of an encoder that was called on its own
    last: dict[str, Tensor] | None = None  # what the routers gave in the pass before

    def __reduce__(self) -> tuple[Any, ...]:
        return Current, ()


class EnsembledLinear(nn.Module):
    """A linear map whose weight is that of the base plus a weighed sum of task vectors."""

    vectors: Tensor
    values: Tensor
    columns: Tensor
    row_ends: Tensor
    bias_vectors: Tensor

    def __init__(self, base: Any, experts: int, kept: int | None, group: str, current: Current) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.is_transposed = isinstance(base, Conv1D)
        self.kept, self.group, self.current = kept, group, current
        shape, like = self.weight.shape, {"dtype": self.weight.dtype, "device": self.weight.device}
        if kept is None:
            self.register_buffer("vectors", torch.zeros(experts, *shape, **like))
        else:
            index = torch.uint16 if shape[1] <= 2**16 else torch.int32
            self.register_buffer("values", torch.zeros(experts, kept, **like))
            self.register_buffer("columns", torch.zeros(experts, kept, dtype=index, device=like["device"]))
            ends = torch.full((experts, shape[0]), kept, dtype=torch.int32, device=like["device"])
            self.register_buffer("row_ends", ends)
        if self.bias is not None:
            self.register_buffer("bias_vectors", torch.zeros(experts, *self.bias.shape, **like))

    def forward(self, x: Tensor) -> Tensor:
        call = self.current.call
        if call is None:
            raise RuntimeError(_OUTSIDE)
        c = call.values[self.group].to(x.device, self.weight.dtype)
        if self.group in call.keeping:
            if id(self) not in call.carried.merged:
                one = c if c.ndim == 1 else c[0]
                call.carried.merged[id(self)] = self.merged(one), self._merged_bias(one)
            return self._linear(x, *call.carried.merged[id(self)])
        y = self._by_sample(x.reshape(len(c) if c.ndim > 1 else 1, -1, x.shape[-1]), c if c.ndim > 1 else c[None])
        return y.view(*x.shape[:-1], y.shape[-1])  # some decoders flatten samples and tokens (OPT)

    def _by_sample(self, x: Tensor, c: Tensor) -> Tensor:
        """(samples, tokens, in) and (samples, experts) or (samples, tokens, experts) to (samples, tokens, out)"""
        with _without_autocast(x) as kind:
            y = _Product.apply(x.to(kind), c, self.weight, self.is_transposed, *self._stored())
            bias = self._merged_bias(c)
            if bias is not None:
                y += bias if c.ndim == 3 else bias[:, None]
        return y

    def _stored(self) -> tuple[Tensor, ...]:
        return (self.vectors,) if self.kept is None else (self.values, self.columns, self.row_ends)

    def merged(self, c: Tensor) -> Tensor:
        """(experts,) to the weight."""
        return torch.cat([tile[0] for _, _, tile in _merged_tiles(c[None], self.weight, self._stored())])

    def _merged_bias(self, c: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias + c @ self.bias_vectors

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight.T if self.is_transposed else weight, bias)


class _Product(torch.autograd.Function):
    """x (samples, tokens, in) times the weight of each sample or token.

    A tile of the weights at a time is merged and used, in the backward pass once more, so that merged weights are
    never held whole.
    """

    @staticmethod
    def forward(x: Tensor, c: Tensor, weight: Tensor, is_transposed: bool, *stored: Tensor) -> Tensor:
        return _product(x, c, weight, stored, over_rows=is_transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, c, weight, ctx.is_transposed, *stored = inputs
        ctx.save_for_backward(x, c, weight, *stored)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, c, weight, *stored = ctx.saved_tensors
        by_rows, by_columns = (x, gradient) if ctx.is_transposed else (gradient, x)
        of_x = of_c = of_weight = None
        with _without_autocast(x):
            if ctx.needs_input_grad[0]:
                of_x = _product(gradient, c, weight, stored, over_rows=not ctx.is_transposed)
            if ctx.needs_input_grad[1]:
                of_c = _gradient_of_coefficients(by_rows, by_columns, c, weight, stored)
            if ctx.needs_input_grad[2]:
                of_weight = (by_rows.flatten(0, 1).mT @ by_columns.flatten(0, 1)).to(weight.dtype)
        return of_x, of_c, of_weight, None, *[None for _ in stored]


def _product(x: Tensor, c: Tensor, weight: Tensor, stored: Sequence[Tensor], *, over_rows: bool) -> Tensor:
    """x W with the W (rows, columns) of each sample or token; where not `over_rows`, x Wᵀ."""
    if len(stored) > 1 and not over_rows and _is_sparse_faster(x, c):
        return _sparse_product(x, c, weight, *stored)
    if over_rows:  # a sum over tiles
        y = x.new_zeros(*x.shape[:2], weight.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    else:
        y = x.new_empty(*x.shape[:2], weight.shape[0])
    merges = c.ndim == 2 and x.shape[1] >= _MERGING
    for tile, some, product in (_merged_products if merges else _products)(x, c, weight, stored, over_rows):
        if over_rows:
            y[some] += product
        else:
            y[some, :, tile] = product
    return y.to(x.dtype)


Parts = Iterator[tuple[slice, slice, Tensor]]  # of rows, of samples, and what they give


def _merged_products(x: Tensor, c: Tensor, weight: Tensor, stored: Sequence[Tensor], over_rows: bool) -> Parts:
    for tile, some, merged in _merged_tiles(c, weight, stored):
        yield tile, some, _times(x[some, :, tile] if over_rows else x[some], merged, over_rows)


def _products(x: Tensor, c: Tensor, weight: Tensor, stored: Sequence[Tensor], over_rows: bool) -> Parts:
    """One expert after the other."""
    each = c if c.ndim == 3 else c[:, None]
    for tile, part, vectors in _tiles(weight, stored, _rows_of_tile(weight, c.shape[-1])):
        left = x[..., tile] if over_rows else x
        product = _times(left, part, over_rows)
        for index, vector in enumerate(vectors):
            product += each[..., index, None] * _times(left, vector, over_rows)
        yield tile, slice(None), product


def _times(x: Tensor, weight: Tensor, over_rows: bool) -> Tensor:
    weight = weight.to(x.dtype)
    return x @ (weight if over_rows else weight.mT)


def _merged_tiles(c: Tensor, weight: Tensor, stored: Sequence[Tensor]) -> Parts:
    """(samples, experts) to weights (samples, rows, columns), some at a time."""
    if len(c) == 1 and len(stored) > 1:
        values, *places = stored
        for tile, part, vectors in _tiles(weight, (c.T * values, *places), _rows_of_tile(weight, 1), is_sum=True):
            yield tile, slice(None), part + vectors
        return
    samples = _samples_of_tile(weight, len(c))
    for tile, part, vectors in _tiles(weight, stored, _rows_of_tile(weight, max(samples, c.shape[1]))):
        for some in _slices(len(c), samples):
            merged = torch.addmm(part.flatten(), c[some], vectors.flatten(1))
            yield tile, some, merged.unflatten(-1, part.shape)


def _gradient_of_coefficients(
    by_rows: Tensor, by_columns: Tensor, c: Tensor, weight: Tensor, stored: Sequence[Tensor]
) -> Tensor:
    """Of a weight's input and the gradient of its output, that along its rows and that along its columns."""
    total = torch.zeros_like(c, dtype=torch.promote_types(c.dtype, torch.float32))
    samples = _samples_of_tile(weight, len(c))
    for tile, _, vectors in _tiles(weight, stored, _rows_of_tile(weight, max(samples, c.shape[-1]))):
        if c.ndim == 3:
            for index, vector in enumerate(vectors):
                total[..., index] += (_times(by_columns, vector, False) * by_rows[..., tile]).sum(-1)
            continue
        for some in _slices(len(c), samples):
            of_weights = by_rows[some, :, tile].mT @ by_columns[some]
            total[some] += of_weights.flatten(1).to(vectors.dtype) @ vectors.flatten(1).mT
    return total.to(c.dtype)


def _tile_size(weight: Tensor) -> int:
    return _TILE if weight.device.type == "cpu" and not torch.compiler.is_compiling() else _LARGE_TILE


def _samples_of_tile(weight: Tensor, samples: int) -> int:
    """How many samples' weights are merged at the same time; about the same number each time."""
    most = max(1, _tile_size(weight) // (_ROWS * weight.shape[1]))
    return max(1, -(-samples // -(-samples // most))) if samples else 1


def _rows_of_tile(weight: Tensor, held: int) -> int:
    blocks = _tile_size(weight) // (held * weight.shape[1] * _ROWS)
    return min(max(1, blocks) * _ROWS, weight.shape[0])


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _tiles(
    weight: Tensor, stored: Sequence[Tensor], rows: int, *, is_sum: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows at a time: which, those of the weight, and of the vectors, dense (experts, rows, columns).

    With `is_sum`, of sparse vectors alone: of their sum (1, rows, columns).
    """
    slices = _slices(weight.shape[0], rows)
    if len(stored) == 1:
        for tile in slices:
            yield tile, weight[tile], stored[0][:, tile]
        return
    values, columns, row_ends = stored
    counts = torch.diff(row_ends, prepend=row_ends.new_zeros(len(row_ends), 1), dim=1)
    starts = torch.arange(len(weight), dtype=torch.int32, device=weight.device) % rows * weight.shape[1]
    places = starts.repeat(len(values)).repeat_interleave(counts.flatten(), output_size=columns.numel())
    places = places.view(columns.shape)
    places += columns.int()
    inner = row_ends[:, rows - 1 : -1 : rows].tolist() if len(slices) > 1 else [[] for _ in values]
    edges = [[0, *ends, values.shape[1]] for ends in inner]
    for number, tile in enumerate(slices):
        part = weight[tile]
        vectors = values.new_zeros(1 if is_sum else len(values), part.numel())
        for index, (first, last) in enumerate((each[number], each[number + 1]) for each in edges):
            vectors[0 if is_sum else index].index_add_(0, places[index, first:last], values[index, first:last])
        yield tile, part, vectors.unflatten(1, part.shape)


def _is_sparse_faster(x: Tensor, c: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not torch.backends.mkl.is_available():
        return False
    return c.ndim == 3 or x.shape[1] < _MERGING or len(x) * x.shape[1] <= _FEW


def _sparse_product(x: Tensor, c: Tensor, weight: Tensor, values: Tensor, columns: Tensor, row_ends: Tensor) -> Tensor:
    """x Wᵀ by products with all vectors as one sparse matrix (experts * rows, columns)."""
    kind = torch.promote_types(x.dtype, torch.float32)  # MKL knows no other
    experts, kept = values.shape
    rows, width = weight.shape
    columns = columns.flatten().int()
    least, most = torch.aminmax(columns) if columns.numel() else (0, 0)
    counts = torch.diff(row_ends, prepend=row_ends.new_zeros(experts, 1), dim=1)
    if least < 0 or most >= width or (counts < 0).any() or (row_ends[:, -1] != kept).any():
        raise ValueError("sparse task vectors whose columns or row ends lie outside of the weight")  # MKL would crash
    ends = row_ends + kept * torch.arange(experts, dtype=torch.int32)[:, None]
    ends = torch.cat([ends.new_zeros(1), ends.flatten()])
    size = experts * rows, width
    matrix = torch.sparse_csr_tensor(ends, columns, values.flatten().to(kind), size, check_invariants=False)
    y = _times(x, weight, False)
    each = (c if c.ndim == 3 else c[:, None].expand(*x.shape[:2], -1)).flatten(0, 1).to(kind)
    flat, flat_y = x.flatten(0, 1).to(kind), y.flatten(0, 1)
    for some in _slices(len(flat), max(1, _TILE // len(ends))):
        products = (matrix @ flat[some].T).view(experts, rows, -1)
        products *= each[some].T[:, None]
        flat_y[some] += products.sum(0).T
    return y


@contextmanager
def _without_autocast(x: Tensor) -> Iterator[torch.dtype]:
    """And what autocast would have made of x."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        yield x.dtype
        return
    with torch.autocast(kind, enabled=False):
        yield x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)


class WeighedTensor:
    """A parameter that in a forward pass is the base's plus a weighed sum of task vectors, which its module keeps."""

    def __init__(self, module: nn.Module, part: str, experts: int, group: str, current: Current) -> None:
        base = module.get_parameter(part)
        module.register_buffer(vectors_of(part), base.new_zeros(experts, *base.shape))
        self.module, self.part, self.group, self.current = module, part, group, current

    def read(self, base: Tensor) -> Tensor:
        call = self.current.call
        if call is None or base.is_meta:  # while it is loaded, saved or offloaded
            return base
        c = call.values[self.group]
        if self.group not in call.keeping:
            return self.merged(base, c)
        if id(self) not in call.carried.merged:
            call.carried.merged[id(self)] = self.merged(base, c), None
        return call.carried.merged[id(self)][0]

    def merged(self, base: Tensor, c: Tensor) -> Tensor:
        vectors = getattr(self.module, vectors_of(self.part)).to(base)
        return torch.addmv(base.flatten(), vectors.reshape(len(c), -1).T, c.to(base)).view_as(base)

    def replace_in(self, module: Any, part: str) -> None:
        """Have a module, its own or one that is tied to it, read this in place of its parameter."""
        stock: Any = type(module).__base__ if hasattr(module, "weighed") else type(module)
        module.weighed = {**getattr(module, "weighed", {}), part: self}
        module.__class__ = _reading(stock, tuple(module.weighed))


@cache
def _reading(stock: Any, parts: tuple[str, ...]) -> Any:
    """A subclass of a module's class, by the same name, that finds these parameters among `weighed`."""

    def read(part: str, module: Any) -> Tensor:
        if part not in module._parameters:
            raise AttributeError(part)
        return module.weighed[part].read(module._parameters[part])

    members: dict[str, Any] = {part: property(partial(read, part)) for part in parts}
    members["__reduce_ex__"] = lambda module, _protocol: (_unpickled, (stock, parts), module.__dict__)
    return type(
        stock.__name__, (stock,), {**members, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    )


def _unpickled(stock: Any, parts: tuple[str, ...]) -> Any:
    kind = _reading(stock, parts)
    return kind.__new__(kind)


class Router(nn.Module):
    """Hidden states to coefficients, before they are averaged (WEMoE, equations 3 and 4)."""

    def __init__(self, width: int, ensembling: Ensembling) -> None:
        super().__init__()
        self.width = width
        self.init_lambda, self.init_std = ensembling.init_lambda, ensembling.init_std
        layers, experts = ensembling.router_layers, len(ensembling.experts)
        if layers == 2:
            self.hidden = nn.Linear(width, width)
        if layers:
            self.weight = nn.Parameter(torch.zeros(experts, width))
        self.bias = nn.Parameter(torch.zeros(experts))

    @property
    def is_constant(self) -> bool:
        return not hasattr(self, "weight")

    def forward(self, h: Tensor | None) -> Tensor:
        """(…, width) to (…, experts), in float32 or wider: means over many tokens are taken of it.

        Of a constant (experts,), whatever h.
        """
        if self.is_constant:
            return self.bias
        assert h is not None
        x = h.to(self.weight.dtype)
        if hasattr(self, "hidden"):
            x = functional.relu(self.hidden(x))
        r = functional.linear(x, self.weight, self.bias)
        return r.to(torch.promote_types(r.dtype, torch.float32))


@dataclass
class Carried:
    """What a cache carries from one forward pass to the next."""

    values: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # by group; the first axis is the sample
    merged: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)  # weights and biases, by module
    can_be_cropped: bool = True


class _Carrying:
    """A cache that does to what it carries what is done to its rows, as in beam search."""

    carried: Carried

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        values = {name: tuple(map(change, of_group)) for name, of_group in self.carried.values.items()}
        merged = {} if values else self.carried.merged  # constants are of no row
        self.carried = Carried(values, merged, self.carried.can_be_cropped)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change(lambda rows: rows[indices.to(rows.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if not self.carried.can_be_cropped:
            raise ValueError("mode running: a mean over what is past cannot take tokens back")
        super().crop(tokens_to_remove)  # type: ignore[misc]


@cache
def _carrying(kind: Any) -> Any:
    return type(f"Carrying{kind.__name__}", (_Carrying, kind), {})


class Call:
    """One forward pass of the whole model, or of its encoder alone."""

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        self.generates = model.can_generate()
        self.is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self.runs = self.generates and (self.is_encoder_decoder or model.ensembling.mode == "running")
        self.mask = arguments.get("attention_mask")
        self.decoder_mask = arguments.get("decoder_attention_mask")
        self.given = arguments.get("coefficients")
        self.model = model
        self.cache: Any = cache_in(arguments)
        self.has_begun = False
        self.uses_cache = self.cache is not None or arguments.get("use_cache") is True
        if self.cache is not None and self.cache.is_compileable:
            raise ValueError("a static cache hides which tokens are padding: leave cache_implementation out")
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())
        self.samples = _samples_in(arguments)
        self.head = 0
        # What this pass leaves behind is kept apart from what it found: gradient checkpointing runs layers again.
        carried = getattr(self.cache, "carried", None) if self.past else None
        self.carried: Carried = carried or Carried(can_be_cropped=not self.runs)
        self.left: dict[str, tuple[Tensor, ...]] = {}
        self.values: dict[str, Tensor] = {}  # by group: (experts,), (samples, experts) or (samples, tokens, experts)
        self.keeping: set[str] = set()  # groups whose merged weights serve further passes
        if model.ensembling.per_tensor:
            self._weigh_tensors(model)

    def _weigh_tensors(self, model: Any) -> None:
        """No hidden states choose here, so that everything is known before the first module is called."""
        for index, name in enumerate(model.ensembling.groups):
            router = model.routers["0" if model.ensembling.shared_router else str(index)]
            self.values[name] = router(None) if self.given is None else self.given[0, index]
        if self.given is None and self.cache is not None and not torch.is_grad_enabled():
            self.keeping = set(model.ensembling.groups)

    @property
    def fills_cache(self) -> bool:
        return self.cache is not None and self.past == 0

    def found(self, name: str) -> tuple[Tensor, ...] | None:
        """What the cache carries for this group; None at the start of a sequence.

        `ValueError` where the cache carries nothing; `RuntimeError` where the same generation started before.
        """
        if self.past and name not in self.carried.values:
            raise ValueError("this cache was not filled by the routers of this model: start with an empty one")
        # Running means without a cache start anew in every pass, which goes over everything.
        if not self.past and not self.has_begun and (self.uses_cache or not self.runs):
            begin_sequences(self.model)
            self.has_begun = True
        return self.carried.values.get(name)

    def end(self, output: Any) -> None:
        """Leaves with the cache what further passes need."""
        filled = self.cache if self.cache is not None else cache_in(output)
        if filled is not None:
            self.carried.values |= self.left
            if not isinstance(filled, _Carrying):
                kind: Any = type(filled)
                filled.__class__ = _carrying(kind)
            filled.carried = self.carried

    def real(self, h: Tensor, *, in_decoder: bool) -> Tensor:
        """Which tokens of h (samples, tokens, width) are no padding."""
        mask = self.decoder_mask if in_decoder and self.is_encoder_decoder else self.mask
        past = 0 if self.is_encoder_decoder and not in_decoder else self.past
        if not isinstance(mask, Tensor) or mask.shape != (len(h), past + h.shape[1]):
            return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        return mask[:, past:].bool().to(h.device)


class Ensemble:
    """What `WEMoE<X>` has besides what `<X>` has."""

    _is_stateful = True  # assisted decoding, which mixes prompt and guesses, is refused by transformers

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_architecture(type(self), config)
        kind = type(config)
        config.__class__ = kind.__base__  # some classes ask AutoModel for their trunk, which does not know ours
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            config.__class__ = kind
        self.ensembling = Ensembling(**config.ensembling)
        if getattr(config, "chunk_size_feed_forward", 0):
            raise ValueError("chunk_size_feed_forward hides from a router what tokens a sample has: set it to 0")
        self._current = Current()
        if self.ensembling.heads:
            self._swap_head()
        self.routers: Any = nn.ModuleDict()
        for index, (name, linears) in enumerate(self.ensembling.groups.items()):
            key = "0" if self.ensembling.shared_router else str(index)
            if self.ensembling.per_tensor:
                self._weigh(name)
                self.routers[key] = Router(0, self.ensembling)
                continue
            for linear in linears:
                self._swap(linear, name)
            width = _width_into(self.get_submodule(linears[0]))  # type: ignore[attr-defined]
            if key not in self.routers:
                self.routers[key] = Router(width, self.ensembling)
            elif self.routers[key].width != width:
                widths = f"{self.routers[key].width} and {width}"
                raise ValueError(f"shared_router: one router cannot read widths of {widths} ({name})")
            group = self.get_submodule(name)  # type: ignore[attr-defined]  # after swapping: OPT's is a linear itself
            group.register_forward_pre_hook(partial(_choose, self, name, key), with_kwargs=True)
        if (encoder := self._encoder()) is not None:
            encoder.register_forward_pre_hook(partial(_enter_encoder, self), with_kwargs=True)
            encoder.register_forward_hook(partial(_leave_encoder, self), always_call=True)
        self.post_init()  # type: ignore[attr-defined]

    def _encoder(self) -> Any:
        """That of an encoder-decoder, which `generate` calls on its own."""
        return self.get_encoder() if getattr(self.config, "is_encoder_decoder", False) else None  # type: ignore[attr-defined]

    def _swap(self, name: str, group: str) -> None:
        parent, _, last = name.rpartition(".")
        base = self.get_submodule(name)  # type: ignore[attr-defined]
        kept = self.ensembling.kept.get(name)
        ensembled = EnsembledLinear(base, len(self.ensembling.experts), kept, group, self._current)
        setattr(self.get_submodule(parent), last, ensembled)  # type: ignore[attr-defined]

    def _weigh(self, name: str) -> None:
        """The parameter of this name, and those that are tied to it."""
        owner, _, own_part = name.rpartition(".")
        experts = len(self.ensembling.experts)
        weighed = WeighedTensor(self.get_submodule(owner), own_part, experts, name, self._current)  # type: ignore[attr-defined]
        tied = [target for target, source in self.all_tied_weights_keys.items() if source == name]  # type: ignore[attr-defined]
        for each in (name, *tied):
            parent, _, part = each.rpartition(".")
            module = self.get_submodule(parent)  # type: ignore[attr-defined]
            if not hasattr(module, "weighed") and module not in (self, self._encoder()):
                module.register_forward_pre_hook(partial(_check_inside, self))
            weighed.replace_in(module, part)

    def _swap_head(self) -> None:
        parent, _, last = self.ensembling.head.rpartition(".")
        head = self.get_submodule(self.ensembling.head)  # type: ignore[attr-defined]
        setattr(self.get_submodule(parent), last, TaskHeads(head, self.ensembling.heads, self._current))  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            nn.init.constant_(module.bias, module.init_lambda)
            if not module.is_constant:
                nn.init.normal_(module.weight, std=module.init_std)
            if hasattr(module, "hidden"):
                nn.init.normal_(module.hidden.weight, std=module.init_std)
                nn.init.zeros_(module.hidden.bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """Layers that run again in the backward pass do so as part of the forward pass that they belong to."""
        groups = () if self.ensembling.per_tensor else self.ensembling.groups
        chosen_outside = [name for name in groups if _is_checkpointed(self.get_submodule(name))]  # type: ignore[attr-defined]
        if chosen_outside and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(f"use_reentrant=True cuts {chosen_outside[0]} off from its router: take False")
        remembering = partial(self._remembering, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, remembering, **kwargs)  # type: ignore[misc]

    def _remembering(self, checkpointing: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpointing(partial(self._within, self._current.call, function), *args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel cannot spread routed task vectors: start with torchrun or accelerate launch"
        )

    def _within(self, call: Call | None, function: Any, *args: Any, **kwargs: Any) -> Any:
        before, self._current.call = self._current.call, call
        try:
            return function(*args, **kwargs)
        finally:
            self._current.call = before

    def _forward(self, forward: Any, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        arguments.pop("self")
        arguments |= arguments.pop("kwargs", {})
        arguments = with_cache_renamed(arguments, signature.parameters)
        self._check_given(arguments.get("coefficients"), _samples_in(arguments))
        call = Call(self, arguments)
        arguments.pop("coefficients", None)
        task, labels = arguments.pop("task", None), arguments.get("labels")
        call.head = self._chosen_head(task)
        if not self.ensembling.heads:
            arguments |= self._without_prefix(arguments, call) if isinstance(labels, Tensor) else {}
            return self._called(call, forward, arguments)
        arguments.pop("labels", None)
        items = arguments.pop("num_items_in_batch", None)
        output = self._called(call, forward, arguments)
        return output if labels is None else _with_loss(output, labels, items)

    def _called(self, call: Call, forward: Any, arguments: dict[str, Any]) -> Any:
        output = self._within(call, forward, self, **arguments)
        call.end(output)
        self._current.last = {name: value.detach() for name, value in call.values.items()}
        return output

    def _check_given(self, given: Tensor | None, samples: int | None) -> None:
        if given is None:
            return
        wanted = len(self.ensembling.groups), len(self.ensembling.experts)
        has_shape = given.ndim == 3 and given.shape[1:] == wanted
        fits = not self.ensembling.per_tensor and samples in (None, len(given))
        # one set for all may have been repeated, for beams
        if not has_shape or not (fits or len(given) == 1 or torch.equal(given, given[:1].expand_as(given))):
            raise ValueError(
                f"coefficients= are ({samples or 'samples'}, {wanted[0]} groups, {wanted[1]} experts), or one set for "
                f"all samples, not {tuple(given.shape)}"
                + ("; where every parameter is weighed all are the same" if self.ensembling.per_tensor else "")
            )

    def _chosen_head(self, task: str | None) -> int:
        tasks = list(self.ensembling.heads)
        if not tasks:
            if task not in (None, *self.ensembling.experts):
                raise ValueError(f"task={task!r} is none of {', '.join(self.ensembling.experts)}")
            return 0
        if (task is None and len(tasks) > 1) or (task is not None and task not in tasks):
            raise ValueError(f"task={task!r}: choose a head, one of {', '.join(tasks)}")
        return tasks.index(task or tasks[0])

    def _without_prefix(self, arguments: dict[str, Any], call: "Call") -> dict[str, Any]:
        """Labels that had no part in the choice, and as many fewer items where the Trainer has counted them."""
        labels = arguments["labels"]
        frozen = call.generates and not call.runs
        if not frozen or call.given is not None or self.ensembling.router_layers == 0 or labels.ndim != 2:
            return {}
        prefix = self._prefix(call, labels[..., None])
        kept = labels.masked_fill(prefix, -100)
        items = arguments.get("num_items_in_batch")
        if items is None:
            return {"labels": kept}
        after, before = ((part[:, 1:] != -100).sum().clamp(min=1) for part in (kept, labels))
        return {"labels": kept, "num_items_in_batch": items * after / before}

    def _prefix(self, call: "Call", h: Tensor) -> Tensor:
        real = call.real(h, in_decoder=False)
        return real if call.fills_cache else real & (real.cumsum(dim=1) <= self.ensembling.routing_tokens)

    def _route(self, call: Call, name: str, key: str, h: Tensor) -> Tensor:
        """The coefficients of a group whose module gets the input h."""
        router, keeps = self.routers[key], call.cache is not None and not torch.is_grad_enabled()
        if call.given is not None:
            return call.given[:, list(self.ensembling.groups).index(name)]
        if router.is_constant:
            if keeps:
                call.keeping.add(name)
            return router(None)
        if call.samples and (h.ndim != 3 or len(h) != call.samples):  # flattened (OPT), or in windows (Swin)
            h = h.reshape(call.samples, -1, h.shape[-1])
        if h.ndim != 3:
            raise ValueError(f"cannot tell samples apart in an input of shape {tuple(h.shape)} of {name}")
        in_decoder = call.is_encoder_decoder and "decoder" in name.split(".")
        real = call.real(h, in_decoder=in_decoder)
        if not call.generates or (call.is_encoder_decoder and not in_decoder):
            return _mean(router(h).to(h.device), real)
        found = call.found(name)
        if call.runs:
            coefficients, call.left[name] = _running_mean(router(h).to(h.device), real, *(found or ()))
            return coefficients
        if found:
            if keeps and len(h) == 1:
                call.keeping.add(name)
            return found[0]
        coefficients = _mean(router(h).to(h.device), self._prefix(call, h))
        call.left[name] = (coefficients,)
        return coefficients

    @torch.no_grad()
    def coefficients(self, **inputs: Any) -> Tensor:
        """What the routers give to these inputs: (samples, groups, experts), to be given as `coefficients=`.

        In `frozen` of a plain forward pass these are the first `routing_tokens` tokens'; with an empty cache as
        `past_key_values=` those of all tokens, as `generate` takes them. `ValueError` in `running`.
        """
        self(**inputs)  # type: ignore[operator]
        last = self._current.last or {}
        values = [last[name] for name in self.ensembling.groups]
        if any(value.ndim == 3 for value in values):
            raise ValueError("there is no one set of coefficients per sample where they are running means")
        samples = max(len(value) if value.ndim == 2 else 1 for value in values)
        return torch.stack([value.to(values[0]).expand(samples, -1) for value in values], dim=1)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        if self.ensembling.per_tensor:
            raise ValueError("the task vectors of the embeddings cannot be resized: resize them in the sources")
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_generation_config(*args, **kwargs)  # type: ignore[misc]
        config, arguments = prepared
        is_frozen = not self.config.is_encoder_decoder and self.ensembling.mode == "frozen"  # type: ignore[attr-defined]
        if is_frozen and self.ensembling.router_layers and arguments.get("coefficients") is None:
            if config.prefill_chunk_size is not None:
                raise ValueError("prefill_chunk_size: the whole prompt chooses in mode frozen; leave it out")
            if config.use_cache is False:
                raise ValueError("use_cache=False: mode frozen keeps its choice in the cache; give coefficients=")
        return prepared


class TaskHeads(nn.ModuleList):
    """One head per task, of which `task=` chooses one."""

    def __init__(self, head: Any, classes: dict[str, list[str]], current: Current) -> None:
        make = getattr(head, "with_classes", partial(_linear_head, head))
        super().__init__(make(len(names)) for names in classes.values())
        self.current = current

    def forward(self, x: Tensor) -> Tensor:
        if self.current.call is None:
            raise RuntimeError(_OUTSIDE)
        return self[self.current.call.head](x)


def _linear_head(head: Any, classes: int) -> nn.Linear:
    return nn.Linear(head.in_features, classes, bias=head.bias is not None)


def _choose(model: Any, name: str, key: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = model._current.call
    if call is None:
        raise RuntimeError(_OUTSIDE)
    call.values[name] = model._route(call, name, key, args[0] if args else kwargs["hidden_states"])


def _check_inside(model: Any, module: nn.Module, args: tuple[Any, ...]) -> None:
    if model._current.call is None:
        raise RuntimeError(_OUTSIDE)


def _enter_encoder(model: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if model._current.call is None:
        model._current.call = model._current.encoding = Call(model, kwargs)


def _leave_encoder(model: Any, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if model._current.call is model._current.encoding:
        model._current.call = model._current.encoding = None


def _with_loss(output: Any, labels: Tensor, items: Any) -> Any:
    """The output of a classifier without its loss, and that, as transformers' own has it."""
    logits = output[0].float().flatten(0, -2)
    if labels.is_floating_point() or labels.numel() != len(logits):
        raise ValueError(
            f"labels= are numbers of classes, one for each of the {len(logits)} predictions, not "
            f"{tuple(labels.shape)} of {labels.dtype}"
        )
    labels = labels.flatten().to(logits.device)
    if items is None:
        loss = functional.cross_entropy(logits, labels)
    else:
        loss = functional.cross_entropy(logits, labels, reduction="sum") / items
    return (loss, *output) if isinstance(output, tuple) else type(output)(**{**output, "loss": loss})


def _is_checkpointed(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def _samples_in(arguments: dict[str, Any]) -> int | None:
    """How many samples there are, if the inputs agree on it."""
    given = [arguments.get(name) for name in _INPUTS]
    numbers = {len(each) for each in given if isinstance(each, Tensor)}
    return numbers.pop() if len(numbers) == 1 else None


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """(samples, tokens, n) over the chosen tokens to (samples, n)."""
    return torch.where(chosen[..., None], values, 0).sum(dim=1) / chosen.sum(dim=1, keepdim=True).clamp(min=1)


def _running_mean(
    values: Tensor, real: Tensor, total: Tensor | int = 0, count: Tensor | int = 0
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(samples, tokens, n): at every position over the tokens up to it; `total` and `count` are those before.

    And total and count up to the last one.
    """
    totals = torch.where(real[..., None], values, 0).cumsum(dim=1) + total
    counts = real.cumsum(dim=1)[..., None] + count
    return totals / counts.clamp(min=1), (totals[:, -1:], counts[:, -1:])


def _width_into(linear: EnsembledLinear) -> int:
    return linear.weight.shape[0 if linear.is_transposed else 1]


@cache
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`WEMoE<X>` for `<X>`."""
    signature = inspect.signature(base.forward)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("coefficients", "task")]
    *first, last = signature.parameters.values()
    ending = [*more, last] if last.kind is inspect.Parameter.VAR_KEYWORD else [last, *more]
    signature = signature.replace(parameters=[*first, *ending])

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(base.forward, signature, *args, **kwargs)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, in which a sequence is begun once."""
        with generating(self):
            return base.generate(self, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    # Checkpoints have the names that the base's have, which transformers looks up by class or model type.
    names = get_checkpoint_conversion_mapping(base.__name__) or get_checkpoint_conversion_mapping(
        base.config_class.model_type
    )
    if names:
        register_checkpoint_conversion_mapping(_PREFIX + base.__name__, names, overwrite=True)
    members = {
        "config_class": config_class(base.config_class),
        "forward": forward,
        "_auto_class": base._auto_class or auto_class_of(base.__name__),
        "__module__": __name__ if base.__module__.startswith("transformers.") else base.__module__,
    }
    if base.can_generate():
        members["generate"] = wraps(base.generate)(generate)
    return type(_PREFIX + base.__name__, (Ensemble, base), members)


def check_architecture(asked: type, config: Any) -> None:
    """`ValueError` where the checkpoint of this configuration is one of another class."""
    wanted = getattr(config, "architectures", None) or []
    if wanted and not any(each.__name__ in wanted for each in asked.__mro__):
        auto = next((name for name in getattr(config, "auto_map", None) or {} if name != "AutoConfig"), "its class")
        raise ValueError(f"this is a {wanted[0]}, which {auto} loads")


AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def auto_class_of(name: str) -> str:
    """Which of transformers' Auto classes loads this architecture."""
    for auto in AUTO_CLASSES:
        for known in getattr(transformers, auto)._model_mapping._model_mapping.values():
            if name in ([known] if isinstance(known, str) else known):
                return auto
    raise ValueError(f"none of {', '.join(AUTO_CLASSES)} loads a {name}")


def __getattr__(name: str) -> Any:
    base = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class(base)
