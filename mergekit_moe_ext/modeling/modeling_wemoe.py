"""Models some of whose linear modules are routed: the base's weights plus task vectors (WEMoE).

`WEMoE<X>` is made of transformers' `<X>` when it is asked for: the same class, the same names, with
those linear modules swapped and a router for each group of them (E-WEMoE: one router for all).
Or every parameter has constants of its own (AdaMerging), and is merged whenever it is read.

A model that does not generate has one set of coefficients per sample, the mean over its tokens. One
that does takes the mean over a prefix (`frozen`: the prompt in `generate`, else the first
`routing_tokens` tokens; labels among them are left out of the loss) or, at every position, over
what is there up to it (`running`).

The files beside this one hold the products (`wemoe_products`), the tiles that these go through
(`wemoe_tiles`), a GPU's kernel for sparse task vectors (`wemoe_kernel`), the parameters that are
weighed when they are read (`wemoe_tensors`), and what a forward pass knows (`wemoe_calls`).
"""

import inspect
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .any_base import (
    as_config_of_base,
    check_architecture,
    keep_own_config,
    made_on_demand,
    subclass_of,
    with_own_arguments,
)
from .configuration_wemoe import Ensembling, config_class
from .host_cache import cache_in, generating, with_cache_renamed
from .prefix_labels import without_prefix_labels
from .wemoe_calls import (
    BATCH,
    IS_PROMPT,
    OUTSIDE,
    PADDING_MASKS,
    Carried,
    CoefficientRouter,
    Current,
    EnsembleCall,
    carry,
    mask_of_group,
    mean,
    samples_in,
)
from .wemoe_products import EnsembledLinear
from .wemoe_tensors import WeighedTensor

_PREFIX = "WEMoE"


