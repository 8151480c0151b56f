"""Products with a weight that is the base's plus a weighed sum of task vectors, tile by tile.

By linearity, (W + sum of c_i T_i) x is either one product with merged weights or a sum of products;
which is cheaper depends on how many tokens share a set of coefficients. Both are processed in tiles
of rows, so that on a CPU neither a whole merged weight nor a whole sparse task vector is held.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization
from transformers.pytorch_utils import Conv1D

from .wemoe_calls import OUTSIDE, Current
from .wemoe_kernel import can_merge, merge
from .wemoe_tiles import (
    PLAIN,
    RULES,
    Rule,
    made_dense,
    places_in_tile,
    rows_of_tile,
    rule_of,
    samples_of_tile,
    slices_of,
    tiles_of,
)

_MEMORY = Path("/proc/meminfo")  # on Linux, lines of a name and kilobytes

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


class EnsembledLinear(nn.Module):
    """A linear map whose weight is that of the base plus a weighed sum of task vectors."""

    vectors: Tensor
    values: Tensor
    columns: Tensor
    row_ends: Tensor
    bias_vectors: Tensor

    def __init__(
        self,
        base: Any,
        experts: int,
        kept: int | None,
        group: str,
        current: Current,
    ) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.is_transposed = isinstance(base, Conv1D)
        self.kept = kept
        self.group = group
        self.current = current
        shape = self.weight.shape
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        if kept is None:
            self.register_buffer("vectors", torch.zeros(experts, *shape, **like))
        else:
            # Every expert keeps the same number of elements, so that plain tensors hold all of
            # them: values and columns row by row, and where in these each row ends. Columns are
            # as narrow as the width allows, since they take as much memory as the values.
            index_dtype = torch.uint16 if shape[1] <= 2**16 else torch.int32
            columns = torch.zeros(experts, kept, dtype=index_dtype, device=like["device"])
            row_ends = torch.full(
                (experts, shape[0]),
                kept,
                dtype=torch.int32,
                device=like["device"],
            )
            self.register_buffer("values", torch.zeros(experts, kept, **like))
            self.register_buffer("columns", columns)
            self.register_buffer("row_ends", row_ends)
        if self.bias is not None:
            self.register_buffer("bias_vectors", torch.zeros(experts, *self.bias.shape, **like))

    def initialise(self, std: float) -> None:
        """Gives what was not loaded values: transformers' random base, and task vectors of 0."""
        initialization.normal_(self.weight, std=std)
        if self.bias is not None:
            initialization.zeros_(self.bias)
        for name, tensor in self.named_buffers():
            initialization.constant_(tensor, self.kept if name == "row_ends" else 0)

    def forward(self, x: Tensor) -> Tensor:
        """The output (samples, tokens, out) for x (samples, tokens, in), with the running call's
        coefficients.
        """
        call = self.current.call
        if call is None:
            raise RuntimeError(OUTSIDE)
        # These coefficients hold for further passes with the same cache, which often have one
        # token each: merged once, the weights cost such a pass one plain product.
        if self.group in call.keeping:
            kept = call.carried.merged
            if id(self) not in kept:
                c = call.values[self.group].to(x.device, self.weight.dtype)
                if self._is_worth_keeping(c):
                    kept[id(self)] = self._ready(c)
            if id(self) in kept:
                return _linear(x, *kept[id(self)])
        c = call.values[self.group].to(x.device, self.weight.dtype)
        by_sample = c if c.ndim > 1 else c[None]
        # Some decoders flatten samples and tokens (OPT), so x is given its samples back, of which
        # constants see only one.
        if x.ndim == 3 and x.shape[0] == by_sample.shape[0]:
            return self._by_sample(x, by_sample)
        y = self._by_sample(x.reshape(len(by_sample), -1, x.shape[-1]), by_sample)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _by_sample(self, x: Tensor, c: Tensor) -> Tensor:
        """The output (samples, tokens, out) for x (samples, tokens, in).

        The coefficients are (samples, experts) or (samples, tokens, experts).
        """
        dtype = _autocast_dtype(x)
        if dtype is None:
            return self._without_autocast(x, c)
        # Autocast would cast the sums of a product's tiles, too, which have to stay wide.
        with torch.autocast(x.device.type, enabled=False):
            return self._without_autocast(x.to(dtype), c)

    def _without_autocast(self, x: Tensor, c: Tensor) -> Tensor:
        weight = self.weight
        bias = self._merged_bias(c)
        if bias is not None:
            bias = bias.to(x.dtype)
        # An autograd function takes longer to be called than a GPU takes for the product.
        is_differentiated = x.requires_grad or c.requires_grad or weight.requires_grad
        if is_differentiated and torch.is_grad_enabled():
            return _Product.apply(x, c, bias, weight, self.is_transposed, *self._stored())
        return _product(x, c, bias, weight, self._stored(), over_rows=self.is_transposed)

    def _stored(self) -> tuple[Tensor, ...]:
        if self.kept is None:
            return (self.vectors,)
        return self.values, self.columns, self.row_ends

    def _is_worth_keeping(self, c: Tensor) -> bool:
        """Whether merged weights of these samples are to be held for further passes."""
        if c.ndim == 1 or len(c) == 1:
            return True
        # A pass without them reads the base's weight and all task vectors, and so as much as the
        # weights of one sample more than there are vectors. Sparse vectors are less to read, where
        # their products are fast.
        rule = RULES.get(self.weight.device.type, PLAIN)
        is_fast_as_it_is = self.kept is not None and rule.sparse > 0
        if is_fast_as_it_is or len(c) > c.shape[1] + 1:
            return False
        return _has_room(len(c) * self.weight.nbytes, self.weight.device)

    def merged(self, c: Tensor) -> Tensor:
        """The weight for coefficients (experts,); one per sample for (samples, experts)."""
        by_sample = c if c.ndim > 1 else c[None]
        weight = self.weight
        stored = self._stored()
        tile = rule_of(weight.device).tile
        if _fits_one_tile(by_sample, weight, stored, tile):
            weights = _merged_at_once(by_sample, weight, stored).to(weight.dtype)
        else:
            weights = weight.new_empty(len(by_sample), *weight.shape)
            for rows, samples, merged in _merged_tiles(by_sample, weight, stored):
                weights[samples, rows] = merged
        return weights if c.ndim > 1 else weights[0]

    def _merged_bias(self, c: Tensor) -> Tensor | None:
        """The bias for coefficients (…, experts): (…, out)."""
        if self.bias is None:
            return None
        if c.ndim == 2 and self.bias.dtype == c.dtype:
            return torch.addmm(self.bias, c, self.bias_vectors)
        return self.bias + c @ self.bias_vectors

    def _ready(self, c: Tensor) -> tuple[Tensor, Tensor | None]:
        """The merged weight and bias for coefficients (samples, experts), as `_linear` takes them:
        those of one sample for all if there is one.
        """
        if _autocast_dtype(c) is not None:  # which would round the sums to half precision
            with torch.autocast(c.device.type, enabled=False):
                return self._ready(c)
        if c.ndim > 1 and len(c) == 1:
            c = c[0]
        weight = self.merged(c)
        bias = self._merged_bias(c)
        if c.ndim == 1:
            return weight.mT if self.is_transposed else weight, bias
        by_columns = weight if self.is_transposed else weight.mT
        return by_columns, None if bias is None else bias[:, None]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x by one weight (out, in) and bias for all samples, or by weights (samples, in, out) and
    biases (samples, 1, out).
    """
    if weight.ndim == 2:
        return functional.linear(x, weight, bias)
    # Some decoders flatten samples and tokens (OPT).
    by_sample = x.reshape(len(weight), -1, x.shape[-1])
    y = torch.bmm(by_sample, weight) if bias is None else torch.baddbmm(bias, by_sample, weight)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Product(torch.autograd.Function):
    """x (samples, tokens, in) times the weight of each sample or token, plus its bias.

    Autograd would keep every merged weight for the backward pass. Here one tile of the weights at a
    time is merged, used and dropped, and merged again in the backward pass.
    """

    @staticmethod
    def forward(
        x: Tensor,
        c: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        is_transposed: bool,
        *stored: Tensor,
    ) -> Tensor:
        return _product(x, c, bias, weight, stored, over_rows=is_transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, c, _, weight, ctx.is_transposed, *stored = inputs
        ctx.save_for_backward(x, c, weight, *stored)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        if _autocast_dtype(x) is None:
            return _Product._gradients(ctx, gradient, x, *others)
        with torch.autocast(x.device.type, enabled=False):
            return _Product._gradients(ctx, gradient, x, *others)

    @staticmethod
    def _gradients(
        ctx: Any, gradient: Tensor, x: Tensor, c: Tensor, weight: Tensor, *stored: Tensor
    ) -> tuple[Tensor | None, ...]:
        # GPT-2's Conv1D stores (in, out), others (out, in): of the input and the gradient of the
        # output, `by_rows` is the one as wide as the stored weight has rows.
        by_rows = x if ctx.is_transposed else gradient
        by_columns = gradient if ctx.is_transposed else x
        x_gradient = None
        c_gradient = None
        bias_gradient = None
        weight_gradient = None
        if ctx.needs_input_grad[0]:
            over_rows = not ctx.is_transposed
            x_gradient = _product(gradient, c, None, weight, stored, over_rows=over_rows)
        if ctx.needs_input_grad[1]:
            c_gradient = _gradient_of_coefficients(by_rows, by_columns, c, weight, stored)
        if ctx.needs_input_grad[2]:
            bias_gradient = gradient if c.ndim == 3 else gradient.sum(1)
        # The base's weight takes part in every product with a factor of one, so that its gradient
        # is that of a plain linear map.
        if ctx.needs_input_grad[3]:
            weight_gradient = by_rows.flatten(0, 1).mT @ by_columns.flatten(0, 1)
            weight_gradient = weight_gradient.to(weight.dtype)
        gradients = (x_gradient, c_gradient, bias_gradient, weight_gradient)
        return *gradients, None, *[None for _ in stored]


def _product(
    x: Tensor,
    c: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    stored: Sequence[Tensor],
    *,
    over_rows: bool,
) -> Tensor:
    """x W with the W (rows, columns) of each sample or token; where not `over_rows`, x Wᵀ.

    The bias, (samples, out) or (samples, tokens, out), is added.
    """
    rule = rule_of(x.device)
    # Merging a weight costs as much as products with all task vectors for a few tokens.
    is_merged = c.ndim == 2 and x.shape[1] >= rule.merging
    if len(stored) > 1 and not over_rows and _is_sparse_faster(x, c, rule):
        y = _sparse_product(x, c, weight, *stored)
    elif is_merged and _fits_one_tile(c, weight, stored, rule.tile):
        return _times(x, _merged_at_once(c, weight, stored), over_rows, bias)
    elif not is_merged and _fit_at_once(x, c, weight, rule.tile):
        y = _products_at_once(x, c, weight, stored, over_rows)
    else:
        y = _product_by_tiles(x, c, weight, stored, over_rows, is_merged)
    if bias is not None:
        y += bias if c.ndim == 3 else bias[:, None]
    return y


def _product_by_tiles(
    x: Tensor,
    c: Tensor,
    weight: Tensor,
    stored: Sequence[Tensor],
    over_rows: bool,
    is_merged: bool,
) -> Tensor:
    # A tile is some rows of W. With x W each tile adds to the whole output, in float32 or wider, so
    # that rounding does not grow with the number of tiles; with x Wᵀ it is a part of the output.
    if over_rows:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.new_zeros(*x.shape[:2], weight.shape[1], dtype=wide)
    else:
        y = x.new_empty(*x.shape[:2], weight.shape[0])
    products = _merged_products if is_merged else _products
    for tile, samples, product in products(x, c, weight, stored, over_rows):
        if over_rows:
            y[samples] += product
        else:
            y[samples, :, tile] = product
    return y.to(x.dtype)


def _fits_one_tile(c: Tensor, weight: Tensor, stored: Sequence[Tensor], tile: int) -> bool:
    """Whether the weights of all coefficients (samples, experts) are merged in one tile."""
    samples, experts = c.shape
    if samples * weight.numel() > tile:
        return False
    if experts * weight.numel() <= tile:
        return True
    # Where the elements of sparse vectors are added up where they lie, none is made dense.
    return len(stored) > 1 and (samples == 1 or can_merge(c, weight, stored))


def _merged_at_once(c: Tensor, weight: Tensor, stored: Sequence[Tensor]) -> Tensor:
    """The weights (samples, rows, columns) of coefficients (samples, experts), in as few operations
    as there can be: where a model is small, each takes longer to be started than to be done.
    """
    if len(stored) > 1 and can_merge(c, weight, stored):
        return merge(c, weight, *stored)
    # As in `_merged_tiles`, the elements of sparse vectors are added up where they lie if there is
    # one sum, and that in float32 or wider.
    if c.shape[0] == 1 and len(stored) > 1:
        values, columns, row_ends = stored
        wide = torch.promote_types(values.dtype, torch.float32)
        weighed = c.T.to(wide) * values
        places = places_in_tile(columns, row_ends, weight.shape[1], len(weight))
        total = weight.flatten().to(wide, copy=True)
        total.index_add_(0, places.flatten(), weighed.flatten())
        return total.view(1, *weight.shape)
    vectors = stored[0] if len(stored) == 1 else made_dense(weight, *stored)
    merged = torch.addmm(weight.flatten(), c, vectors.flatten(1))
    return merged.view(-1, *weight.shape)


def _fit_at_once(x: Tensor, c: Tensor, weight: Tensor, tile: int) -> bool:
    """Whether all task vectors fit in one tile, and products with x are not more than they are."""
    tokens = x.shape[0] * x.shape[1]
    return c.shape[-1] * weight.numel() <= tile and tokens <= min(weight.shape)


def _products_at_once(
    x: Tensor,
    c: Tensor,
    weight: Tensor,
    stored: Sequence[Tensor],
    over_rows: bool,
) -> Tensor:
    """What `_products` gives, by one product with all task vectors, whose parts are then summed."""
    vectors = stored[0] if len(stored) == 1 else made_dense(weight, *stored)
    tokens = len(x) * x.shape[1]
    flat_x = x.reshape(tokens, x.shape[2])
    if over_rows:
        products = torch.matmul(flat_x, vectors.to(x.dtype)).transpose(0, 1)
    else:
        products = _times(flat_x, vectors.flatten(0, 1), False)
        products = products.view(tokens, len(vectors), len(weight))
    # One coefficient per token, or one per sample that is repeated for its tokens.
    by_token = c if c.ndim == 3 else c[:, None].expand(*x.shape[:2], -1)
    by_token = by_token.reshape(tokens, 1, len(vectors)).to(x.dtype)
    of_base = _times(flat_x, weight, over_rows)
    y = torch.baddbmm(of_base[:, None], by_token, products)
    return y.view(*x.shape[:2], y.shape[2])


Parts = Iterator[tuple[slice, slice, Tensor]]  # rows, samples, and the result for these


def _merged_products(
    x: Tensor,
    c: Tensor,
    weight: Tensor,
    stored: Sequence[Tensor],
    over_rows: bool,
) -> Parts:
    """Products with the merged weights of some samples at a time."""
    for tile, samples, merged in _merged_tiles(c, weight, stored):
        left = x[samples, :, tile] if over_rows else x[samples]
        yield tile, samples, _times(left, merged, over_rows)


def _products(
    x: Tensor,
    c: Tensor,
    weight: Tensor,
    stored: Sequence[Tensor],
    over_rows: bool,
) -> Parts:
    """Products with the base's weight and with one task vector after the other, of all samples."""
    # One coefficient per token, or one per sample that is broadcast over its tokens. It scales the
    # product and not the vector, so that one product serves tokens with different coefficients.
    by_token = c if c.ndim == 3 else c[:, None]
    for tile, base_rows, vectors in tiles_of(weight, stored, rows_of_tile(weight, c.shape[-1])):
        left = x[..., tile] if over_rows else x
        product = _times(left, base_rows, over_rows)
        for index, vector in enumerate(vectors):
            product += by_token[..., index, None] * _times(left, vector, over_rows)
        yield tile, slice(None), product


