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
from transformers import Cache, GenerationConfig

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.host_cache import OUTPUT_NAME, generating, with_cache_renamed
from _mergekit_moe_ext_common.prefix_labels import (
    IGNORED,
    predicted_labels,
    without_prefix_labels,
)
from peft_routing import given, own_heads
from peft_routing.calls import CALL, RoutedCall, input_in
from peft_routing.config import RoutedLoraConfig
from peft_routing.sharing import SharedChoice, choices_held, give_choices, open_choices

_MIXED = (
    "adapter_names: routed adapters do not mix in a batch; run one per adapter, after set_adapter"
)
# Settings of `generate` by which the first pass is not the prompt: part of it, or a draft as well.
_NOT_PER_SEQUENCE = (
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "assistant_model",
    "assistant_early_exit",
    "use_mtp",
)
# The ways into continuous batching; the first one goes through the second.
_CONTINUOUS = ("generate_batch", "init_continuous_batching")


def watch(model: Any) -> list[Any]:
    """Follow the model's forward passes; returns the hooks' handles.

    The hooks have no state: copies of the model keep working. The model's `generate` then takes
    `coefficients=`, of which transformers' own would say that the model does not use it, and
    continuous batching is refused where it would go wrong. Both are attributes of the model, since
    a plain `PeftModel` calls the model's without asking the tuner.
    """
    if hasattr(model, "generate"):
        model.generate = _Generate(model, "generate")
    for name in _CONTINUOUS:
        if hasattr(model, name):
            setattr(model, name, _Continuous(model, name))
    return [
        model.register_forward_pre_hook(_enter, with_kwargs=True),
        model.register_forward_hook(_leave, with_kwargs=True, always_call=True),
    ]


def share(model: nn.Module, config: RoutedLoraConfig, routers: dict[str, Any]) -> list[Any]:
    """Have modules that have a router in common share its choice; returns the hooks' handles."""
    handles = []
    for module, choice in give_choices(model, config, routers):
        handles += [
            module.register_forward_pre_hook(partial(_begin_choice, choice)),
            module.register_forward_hook(partial(_end_choice, choice), always_call=True),
        ]
    return handles


def _begin_choice(choice: SharedChoice, module: nn.Module, args: Any) -> None:
    choice.begin()
    if module.training and not torch.compiler.is_compiling():
        _keep_in_checkpoints(module, choice)


def _end_choice(choice: SharedChoice, module: nn.Module, args: Any, output: Any) -> None:
    choice.end()


def unwatch(model: Any, handles: Sequence[Any]) -> None:
    """Leave nothing of ours on the model."""
    for handle in handles:
        handle.remove()
    for name in ("generate", *_CONTINUOUS):
        ours = vars(model).get(name)
        # One in place of another, where the model was watched several times.
        while isinstance(ours, _Method):
            delattr(model, name)
            if ours.before is not None:
                setattr(model, name, ours.before)
            ours = ours.before
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, _InCall):
            module._gradient_checkpointing_func = function.checkpoint


class _Method:
    """A method in place of one of the model's.

    It refers to the model weakly, so that a model that is let go is freed at once.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model = weakref.ref(model)
        self.name = name
        self.before = vars(model).get(name)  # where it was not the class's

    def __reduce__(self) -> Any:
        return type(self), (self.model(), self.name), {"before": self.before}

    @property
    def replaced(self) -> Callable:
        model: Any = self.model()
        return self.before or partial(getattr(type(model), self.name), model)


class _Generate(_Method):
    """A model's `generate`, with `coefficients=`."""

    def __call__(self, *args: Any, coefficients: Tensor | None = None, **kwargs: Any) -> Any:
        if coefficients is None:
            model: Any = self.model()
            guidance = _setting(model, with_generation_config(args, kwargs), "guidance_scale")
            with generating(model, guidance):
                return self.replaced(*args, **kwargs)
        with given.given_coefficients(coefficients):
            return self.replaced(*args, **kwargs)