class Ensemble:
    """What `WEMoE<X>` has besides what `<X>` has."""

    _can_compile_fullgraph = False  # a pass asks its cache what it carries

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_architecture(type(self), config)
        with as_config_of_base(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        keep_own_config(self, config)
        self.ensembling = Ensembling.from_dict(config.ensembling)
        if getattr(config, "chunk_size_feed_forward", 0):
            raise ValueError(
                "chunk_size_feed_forward hides from a router what tokens a sample has: set it to 0",
            )
        self._current = Current()
        if self.ensembling.heads:
            self._swap_head()
        self.routers: Any = nn.ModuleDict()
        self._masks: dict[str, str] = {}  # by group, the argument that tells its padding
        for index, (name, linears) in enumerate(self.ensembling.groups.items()):
            key = "0" if self.ensembling.shared_router else str(index)
            if self.ensembling.per_tensor:
                self._weigh(name)
                self.routers[key] = CoefficientRouter(0, self.ensembling)
            else:
                self._route_group(name, key, linears)
        encoder = self._encoder()
        if encoder is not None:
            encoder.register_forward_pre_hook(partial(_enter_encoder, self), with_kwargs=True)
            encoder.register_forward_hook(partial(_leave_encoder, self), always_call=True)
        self.post_init()  # type: ignore[attr-defined]

    def _route_group(self, name: str, key: str, linears: list[str]) -> None:
        """Swap the linear modules of a group, and have a router read what the group's module reads.

        `name` is that module's, `key` the router's.
        """
        for linear in linears:
            self._swap(linear, name)
        width = _width_into(self.get_submodule(linears[0]))  # type: ignore[attr-defined]
        if key not in self.routers:
            self.routers[key] = CoefficientRouter(width, self.ensembling)
        elif self.routers[key].width != width:
            widths = f"{self.routers[key].width} and {width}"
            raise ValueError(f"shared_router: one router cannot read widths of {widths} ({name})")
        self._masks[name] = mask_of_group(self, name)  # type: ignore[arg-type]
        # Looked up after swapping: OPT's is a linear module itself.
        group = self.get_submodule(name)  # type: ignore[attr-defined]
        group.register_forward_pre_hook(partial(_choose, self, name, key), with_kwargs=True)

    def _encoder(self) -> Any:
        """The encoder of an encoder-decoder, which `generate` calls on its own; else None."""
        config = self.config  # type: ignore[attr-defined]
        if not getattr(config, "is_encoder_decoder", False):
            return None
        return self.get_encoder()  # type: ignore[attr-defined]

    def _swap(self, name: str, group: str) -> None:
        parent, _, last = name.rpartition(".")
        base = self.get_submodule(name)  # type: ignore[attr-defined]
        kept = self.ensembling.kept.get(name)
        experts = len(self.ensembling.experts)
        ensembled = EnsembledLinear(base, experts, kept, group, self._current)
        setattr(self.get_submodule(parent), last, ensembled)  # type: ignore[attr-defined]

    def _weigh(self, name: str) -> None:
        """Weigh the parameter of this name, and those that are tied to it."""
        owner_name, _, own_part = name.rpartition(".")
        owner = self.get_submodule(owner_name)  # type: ignore[attr-defined]
        experts = len(self.ensembling.experts)
        weighed = WeighedTensor(owner, own_part, experts, name, self._current)
        sources: dict[str, str] = self.all_tied_weights_keys  # type: ignore[attr-defined]
        tied = [target for target, source in sources.items() if source == name]
        for each in (name, *tied):
            parent, _, part = each.rpartition(".")
            module = self.get_submodule(parent)  # type: ignore[attr-defined]
            if not hasattr(module, "weighed") and module not in (self, self._encoder()):
                module.register_forward_pre_hook(partial(_check_inside, self))
            weighed.replace_in(module, part)

    def _swap_head(self) -> None:
        parent, _, last = self.ensembling.head.rpartition(".")
        head = self.get_submodule(self.ensembling.head)  # type: ignore[attr-defined]
        heads = TaskHeads(head, self.ensembling.heads, self._current)
        setattr(self.get_submodule(parent), last, heads)  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CoefficientRouter):
            nn.init.constant_(module.bias, module.init_lambda)
            if not module.is_constant:
                nn.init.normal_(module.weight, std=module.router_init_std)
            if hasattr(module, "hidden"):
                nn.init.normal_(module.hidden.weight, std=module.router_init_std)
                nn.init.zeros_(module.hidden.bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """transformers' initialisation, and then that of our modules which no file held: their task
        vectors are 0, which leaves the base as it is.
        """
        super().initialize_weights()  # type: ignore[misc]
        # A trunk initialises the modules inside it by rules of its own, which do not know ours.
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, EnsembledLinear):
                config = self.config.get_text_config()  # type: ignore[attr-defined]
                module.initialise(getattr(config, "initializer_range", None) or 0.02)
            for weighed in getattr(module, "weighed", {}).values():
                weighed.initialise()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = checkpoint,
        **kwargs: Any,
    ) -> None:
        """Switch it as transformers does; a layer runs again within the pass it belongs to."""
        # A router whose group is a checkpointed layer itself runs before that layer's checkpoint;
        # a reentrant one has a graph of its own, in which the router's coefficients are constants.
        groups = () if self.ensembling.per_tensor else self.ensembling.groups
        cut_off = []
        for name in groups:
            module = self.get_submodule(name)  # type: ignore[attr-defined]
            if isinstance(module, GradientCheckpointingLayer):
                cut_off.append(name)
        settings = getattr(gradient_checkpointing_func, "keywords", {})
        if cut_off and settings.get("use_reentrant"):
            raise ValueError(
                f"use_reentrant=True cuts {cut_off[0]} off from its router: take False",
            )
        remembering = partial(self._remembering, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, remembering, **kwargs)  # type: ignore[misc]

    def _remembering(self, checkpointing: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpointing(partial(self._within, self._current.call, function), *args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel cannot spread routed task vectors: use torchrun or accelerate launch",
        )

    def _within(self, call: EnsembleCall | None, function: Any, *args: Any, **kwargs: Any) -> Any:
        before = self._current.call
        self._current.call = call
        try:
            return function(*args, **kwargs)
        finally:
            self._current.call = before

    def _forward(
        self,
        forward: Any,
        signature: inspect.Signature,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What the base's `forward` gives, run as one call."""
        arguments = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        arguments.pop("self")
        arguments |= arguments.pop("kwargs", {})
        arguments = with_cache_renamed(arguments, signature.parameters)
        self._check_override(arguments.get("coefficients"), samples_in(arguments))
        call = EnsembleCall(self, arguments)
        if self.ensembling.router_layers and "attention_mask" in signature.parameters:
            arguments = call.with_inferred_mask(arguments)
        arguments.pop("coefficients", None)
        arguments.pop(IS_PROMPT, None)
        arguments.pop(PADDING_MASKS, None)
        call.head = self._chosen_head(arguments.pop("task", None))
        labels = arguments.get("labels")
        if not self.ensembling.heads:
            if isinstance(labels, Tensor) and self._chooses_by_prefix(call) and labels.ndim == 2:
                prefix = self._prefix(call, labels)
                arguments = without_prefix_labels(arguments, prefix, training=call.model.training)
            return self._called(call, forward, arguments)
        arguments.pop("labels", None)
        items = arguments.pop("num_items_in_batch", None)
        output = self._called(call, forward, arguments)
        return output if labels is None else _with_loss(output, labels, items)

    def _called(self, call: EnsembleCall, forward: Any, arguments: dict[str, Any]) -> Any:
        output = self._within(call, forward, self, **arguments)
        call.end(output)
        self._current.last = {name: value.detach() for name, value in call.values.items()}
        return output

    def _check_override(self, coefficients: Tensor | str | None, samples: int | None) -> None:
        if coefficients is None or (isinstance(coefficients, str) and coefficients == BATCH):
            return
        if not isinstance(coefficients, Tensor):
            raise ValueError(f'coefficients= are a tensor or "{BATCH}", not {coefficients!r}')
        groups = len(self.ensembling.groups)
        experts = len(self.ensembling.experts)
        has_shape = coefficients.ndim == 3 and coefficients.shape[1:] == (groups, experts)
        is_per_sample = not self.ensembling.per_tensor and samples in (None, len(coefficients))
        # One set for all may have been repeated, for beams.
        if has_shape and (is_per_sample or _are_alike(coefficients)):
            return
        hint = ""
        if self.ensembling.per_tensor:
            hint = "; where every parameter is weighed all are the same"
        raise ValueError(
            f"coefficients= are ({samples or 'samples'}, {groups} groups, {experts} experts), or "
            f"one set for all samples, not {tuple(coefficients.shape)}{hint}"
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

    def _chooses_by_prefix(self, call: EnsembleCall) -> bool:
        is_frozen = call.generates and not call.runs
        return is_frozen and call.override is None and self.ensembling.router_layers > 0

    # Where a cache is filled, as `generate` does, the whole input is a prompt, and what is
    # predicted comes later. A plain pass goes over prompt and answer at once: only a part that is
    # fixed in advance may choose there, or the choice would know the answer.
    def _prefix(self, call: EnsembleCall, tokens: Tensor) -> Tensor:
        """Which of the tokens (samples, tokens, …) choose: (samples, tokens)."""
        real = call.real(tokens, in_decoder=False)
        if real is None:
            real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if call.fills_cache or call.is_prompt:
            return real
        return real & (real.cumsum(dim=1) <= self.ensembling.routing_tokens)

    def _chosen_by_prefix(self, call: EnsembleCall, router: CoefficientRouter, h: Tensor) -> Tensor:
        """The mean of a router's coefficients over the tokens of h (samples, tokens, width) that
        choose.
        """
        counted = call.real(h, in_decoder=False)
        if counted is not None:
            counted = call.once(("prefix", h.device), partial(self._prefix, call, h))
        elif not (call.fills_cache or call.is_prompt):
            h = h[:, : self.ensembling.routing_tokens]
        return mean(router(h).to(h.device), counted)

    def _route(self, call: EnsembleCall, name: str, key: str, h: Tensor) -> Tensor:
        """The coefficients of a group whose module gets the input h."""
        router = self.routers[key]
        keeps = call.cache is not None and not torch.is_grad_enabled()
        if call.override is not None:
            return call.override[:, list(self.ensembling.groups).index(name)]
        if router.is_constant:
            if keeps:
                call.keeping.add(name)
            return router(None)
        # Some bases flatten samples and tokens (OPT), or cut samples into windows (Swin).
        if call.samples and (h.ndim != 3 or len(h) != call.samples):
            h = h.reshape(call.samples, -1, h.shape[-1])
        if h.ndim != 3:
            shape = tuple(h.shape)
            raise ValueError(f"cannot tell samples apart in an input of shape {shape} of {name}")
        in_decoder = call.is_encoder_decoder and "decoder" in name.split(".")
        is_whole = not call.generates or (call.is_encoder_decoder and not in_decoder)
        if is_whole or call.runs:
            real = call.real(h, in_decoder=in_decoder, mask_name=self._masks[name])
            coefficients = router(h).to(h.device)
            # An encoder, a classifier or a vision model predicts no next token: all tokens choose.
            if not is_whole:
                return call.running_mean(name, coefficients, real)
            coefficients = mean(coefficients, real)
            return coefficients.mean(dim=0) if call.is_of_batch else coefficients
        earlier = call.earlier(name)
        # Frozen: chosen once, and kept with the cache. So merged weights serve further steps.
        if earlier:
            if keeps and not call.carried.rows_changed:
                call.keeping.add(name)
            return earlier[0]
        coefficients = self._chosen_by_prefix(call, router, h)
        call.left[name] = (coefficients,)
        return coefficients.mean(dim=0) if call.is_of_batch else coefficients

    @torch.no_grad()
    def coefficients(self, **inputs: Any) -> Tensor:
        """What the routers give to these inputs: (samples, groups, experts).

        This can be handed to `forward` and `generate` as `coefficients=`. In mode `frozen` a plain
        forward pass takes the first `routing_tokens` tokens; with an empty cache as
        `past_key_values=` it takes all of them, as `generate` does. `ValueError` in `running`.
        """
        self(**inputs)  # type: ignore[operator]
        return self._last_coefficients()

    def _last_coefficients(self) -> Tensor:
        """What the routers gave in the last pass: (samples, groups, experts)."""
        last = self._current.last or {}
        values = [last[name] for name in self.ensembling.groups]
        if any(value.ndim == 3 for value in values):
            raise ValueError(
                "there is no one set of coefficients per sample where they are running means",
            )
        samples = max(len(value) if value.ndim == 2 else 1 for value in values)
        by_sample = [value.to(values[0]).expand(samples, -1) for value in values]
        return torch.stack(by_sample, dim=1)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        if self.ensembling.per_tensor:
            raise ValueError(
                "the task vectors of the embeddings cannot be resized: resize them in the sources",
            )
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_generation_config(*args, **kwargs)  # type: ignore[misc]
        config, arguments = prepared
        is_decoder = not self.config.is_encoder_decoder  # type: ignore[attr-defined]
        is_frozen = is_decoder and self.ensembling.mode == "frozen"
        is_free = self.ensembling.router_layers and arguments.get("coefficients") is None
        if not is_frozen or not is_free:
            return prepared
        if config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size: the whole prompt chooses in mode frozen; leave it out",
            )
        if config.use_cache is False and config.guidance_scale not in (None, 1):
            raise ValueError(
                "guidance_scale with use_cache=False: nothing keeps the choice of the prompt "
                "beside it; leave use_cache out, or give coefficients=",
            )
        return prepared

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
    ) -> Any:
        is_decoder = not self.config.is_encoder_decoder  # type: ignore[attr-defined]
        is_frozen = is_decoder and self.ensembling.mode == "frozen"
        is_free = self.ensembling.router_layers and model_kwargs.get("coefficients") is None
        if generation_config.use_cache is False and is_frozen and is_free:
            model_kwargs[IS_PROMPT] = True
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args
        )
        cache = cache_in(model_kwargs)
        if generation_config.is_assistant:
            self._let_take_back(cache)
        # On a GPU transformers would compile each step of a static cache unasked, into graphs whose
        # outputs do not last until the next, as what a cache carries has to.
        if cache is not None and cache.is_compileable and generation_config.compile_config is None:
            generation_config.disable_compile = True

    def _let_take_back(self, cache: Any) -> None:
        """Have an empty cache carry running means from which tokens can be taken back."""
        is_running = self.config.is_encoder_decoder or self.ensembling.mode == "running"  # type: ignore[attr-defined]
        if is_running and cache is not None and cache.get_seq_length() == 0:
            carry(cache, Carried(keeps_every_sum=True))

    # The first pass of assisted decoding goes over the prompt and guesses at what follows, which
    # must not choose. So the prompt is passed over once before, and the choice put into the cache.
    # (A running mean sees no guess that follows, but guesses are taken back from it.)
    # It is not left among the arguments, all of which transformers hands to the assistant as well.
    @wraps(GenerationMixin._assisted_decoding)
    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What transformers' own does, the prompt having chosen first."""
        cache = cache_in(kwargs)
        is_empty = cache is not None and cache.get_seq_length() == 0
        if is_empty and self.ensembling.router_layers:
            is_decoder = not self.config.is_encoder_decoder  # type: ignore[attr-defined]
            if not is_decoder or self.ensembling.mode == "running":
                self._let_take_back(cache)
                return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]
            chosen = kwargs.pop("coefficients", None)
            if chosen is None:
                inputs = {"inputs_embeds": kwargs.get("inputs_embeds")}
                if inputs["inputs_embeds"] is None:
                    inputs = {"input_ids": input_ids}
                self(  # type: ignore[operator]
                    **inputs, attention_mask=kwargs.get("attention_mask"), **{IS_PROMPT: True}
                )
                chosen = self._last_coefficients()
            values: dict[str, tuple[Tensor, ...]] = {}
            for index, name in enumerate(self.ensembling.groups):
                values[name] = (chosen[:, index],)
            carry(cache, Carried(values, is_ahead=True))
        return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand on what transformers does, and without a cache the choice as `coefficients`.

        Each step then passes over everything, and rows stay with their prompts, in beam search too.
        """
        if model_kwargs.pop(IS_PROMPT, False):
            model_kwargs["coefficients"] = self._last_coefficients()
        return super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, *args, **kwargs
        )


class TaskHeads(nn.ModuleList):
    """One head per task, of which `task=` chooses one."""

    def __init__(self, head: Any, classes: dict[str, list[str]], current: Current) -> None:
        make = getattr(head, "with_classes", partial(_linear_head, head))
        super().__init__(make(len(names)) for names in classes.values())
        self.current = current

    def forward(self, x: Tensor) -> Tensor:
        if self.current.call is None:
            raise RuntimeError(OUTSIDE)
        return self[self.current.call.head](x)


def _linear_head(head: Any, classes: int) -> nn.Linear:
    return nn.Linear(head.in_features, classes, bias=head.bias is not None)


def _choose(
    model: Any,
    name: str,
    key: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    call = model._current.call
    if call is None:
        raise RuntimeError(OUTSIDE)
    call.values[name] = model._route(call, name, key, args[0] if args else kwargs["hidden_states"])


def _check_inside(model: Any, module: nn.Module, args: tuple[Any, ...]) -> None:
    if model._current.call is None:
        raise RuntimeError(OUTSIDE)


def _enter_encoder(
    model: Any,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    current = model._current
    if current.call is None:
        current.call = current.encoding = EnsembleCall(model, kwargs)


def _leave_encoder(model: Any, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    current = model._current
    if current.call is current.encoding:
        current.call = current.encoding = None


def _with_loss(output: Any, labels: Tensor, items: Any) -> Any:
    """The output of a classifier, with the loss that transformers' own would have."""
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
    if isinstance(output, tuple):
        return (loss, *output)
    return type(output)(**{**output, "loss": loss})


