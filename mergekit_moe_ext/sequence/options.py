"""The options, the output's configuration and the learned router of both sequence MoEs."""

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

MERGEME = "https://arxiv.org/abs/2502.00997"
# Values that the output takes from the donor's configuration.
_DONOR_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


class SequenceOptions(MethodOptions):
    """The options of both sequence MoEs."""

    experts_per_sequence: int | None = Field(
        None,
        ge=1,
        description="number of experts that a sequence chooses [default: 2 (MergeME); all with "
        "routing: uniform]",
    )
    routing_tokens: int = Field(
        32,
        ge=1,
        description="number of tokens of a sequence that choose, outside generate, which takes the "
        "prompt",
    )
    routing_prefix: Literal["prefix", "sequence"] = Field(
        "prefix",
        description="tokens that choose: prefix, the first ones, or sequence, all of them, as in "
        "the paper, which leaks later tokens into the prediction of earlier ones",
    )
    combine: Literal["logits", "probabilities"] = Field(
        "logits",
        description="quantity of the chosen experts that is added up: logits (the paper), or "
        "probabilities, which is for experts whose logits are of different scales",
    )
    router_aux_loss_coef: float = Field(
        0.0,
        ge=0,
        description="weight of the load-balancing loss in training, with routing: learned",
    )


def sequence_config(
    job: Job, donor: PretrainedConfig, experts: Sequence[Decoder], **more: Any
) -> SequenceMoEConfig:
    """The output's configuration. `UserError` for numbers and routings that do not go together."""
    options = job.options
    number = len(experts)
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
        raise UserError("router_aux_loss_coef is for routing: learned; no other routing is trained")
    values = {}
    for key in _DONOR_KEYS:
        if getattr(donor, key, None) is not None:
            values[key] = getattr(donor, key)
    # A sequence may choose any expert, so that the shortest context of all counts.
    lengths = [getattr(expert.config, "max_position_embeddings", None) for expert in experts]
    known_lengths = [length for length in lengths if length is not None]
    if known_lengths:
        values["max_position_embeddings"] = min(known_lengths)
    return SequenceMoEConfig(
        **values,
        experts=[expert.expert_config for expert in experts],
        expert_names=names_of(job.experts),
        vocab_size=donor.vocab_size,
        routing=options.routing,
        experts_per_sequence=chosen,
        logit_softcaps=[expert.softcap for expert in experts],
        combine=options.combine,
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


def untrained_router(config: SequenceMoEConfig) -> dict[str, str]:
    """The `untrained` of a plan: a learned router, where there is a choice."""
    is_untrained = config.routing == "learned" and len(config.experts) > 1
    return {"router": "random"} if is_untrained else {}


def learned_router(job: Job, config: SequenceMoEConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The router's tensor, random, by its name; empty unless routing is learned (MergeME 3.2)."""
    if config.routing != "learned":
        return {}
    name = "router.weight"
    tasks: dict[str, Task] = {
        name: RandomTensor(
            name=name,
            shape=(len(config.experts), config.hidden_size),
            mode="random",
            std=config.initializer_range,
            seed=job.seed,
            dtype=str(dtype),
        )
    }
    return tasks
