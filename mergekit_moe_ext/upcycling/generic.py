"""A mixture of experts out of dense models of any one class, where transformers has no mixture that
fits: the class itself, with a router and all experts in each of its FFNs (`UpcycledMoe<X>`).
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from transformers import PretrainedConfig, PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.card import model_in_markdown
from mergekit_moe_ext.merging.manifest import Manifest, hub_names, hub_state, manifest_from
from mergekit_moe_ext.merging.method import Job, Plan
from mergekit_moe_ext.merging.sources import (
    check_same_size,
    output_dtype,
    read_headers,
    views_of,
    warn_of_other_behaviour,
)
from mergekit_moe_ext.merging.tasks import StackedExperts
from mergekit_moe_ext.merging.wrappers import copied_outside, language_config
from mergekit_moe_ext.modeling import find_architecture
from mergekit_moe_ext.modeling.any_base import auto_class_of
from mergekit_moe_ext.modeling.configuration_upcycled_moe import RoutedFFN, config_class
from mergekit_moe_ext.upcycling.families.declaration import Stack
from mergekit_moe_ext.upcycling.ffns import find_ffns, layers_with_experts
from mergekit_moe_ext.upcycling.gates import initial_gates, untrained_gates

LOG = logging.getLogger(__name__)
# Config keys by which architectures name the activation of their FFNs, besides `hidden_act`.
_ACTIVATIONS = (
    "activation",
    "activation_function",
    "decoder_activation_function",
    "dense_act_fn",
    "encoder_activation_function",
    "gelu_activation",
    "hidden_activation",
)


@dataclass(frozen=True)
class Dense:
    """A dense model without memory.

    manifest: its tensors, as checkpoints have them.
    stored: the names of its tensors in a checkpoint, by their names in the network.
    ffns: its FFNs, by the names that their routers get.
    """

    network: PreTrainedModel
    manifest: Manifest
    stored: Mapping[str, str]
    ffns: Mapping[str, RoutedFFN]

    @property
    def expert_tensors(self) -> list[str]:
        """The network's names of the tensors that every expert has."""
        names = []
        for ffn in self.ffns.values():
            for linear in ffn.linears:
                for part in ("weight", "bias"):
                    if f"{linear}.{part}" in self.network.state_dict():
                        names.append(f"{linear}.{part}")
        return names


def read_dense(config: PretrainedConfig) -> Dense:
    """The dense model of a configuration. `UserError` for one that cannot be upcycled."""
    names = config.architectures or []
    if len(names) != 1:
        raise UserError(f"its config names {len(names)} classes under `architectures`, not one")
    network, state = hub_state(config)
    manifest = manifest_from(network, state)
    trunk = f"{network.base_model_prefix}."
    # Some checkpoints never have the trunk's name before those of its tensors (LLaVA's).
    has_trunk = any(name.startswith(trunk) for name in manifest.shapes)
    if network.base_model is not network and has_trunk:
        manifest = replace(manifest, trunk=trunk)
    dense = Dense(network, manifest, hub_names(network, state), find_ffns(network))
    try:
        auto_class_of(names[0])
    except ValueError as error:
        raise UserError(str(error)) from error
    for name in dense.expert_tensors:
        if name not in dense.stored:
            raise UserError(f"{name} is stored in another layout than {names[0]} uses")
    return dense


def upcycled_config(
    dense: PretrainedConfig, ffns: Mapping[str, RoutedFFN], experts: int, experts_per_token: int
) -> PretrainedConfig:
    """The configuration of `UpcycledMoe<X>` for a dense `<X>` with these FFNs."""
    config_type: Any = config_class(type(dense))  # type: ignore[arg-type]
    output: Any = find_architecture(f"UpcycledMoe{dense.architectures[0]}")
    replaced = ("model_type", "architectures", "auto_map", "dtype", "transformers_version")
    values = {key: value for key, value in dense.to_dict().items() if key not in replaced}
    # Some dense models have a number of experts, which counts for nothing, in their config.
    values |= {
        "num_local_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "routed_ffns": {router: ffn.as_dict() for router, ffn in ffns.items()},
        "architectures": [output.__name__],
        "auto_map": {
            "AutoConfig": f"configuration_upcycled_moe.{config_type.__name__}",
            output._auto_class: f"{Path(inspect.getfile(output)).stem}.{output.__name__}",
        },
    }
    return config_type(**values)


