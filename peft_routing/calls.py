"""What a module must know of the forward pass it is in: padding, prefix and cache.

A coefficient that holds for a whole sequence comes from a prefix alone: the prompt where a cache is
filled (`generate`), else the first `routing_tokens` tokens of a decoder. It is kept with the cache
that it belongs to. A model that does not generate (an encoder, a classifier, a vision model) is
routed by the whole input. `hooks` starts and ends these passes.
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from _mergekit_moe_ext_common.host_cache import begin_sequences, cache_in, refuse_other_caches
from peft_routing.routers import over_tokens, wide

_ON_CACHE = "_routed_lora_coefficients"
_NO_CACHE = "routing per sequence keeps its choice with a key-value cache, which this model has not"
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_values",
    "input_features",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)


class RoutedCall:
    """One forward pass of the whole model."""

    def __init__(
        self,
        model: Any,
        arguments: dict[str, Any],
        *,
        per_sequence: bool,
        outer: "RoutedCall | None",
    ) -> None:
        self.model = model
        self.outer = outer
        self.balance: list[Tensor] = []
        self.balance_weight = 0.0
        config = getattr(model, "config", None)
        self._training = model.training
        self._is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
        self._mask = arguments.get("attention_mask")
        self._predicts_tokens = hasattr(model, "can_generate") and model.can_generate()
        example = input_in(arguments)
        self._batch_size = None if example is None else len(example)
        self._has_begun = False
        if per_sequence:
            refuse_other_caches(arguments)
        self._cache: Any = cache_in(arguments) if per_sequence else None
        self._keeps_no_cache = arguments.get("use_cache") is False
        self._state_space = _knows_no_length(self._cache)
        if self._state_space:
            self._cache = None
        # An empty cache is about to be filled by the prompt. What another sequence chose with this
        # cache object, before it was reset, is forgotten.
        self._fills_cache = self._cache is not None and self._cache.get_seq_length() == 0
        if self._fills_cache:
            setattr(self._cache, _ON_CACHE, {})
        # `generate` without a cache: every step goes over prompt and answer, and asks for the last
        # logits alone. A training pass does not.
        has_no_cache = self._cache is None and arguments.get("use_cache") is False
        self._grows_without_cache = has_no_cache and "logits_to_keep" in arguments

    def choose(self, router: Any, x: Tensor, adapter: str, layer: Any) -> Tensor:
        """The coefficients (…, experts) of a router that depends on its input x.

        They can be broadcast over the tokens of x.
        """
        key = adapter, layer.key
        if router.granularity == "token":
            scores = router.scores(x)
            coefficients = router.coefficients(scores)
        elif self._cache is not None and not self._fills_cache:
            # A later step of `generate`: the prompt chose, and its choice lies with the cache, not
            # with the module, which other sequences may have passed through in between.
            known: dict[Any, Tensor] = getattr(self._cache, _ON_CACHE, {})
            if key not in known:
                raise ValueError(
                    "there are no coefficients for the sequences of this cache: start with an "
                    "empty one of your own, past_key_values=DynamicCache(config=model.config), "
                    "with this adapter active"
                )
            return over_tokens(known[key], x)
        else:
            self._begin()
            scores = self._mean(router.scores(x), self.prefix(x, router.routing_tokens))
            coefficients = router.coefficients(scores)
            if self._fills_cache:
                getattr(self._cache, _ON_CACHE)[key] = coefficients
        if router.is_balanced and self._training:
            self.balance.append(self._imbalance(router, scores))
        if router.granularity == "token":
            return coefficients
        return over_tokens(coefficients, x)

    def _begin(self) -> None:
        """`RuntimeError` where the same generation chose for its sequences in an earlier pass."""
        # A pass of somebody's own that says use_cache=False is no step of a generation.
        if not self._has_begun and not self._keeps_no_cache:
            begin_sequences(self.model)
        self._has_begun = True

    # Where a cache is filled the whole input is a prompt, and what is predicted comes later. A
    # plain pass of a decoder goes over prompt and answer at once: only a part that is fixed in
    # advance may choose there, or the choice would know the answer.
    def prefix(self, x: Tensor, routing_tokens: int) -> Tensor | None:
        """Which tokens of x (batch, length, …) choose: (batch, length), or None for all of them."""
        if self._grows_without_cache:
            raise ValueError(
                "routing per sequence keeps its choice with the cache: generate with "
                "use_cache=True, and leave logits_to_keep out of a pass without one"
            )
        if self._state_space:
            raise ValueError(_NO_CACHE)
        if self._batch_size is not None and len(x) != self._batch_size:
            raise ValueError(
                f"cannot tell the sequences apart in an input of shape {tuple(x.shape)} with "
                f"{self._batch_size} sequences: use granularity='token'"
            )
        if x.ndim != 3:
            return None
        real = self._real(x)
        if self._predicts_tokens and not self._fills_cache:
            if real is None:
                real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            return real & (real.cumsum(dim=1) <= routing_tokens)
        return real

    def prefix_of_labels(self, labels: Tensor, routing_tokens: int) -> Tensor | None:
        """Which labels (batch, length) are of tokens that choose; None where none is to go."""
        if not self._predicts_tokens or labels.ndim != 2:
            return None
        return self.prefix(labels[..., None], routing_tokens)

    def _real(self, x: Tensor) -> Tensor | None:
        """Which tokens of x (batch, length, …) are not padding; None for all of them."""
        if self._mask is None or (self._is_encoder_decoder and self._mask.shape != x.shape[:2]):
            return None  # the mask is the encoder's
        if isinstance(self._mask, Tensor) and self._mask.shape == x.shape[:2]:
            return self._mask.bool().to(x.device)
        is_tensor = isinstance(self._mask, Tensor)
        shape = tuple(self._mask.shape) if is_tensor else type(self._mask).__name__
        raise ValueError(
            "routing needs an attention mask of shape (batch, tokens) to leave out padding; it is "
            f"{shape} for an input of shape {tuple(x.shape)}"
        )

    @staticmethod
    def _mean(scores: Tensor, chosen: Tensor | None) -> Tensor:
        """(batch, …, n) over the chosen tokens to (batch, n)."""
        scores = wide(scores)
        if scores.ndim == 2:
            return scores
        if chosen is None:
            return scores.flatten(1, -2).mean(dim=1)
        # Not scores * chosen: what is left out may be infinite or NaN.
        total = torch.where(chosen[..., None], scores, 0).sum(dim=1)
        return total / chosen.sum(dim=1, keepdim=True).clamp(min=1)

    def _imbalance(self, router: Any, scores: Tensor) -> Tensor:
        """n sum of f_i P_i, a scalar: 1 at balance, more where few experts are chosen."""
        # f is how often an expert was chosen, P its probability, both averaged over tokens. Only P
        # has a gradient: it falls for experts that are chosen much. Padding is not counted.
        probabilities = router.probabilities(scores)
        chosen = router.load(scores).detach()
        if router.granularity == "token" and scores.ndim == 3:
            real = self._real(scores)
            if real is not None:
                probabilities = probabilities[real]
                chosen = chosen[real]
        mean_probability = probabilities.flatten(0, -2).mean(dim=0)
        frequency = chosen.flatten(0, -2).mean(dim=0)
        return (mean_probability * frequency).sum() * scores.shape[-1]

    def check_cache(self) -> None:
        """`ValueError` if the cache to which the choice was entrusted was not filled."""
        if self._fills_cache and self._cache.get_seq_length() == 0:
            raise ValueError(_NO_CACHE)


CALL: ContextVar[RoutedCall | None] = ContextVar("peft_routing_call", default=None)


def coefficients_at(layer: Any, router: Any, x: Tensor, adapter: str) -> Tensor:
    """The coefficients that the router of an adapter gives to the input x of a layer.

    They are (experts,), or (…, experts) to be broadcast over the tokens of x. `RuntimeError` where
    routing is per sequence, and a part of the model is called alone.
    """
    if not router.depends_on_input or (router.granularity == "token" and not router.is_balanced):
        return router(x)
    call = CALL.get()
    if call is not None:
        return call.choose(router, x, adapter, layer)
    if router.granularity == "sequence":
        raise RuntimeError(
            "routing per sequence needs the whole model to be called, not a part of it",
        )
    return router(x)


def input_in(arguments: dict[str, Any]) -> Any:
    """One of the inputs (batch, …) of a forward pass; None if there is none."""
    return next((arguments[name] for name in _INPUTS if arguments.get(name) is not None), None)


def _knows_no_length(cache: Any) -> bool:
    """Whether none of a cache's layers counts tokens, as in a state-space model."""
    is_linear = getattr(cache, "is_linear", [])
    return bool(is_linear) and all(is_linear)