class _Continuous(_Method):
    """A way into continuous batching; `UserError` where a choice could not be kept.

    It runs the model in a thread of its own, which logs an error and returns nothing.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("coefficients") is not None or given.current() is not None:
            raise UserError(f"{self.name}: continuous batching takes no coefficients; use generate")
        if any(config.routes_sequences for config in _watched(self.model())):
            raise UserError(
                f"{self.name}: continuous batching has a cache of its own kind, which keeps no "
                "choice for a sequence. Use generate without cache_implementation='paged', or an "
                "adapter with granularity='token'"
            )
        return self.replaced(*args, **kwargs)


def with_generation_config(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `generate` with its configuration, which may be given by place."""
    for argument in args:
        if isinstance(argument, GenerationConfig):
            return {**kwargs, "generation_config": argument}
    return kwargs


def refuse_mixed_batches(kwargs: dict[str, Any]) -> None:
    """`UserError` where a batch is to use several adapters."""
    if kwargs.get("adapter_names") is not None:
        raise UserError(_MIXED)


def refuse_unkept_choices(model: Any, kwargs: dict[str, Any]) -> None:
    """`UserError` where `generate` could not choose by the prompt, or not keep the choice.

    It would add a draft to the prompt, or cut it; its mask would not say what is padding; or its
    code would be compiled whole, which cannot ask the cache.
    """
    if kwargs.get("coefficients") is not None or given.current() is not None:
        return
    if not any(config.routes_sequences for config in _watched(model)):
        return
    for name in _NOT_PER_SEQUENCE:
        value = _setting(model, kwargs, name)
        if value is not None and value is not False:
            raise UserError(
                f"{name}: routing per sequence chooses by the first pass, which must be the prompt",
            )
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim != 2:
        raise UserError(
            "attention_mask: routing per sequence needs one of shape (batch, tokens) to leave out "
            f"padding; it is {tuple(mask.shape)}"
        )
    if getattr(_setting(model, kwargs, "compile_config"), "fullgraph", False):
        raise UserError(
            "compile_config: routing per sequence asks the cache for its choice, which cannot be "
            "compiled with fullgraph=True. Use fullgraph=False, or granularity='token'"
        )


