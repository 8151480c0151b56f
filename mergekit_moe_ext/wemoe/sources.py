"""What a weight-ensembling merge knows of base and sources before it reads a tensor, and what it
asks of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit.common import ModelReference
from transformers import PretrainedConfig, PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import Manifest, hub_names, hub_state, manifest_from
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.merging.sources import Headers, check_same_size, read_configs, read_headers
from mergekit_moe_ext.modeling.modeling_wemoe import auto_class_of
from mergekit_moe_ext.wemoe.clip_heads import (
    ClipHead,
    as_tower,
    has_projection,
    read_heads,
    with_projection,
)

_HEADS = ("classifier", "score", "classification_head.out_proj", "classifier.out_proj")


@dataclass(frozen=True)
class Sources:
    """What is known of base and sources before any tensor is read."""

    base: ModelReference
    configs: Mapping[ModelReference, PretrainedConfig]
    headers: Mapping[ModelReference, Headers]
    network: PreTrainedModel  # the base's, without memory
    manifest: Manifest  # the base's
    stored: Mapping[str, str]  # its names in a checkpoint
    clip_heads: Sequence[ClipHead]
    projecting: Sequence[ModelReference]  # CLIP's towers with a projection of their own

    @property
    def config(self) -> PretrainedConfig:
        return self.configs[self.base]

    def stored_name(self, name: str) -> str:
        if name not in self.stored:
            raise UserError(
                f"{name} of {self.base} is not stored as it is used, so that it cannot be upscaled"
            )
        return self.stored[name]


def read_sources(job: Job, method: str) -> Sources:
    """Reads headers only. `UserError` for models that are no fine-tunes of the base."""
    base = job.base
    if base is None or base in job.experts:
        raise UserError(
            f"{method} needs what its sources are fine-tunes of as `base_model:`, and not among "
            "`models:`"
        )
    configs = read_configs(job)
    clip_heads = read_heads([of_model.head for of_model in job.model_options], job.experts, configs)
    projecting = [
        model for model, config in configs.items() if clip_heads and has_projection(config)
    ]
    configs |= {model: as_tower(configs[model]) for model in projecting}
    _check_one_architecture(base, configs)
    check_same_size(job, configs)
    built = {model: hub_state(config) for model, config in configs.items()}
    manifests = {model: manifest_from(*each) for model, each in built.items()}
    manifests |= {model: with_projection(manifests[model], configs[model]) for model in projecting}
    headers = read_headers(job, configs, manifests)
    network, state = built[base]
    stored = hub_names(network, state)
    return Sources(base, configs, headers, network, manifests[base], stored, clip_heads, projecting)


def _check_one_architecture(
    base: ModelReference, configs: Mapping[ModelReference, PretrainedConfig]
) -> None:
    wanted = configs[base].architectures
    for model, config in configs.items():
        if config.architectures != wanted or not wanted:
            raise UserError(
                f"{model} is a {config.architectures} and {base} a {wanted}: they must be one class"
            )
    try:
        auto_class_of(wanted[0])
    except ValueError as error:
        raise UserError(f"{base}: {error}") from error


def head_of_tasks(
    network: PreTrainedModel, configs: Mapping[ModelReference, PretrainedConfig]
) -> str | None:
    """The classification head, where not all models have the same classes, by their names.

    Where nobody named them (`LABEL_0`, `LABEL_1` …), as many classes of two models are not taken
    for the same.
    """
    head = next(
        (
            name
            for name, module in network.named_modules()
            if name in _HEADS and hasattr(module, "weight")
        ),
        None,
    )
    classes = [config.id2label for config in configs.values()]
    are_named = any(not str(label).startswith("LABEL_") for label in classes[0].values())
    return (
        head if head and not (are_named and all(each == classes[0] for each in classes)) else None
    )