def _are_alike(coefficients: Tensor) -> bool:
    """Whether all samples (samples, groups, experts) have the same."""
    first = coefficients[:1]
    return len(coefficients) == 1 or torch.equal(coefficients, first.expand_as(coefficients))


def _width_into(linear: EnsembledLinear) -> int:
    return linear.weight.shape[0 if linear.is_transposed else 1]


@cache
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`WEMoE<X>` for `<X>`."""
    signature = with_own_arguments(inspect.signature(base.forward), "coefficients", "task")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(base.forward, signature, *args, **kwargs)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What transformers' own does, within which a sequence is begun once."""
        with generating(self, kwargs.get("guidance_scale")):
            return base.generate(self, *args, **kwargs)

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What transformers' own does, with the masks that tell padding beside a static cache's."""
        inputs = base.prepare_inputs_for_generation(self, *args, **kwargs)
        cache = cache_in(inputs)
        if cache is not None and cache.is_compileable:
            names = ("attention_mask", "decoder_attention_mask")
            inputs[PADDING_MASKS] = {name: kwargs.get(name) for name in names}
        return inputs

    forward.__signature__ = signature  # type: ignore[attr-defined]
    members = {"config_class": config_class(base.config_class), "forward": forward}
    if base.can_generate():
        members["generate"] = wraps(base.generate)(generate)
        prepare = wraps(base.prepare_inputs_for_generation)(prepare_inputs_for_generation)
        members["prepare_inputs_for_generation"] = prepare
    return subclass_of(base, _PREFIX, Ensemble, __name__, members)


__getattr__ = made_on_demand(__name__, _PREFIX, model_class)