def _setting(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """What `generate`, called with these arguments, takes for one of its settings."""
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return kwargs.get(name, getattr(settings, name, None))


def _followed(model: Any) -> dict[str, RoutedLoraConfig]:
    """The adapters for which a forward pass is followed where they are active."""
    followed = {}
    for name, config in getattr(model, "peft_config", {}).items():
        if not isinstance(config, RoutedLoraConfig):
            continue
        # A load is balanced in training alone. Compiled code cannot follow a pass.
        if config.routes_sequences or (config.router_aux_loss_coef and model.training):
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
    """All arguments of a forward pass by their names."""
    names = list(inspect.signature(type(model).forward).parameters)[1:] if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Start following a forward pass; what it returns are the pass's arguments."""
    refuse_mixed_batches(kwargs)
    kwargs = own_heads.enter(model, kwargs)
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
    call = RoutedCall(
        model,
        arguments,
        per_sequence=bool(per_sequence),
        balance_weight=max(config.router_aux_loss_coef for config in configs),
        outer=CALL.get(),
    )
    if per_sequence and isinstance(arguments.get("labels"), Tensor):
        prefix = call.prefix_of_labels(arguments["labels"], max(per_sequence))
        if prefix is not None:
            args = ()
            kwargs = without_prefix_labels(arguments, prefix, training=model.training)
    if model.training:
        _keep_in_checkpoints(model)
    CALL.set(call)
    return args, kwargs


def _given(kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The model's own arguments, and the coefficients of this call."""
    coefficients = kwargs.get("coefficients")
    if coefficients is not None:
        given.checked(coefficients)
    else:
        outer = given.current()
        coefficients = None if outer is None else outer.coefficients
    own = {name: value for name, value in kwargs.items() if name != "coefficients"}
    return own, coefficients


def _leave(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """End following a forward pass; what it returns takes the place of the output."""
    chosen = own_heads.leave(model)
    if chosen is None or chosen.labels is None or output is None:
        return _routed_output(model, args, kwargs, output)
    kwargs = {**kwargs, "labels": chosen.labels}
    output = own_heads.with_loss(model, chosen.labels, kwargs.get("num_items_in_batch"), output)
    changed = _routed_output(model, args, kwargs, output)
    return output if changed is None else changed


def _routed_output(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """What takes the place of the output, by the router; None where nothing does."""
    if given.leave(model) or not _followed(model):
        return None
    call = CALL.get()
    if call is None or call.model is not model:
        return None
    CALL.set(call.outer)
    if output is None:  # the pass failed
        return None
    call.end(output)
    return _with_balance(model, call, _arguments(model, args, kwargs), output)


def _with_balance(model: Any, call: RoutedCall, arguments: dict[str, Any], output: Any) -> Any:
    """The output, to whose loss the load-balancing loss is added.

    A warning says so where a training pass has no loss to add it to.
    """
    if not call.balance:
        return output
    # The Trainer adds up the losses of a step's batches, each of which counts by its tokens.
    share = _share(model, arguments)
    if isinstance(getattr(output, "loss", None), Tensor):
        output.loss = call.balance.added_to(output.loss, share)
    elif isinstance(output, tuple) and arguments.get("labels") is not None:
        output = (call.balance.added_to(output[0], share), *output[1:])
    elif torch.is_grad_enabled() and _has_trained_router(model):
        call.balance.warn_of_no_loss()
    return output


def _has_trained_router(model: nn.Module) -> bool:
    trained = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    return any("routed_lora_router" in name for name in trained)


def _share(model: Any, arguments: dict[str, Any]) -> Any:
    """This pass's share in the tokens of a step; 1 unless the Trainer says how many these are."""
    items = arguments.get("num_items_in_batch")
    if items is None or arguments.get("labels") is None:
        return 1.0
    in_decoder = model.config.is_encoder_decoder
    labels = arguments["labels"] if in_decoder else predicted_labels(arguments)
    return (labels != IGNORED).sum() / items


def _keep_in_checkpoints(model: nn.Module, choice: SharedChoice | None = None) -> None:
    """Have gradient checkpointing run layers within the call that they belong to, and with a choice
    that modules of the model share.

    It runs them again when the forward pass is over.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is None:
            continue
        if not isinstance(function, _InCall):
            function = _InCall(function)
            module._gradient_checkpointing_func = function  # type: ignore[assignment]
        if choice is not None and all(choice is not known for known in function.choices):
            function.choices.append(choice)


class _InCall:
    """A checkpointing function whose layers find the call again, and the coefficients that were
    given, or chosen in an earlier layer.
    """

    def __init__(self, checkpoint: Callable):
        self.checkpoint = checkpoint
        self.choices: list[SharedChoice] = []  # that layers on both sides of this function share

    @property
    def _is_reentrant(self) -> bool:
        # What says nothing has torch's default, which has been both.
        return getattr(self.checkpoint, "keywords", {}).get("use_reentrant") is not False

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        call = CALL.get()
        override = given.current()
        choices = open_choices(self.choices)
        # A choice of an earlier layer; one that is yet to be made is made in here.
        is_made = any(coefficients is not None for _, coefficients in choices)
        if is_made and override is None and self._is_reentrant:
            raise UserError(
                "router_granularity='model': reentrant gradient checkpointing lets no gradient of "
                "other blocks through to the router. Train with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

        def in_call(*args: Any, **kwargs: Any) -> Any:
            token = CALL.set(call)
            try:
                with given.held(override), choices_held(choices):
                    return function(*args, **kwargs)
            finally:
                CALL.reset(token)

        return self.checkpoint(in_call, *args, **kwargs)
