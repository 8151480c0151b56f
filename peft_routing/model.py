"""The tuner: it composes experts into a routed adapter, or makes room for a saved one."""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from torch import nn

from _mergekit_moe_ext_common.errors import UserError
from peft_routing import heads
from peft_routing.calls import reads_of
from peft_routing.config import RoutedLoraConfig
from peft_routing.default_mixing import mixing_of
from peft_routing.expert import Expert, check_experts, layout, read_expert
from peft_routing.exporting import truncated, write_experts, write_lora
from peft_routing.hooks import (
    refuse_mixed_batches,
    refuse_unkept_choices,
    share,
    unwatch,
    watch,
    with_generation_config,
)
from peft_routing.layer import RoutedLoraLayer, RoutedLoraLinear, updates
from peft_routing.loading import check_adapter
from peft_routing.routers import Router, SharedRouter
from peft_routing.routers.fixed import FixedRouter
from peft_routing.sharing import (
    check_groups,
    check_prototypes,
    check_readers,
    check_sequences,
    group_of,
)


class RoutedLoraModel(BaseTuner):
    """The tuner that puts routed experts beside linear modules; PEFT makes it.

    Its methods can be called on the `PeftModel`: `add_expert`, `remove_expert`, `merge_and_unload`
    and PEFT's others.
    """

    prefix: str = "routed_lora_"
    tuner_layer_cls = RoutedLoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any
    ) -> None:
        # Of the adapter that is being put in, each router by its modules' group.
        self._owners: dict[str, Router] = {}
        self._handles_of: dict[str, list[Any]] = {}  # of the hooks for an adapter's shared choices
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self._handles = watch(self.model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Put an adapter into the model, as PEFT does.

        Where the configuration names directories, the experts are read and checked before that.
        """
        config = self.peft_config[adapter_name]
        source = config.source
        if source is None:
            _check_names(self.peft_config, config)
            self._make_room(model, adapter_name, config, **kwargs)
            heads.make_room(model, adapter_name)
        else:
            paths = {**source.experts, **source.general_experts}
            experts = [read_expert(name, path, model) for name, path in paths.items()]
            made = composed(source, experts, model)
            _check_names(self.peft_config, made)
            # The object that was given is kept, unless another model holds it.
            if config.is_locked:
                config = made
            else:
                config.become(made)
            self._put_in(model, adapter_name, config, experts, **kwargs)
            heads.fill(model, adapter_name, config, experts)

    def add_expert(
        self,
        name: str,
        path: str,
        adapter_name: str | None = None,
        *,
        weight: float | None = None,
        cluster: Any = None,
    ) -> None:
        """Add a LoRA adapter as one more expert; everything of the others stays as it is.

        A learned router gives it what an expert starts with; `fixed` needs its `weight`,
        `hierarchical` its `cluster`. `UserError` if it cannot be routed here, before anything is
        changed.
        """
        adapter_name, config, experts = self._taken_out(adapter_name)
        if name in config.experts or name in config.general_experts:
            raise UserError(f"there is an expert {name!r} already")
        clusters = None if config.clusters is None else {**config.clusters, name: cluster}
        weights = None if config.weights is None else {**_weights(config), name: weight}
        if (clusters is None) != (cluster is None) or (weights is None) != (weight is None):
            raise UserError(
                f"router={config.router!r}: give weight= for fixed, cluster= for hierarchical"
            )
        added = read_expert(name, path, self.model)
        if config.head == "mean":
            heads.check_added(added, config, self.model)
        experts.insert(len(config.experts), added)
        self._replace(adapter_name, config, experts, clusters=clusters, weights=weights)

    def remove_expert(self, name: str, adapter_name: str | None = None) -> None:
        """Take an expert out; everything of the others stays as it is."""
        adapter_name, config, experts = self._taken_out(adapter_name)
        if name not in config.experts:
            raise UserError(f"there is no expert {name!r}; there are {', '.join(config.names)}")
        others = [expert for expert in experts if expert.name != name]
        clusters = config.clusters
        if clusters:
            clusters = _without(clusters, name)
        weights = config.weights
        if weights:
            weights = _without(_weights(config), name)
        # The head that it gave stays, as the adapter's own.
        head = "new" if config.head == name else config.head
        self._replace(adapter_name, config, others, clusters=clusters, weights=weights, head=head)

    def set_routing(
        self,
        *,
        top_k: int | None = None,
        router_temperature: float | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Change how many experts keep a coefficient, or the softmax's temperature, in place.

        What is not given stays as it is. It holds from the next forward pass on, though not for the
        sequences of a cache that is filled, and is saved with the adapter. `UserError` for a value
        that does not fit the router, before anything is changed.
        """
        stated: dict[str, Any] = {"top_k": top_k, "router_temperature": router_temperature}
        stated = {option: value for option, value in stated.items() if value is not None}
        if not stated:
            raise UserError("set_routing: give top_k= or router_temperature=")
        adapter_name = self._unmerged(adapter_name)
        changed = dataclasses.replace(self.peft_config[adapter_name], **stated)
        routers = self._routers(adapter_name)
        # Not the modules are replaced: an optimiser may hold their parameters.
        for router in routers.values():
            like = changed.router_class(changed, changed.names, router.in_features)
            router.k = like.k
            router.temperature = like.temperature
        changed.lock()
        self.peft_config[adapter_name] = changed

    def export_experts(self, directory: str, adapter_name: str | None = None) -> None:
        """Write each expert, the general ones too, as an ordinary LoRA directory,
        `<directory>/<name>`, its tensors as they came in. In the name of a directory `-` stands for
        what is no letter, no number and none of `_.-`.

        Nothing is subtracted from anything. An expert gets the head that it has here, which is its
        own only for `head="own"`.
        """
        write_experts(self._to_export(adapter_name)[2], directory)

    def to_lora(
        self, directory: str, adapter_name: str | None = None, *, rank: int | None = None
    ) -> float:
        """Write the mixture as one ordinary LoRA adapter, where it does not depend on the input.

        Without `rank` it is exact: of the rank of the experts together, or of each for `low_rank`.
        With it, every update is the closest one of that rank. Returns the relative error.
        `UserError` where coefficients depend on the input.
        """
        adapter_name, config, experts = self._to_export(adapter_name)
        self._check_one_head(adapter_name)
        factors = {}
        biases = {}
        for layer in self._layers(adapter_name):
            coefficients = layer.constant_coefficients(adapter_name)
            inside = layer.experts_of(adapter_name)
            factors[layer.key] = inside.merged_factors(coefficients)
            if inside.site.has_biases:
                biases[layer.key] = inside.merged_bias(coefficients)
        error = 0.0
        if rank is not None:
            if rank < 1:
                raise UserError(f"rank={rank} is below 1")
            factors, error = truncated(factors, rank)
        write_lora(
            factors,
            biases,
            config.base_model_name_or_path,
            config.task_type,
            directory,
            experts[0].head,
            config.modules_to_save,
        )
        return error

    def _check_one_head(self, adapter_name: str) -> None:
        """`UserError` where every expert has its own head: without the adapter there is one."""
        config = self.peft_config[adapter_name]
        if config.head == "own":
            raise UserError(
                f"adapter {adapter_name!r} has a head per expert, and a merged model has one: "
                f"compose with head= one of {', '.join(config.names)}, 'mean' or 'new'"
            )

    def _unmerged(self, adapter_name: str | None) -> str:
        """The name of an adapter, the first active one if None. `UserError` if it is merged."""
        adapter_name = adapter_name or self.active_adapters[0]
        if adapter_name not in self.peft_config:
            raise UserError(
                f"there is no adapter {adapter_name!r}; there are {', '.join(self.peft_config)}"
            )
        if any(adapter_name in layer.merged_adapters for layer in self._layers(adapter_name)):
            raise UserError(f"adapter {adapter_name!r} is merged: unmerge it first")
        return adapter_name

    def _taken_out(self, adapter_name: str | None) -> tuple[str, RoutedLoraConfig, list[Expert]]:
        """An adapter's name, its configuration, and its experts with their factors."""
        adapter_name = self._unmerged(adapter_name)
        config = self.peft_config[adapter_name]
        described = {**config.experts, **config.general_experts}
        experts = [Expert(name, dict(of_expert), {}, {}) for name, of_expert in described.items()]
        for layer in self._layers(adapter_name):
            site = config.sites[layer.key]
            inside = layer.experts_of(adapter_name)
            pairs = inside.factors()
            for expert, pair, rank, scaling in zip(
                experts, pairs, site.ranks, site.scalings, strict=True
            ):
                if rank:
                    expert.factors[layer.key] = pair
                    expert.scalings[layer.key] = scaling
            # Where one expert has a bias there is room for one of each; some never had it.
            for expert, bias in zip(experts, inside.biases_of_all(), strict=True):
                if expert.config.get("lora_bias") and layer.key in expert.factors:
                    expert.biases[layer.key] = bias
        if config.head == "own":
            heads.take_out(self.model, adapter_name, experts)
        return adapter_name, config, experts

    def _to_export(self, adapter_name: str | None) -> tuple[str, RoutedLoraConfig, list[Expert]]:
        """The adapter's name, configuration and experts, with the modules that PEFT saves whole."""
        adapter_name, config, experts = self._taken_out(adapter_name)
        heads.take_out(self.model, adapter_name, experts)
        for expert in experts:
            expert.config.pop("modules_to_save", None)
            if expert.head:
                expert.config["modules_to_save"] = config.modules_to_save
        return adapter_name, config, experts

    def _replace(
        self, adapter_name: str, config: RoutedLoraConfig, experts: Sequence[Expert], **changes: Any
    ) -> None:
        """Put other experts into an adapter, whose router keeps all that it knows of the old ones.

        `changes` are fields of the configuration. `UserError` before anything is changed.
        """
        names = {
            expert.name: expert.config
            for expert in experts
            if expert.name not in config.general_experts
        }
        changed = dataclasses.replace(config, experts=names, layout=None, **changes)
        # Whoever gave the one head, it is the adapter's now, and may have been trained.
        source = changed.head
        if source not in (None, "own"):
            changed = dataclasses.replace(changed, head="new")
        changed = composed(changed, experts, self.model)
        changed = dataclasses.replace(changed, head=source, modules_to_save=config.modules_to_save)
        layers = self._layers(adapter_name)
        check_readers(self.model, config, changed)
        before = self._routers(adapter_name)
        example = next(iter(before.values()))
        changed.router_class(changed, changed.names, example.in_features).check_rows(example)
        for layer in layers:
            del layer.routed_lora_router[adapter_name], layer.routed_lora_experts[adapter_name]
        self._put_in(self.model, adapter_name, changed, experts)
        if changed.head == "own":
            heads.fill(self.model, adapter_name, changed, experts)
        for group, router in self._routers(adapter_name).items():
            if group in before:
                router.take(before[group])

    def _put_in(
        self,
        model: nn.Module,
        adapter_name: str,
        config: RoutedLoraConfig,
        experts: Sequence[Expert],
        **kwargs: Any,
    ) -> None:
        """Layers for a composed configuration, with its experts, and a router that starts."""
        self._make_room(model, adapter_name, config, **kwargs)
        for layer in self._layers(adapter_name):
            site = config.sites[layer.key]
            inside = layer.experts_of(adapter_name)
            empty = (torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0))
            device = torch.device("cpu") if inside.owners.is_meta else inside.owners.device
            factors = [expert.factors.get(layer.key, empty) for expert in experts]
            factors = [(a.to(device), b.to(device)) for a, b in factors]
            inside.fill(factors)
            if site.has_biases:
                none = torch.zeros(layer.out_features)
                biases = [expert.biases.get(layer.key, none).to(device) for expert in experts]
                inside.fill_biases(torch.stack(biases))
            router = layer.routed_lora_router[adapter_name]
            if isinstance(router, Router):  # and not what stands for that of another module
                router.start(*updates(factors, site), config.mixing or "full")
                router.check_started()
            layer._move_adapter_to_device_of_base_layer(adapter_name)

    def _make_room(
        self, model: nn.Module, adapter_name: str, config: RoutedLoraConfig, **kwargs: Any
    ) -> None:
        """Layers for a composed configuration, with empty experts."""
        _check_model(config, model)
        self.peft_config[adapter_name] = config
        self._stop_sharing(adapter_name)
        self._owners = {}
        super().inject_adapter(model, adapter_name, **kwargs)
        self._owners = {}
        self._handles_of[adapter_name] = share(model, config, self._routers(adapter_name))
        if config.head == "own":
            heads.make_own(model, adapter_name, config)
        config.lock()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as PEFT does, and leave nothing of it on the model."""
        super().delete_adapter(adapter_name)
        self._stop_sharing(adapter_name)

    def _stop_sharing(self, adapter_name: str) -> None:
        for handle in self._handles_of.pop(adapter_name, []):
            handle.remove()

    def _routers(self, adapter_name: str) -> dict[str, Router]:
        """An adapter's routers by the group of modules that each is for."""
        routers = {}
        for layer in self._layers(adapter_name):
            router = layer.router_of(adapter_name)
            routers[router.group] = router
        return routers

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """PEFT's renaming, and a `UserError` for a damaged adapter, of which PEFT only warns."""
        tensors = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_adapter(model, adapter_name, tensors)
        return tensors

    def _layers(self, adapter_name: str) -> list[RoutedLoraLinear]:
        """The modules that an adapter lies at."""
        return [
            module
            for module in self.model.modules()
            if isinstance(module, RoutedLoraLinear) and adapter_name in module.routed_lora_experts
        ]

    def _prepare_adapter_config(
        self, peft_config: RoutedLoraConfig, model_config: dict
    ) -> RoutedLoraConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: RoutedLoraConfig, key: str) -> bool:
        return key in peft_config.sites

    def _create_and_replace(
        self,
        peft_config: RoutedLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Put an adapter's experts and router at a module; PEFT calls it for each."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        router = self._router(peft_config, current_key, _get_in_out_features(base)[0])
        if isinstance(target, RoutedLoraLayer):
            target.update_layer(adapter_name, peft_config, router)
            return
        layer = RoutedLoraLinear(target, adapter_name, peft_config, current_key, router)
        layer.reads = reads_of(self.model, current_key)
        if adapter_name != self.active_adapter:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _router(self, config: RoutedLoraConfig, module: str, in_features: int) -> nn.Module:
        """A new router for a module, or what stands for the one that lies at an earlier module."""
        group = group_of(module, config)
        if group in self._owners:
            return SharedRouter(self._owners[group])
        router = config.router_class(config, config.names, in_features)
        router.group = group
        self._owners[group] = router
        return router

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a module in. Layers of ours, base layers and heads are where they belong already.

        PEFT would send ours after a base model on the meta device, and it takes a module that it
        puts back for one with a weight, which a head of several layers has not.
        """
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast an adapter as PEFT casts a LoRA: out of half precision, or to the dtype of the base
        model's modules. A stated `expert_dtype` stays.
        """
        for layer in self._layers(adapter_name):
            layer.cast_adapter(adapter_name, to_base=not autocast_adapter_dtype)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Add the updates to the base model's weights. `UserError` before any is changed."""
        self._prepare_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if merge:
            for name in self.active_adapters if adapter_names is None else adapter_names:
                self._check_one_head(name)
        untied = self._prepare_merge(adapter_names) if merge else []
        heads.switch_off_own(self.model)
        model = super()._unload_and_optionally_merge(
            merge, *args, adapter_names=adapter_names, **kwargs
        )
        unwatch(model, self._handles)
        for name in list(self._handles_of):
            self._stop_sharing(name)
        if untied:
            _declare_untied(model)
        return model

    def _prepare_merge(self, adapter_names: list[str] | None) -> list[RoutedLoraLinear]:
        """The layers whose weight other modules share; from now on they have one of their own.

        `UserError` where an adapter cannot be merged, before a weight is changed.
        """
        layers = []
        for name in self.active_adapters if adapter_names is None else adapter_names:
            for layer in self._layers(name):
                layer.check_mergeable(name)
                layers.append(layer)
        # The update is of one module. Through a weight that is tied it would reach the others, as
        # from the head to the embedding.
        parameters = self.model.named_parameters(remove_duplicate=False)
        numbers = Counter(id(parameter) for _, parameter in parameters)
        tied = []
        for layer in dict.fromkeys(layers):
            if numbers[id(layer.get_base_layer().weight)] > 1:
                tied.append(layer)
        is_encoder_decoder = getattr(
            getattr(self.model, "config", None), "is_encoder_decoder", False
        )
        if tied and is_encoder_decoder:
            raise UserError(
                f"{tied[0].key} shares its weight with the embeddings, and by that transformers "
                "scales the logits of an encoder-decoder: the adapter cannot be merged there. Keep "
                "it as an adapter, or write the mixture as one LoRA adapter with to_lora"
            )
        for layer in tied:
            layer.untie()
        return tied

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        refuse_mixed_batches(kwargs)
        refuse_unkept_choices(self.model, with_generation_config(args, kwargs))
        yield


def _declare_untied(model: Any) -> None:
    """Have a model's configuration say that its head has a weight of its own.

    PEFT says it too, and warns; but not of the configuration of a model of several modalities, and
    what transformers keeps of it in the model would tie the weights again.
    """
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def composed(
    config: RoutedLoraConfig, experts: Sequence[Expert], model: nn.Module
) -> RoutedLoraConfig:
    """The configuration with all that the experts decide, the general ones last among them.

    `UserError` if they do not fit.
    """
    check_experts(experts, model)
    tasks = {expert.config.get("task_type") for expert in experts}
    task_type = config.task_type or (tasks.pop() if len(tasks) == 1 else None)
    described = {}
    for expert in experts:
        described[expert.name] = {"dtype": _name(_dtype(expert)), **expert.config}
        if config.head == "own" and expert.name in config.experts:
            described[expert.name]["head"] = heads.shapes_of(expert)
    changed = dataclasses.replace(  # type: ignore[call-arg]
        config,
        experts={name: described[name] for name in config.experts},
        general_experts={name: described[name] for name in config.general_experts},
        layout=layout(experts, model),
        mixing=mixing_of(config, experts),
        mixing_by_default=config.mixing is None or config.mixing_by_default,
        router_granularity=config.modules_per_router,
        task_type=task_type,
        **heads.completed(config, experts, model, task_type),
    )
    check_prototypes(model, changed, experts)
    return changed


def _dtype(expert: Expert) -> torch.dtype:
    """The widest dtype of an expert's factors."""
    dtypes = []
    for a, b in expert.factors.values():
        dtypes += [a.dtype, b.dtype]
    return functools.reduce(torch.promote_types, dtypes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_model(config: RoutedLoraConfig, model: nn.Module) -> None:
    """`UserError` if the model lacks a module, or cannot be routed as the configuration says."""
    present = {name for name, _ in model.named_modules()}
    absent = [module for module in config.sites if module not in present]
    if absent:
        raise UserError(
            f"this adapter is for another model: {len(absent)} of its {len(config.sites)} modules "
            f"are not in the base model, {absent[0]} among them"
        )
    check_groups(model, config)
    check_sequences(model, config)
    saved_whole = list(dict.fromkeys(config.modules_to_save or ()))
    if config.head is not None and not heads.base_heads(model, saved_whole):
        raise UserError(
            f"this adapter has a head ({', '.join(saved_whole)}), for which a "
            f"{type(model).__name__} has no place: load the base model with the class for "
            f"{config.task_type or 'its task'}, such as AutoModelForSequenceClassification"
        )


def _check_names(configs: Mapping[str, Any], added: RoutedLoraConfig) -> None:
    """`UserError` where one of several adapters is called like a tensor of routed adapters.

    PEFT tells by any part of a key whose it is: on saving it would leave these keys out. (So it
    does, for all kinds of adapters, with parts of modules' names.)
    """
    if len(configs) == 1:
        return
    taken = {"A", "B", "biases", "routed_lora_experts", "routed_lora_router"}
    for config in (*configs.values(), added):
        if not isinstance(config, RoutedLoraConfig) or not config.is_composed:
            continue
        router = config.router_class(config, config.names, in_features=1)
        for name, _ in router.named_parameters():
            taken |= set(name.split("."))
    for name in configs:
        if name in taken:
            raise UserError(
                f"an adapter beside others cannot be called {name!r}: tensors of routed adapters "
                "are, and PEFT would leave them out on saving; take another name"
            )


def _without(by_expert: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What stands for each expert but this one."""
    return {expert: value for expert, value in by_expert.items() if expert != name}


def _weights(config: RoutedLoraConfig) -> dict[str, float]:
    """The coefficients of `fixed` by expert."""
    return dict(zip(config.names, FixedRouter.weights_of(config, config.names), strict=True))
