"""The state of a weight-ensembling model's forward passes, and what a cache carries between them.

Routers give one set of coefficients per sample, the mean over its tokens. In a model that generates
and is in mode `running` they give one at every position, the mean over the tokens up to it.
"""

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from .configuration_wemoe import Ensembling
from .host_cache import (
    FollowingCache,
    begin_sequences,
    cache_in,
    following,
    refuse_other_caches,
)
from .packed_rows import refuse_packed_rows
from .padding import inferred_masks

# An argument of `forward`, of `generate` alone: this pass goes over a prompt, of which all chooses.
IS_PROMPT = "prompt_chooses"
# Another: masks (rows, tokens) by argument; `generate` makes other masks of them for static caches.
PADDING_MASKS = "padding_masks"
OUTSIDE = (
    "a weight-ensembling module must be called through its model, which knows samples and padding"
)
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)
# The arguments that tell padding, of tokens and of what an image was cut into (SigLIP 2).
_TOKEN_MASK = "attention_mask"
_DECODER_MASK = "decoder_attention_mask"
_IMAGE_MASK = "pixel_attention_mask"
# A value of `coefficients=`: every sample has the mean of what the batch's samples would have.
BATCH = "batch"
_TAKES_OTHERS = {"pixel_values", "input_features", "input_values", "query_embeds"}


class Current(threading.local):
    """The call that is running, for every module that takes part; each thread has its own."""

    call: "EnsembleCall | None" = None
    encoding: "EnsembleCall | None" = None  # the call of an encoder on its own
    last: dict[str, Tensor] | None = None  # the coefficients of the last pass, by group

    def __reduce__(self) -> tuple[Any, ...]:
        return Current, ()


class CoefficientRouter(nn.Module):
    """Hidden states to coefficients, before they are averaged (WEMoE, equations 3 and 4)."""

    def __init__(self, width: int, ensembling: Ensembling) -> None:
        super().__init__()
        self.width = width
        self.init_lambda = ensembling.init_lambda
        self.router_init_std = ensembling.router_init_std
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
        """The coefficients (…, experts) of hidden states (…, width).

        They are in float32 or wider, since means over many tokens follow. A constant gives
        (experts,), whatever h is.
        """
        if self.is_constant:
            return self.bias
        assert h is not None
        x = h.to(self.weight.dtype)
        if hasattr(self, "hidden"):
            x = functional.relu(self.hidden(x))
        c = functional.linear(x, self.weight, self.bias)
        return c.to(torch.promote_types(c.dtype, torch.float32))


@dataclass
class Carried:
    """The tensors that a cache carries from one forward pass to the next.

    values: coefficients, or totals and counts of running means (samples, 1, …), by group; the
        first axis is the sample.
    merged: merged weights and biases, by the `id` of their module.
    rows_changed: whether the cache's rows were exchanged since the last pass, as a beam search does
        after every token: merged weights would not last.
    can_be_cropped: whether tokens can be taken back from the cache.
    keeps_every_sum: whether totals and counts are those at every token, (samples, tokens, …), so
        that tokens can be taken back.
    mask: the mask (rows, tokens) of tokens that came without one and have padding at an end.
    is_ahead: whether the values were chosen before the first pass that fills the cache.
    """

    values: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    merged: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    can_be_cropped: bool = True
    keeps_every_sum: bool = False
    rows_changed: bool = False
    mask: Tensor | None = None
    is_ahead: bool = False

    # Where a cache goes on from a file, an `id` is that of another module.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "merged": {}}