def _times(x: Tensor, weight: Tensor, over_rows: bool, bias: Tensor | None = None) -> Tensor:
    """x W where `over_rows`, else x Wᵀ, with one W (rows, columns) or one for each sample (samples,
    rows, columns); in that case their biases (samples, out) are added.
    """
    weight = weight.to(x.dtype)
    if weight.ndim == 3 and weight.shape[0] == 1:
        weight = weight.squeeze(0)
        bias = None if bias is None else bias.squeeze(0)
    if weight.ndim == 2:
        return functional.linear(x, weight.mT if over_rows else weight, bias)
    right = weight if over_rows else weight.mT
    return torch.bmm(x, right) if bias is None else torch.baddbmm(bias[:, None], x, right)


def _merged_tiles(c: Tensor, weight: Tensor, stored: Sequence[Tensor]) -> Parts:
    """The weights (samples, rows, columns) of coefficients (samples, experts), some at a time."""
    # With one set of coefficients and sparse vectors, their weighed elements are added up where
    # they lie, and no vector is made dense by itself. They are summed in float32 or wider, so that
    # rounding does not grow with their number.
    if len(c) == 1 and len(stored) > 1:
        values, *places = stored
        wide = torch.promote_types(values.dtype, torch.float32)
        weighed = (c.T * values.to(wide), *places)
        rows = rows_of_tile(weight, 1)
        for tile, base_rows, total in tiles_of(weight, weighed, rows, is_sum=True):
            yield tile, slice(None), base_rows + total
        return
    # Else the vectors of a tile are made dense once and serve all samples. The weights of as many
    # samples are merged at a time as fit beside them.
    samples_per_tile = samples_of_tile(weight, len(c))
    rows = rows_of_tile(weight, max(samples_per_tile, c.shape[1]))
    for tile, base_rows, vectors in tiles_of(weight, stored, rows):
        for samples in slices_of(len(c), samples_per_tile):
            merged = torch.addmm(base_rows.flatten(), c[samples], vectors.flatten(1))
            yield tile, samples, merged.unflatten(-1, base_rows.shape)


