"""A mixture of experts that is changed, and the plan of the one that it becomes.

Every tensor that does not count experts is copied. Of those that do, the entries of the experts
that stay are copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.growing.tasks import ArrangedExperts
from mergekit_moe_ext.merging.card import model_in_markdown
from mergekit_moe_ext.merging.manifest import Manifest
from mergekit_moe_ext.merging.method import CopiedTensor, Job, Plan
from mergekit_moe_ext.merging.sources import Headers, output_dtype
from mergekit_moe_ext.mixtures.experts import (
    MoeLayer,
    experts_per_token,
    moe_layers,
    num_experts,
)


@dataclass(frozen=True)
class Mixture:
    """The mixture that is changed."""

    model: ModelReference
    config: PretrainedConfig
    layers: list[MoeLayer]
    manifest: Manifest
    headers: Headers
    dtype: torch.dtype  # of the output

    @property
    def number(self) -> int:
        """The number of experts of a layer."""
        return num_experts(self.config)

    @property
    def in_markdown(self) -> str:
        return model_in_markdown(self.model)

    @classmethod
    def among(
        cls,
        job: Job,
        configs: Mapping[ModelReference, PretrainedConfig],
        manifests: Mapping[ModelReference, Manifest],
        headers: Mapping[ModelReference, Headers],
    ) -> "Mixture":
        if job.merge_options.unsafe_truncate_embeddings:
            raise UserError("the mixture keeps its vocabulary: nothing is truncated here")
        model = job.donor
        config = configs[model]
        dtype = output_dtype(job, {model: headers[model]})
        return cls(model, config, moe_layers(config), manifests[model], headers[model], dtype)


def arranged(
    job: Job,
    mixture: Mixture,
    config: PretrainedConfig,
    order: Sequence[int],
    added: Mapping[tuple[str, int], CopiedTensor],
    new: Mapping[str, Task],
    notes: str,
) -> Plan:
    """The plan of the mixture with the experts in `order`, in which new ones are numbered after
    those that it has.

    added: the tensors of new experts that lie apart, by template and number among the new ones.
    new: by tensor of all experts, the task that makes the new experts' part of it.
    """
    config.dtype = mixture.dtype
    copies: dict[str, CopiedTensor] = {}
    computed: dict[str, ArrangedExperts] = {}
    of_experts: set[str] = set()
    for layer in mixture.layers:
        for template in layer.experts:
            for index in range(mixture.number):
                of_experts.add(template.format(expert=index))
            for target, index in enumerate(order):
                name = template.format(expert=target)
                if index < mixture.number:
                    copies[name] = _kept(mixture, template.format(expert=index))
                else:
                    copies[name] = added[template, index - mixture.number]
        for name, axis in layer.rows.items():
            of_experts.add(name)
            shape = list(mixture.manifest.shapes[name])
            shape[axis] = len(order)
            computed[name] = ArrangedExperts(
                name=name,
                old=job.load(mixture.model, name, job.config.dtype),
                new=new.get(name),
                axis=axis,
                order=tuple(order),
                shape=tuple(shape),
            )
    for name in mixture.manifest.shapes:
        if name not in of_experts:
            copies[name] = _kept(mixture, name)
    return Plan(
        config=config,
        num_experts=len(order),
        experts_per_token=experts_per_token(config),
        shared={},
        copies=copies,
        computed=computed,
        dtype=mixture.dtype,
        views={mixture.model: mixture.headers.view},
        notes=notes,
    )


def _kept(mixture: Mixture, name: str) -> CopiedTensor:
    """A tensor of the mixture as its files have it, where a tied one may stand under the other's
    name.
    """
    stored = mixture.headers.shapes
    names = [name]
    if name in mixture.manifest.vocabulary:
        names += sorted(mixture.manifest.tied)
    stored_name = next(each for each in names if each in stored)
    return CopiedTensor(mixture.model, stored_name, stored[stored_name])