def dense_of_all(
    job: Job, configs: Mapping[ModelReference, PretrainedConfig], donor: PretrainedConfig
) -> Dense:
    """The dense model that all sources are, by the config of the donor.

    `UserError` for sources of which no generic mixture can be made.
    """
    _check_one_class(job, configs)
    try:
        return read_dense(donor)
    except UserError as error:
        raise UserError(f"{job.donor}: {error.message}") from error


def plan_upcycled(
    job: Job,
    configs: Mapping[ModelReference, PretrainedConfig],
    donor: PretrainedConfig,
    dense: Dense,
    experts_per_token: int,
    shared_defaults: Mapping[str, Any],
    reason: str,
) -> Plan:
    """The plan of a merge to `UpcycledMoe<X>`; `reason` says why it is not a stock architecture.

    donor, dense: the config that the output's is made of, and what `dense_of_all` gives for it.
    shared_defaults: parameters of the shared method, where the configuration states none.
    """
    if job.options.expert_capacity is not None:
        raise UserError("`expert_capacity` is for Switch Transformers alone")
    if job.merge_options.unsafe_truncate_embeddings:
        raise UserError(
            "a generic mixture does not truncate embeddings; align vocabularies with `tokenizer:`"
        )
    check_same_size(job, configs)
    warn_of_other_behaviour(job, configs)
    headers = read_headers(job, configs, dict.fromkeys(configs, dense.manifest))
    config = upcycled_config(donor, dense.ffns, len(job.experts), experts_per_token)
    network, state = hub_state(config)
    output_names = hub_names(network, state)
    dtype = output_dtype(job, headers)
    config.dtype = dtype
    if job.options.architecture == "auto":
        LOG.warning(
            "%s; so the output is a %s, whose code lies beside its weights",
            reason,
            config.architectures[0],
        )

    computed: dict[str, Any] = {}
    for name in dense.expert_tensors:
        computed[output_names[name]] = _stacked(job, dense.manifest, dense.stored[name], dtype)
    gates = {f"{router}.weight": ffn.readers[0] for router, ffn in dense.ffns.items()}
    computed |= _gates(job, config, network, dense.manifest.embedding, gates, output_names)
    of_experts = {dense.stored[name] for name in dense.expert_tensors}
    outside = copied_outside(job, donor, headers[job.donor].shapes)
    shared = {}
    for name in dense.manifest.shapes:
        if name not in of_experts and name not in outside:
            shared[name] = dense.manifest.shared_tensor(name)
    return Plan(
        config=config,
        num_experts=len(job.experts),
        experts_per_token=experts_per_token,
        shared=shared,
        copies=outside,
        computed=computed,
        dtype=dtype,
        shared_defaults=shared_defaults,
        views=views_of(headers),
        untrained=untrained_gates(job),
        notes=_notes(job, config, dense, reason),
    )


