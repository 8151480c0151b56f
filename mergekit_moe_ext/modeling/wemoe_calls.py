"""Forward passes of a weight-ensembling model: what each knows, and what a cache carries on.

Routers give a set of coefficients per sample, the mean over its tokens, or, in a model that
generates and is in mode `running`, one at every position, the mean over what is there up to it.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_wemoe import Ensembling
from .host_cache import begin_sequences, cache_in, refuse_other_caches

OUTSIDE = "an ensembled module must be called through its model, which knows samples and padding"
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)


class Current(threading.local):
    """The call that is running, for every module that takes part; each thread has its own."""

    call: "EnsembleCall | None" = None
    encoding: "EnsembleCall | None" = None  # of an encoder that was called on its own
    last: dict[str, Tensor] | None = None  # what the routers gave in the pass before

    def __reduce__(self) -> tuple[Any, ...]:
        return Current, ()


class CoefficientRouter(nn.Module):
    """Hidden states to coefficients, before they are averaged (WEMoE, equations 3 and 4)."""

    def __init__(self, width: int, ensembling: Ensembling) -> None:
        super().__init__()
        self.width = width
        self.init_lambda = ensembling.init_lambda
        self.init_std = ensembling.init_std
        experts = len(ensembling.experts)
        if ensembling.router_layers == 2:
            self.hidden = nn.Linear(width, width)
        if ensembling.router_layers:
            self.weight = nn.Parameter(torch.zeros(experts, width))
        self.bias = nn.Parameter(torch.zeros(experts))

    @property
    def is_constant(self) -> bool:
        return not hasattr(self, "weight")

    def forward(self, h: Tensor | None) -> Tensor:
        """(…, width) to (…, experts), in float32 or wider, since means over many are taken of it.

        A constant gives (experts,), whatever h is.
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
    """What a cache carries from one forward pass to the next.

    values: tensors by group; the first axis is the sample.
    merged: weights and biases by module.
    """

    values: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    merged: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    can_be_cropped: bool = True


class _Carrying:
    """A cache that does to what it carries what is done to its rows, as in beam search."""

    carried: Carried

    # Beam search drops and doubles sequences, and each keeps the coefficients that were chosen for
    # its prompt. Merged weights are those of the one row that there was, unless nothing is carried
    # by row: then they come from constants, which hold for any rows.
    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        values = {}
        for group, tensors in self.carried.values.items():
            values[group] = tuple(change(tensor) for tensor in tensors)
        merged = {} if values else self.carried.merged
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


class EnsembleCall:
    """One forward pass of the whole model, or of its encoder alone."""

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        self.model = model
        self.generates = model.can_generate()
        self.is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        is_running = self.is_encoder_decoder or model.ensembling.mode == "running"
        self.runs = self.generates and is_running
        self.mask = arguments.get("attention_mask")
        self.decoder_mask = arguments.get("decoder_attention_mask")
        self.override = arguments.get("coefficients")
        self.samples = samples_in(arguments)
        self.head = 0
        self.has_begun = False
        if model.ensembling.router_layers:
            refuse_other_caches(arguments)
        self.cache: Any = cache_in(arguments)
        self.keeps_no_cache = arguments.get("use_cache") is False
        self.uses_cache = self.cache is not None or arguments.get("use_cache") is True
        if self.cache is not None and self.cache.is_compileable:
            raise ValueError(
                "a static cache hides which tokens are padding: leave cache_implementation out",
            )
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())
        # What this pass leaves behind is kept apart from what it was handed: gradient
        # checkpointing runs layers again, and these must not count their tokens twice.
        carried = getattr(self.cache, "carried", None) if self.past else None
        self.carried: Carried = carried or Carried(can_be_cropped=not self.runs)
        self.left: dict[str, tuple[Tensor, ...]] = {}
        # By group: (experts,), (samples, experts) or (samples, tokens, experts).
        self.values: dict[str, Tensor] = {}
        self.keeping: set[str] = set()  # groups whose merged weights serve further passes
        if model.ensembling.per_tensor:
            self._weigh_tensors(model)

    def _weigh_tensors(self, model: Any) -> None:
        """Take the constants of all parameters, which no hidden state chooses.

        So everything is known before the first module is called.
        """
        for index, name in enumerate(model.ensembling.groups):
            router = model.routers["0" if model.ensembling.shared_router else str(index)]
            if self.override is None:
                self.values[name] = router(None)
            else:
                self.values[name] = self.override[0, index]
        if self.override is None and self.cache is not None and not torch.is_grad_enabled():
            self.keeping = set(model.ensembling.groups)

    @property
    def fills_cache(self) -> bool:
        return self.cache is not None and self.past == 0

    def earlier(self, name: str) -> tuple[Tensor, ...] | None:
        """What the cache carries for this group; None at the start of a sequence.

        `ValueError` where the cache carries nothing; `RuntimeError` where the same generation
        started before.
        """
        if self.past and name not in self.carried.values:
            raise ValueError(
                "this cache was not filled by the routers of this model: start with an empty one",
            )
        # Running means without a cache start anew in every pass, which goes over everything.
        # A pass of somebody's own that says use_cache=False is no step of a generation.
        counts = self.uses_cache or not (self.runs or self.keeps_no_cache)
        if not self.past and not self.has_begun and counts:
            begin_sequences(self.model)
            self.has_begun = True
        return self.carried.values.get(name)

    def end(self, output: Any) -> None:
        """Leave with the cache what further passes need."""
        filled = self.cache if self.cache is not None else cache_in(output)
        if filled is None:
            return
        self.carried.values |= self.left
        if not isinstance(filled, _Carrying):
            kind: Any = type(filled)
            filled.__class__ = _carrying(kind)
        filled.carried = self.carried

    def real(self, h: Tensor, *, in_decoder: bool) -> Tensor:
        """Which tokens of h (samples, tokens, width) are not padding: (samples, tokens)."""
        mask = self.decoder_mask if in_decoder and self.is_encoder_decoder else self.mask
        past = 0 if self.is_encoder_decoder and not in_decoder else self.past
        if not isinstance(mask, Tensor) or mask.shape != (len(h), past + h.shape[1]):
            return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        return mask[:, past:].bool().to(h.device)


def samples_in(arguments: dict[str, Any]) -> int | None:
    """The number of samples, if the inputs agree on it."""
    inputs = [arguments.get(name) for name in _INPUTS]
    numbers = {len(values) for values in inputs if isinstance(values, Tensor)}
    return numbers.pop() if len(numbers) == 1 else None


def mean(values: Tensor, chosen: Tensor) -> Tensor:
    """(samples, tokens, n) over the chosen tokens to (samples, n)."""
    # Not values * chosen: what is left out may be infinite or NaN.
    total = torch.where(chosen[..., None], values, 0).sum(dim=1)
    return total / chosen.sum(dim=1, keepdim=True).clamp(min=1)


# At every position the sum of the values up to it, divided by how many there are. Both go on from
# what a cache carries, so that a pass with it gives what one over the whole sequence would. Values
# are in float32 or wider: a sum of thousands of bfloat16 numbers would stop growing.
def running_mean(
    values: Tensor,
    real: Tensor,
    total: Tensor | int = 0,
    count: Tensor | int = 0,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Means (samples, tokens, n) over the tokens up to each one, and total and count at the last.

    `total` and `count` are those of the tokens before; `real` (samples, tokens) are not padding.
    """
    totals = torch.where(real[..., None], values, 0).cumsum(dim=1) + total
    counts = real.cumsum(dim=1)[..., None] + count
    return totals / counts.clamp(min=1), (totals[:, -1:], counts[:, -1:])
