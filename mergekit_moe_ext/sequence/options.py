"""What both sequence MoEs have: options, the output's configuration, and the learned router."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from mergekit.graph import Task
from pydantic import Field
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.method import Job, MethodOptions
from mergekit_moe_ext.merging.sources import names_of
from mergekit_moe_ext.merging.tasks import RandomTensor
from mergekit_moe_ext.modeling import SequenceMoEConfig
from mergekit_moe_ext.sequence.decoders import Decoder, special_token_ids

# Of the donor, for those who generate with the output.
_KEPT_OF_DONOR = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


class SequenceOptions(MethodOptions):
    """What both sequence MoEs have."""

    experts_per_sequence: int | None = Field(
        None,
        ge=1,
        description="how many experts a sequence chooses: 2 if not given (MergeME), all if uniform",
    )
    routing_tokens: int = Field(
        32,
        ge=1,
        description="how many tokens of a sequence choose, outside generate, which takes the "
        "prompt",
    )
    routing_prefix: Literal["prefix", "sequence"] = Field(
        "prefix",
        description="prefix, or sequence: the whole sequence chooses, as in the paper, which leaks "
        "later tokens into the prediction of earlier ones",
    )
    router_aux_loss_coef: float = Field(
        0.0, ge=0, description="weight of the load-balancing loss in training; for routing: learned"
    )


def sequence_config(
    job: Job, donor: PretrainedConfig, experts: Sequence[Decoder], **more: Any
) -> SequenceMoEConfig:
    """The output's configuration. `UserError` for numbers and routings that do not go together."""
    options, number = job.options, len(experts)
    if options.routing == "uniform":
        if options.experts_per_sequence not in (None, number):
            raise UserError(
                f"routing: uniform takes all {number} experts: leave experts_per_sequence out"
            )
        chosen = number
    else:
        chosen = options.experts_per_sequence or min(2, number)
    if chosen > number:
        raise UserError(
            f"experts_per_sequence is {chosen}, but `models:` lists {number} expert(s); it can be "
            f"at most {number}"
        )
    if options.routing == "learned" and chosen == 1 and number > 1:
        raise UserError(
            "routing: learned with experts_per_sequence: 1 cannot be trained: the softmax over one "
            "expert is always 1, so that the router gets no gradient; take 2 or more"
        )
    if options.router_aux_loss_coef and options.routing != "learned":
        raise UserError(
            "router_aux_loss_coef is for routing: learned; nothing else is trained to route"
        )
    softcaps = [expert.softcap for expert in experts]
    if len(set(softcaps)) > 1 and chosen > 1:
        raise UserError(
            f"the experts cap their logits differently ({', '.join(map(str, softcaps))}), so that "
            "no two of them can be mixed: take experts_per_sequence: 1"
        )
    of_donor = {
        key: getattr(donor, key) for key in _KEPT_OF_DONOR if getattr(donor, key, None) is not None
    }
    lengths = [
        expert.config.max_position_embeddings for expert in experts if _has_length(expert.config)
    ]
    if lengths:
        of_donor["max_position_embeddings"] = min(lengths)
    return SequenceMoEConfig(
        **of_donor,
        experts=[expert.expert_config for expert in experts],
        expert_names=names_of(job.experts),
        vocab_size=donor.vocab_size,
        routing=options.routing,
        experts_per_sequence=chosen,
        logit_softcaps=softcaps,
        routing_tokens=options.routing_tokens,
        routing_prefix=options.routing_prefix,
        router_aux_loss_coef=options.router_aux_loss_coef,
        special_token_ids=special_token_ids(job, donor),
        architectures=["SequenceMoEForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_sequence_moe.SequenceMoEConfig",
            "AutoModelForCausalLM": "modeling_sequence_moe.SequenceMoEForCausalLM",
        },
        **more,
    )


def learned_router(job: Job, config: SequenceMoEConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The router's tensor, drawn at random, where routing is learned (MergeME 3.2)."""
    if config.routing != "learned":
        return {}
    name, width = "router.weight", config.hidden_size
    tasks: dict[str, Task] = {
        name: RandomTensor(
            name=name,
            shape=(len(config.experts), width),
            mode="random",
            std=config.initializer_range,
            seed=job.seed,
            dtype=str(dtype),
        )
    }
    return tasks


def _has_length(config: PretrainedConfig) -> bool:
    return getattr(config, "max_position_embeddings", None) is not None
