"""Hooks on a model that follow its forward passes, for choices per sequence and for balance.

A pass that is followed is a `RoutedCall`, which the routed layers ask. Positions inside the prefix
depend on one another, so labels there are left out of the loss.
"""

import inspect
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from _mergekit_moe_ext_common.host_cache import OUTPUT_NAME, generating, with_cache_renamed
from _mergekit_moe_ext_common.prefix_labels import IGNORED, without_prefix_labels
from peft_routing import given
from peft_routing.calls import CALL, RoutedCall, input_in
from peft_routing.config import RoutedLoraConfig

_MIXED = "adapter_names: routed adapters do not mix in a batch; use set_adapter, a batch for each"
_NOT_PER_SEQUENCE = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model")


def watch(model: Any) -> list[Any]:
    """Follow the model's forward passes; returns the hooks' handles.

    The hooks have no state: copies of the model keep working. The model's `generate` then takes
    `coefficients=`, of which transformers' own would say that the model does not use it. It is an
    attribute of the model, since a plain `PeftModel` calls the model's without asking the tuner.
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
    """A model's `generate`, with `coefficients=`.

    It refers to the model weakly, so that a model that is let go is freed at once.
    """

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)
        self.before = vars(model).get("generate")  # where it was not the class's

    def __reduce__(self) -> Any:
        return _Generate, (self.model(),), {"before": self.before}

    def __call__(self, *args: Any, coefficients: Tensor | None = None, **kwargs: Any) -> Any:
        model: Any = self.model()
        generate = self.before or partial(type(model).generate, model)
        if coefficients is None:
            with generating(model, kwargs.get("guidance_scale")):
                return generate(*args, **kwargs)
        with given.given_coefficients(coefficients):
            return generate(*args, **kwargs)


def refuse_mixed_batches(kwargs: dict[str, Any]) -> None:
    """`ValueError` where a batch is to use several adapters."""
    if kwargs.get("adapter_names") is not None:
        raise ValueError(_MIXED)


def refuse_several_passes(model: Any, kwargs: dict[str, Any]) -> None:
    """`ValueError` where `generate` would add a draft to the prompt, or cut it.

    The prompt must be the first pass.
    """
    if kwargs.get("coefficients") is not None or given.current() is not None:
        return
    if not any(config.routes_sequences for config in _watched(model)):
        return
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    for name in _NOT_PER_SEQUENCE:
        if kwargs.get(name, getattr(settings, name, None)) is not None:
            raise ValueError(
                f"{name}: routing per sequence chooses by the first pass, which must be the prompt",
            )


def _followed(model: Any) -> dict[str, RoutedLoraConfig]:
    """The adapters for which a forward pass is followed where they are active."""
    followed = {}
    for name, config in getattr(model, "peft_config", {}).items():
        if not isinstance(config, RoutedLoraConfig):
            continue
        if config.routes_sequences or config.router_aux_loss_coef:
            followed[name] = config
    return followed


def _watched(model: Any) -> list[RoutedLoraConfig]:
    """The configurations of those active adapters that are followed."""
    configs = _followed(model)
    if not configs:
        return []
    layers = (module for module in model.modules() if hasattr(module, "routed_lora_experts"))
    layer: Any = next(layers, None)
    if layer is None or layer.disable_adapters or layer.merged:
        return []
    return [configs[name] for name in layer.active_adapters if name in configs]


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(model).forward).parameters)[1:] if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    refuse_mixed_batches(kwargs)
    kwargs, coefficients = _given(kwargs)
    if any(isinstance(value, Cache) and name != OUTPUT_NAME for name, value in kwargs.items()):
        kwargs = with_cache_renamed(kwargs, inspect.signature(type(model).forward).parameters)
    if coefficients is not None:
        given.enter(model, coefficients, input_in(_arguments(model, args, kwargs)))
        if model.training:
            _keep_in_checkpoints(model)
        return args, kwargs
    configs = _watched(model)
    if not configs:
        return args, kwargs
    per_sequence = [config.routing_tokens for config in configs if config.routes_sequences]
    arguments = _arguments(model, args, kwargs)
    call = RoutedCall(model, arguments, per_sequence=bool(per_sequence), outer=CALL.get())
    call.balance_weight = max(config.router_aux_loss_coef for config in configs)
    if per_sequence and isinstance(kwargs.get("labels"), Tensor):
        prefix = call.prefix_of_labels(kwargs["labels"], max(per_sequence))
        if prefix is not None:
            kwargs = without_prefix_labels(kwargs, prefix, training=model.training)
    if model.training:
        _keep_in_checkpoints(model)
    CALL.set(call)
    return args, kwargs


def _given(kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The model's own arguments, and the coefficients of this call."""
    coefficients = kwargs.get("coefficients")
    if coefficients is not None:
        given.checked(coefficients)
    elif (outer := given.current()) is not None:
        coefficients = outer.coefficients
    own = {name: value for name, value in kwargs.items() if name != "coefficients"}
    return own, coefficients


def _leave(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if given.leave(model) or not _followed(model):
        return None
    call = CALL.get()
    if call is None or call.model is not model:
        return None
    CALL.set(call.outer)
    if output is not None:
        call.check_cache()
    if call.balance and isinstance(getattr(output, "loss", None), Tensor):
        # The Trainer adds up the losses of a step's batches, each of which counts by its tokens.
        weight = call.balance_weight * _share(model, kwargs)
        balance = torch.stack(call.balance).mean()
        output.loss = output.loss + weight * balance.to(output.loss.device)
    return output


def _share(model: Any, kwargs: dict[str, Any]) -> Any:
    """This pass's share in the tokens of a step; 1 unless the Trainer says how many these are."""
    items = kwargs.get("num_items_in_batch")
    labels = kwargs.get("labels")
    if items is None or labels is None:
        return 1.0
    predicted = labels if model.config.is_encoder_decoder else labels[..., 1:]
    return (predicted != IGNORED).sum() / items


def _keep_in_checkpoints(model: nn.Module) -> None:
    """Have gradient checkpointing run layers within the call that they belong to.

    It runs them again when the forward pass is over.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _InCall):
            module._gradient_checkpointing_func = _InCall(function)  # type: ignore[assignment]


class _InCall:
    """A checkpointing function whose layers find the call, and the given coefficients, again."""

    def __init__(self, checkpoint: Callable):
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        call = CALL.get()
        override = given.current()

        def in_call(*args: Any, **kwargs: Any) -> Any:
            token = CALL.set(call)
            try:
                with given.held(override):
                    return function(*args, **kwargs)
            finally:
                CALL.reset(token)

        return self.checkpoint(in_call, *args, **kwargs)