def _gradient_of_coefficients(
    by_rows: Tensor,
    by_columns: Tensor,
    c: Tensor,
    weight: Tensor,
    stored: Sequence[Tensor],
) -> Tensor:
    """The gradient of c, in its shape.

    `by_rows` (samples, tokens, rows) and `by_columns` (samples, tokens, columns) are the input and
    the gradient of the output, whichever of the two has the weight's rows or columns as its width.
    """
    # The gradient of c_i is the inner product of T_i with the gradient of the weight. It is summed
    # up tile by tile, in float32 or wider. With coefficients per sample, the gradient of a tile of
    # the sample's weight is one product. With coefficients per token it would be as large as one
    # weight per token, so T_i is multiplied with the token's two sides instead.
    total = torch.zeros_like(c, dtype=torch.promote_types(c.dtype, torch.float32))
    samples_per_tile = samples_of_tile(weight, len(c))
    rows = rows_of_tile(weight, max(samples_per_tile, c.shape[-1]))
    for tile, _, vectors in tiles_of(weight, stored, rows):
        if c.ndim == 3:
            for index, vector in enumerate(vectors):
                products = _times(by_columns, vector, False) * by_rows[..., tile]
                total[..., index] += products.sum(-1)
            continue
        for samples in slices_of(len(c), samples_per_tile):
            weight_gradients = by_rows[samples, :, tile].mT @ by_columns[samples]
            flat_gradients = weight_gradients.flatten(1).to(vectors.dtype)
            total[samples] += flat_gradients @ vectors.flatten(1).mT
    return total.to(c.dtype)