def _check_one_class(job: Job, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    """Check that all sources are of the donor's class, that their FFNs have its activation, and
    that they classify alike if they classify.
    """
    donor = configs[job.donor]
    for model, config in configs.items():
        if config.architectures != donor.architectures:
            raise UserError(
                f"{model} is a {config.architectures} and {job.donor} a {donor.architectures}: "
                "they must be one class"
            )
        check_same_ffns(model, config, job.donor, donor)
        architecture = (donor.architectures or [""])[0]
        if "Classification" in architecture and config.id2label != donor.id2label:
            raise UserError(
                f"{model} has other classes (`id2label`) than {job.donor}: one head cannot be "
                "merged for both; `merge_method: wemoe` keeps a head per task"
            )


def check_same_ffns(
    model: ModelReference,
    config: PretrainedConfig,
    other: ModelReference,
    config_of_other: PretrainedConfig,
) -> None:
    """`UserError` for two models of one class whose language models, or the activations of their
    FFNs, are not the same.
    """
    inner = language_config(config)
    inner_of_other = language_config(config_of_other)
    if inner is not config and inner.model_type != inner_of_other.model_type:
        raise UserError(
            f"{model} has a {inner.model_type} inside and {other} a {inner_of_other.model_type}: "
            "they must be one class"
        )
    for key in _ACTIVATIONS:
        here = getattr(inner, key, None)
        there = getattr(inner_of_other, key, None)
        if here != there:
            raise UserError(
                f"{model} has another activation than {other}: `{key}` is {here!r}, not {there!r}"
            )


def _stacked(job: Job, manifest: Manifest, stored: str, dtype: torch.dtype) -> StackedExperts:
    """The tensor of this name of all sources, one upon the other."""
    experts = []
    for model in job.experts:
        load = job.load(model, stored, str(dtype), manifest.aliases(stored))
        experts.append((load,))
    shape = (len(experts), *manifest.shapes[stored])
    return StackedExperts(experts=tuple(experts), shape=shape, dtype=str(dtype))


def _gates(
    job: Job,
    config: PretrainedConfig,
    network: PreTrainedModel,
    embedding: str,
    readers: Mapping[str, str],
    output_names: Mapping[str, str],
) -> dict[str, Any]:
    """A task per router, by the name of its tensor in the output.

    `network` is the output's, and `readers` are the modules whose input the routers read, by the
    names of their tensors in the network.
    """
    mode = job.options.gate_mode
    is_decoder = network.can_generate() and not config.is_encoder_decoder
    if mode.startswith("hidden") and not (
        is_decoder and hasattr(language_config(config), "hidden_size")
    ):
        raise UserError(
            f"gate_mode: {mode} reads the states of a model that is one decoder, which "
            f"{config.architectures[0]} is not; use random or zeros"
        )
    if mode == "cheap_embed" and not embedding:
        raise UserError(
            f"gate_mode: {mode} reads token embeddings, which {config.architectures[0]} has not; "
            "use random or zeros"
        )
    layers: list[tuple[Stack, int]] = []
    shapes = {}
    for gate, reader in readers.items():
        layers.append((Stack(ffn=reader, gate=output_names[gate]), 0))
        shapes[output_names[gate]] = tuple(network.get_parameter(gate).shape)
    return initial_gates(job, config, layers, embedding, config.dtype, shapes)


def _notes(job: Job, config: PretrainedConfig, dense: Dense, reason: str) -> str:
    """Markdown on what the output is, and why."""
    for model in job.sources:
        reason = reason.replace(str(model), model_in_markdown(model))
    without = _layers_without(dense)
    lines = [
        f"The output is a generic mixture (`{config.architectures[0]}`): {reason}. Its code lies "
        "beside the weights, and needs transformers 5 with `trust_remote_code=True`, or "
        "mergekit-moe-ext installed. Servers that have code of their own for each architecture "
        "(vLLM, llama.cpp) do not read it.",
        "",
        f"Experts are the linear modules of {len(dense.ffns)} FFNs"
        + (f"; without an FFN that is routed: {', '.join(without)}." if without else "."),
    ]
    if config.num_experts_per_tok == 1:
        lines += ["", "With one expert per token its routers get no gradient."]
    return "\n".join(lines)


def _layers_without(dense: Dense) -> Sequence[str]:
    """The layers of the network that no router lies in."""
    layers = []
    for layer in layers_with_experts(dense.network):
        if not any(router.startswith(f"{layer}.") for router in dense.ffns):
            layers.append(layer)
    return layers
