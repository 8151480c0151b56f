"""What a module must know of the forward pass it is in: padding, prefix and cache, for choices per sequence.

A coefficient that holds for a whole sequence comes from a prefix alone: the prompt where a cache is filled
(`generate`), else the first `routing_tokens` tokens of a decoder. It is kept with the cache that it belongs to.
Positions inside the prefix depend on one another, so labels there are left out of the loss. A model that does not
generate (an encoder, a classifier, a vision model) is routed by the whole input.
"""

import inspect
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from _mergekit_moe_ext_common.host_cache import (
    OUTPUT_NAME,
    begin_sequences,
    cache_in,
    generating,
    with_cache_renamed,
)
from peft_routing import given
from peft_routing.config import RoutedLoraConfig
from peft_routing.routers import over_tokens, wide

_ON_CACHE = "_routed_lora_coefficients"
_NO_CACHE = "routing per sequence keeps its choice with a key-value cache, which this model has not"
_NOT_PER_SEQUENCE = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model")
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_values",
    "input_features",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)


class Call:
    """One forward pass of the whole model."""

    def __init__(self, model: Any, arguments: dict[str, Any], *, per_sequence: bool, outer: "Call | None"):
        self.model, self.outer = model, outer
        self.balance: list[Tensor] = []
        self.balance_weight = 0.0
        self._training = model.training
        self._is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._mask = arguments.get("attention_mask")
        self._predicts_tokens = hasattr(model, "can_generate") and model.can_generate()
        example = _input(arguments)
        self._batch_size = None if example is None else len(example)
        self._has_begun = False
        self._cache: Any = cache_in(arguments) if per_sequence else None
        # Up to transformers 5.5 the caches of state-space models were of classes of their own.
        self._state_space = arguments.get("cache_params") is not None or _knows_no_length(self._cache)
        if self._state_space:
            self._cache = None
        self._fills_cache = self._cache is not None and self._cache.get_seq_length() == 0
        if self._fills_cache:
            setattr(self._cache, _ON_CACHE, {})
        self._grows_without_cache = (
            self._cache is None and arguments.get("use_cache") is False and "logits_to_keep" in arguments
        )

    def coefficients(self, router: Any, x: Tensor, adapter: str, layer: Any) -> Tensor:
        """Of a router that depends on its input: (…, experts), to be broadcast over the tokens of `x`."""
        key = adapter, layer.key
        if router.granularity == "token":
            scores = router.scores(x)
            coefficients = router.coefficients(scores)
        elif self._cache is not None and not self._fills_cache:
            known: dict[Any, Tensor] = getattr(self._cache, _ON_CACHE, {})
            if key not in known:
                raise ValueError(
                    "there are no coefficients for the sequences of this cache: start with an empty one of your own, "
                    "past_key_values=DynamicCache(config=model.config), with this adapter active"
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
        return coefficients if router.granularity == "token" else over_tokens(coefficients, x)

    def _begin(self) -> None:
        """`RuntimeError` where the same generation chose for its sequences in an earlier pass."""
        if not self._has_begun and not self._grows_without_cache:
            begin_sequences(self.model)
        self._has_begun = True

    def prefix(self, x: Tensor, routing_tokens: int) -> Tensor | None:
        """Which tokens of x (batch, length, …) choose; None for all of them."""
        if self._grows_without_cache:
            raise ValueError(
                "routing per sequence keeps its choice with the cache: generate with use_cache=True, and leave "
                "logits_to_keep out of a pass without one"
            )
        if self._state_space:
            raise ValueError(_NO_CACHE)
        if self._batch_size is not None and len(x) != self._batch_size:
            raise ValueError(
                f"cannot tell the sequences apart in an input of shape {tuple(x.shape)} with {self._batch_size} "
                "sequences: use granularity='token'"
            )
        if x.ndim != 3:
            return None
        real = self._real(x)
        if self._predicts_tokens and not self._fills_cache:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
            return real & (real.cumsum(dim=1) <= routing_tokens)
        return real

    def _real(self, x: Tensor) -> Tensor | None:
        """Which tokens of x (batch, length, …) are no padding; None for all of them."""
        if self._mask is None or (self._is_encoder_decoder and self._mask.shape != x.shape[:2]):
            return None  # the mask is the encoder's
        if not isinstance(self._mask, Tensor) or self._mask.shape != x.shape[:2]:
            shape = tuple(self._mask.shape) if isinstance(self._mask, Tensor) else type(self._mask).__name__
            raise ValueError(
                f"routing needs an attention mask of shape (batch, tokens) to leave out padding; it is {shape} for an "
                f"input of shape {tuple(x.shape)}"
            )
        return self._mask.bool().to(x.device)

    @staticmethod
    def _mean(scores: Tensor, chosen: Tensor | None) -> Tensor:
        """(batch, …, n) over the chosen tokens to (batch, n)."""
        scores = wide(scores)
        if scores.ndim == 2:
            return scores
        if chosen is None:
            return scores.flatten(1, -2).mean(dim=1)
        return torch.where(chosen[..., None], scores, 0).sum(dim=1) / chosen.sum(dim=1, keepdim=True).clamp(min=1)

    def _imbalance(self, router: Any, scores: Tensor) -> Tensor:
        """n sum of f_i P_i: what was chosen times its probability, both averaged over tokens; 1 at balance."""
        probabilities = router.probabilities(scores)
        chosen = router.load(scores).detach()
        if router.granularity == "token" and scores.ndim == 3 and (real := self._real(scores)) is not None:
            probabilities, chosen = probabilities[real], chosen[real]
        of_each = probabilities.flatten(0, -2).mean(dim=0) * chosen.flatten(0, -2).mean(dim=0)
        return of_each.sum() * scores.shape[-1]

    def check_cache(self) -> None:
        if self._cache is not None and self._fills_cache and self._cache.get_seq_length() == 0:
            raise ValueError(_NO_CACHE)

    def without_prefix(self, labels: Tensor, routing_tokens: int) -> Tensor:
        """Labels whose tokens had no part in the choice; the others become -100."""
        if not self._predicts_tokens or labels.ndim != 2:
            return labels
        chosen = self.prefix(labels[..., None], routing_tokens)
        return labels if chosen is None else labels.masked_fill(chosen.to(labels.device), -100)


_CALL: ContextVar[Call | None] = ContextVar("peft_routing_call", default=None)


def coefficients(router: Any, x: Tensor, adapter: str, layer: Any) -> Tensor:
    """What the router of an adapter gives to the input x of a layer."""
    if not router.depends_on_input or (router.granularity == "token" and not router.is_balanced):
        return router(x)
    call = _CALL.get()
    if call is not None:
        return call.coefficients(router, x, adapter, layer)
    if router.granularity == "sequence":
        raise RuntimeError("routing per sequence needs the whole model to be called, not a part of it")
    return router(x)


def watch(model: Any) -> list[Any]:
    """Follow the model's forward passes; returns the hooks' handles. The hooks have no state: copies keep working.

    Its `generate` then takes `coefficients=`, of which transformers' own would say that the model does not use it. It
    is an attribute of the model, since a plain `PeftModel` calls the model's without asking the tuner.
    """
    if hasattr(model, "generate"):
        model.generate = _Generate(model)
    return [
        model.register_forward_pre_hook(_enter, with_kwargs=True),
        model.register_forward_hook(_leave, with_kwargs=True, always_call=True),
    ]


def unwatch(model: Any, handles: Sequence[Any]) -> None:
    """Leave nothing of ours on the model."""
    for handle in handles:
        handle.remove()
    while isinstance(ours := vars(model).get("generate"), _Generate):
        del model.generate
        if ours.before is not None:
            model.generate = ours.before
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, _InCall):
            module._gradient_checkpointing_func = function.checkpoint


