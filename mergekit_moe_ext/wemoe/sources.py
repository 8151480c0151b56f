"""The base and the sources of a weight-ensembling merge, as they are known and checked before any
tensor is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import transformers
from mergekit.common import ModelReference
from transformers import PretrainedConfig, PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.joined import joined_tensors
from mergekit_moe_ext.merging.manifest import Manifest, hub_names, hub_state, manifest_from
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.merging.sources import (
    Headers,
    check_same_size,
    read_configs,
    read_headers,
    untied_if_any_is,
    warn_of_other_behaviour,
)
from mergekit_moe_ext.merging.views import derived_shapes
from mergekit_moe_ext.modeling.any_base import auto_class_of
from mergekit_moe_ext.wemoe.clip_heads import (
    TOWERS,
    ClipHead,
    as_tower,
    has_projection,
    read_heads,
    with_projection,
)

# Classes that need no head of the base: a trunk has none, and of classifiers each keeps its own.
_WITHOUT_HEADS_OF_A_BASE = (
    "AutoModel",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
)
_HEADS = ("classifier", "score", "classification_head.out_proj", "classifier.out_proj")


@dataclass(frozen=True)
class Sources:
    """The configurations, names and shapes of base and sources.

    network: the base's, without memory.
    manifest: the base's.
    stored: the names of the network's tensors in a checkpoint, by their names in the network. Where
        a checkpoint holds several joined, those under which the headers' view shows the parts.
    joined: the parts of each tensor that a checkpoint holds joined, by its name there.
    projecting: the CLIP towers that have a projection of their own.
    """

    base: ModelReference
    configs: Mapping[ModelReference, PretrainedConfig]
    headers: Mapping[ModelReference, Headers]
    network: PreTrainedModel
    manifest: Manifest
    stored: Mapping[str, str]
    joined: Mapping[str, Sequence[str]]
    clip_heads: Sequence[ClipHead]
    projecting: Sequence[ModelReference]

    @property
    def config(self) -> PretrainedConfig:
        return self.configs[self.base]

    def stored_name(self, name: str) -> str:
        if name not in self.stored:
            raise UserError(
                f"{name} of {self.base} is stored in another layout than the model uses, so it "
                "cannot be upscaled"
            )
        return self.stored[name]


def read_sources(job: Job, method: str) -> Sources:
    """Base and sources, of which only headers are read.

    `UserError` for models that are not fine-tunes of the base.
    """
    base = job.base
    if base is None or base in job.experts:
        raise UserError(
            f"{method} needs as `base_model:` the model that its sources are fine-tunes of, which "
            "must not be among `models:`"
        )
    if job.merge_options.unsafe_truncate_embeddings:
        raise UserError(
            f"{method} does not truncate embeddings; align vocabularies with `tokenizer:`"
        )
    configs = read_configs(job)
    head_paths = [options.head for options in job.model_options]
    clip_heads = read_heads(head_paths, job.experts, configs)
    # A projection goes into its task's head. What is left of all models is a tower without one, so
    # that those with and without can be merged.
    projecting = []
    if clip_heads:
        projecting = [model for model, config in configs.items() if has_projection(config)]
    configs |= {model: as_tower(configs[model]) for model in projecting}
    _check_one_architecture(base, configs)
    check_same_size(job, configs)
    warn_of_other_behaviour(job, configs)
    networks = {model: hub_state(config) for model, config in configs.items()}
    manifests = {model: manifest_from(*each) for model, each in networks.items()}
    manifests |= {model: with_projection(manifests[model], configs[model]) for model in projecting}
    headers = read_headers(job, configs, manifests)
    network, state = networks[base]
    # The output has a head of its own where any source has: the base is then taken as untied, too.
    untied = untied_if_any_is(job, configs)
    if untied is not configs[base]:
        configs[base] = untied
        network, state = hub_state(untied)
        manifests[base] = manifest_from(network, state)
    stored = hub_names(network, state)
    manifest = manifests[base]
    # Routers weigh linear modules one by one. Where files hold the weights of several joined, the
    # parts are read instead, through a view and under their names in the network.
    joined = joined_tensors(network, state)
    if joined:
        layer = tuple(joined.values())
        headers = {model: source.seen_through(layer) for model, source in headers.items()}
        manifest = replace(manifest, shapes=derived_shapes(manifest.shapes, layer))
    parts = {name: derivation.names[1:] for name, derivation in joined.items()}
    for names in parts.values():
        for name in names:
            stored[name] = name
    return Sources(base, configs, headers, network, manifest, stored, parts, clip_heads, projecting)


def _check_one_architecture(
    base: ModelReference, configs: Mapping[ModelReference, PretrainedConfig]
) -> None:
    architectures = configs[base].architectures
    for model, config in configs.items():
        if config.architectures != architectures or not architectures:
            raise UserError(
                f"{model} is a {config.architectures} and {base} a {architectures}: they must be "
                f"one class{_way_to_one_class(base, configs)}"
            )
    try:
        auto = auto_class_of(architectures[0])
    except ValueError as error:
        raise UserError(f"{base}: {error}") from error
    if auto == "AutoModelForImageTextToText":
        raise UserError(
            f"{base} is a {architectures[0]}, which reads images and texts: `merge_method: moe` "
            "merges such models"
        )


def _way_to_one_class(
    base: ModelReference, configs: Mapping[ModelReference, PretrainedConfig]
) -> str:
    """The Python line that makes a base of the sources' class; empty where it would not do.

    It does for a trunk or tower that the base holds, and for a classifier around it, whose new head
    is not used: each task keeps its own.
    """
    classes: set[str] = set()
    for model, config in configs.items():
        if model != base:
            classes.update(config.architectures or ["no class"])
    if len(classes) != 1 or base.lora:
        return ""
    (architecture,) = classes
    target = getattr(transformers, architecture, None)
    base_config = configs[base]
    config_classes = [type(base_config), *base_config.sub_configs.values()]
    if target is None or target.config_class not in config_classes:
        return ""
    try:
        auto = auto_class_of(architecture)
    except ValueError:
        return ""
    if architecture not in TOWERS and auto not in _WITHOUT_HEADS_OF_A_BASE:
        return ""
    path = json.dumps(str(base.model.path))
    copy = json.dumps(f"{base.model.path.rstrip('/')}-{architecture}")
    return (
        "; this makes such a base, for which the tokenizer or image processor is to be saved "
        f"likewise: transformers.{architecture}.from_pretrained({path}).save_pretrained({copy})"
    )


def head_of_tasks(
    network: PreTrainedModel, configs: Mapping[ModelReference, PretrainedConfig]
) -> str | None:
    """The name of the classification head, where the models need one each; else None.

    They share one if their classes have the same names. Classes without names of their own
    (`LABEL_0`, `LABEL_1` …) are not taken to be the same, even where two models have equally many.
    """
    classes = [config.id2label for config in configs.values()]
    are_named = any(not str(label).startswith("LABEL_") for label in classes[0].values())
    if are_named and all(each == classes[0] for each in classes):
        return None
    for name, module in network.named_modules():
        if name in _HEADS and hasattr(module, "weight"):
            return name
    return None
