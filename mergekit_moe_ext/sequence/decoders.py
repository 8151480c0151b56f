"""Decoders as the experts of a sequence MoE: which can be one, and the parts of each.

An expert is the source's own class with its embedding and its head taken out. The rest must take
embeddings and keep an ordinary key-value cache.
"""

import copy
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from mergekit.common import ModelReference
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.layers import decoder_layers
from mergekit_moe_ext.merging.manifest import Manifest, hub_state, manifest_from
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.merging.sources import tokenizer_of
from mergekit_moe_ext.modeling.host_cache import name_of_cache

LOG = logging.getLogger(__name__)
_KEPT_IN_CACHE = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Decoder:
    """One source model, as an expert.

    config: the source's own.
    embedding: the hub names of the embedding's tensors, by their names in the module.
    head: those of the head; without a weight where it is tied to the embedding's.
    widths: the width of the embedding, and that of the states that the head reads.
    softcap: the cap on its logits, if it has one.
    layers: the name of the list of decoder layers.
    a_layer: one of them, on the meta device.
    """

    config: PretrainedConfig
    manifest: Manifest
    embedding: Mapping[str, str]
    head: Mapping[str, str]
    widths: tuple[int, int]
    softcap: float | None
    layers: str
    a_layer: nn.Module

    @property
    def trunk(self) -> list[str]:
        """The hub names of all tensors but those of embedding and head."""
        outside = {*self.embedding.values(), *self.head.values()}
        return [name for name in self.manifest.shapes if name not in outside]

    @property
    def head_weight(self) -> str:
        """The hub name of the head's matrix, which may be the embedding's."""
        return self.head.get("weight", self.embedding["weight"])

    @property
    def is_tied(self) -> bool:
        return "weight" not in self.head

    @property
    def expert_config(self) -> dict[str, Any]:
        """The configuration of the expert, as the output's holds it."""
        # The mixture itself caps the logits, after its own head.
        config = copy.deepcopy(self.config)
        if self.softcap is not None:
            config.final_logit_softcapping = None
        values = config.to_diff_dict()
        for key in ("dtype", "transformers_version", "auto_map"):
            values.pop(key, None)
        return {**values, "model_type": config.model_type, "architectures": config.architectures}


def read_decoders(
    configs: Mapping[ModelReference, PretrainedConfig],
) -> dict[ModelReference, Decoder]:
    """Every source as a decoder. `UserError` names the one that cannot be an expert."""
    return {model: _read_decoder(model, config) for model, config in configs.items()}


def _read_decoder(model: ModelReference, config: PretrainedConfig) -> Decoder:
    if config.architectures:
        name = config.architectures[0]
    else:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
    reason = _refusal(name, config)
    if reason is not None:
        raise UserError(
            f"{model} cannot be an expert of a sequence MoE: {name or config.model_type} {reason}"
        )
    config.architectures = [name]
    network, state = hub_state(config)
    embedding = network.get_input_embeddings()
    head = network.get_output_embeddings()
    try:
        layers = decoder_layers(network)
    except ValueError as error:
        raise UserError(f"{model} cannot be an expert of a sequence MoE: {error}") from error
    manifest = manifest_from(network, state)
    # Of tied tensors the name counts that the manifest has.
    hub_names = {id(tensor): name for name, tensor in state.items() if name in manifest.shapes}
    embedding_names = {}
    for key, parameter in embedding.named_parameters():
        embedding_names[key] = hub_names[id(parameter)]
    head_names = {}
    for key, parameter in head.named_parameters():
        if parameter is not embedding.weight:
            head_names[key] = hub_names[id(parameter)]
    return Decoder(
        config=config,
        manifest=manifest,
        embedding=embedding_names,
        head=head_names,
        widths=(embedding.embedding_dim, head.in_features),
        softcap=getattr(config, "final_logit_softcapping", None),
        layers=next(iter(layers)).rpartition(".")[0],
        a_layer=next(iter(layers.values())),
    )


def _refusal(name: str, config: PretrainedConfig) -> str | None:
    """The reason why this architecture cannot be an expert, as the end of a sentence; None if it
    can.
    """
    if config.is_encoder_decoder:
        return "is an encoder-decoder"
    if any(hasattr(config, key) for key in ("vision_config", "audio_config", "text_config")):
        return "is not a language model alone"
    if name not in _causal_architectures() or not hasattr(transformers, name):
        return "is not a causal language model of transformers"
    if getattr(config, "hidden_size_per_layer_input", None):
        return "needs token embeddings inside its layers"
    model_class = getattr(transformers, name)
    kinds = set(getattr(config, "layer_types", None) or ())
    takes = inspect.signature(model_class.forward).parameters
    if model_class._is_stateful or kinds - _KEPT_IN_CACHE or name_of_cache(takes) is None:
        return "keeps no key-value cache of the usual kind"
    if "inputs_embeds" not in takes:
        return "takes no embeddings"
    return None


def _causal_architectures() -> set[str]:
    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names |= {value} if isinstance(value, str) else set(value)
    return names


def special_token_ids(job: Job, donor: PretrainedConfig) -> list[int]:
    """The tokens that are special to the donor's tokenizer or configuration, in ascending order.

    Perplexity does not count them.
    """
    ids: set[int] = set()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(donor, key, None)
        if isinstance(value, list):
            ids |= set(value)
        elif value is not None:
            ids.add(value)
    try:
        tokenizer = tokenizer_of(job.donor, job.merge_options)
    except UserError:
        LOG.warning(
            "%s has no tokenizer that can be read, so only its configuration says which tokens are "
            "special",
            job.donor,
        )
        return sorted(ids)
    return sorted(ids | set(tokenizer.all_special_ids))