class _Generate:
    """A model's `generate`, with `coefficients=`. Without a cycle, so that a model that is let go is freed at once."""

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)
        self.before = vars(model).get("generate")  # where it was not the class's

    def __reduce__(self) -> Any:
        return _Generate, (self.model(),), {"before": self.before}

    def __call__(self, *args: Any, coefficients: Tensor | None = None, **kwargs: Any) -> Any:
        model: Any = self.model()
        generate = self.before or partial(type(model).generate, model)
        if coefficients is None:
            with generating(model):
                return generate(*args, **kwargs)
        with given.given_coefficients(coefficients):
            return generate(*args, **kwargs)


def refuse_mixed_batches(kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise ValueError("adapter_names: routed adapters do not mix in one batch; use set_adapter, a batch for each")


def refuse_several_passes(model: Any, kwargs: dict[str, Any]) -> None:
    """The prompt must be the first pass: `generate` must not add a draft to it, or cut it."""
    if kwargs.get("coefficients") is not None or given.current() is not None:
        return
    if not any(config.routes_sequences for config in _watched(model)):
        return
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    for name in _NOT_PER_SEQUENCE:
        if kwargs.get(name, getattr(settings, name, None)) is not None:
            raise ValueError(f"{name}: routing per sequence chooses by the first pass, which must be the prompt")


def _followed(model: Any) -> dict[str, RoutedLoraConfig]:
    """The adapters for which a forward pass is followed where they are active."""
    return {
        name: config
        for name, config in getattr(model, "peft_config", {}).items()
        if isinstance(config, RoutedLoraConfig) and (config.routes_sequences or config.router_aux_loss_coef)
    }


def _watched(model: Any) -> list[RoutedLoraConfig]:
    """Of the active adapters those that are followed."""
    configs = _followed(model)
    layers = (module for module in model.modules() if hasattr(module, "routed_lora_experts"))
    layer: Any = next(layers, None) if configs else None
    if layer is None or layer.disable_adapters or layer.merged:
        return []
    return [configs[name] for name in layer.active_adapters if name in configs]


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(model).forward).parameters)[1:] if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _input(arguments: dict[str, Any]) -> Any:
    """One of the inputs (batch, …) of a forward pass."""
    return next((arguments[name] for name in _INPUTS if arguments.get(name) is not None), None)