def _has_room(size: int, device: torch.device) -> bool:
    """Whether so many bytes leave a quarter of the device's memory free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    elif device.type == "cpu" and _MEMORY.exists():
        # What is free in the strict sense is little on a machine that has read many files, though
        # all that holds them can be had.
        amounts = {}
        for line in _MEMORY.read_text().splitlines():
            name, _, amount = line.partition(":")
            amounts[name] = amount.split()
        if not {"MemAvailable", "MemTotal"} <= amounts.keys():
            return False
        free = 1024 * int(amounts["MemAvailable"][0])
        total = 1024 * int(amounts["MemTotal"][0])
    else:
        return False
    return free - size >= total / 4


def _is_sparse_faster(x: Tensor, c: Tensor, rule: Rule) -> bool:
    # Sparse products need MKL, and cannot be compiled. With many tokens that share coefficients,
    # merging the weight is faster still.
    if rule.sparse == 0 or not torch.backends.mkl.is_available():
        return False
    return c.ndim == 3 or x.shape[1] < rule.merging or len(x) * x.shape[1] <= rule.sparse


def _sparse_product(
    x: Tensor,
    c: Tensor,
    weight: Tensor,
    values: Tensor,
    columns: Tensor,
    row_ends: Tensor,
) -> Tensor:
    """x Wᵀ by products with all vectors as one sparse matrix (experts * rows, columns)."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # MKL has no 16-bit types
    experts, kept = values.shape
    rows, width = weight.shape
    # MKL does not check where elements lie, and would crash the process: a damaged checkpoint must
    # be an error instead.
    columns = columns.flatten().int()
    least, most = torch.aminmax(columns) if columns.numel() else (0, 0)
    counts = torch.diff(row_ends, prepend=row_ends.new_zeros(experts, 1), dim=1)
    if least < 0 or most >= width or (counts < 0).any() or (row_ends[:, -1] != kept).any():
        raise ValueError(
            "sparse task vectors have columns or row ends outside of the weight: the checkpoint is "
            "damaged",
        )
    # One product for all experts: the vectors stand below each other in one matrix, so that each
    # one's row ends come after all elements of those before.
    numbers = torch.arange(experts, dtype=torch.int32, device=row_ends.device)
    ends = row_ends + kept * numbers[:, None]
    ends = torch.cat([ends.new_zeros(1), ends.flatten()])
    matrix = torch.sparse_csr_tensor(
        ends,
        columns,
        values.flatten().to(dtype),
        (experts * rows, width),
        device=values.device,
        check_invariants=False,
    )
    y = _times(x, weight, False)
    # One product gives every expert's output for some tokens, (experts, rows, tokens), which is
    # weighed and added up: for so few tokens at a time that it stays in a CPU cache, as a tile
    # does.
    by_token = c if c.ndim == 3 else c[:, None].expand(*x.shape[:2], -1)
    by_token = by_token.flatten(0, 1).to(dtype)
    flat_x = x.flatten(0, 1).to(dtype)
    flat_y = y.flatten(0, 1)
    for tokens in slices_of(len(flat_x), max(1, rule_of(x.device).tile // len(ends))):
        products = (matrix @ flat_x[tokens].T).view(experts, rows, -1)
        products *= by_token[tokens].T[:, None]
        flat_y[tokens] += products.sum(0).T
    return y


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would compute with x; None where it is off."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