class Carrying(FollowingCache):
    """A cache that carries the coefficients of its rows, and weights that were merged by them."""

    carried: Carried

    # Beam search drops and doubles sequences, and each keeps the coefficients that were chosen for
    # its prompt. Merged weights belong to the rows that there were, and are dropped, unless nothing
    # is carried by row: then they come from constants, which hold for any rows.
    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        values = {}
        for group, tensors in self.carried.values.items():
            values[group] = tuple(change(tensor) for tensor in tensors)
        mask = self.carried.mask
        self.carried = Carried(
            values,
            {} if values else self.carried.merged,
            self.carried.can_be_cropped,
            self.carried.keeps_every_sum,
            rows_changed=bool(values),
            mask=None if mask is None else change(mask),
        )

    def crop(self, tokens_to_remove: int) -> None:
        if not self.carried.can_be_cropped:
            raise ValueError(
                "mode running: the running means that this cache carries cannot take tokens back, "
                "so it cannot be cropped"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        length = int(self.get_seq_length())  # type: ignore[attr-defined]
        if self.carried.mask is not None:
            self.carried.mask = self.carried.mask[:, :length]
        if self.carried.keeps_every_sum:
            for group, sums in self.carried.values.items():
                self.carried.values[group] = tuple(each[:, :length] for each in sums)


def carry(cache: Any, carried: Carried) -> None:
    """Have a cache carry this. It stays the object that its holder has; its class changes."""
    if not isinstance(cache, Carrying):
        cache_class: Any = type(cache)
        cache.__class__ = following(cache_class, Carrying)
    cache.carried = carried


class EnsembleCall:
    """One forward pass of the whole model, or of its encoder alone."""

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        self.model = model
        self.generates = model.can_generate()
        self.is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        is_running = self.is_encoder_decoder or model.ensembling.mode == "running"
        self.runs = self.generates and is_running
        masks = {**arguments, **(arguments.get(PADDING_MASKS) or {})}
        self.masks = {name: masks.get(name) for name in (_TOKEN_MASK, _IMAGE_MASK)}
        self.decoder_mask = masks.get(_DECODER_MASK)
        coefficients = arguments.get("coefficients")
        self.is_of_batch = isinstance(coefficients, str)
        self.override = None if self.is_of_batch else coefficients
        self.samples = samples_in(arguments)
        self.head = 0
        self.has_begun = False
        if model.ensembling.router_layers:
            refuse_other_caches(arguments)
            if self.override is None:
                self._check_masks()
                if self.generates and not self.is_encoder_decoder:
                    refuse_packed_rows(arguments, self.masks[_TOKEN_MASK])
        self.cache: Any = cache_in(arguments)
        self.keeps_no_cache = arguments.get("use_cache") is False
        self.uses_cache = self.cache is not None or arguments.get("use_cache") is True
        self.is_prompt = bool(arguments.get(IS_PROMPT))
        if self.is_of_batch and self.generates and (self.runs or not self.keeps_no_cache):
            raise ValueError(
                f'coefficients="{BATCH}" is for a model that has one set of coefficients per '
                "sample, and in one that generates for a pass with use_cache=False"
            )
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())
        # What this pass leaves behind is kept apart from what it was handed: gradient
        # checkpointing runs layers again, and these must not count their tokens twice.
        carried = getattr(self.cache, "carried", None)
        if carried is None or not (self.past or carried.is_ahead):
            keeps_every_sum = carried is not None and carried.keeps_every_sum
            can_be_cropped = keeps_every_sum or not self.runs
            carried = Carried(can_be_cropped=can_be_cropped, keeps_every_sum=keeps_every_sum)
        self.carried: Carried = carried
        self.left: dict[str, tuple[Tensor, ...]] = {}
        # By group: (experts,), (samples, experts) or (samples, tokens, experts).
        self.values: dict[str, Tensor] = {}
        self.computed: dict[tuple[Any, ...], Tensor] = {}  # what several groups need
        self.keeping: set[str] = set()  # groups whose merged weights serve further passes
        if model.ensembling.per_tensor:
            self._weigh_tensors(model)

    def _weigh_tensors(self, model: Any) -> None:
        """Take the constants of all parameters, which depend on no hidden state.

        So all coefficients are known before the first module is called.
        """
        for index, name in enumerate(model.ensembling.groups):
            router = model.routers["0" if model.ensembling.shared_router else str(index)]
            if self.override is None:
                self.values[name] = router(None)
            else:
                self.values[name] = self.override[0, index]
        if self.override is None and self.cache is not None and not torch.is_grad_enabled():
            self.keeping = set(model.ensembling.groups)

    def _check_masks(self) -> None:
        """`ValueError` for a mask that does not say of every token whether it is padding."""
        for name, mask in (
            (_TOKEN_MASK, self.masks[_TOKEN_MASK]),
            (_DECODER_MASK, self.decoder_mask),
        ):
            if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
                form = "of this kind"
                if isinstance(mask, Tensor):
                    form = f"of shape {tuple(mask.shape)}"
                raise ValueError(
                    f"{name}= {form} does not say which tokens are padding, which no router may "
                    "count: give one of shape (rows, tokens), or coefficients="
                )

    def with_inferred_mask(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, with a mask where tokens came without one and have padding at an end.

        It holds for the steps that follow with the cache, too.
        """
        tokens = arguments.get("input_ids")
        is_told = any(arguments.get(name) is not None for name in (_TOKEN_MASK, "position_ids"))
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or is_told:
            return arguments
        attention: Tensor | None
        if self.past and not self.is_encoder_decoder:
            if self.carried.mask is None:
                return arguments
            new = self.past + tokens.shape[1] - self.carried.mask.shape[1]
            attention = functional.pad(self.carried.mask, (0, new), value=1)
            self.masks[_TOKEN_MASK] = attention
        else:
            attention, self.masks[_TOKEN_MASK] = inferred_masks(
                tokens, self.model.config.get_text_config()
            )
        self.carried.mask = attention
        return arguments if attention is None else {**arguments, _TOKEN_MASK: attention}

    @property
    def fills_cache(self) -> bool:
        return self.cache is not None and self.past == 0

    def earlier(self, name: str) -> tuple[Tensor, ...] | None:
        """The tensors that the cache carries for this group; None at the start of a sequence.

        `ValueError` where a filled cache carries nothing for it; `RuntimeError` where the same
        generation started before.
        """
        if self.past and name not in self.carried.values:
            raise ValueError(
                "this cache was not filled by the routers of this model: start with an empty one",
            )
        if self.carried.is_ahead:
            return self.carried.values[name]
        # Running means without a cache start anew in every pass, which goes over the whole
        # sequence. A pass of the user's own with use_cache=False is not a step of a generation.
        counts = self.uses_cache or self.is_prompt or not (self.runs or self.keeps_no_cache)
        if not self.past and not self.has_begun and counts:
            begin_sequences(self.model)
            self.has_begun = True
        return self.carried.values.get(name)

    def running_mean(self, name: str, values: Tensor, real: Tensor | None) -> Tensor:
        """Means (samples, tokens, n) of a group's values over the tokens up to each one.

        They go on from what the cache carries, and leave with it what the next pass needs.
        """
        if real is None:
            real = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        earlier = self.earlier(name)
        last = [sums[:, -1:] for sums in earlier] if earlier else []
        means, sums = running_mean(values, real, *last)
        if not self.carried.keeps_every_sum:
            self.left[name] = tuple(each[:, -1:] for each in sums)
        elif earlier:
            pairs = zip(earlier, sums, strict=True)
            self.left[name] = tuple(torch.cat(pair, dim=1) for pair in pairs)
        else:
            self.left[name] = sums
        return means

    def end(self, output: Any) -> None:
        """Leave with the cache what further passes need."""
        filled_cache = self.cache if self.cache is not None else cache_in(output)
        if filled_cache is None:
            return
        self.carried.values |= self.left
        self.carried.rows_changed = False
        self.carried.is_ahead = False
        carry(filled_cache, self.carried)

    def real(self, h: Tensor, *, in_decoder: bool, mask_name: str = _TOKEN_MASK) -> Tensor | None:
        """Booleans (samples, tokens): whether each token of h (samples, tokens, width) is not
        padding; None where none is.

        `mask_name` is the argument that says so (`mask_of_group`), outside a decoder beside an
        encoder.
        """
        # The mask covers the cached tokens, too, of which an encoder has none.
        mask = self.masks[mask_name]
        if in_decoder and self.is_encoder_decoder:
            mask = self.decoder_mask
        past = 0 if self.is_encoder_decoder and not in_decoder else self.past
        if not isinstance(mask, Tensor) or mask.shape != (len(h), past + h.shape[1]):
            return None
        return self.once(
            ("real", mask_name, in_decoder, h.device),
            lambda: mask[:, past:].bool().to(h.device),
        )

    def once(self, key: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """What is computed under this key, once for all groups that read the same tokens."""
        if key not in self.computed:
            self.computed[key] = compute()
        return self.computed[key]


def mask_of_group(model: nn.Module, group: str) -> str:
    """The argument of `forward` that says which tokens of this group's input are padding.

    Of two towers each has its own tokens, and a text's mask says nothing of images. The tower of a
    group is the innermost module around it that takes token ids, or something else in their place.
    """
    path = group.split(".")
    for depth in range(len(path), 0, -1):
        module = model.get_submodule(".".join(path[:depth]))
        takes = set(inspect.signature(module.forward).parameters)
        if "input_ids" in takes:
            return _TOKEN_MASK
        # A model inside another that takes neither, nor a mask (the visual part of Qwen2-VL).
        is_model_of_its_own = isinstance(module, PreTrainedModel) and _TOKEN_MASK not in takes
        if takes & _TAKES_OTHERS or is_model_of_its_own:
            return _IMAGE_MASK
    takes = set(inspect.signature(model.forward).parameters)
    is_of_images_alone = _IMAGE_MASK in takes and "input_ids" not in takes
    return _IMAGE_MASK if is_of_images_alone else _TOKEN_MASK


def samples_in(arguments: dict[str, Any]) -> int | None:
    """The number of samples; None where the inputs do not agree on it."""
    inputs = [arguments.get(name) for name in _INPUTS]
    numbers = {len(values) for values in inputs if isinstance(values, Tensor)}
    return numbers.pop() if len(numbers) == 1 else None


def mean(values: Tensor, is_counted: Tensor | None) -> Tensor:
    """The means (samples, n) of values (samples, tokens, n) over the counted tokens; None for all.

    Those over no tokens are 0.
    """
    if is_counted is None:
        return values.mean(dim=1) if values.shape[1] else values.sum(dim=1)
    # Not values * is_counted: what is left out may be infinite or NaN.
    total = torch.where(is_counted[..., None], values, 0).sum(dim=1)
    return total / is_counted.sum(dim=1, keepdim=True).clamp(min=1)


# At every position the sum of the values up to it is divided by their number. Both go on from what
# a cache carries, so that a pass with a cache gives what one over the whole sequence would. Values
# are in float32 or wider: a sum of thousands of bfloat16 numbers would stop growing.
def running_mean(
    values: Tensor,
    real: Tensor,
    total: Tensor | int = 0,
    count: Tensor | int = 0,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Means (samples, tokens, n) over the tokens up to each one, with totals and counts.

    `total` and `count` are those of the tokens before; `real` (samples, tokens) says which tokens
    are not padding.
    """
    totals = torch.where(real[..., None], values, 0).cumsum(dim=1) + total
    counts = real.cumsum(dim=1)[..., None] + count
    return totals / counts.clamp(min=1), (totals, counts)