def _knows_no_length(cache: Any) -> bool:
    """Whether none of a cache's layers counts tokens, as in a state-space model."""
    is_linear = getattr(cache, "is_linear", [])
    return bool(is_linear) and all(is_linear)


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    refuse_mixed_batches(kwargs)
    kwargs, coefficients = _given(kwargs)
    if any(isinstance(value, Cache) and name != OUTPUT_NAME for name, value in kwargs.items()):
        kwargs = with_cache_renamed(kwargs, inspect.signature(type(model).forward).parameters)
    if coefficients is not None:
        given.enter(model, coefficients, _input(_arguments(model, args, kwargs)))
        if model.training:
            _keep_in_checkpoints(model)
        return args, kwargs
    configs = _watched(model)
    if not configs:
        return args, kwargs
    per_sequence = [c.routing_tokens for c in configs if c.routes_sequences]
    call = Call(model, _arguments(model, args, kwargs), per_sequence=bool(per_sequence), outer=_CALL.get())
    call.balance_weight = max(config.router_aux_loss_coef for config in configs)
    if per_sequence and isinstance(kwargs.get("labels"), Tensor):
        kwargs = _without_prefix(call, kwargs, max(per_sequence))
    if model.training:
        _keep_in_checkpoints(model)
    _CALL.set(call)
    return args, kwargs


def _given(kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The model's own arguments, and the coefficients of this call."""
    coefficients = kwargs.get("coefficients")
    if coefficients is not None:
        given.checked(coefficients)
    elif (outer := given.current()) is not None:
        coefficients = outer.coefficients
    return {name: value for name, value in kwargs.items() if name != "coefficients"}, coefficients


def _without_prefix(call: Call, kwargs: dict[str, Any], routing_tokens: int) -> dict[str, Any]:
    """Labels of the prefix left out, and of the number of items that the Trainer counted beforehand as well."""
    before, after = kwargs["labels"], call.without_prefix(kwargs["labels"], routing_tokens)
    items = kwargs.get("num_items_in_batch")
    if items is not None and after is not before:
        kept, counted = ((labels[..., 1:] != -100).sum() for labels in (after, before))
        kwargs = {**kwargs, "num_items_in_batch": items * kept.clamp(min=1) / counted.clamp(min=1)}
    return {**kwargs, "labels": after}


def _leave(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if given.leave(model) or not _followed(model):
        return None
    call = _CALL.get()
    if call is None or call.model is not model:
        return None
    _CALL.set(call.outer)
    if output is not None:
        call.check_cache()
    if call.balance and isinstance(getattr(output, "loss", None), Tensor):
        output.loss = output.loss + call.balance_weight * _share(model, kwargs) * torch.stack(call.balance).mean().to(
            output.loss.device
        )
    return output


def _share(model: Any, kwargs: dict[str, Any]) -> Any:
    """Of a step's tokens, those of this forward pass, where the Trainer says how many there are."""
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or labels is None:
        return 1.0
    predicted = labels if model.config.is_encoder_decoder else labels[..., 1:]
    return (predicted != -100).sum() / items


def _keep_in_checkpoints(model: nn.Module) -> None:
    """Gradient checkpointing runs layers again after the forward pass is over: within the same call, then."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _InCall):
            module._gradient_checkpointing_func = _InCall(function)  # type: ignore[assignment]


class _InCall:
    def __init__(self, checkpoint: Callable):
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        call, coefficients = _CALL.get(), given.current()

        def in_call(*args: Any, **kwargs: Any) -> Any:
            token = _CALL.set(call)
            try:
                with given.held(coefficients):
                    return function(*args, **kwargs)
            finally:
                _CALL.reset(token)

        return self.checkpoint(in_call, *args, **kwargs)
