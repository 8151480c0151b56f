"""How the gates of an upcycled mixture of experts start: at random, or as the states of prompts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.merging.sources import tokenizer_of
from mergekit_moe_ext.merging.tasks import DISTRIBUTIONS, RandomTensor
from mergekit_moe_ext.upcycling.families.declaration import Stack
from mergekit_moe_ext.upcycling.prompts import PromptStates, Tokens

LOG = logging.getLogger(__name__)
GateMode = Literal[
    "random", "uniform_random", "zeros", "hidden", "hidden_last", "hidden_avg", "cheap_embed"
]


def initial_gates(
    job: Job,
    config: PretrainedConfig,
    layers: Sequence[tuple[Stack, int]],
    embedding: str,
    dtype: torch.dtype,
) -> dict[str, Task]:
    """A task per gate, by its name in the output. `UserError` for prompts that cannot make one."""
    mode, shape = job.options.gate_mode, (len(job.experts), config.hidden_size)
    names = [stack.gate.format(layer=layer) for stack, layer in layers]
    if mode in DISTRIBUTIONS:
        if any(
            options.positive_prompts or options.negative_prompts for options in job.model_options
        ):
            LOG.warning(
                "gate_mode is %s, so the prompts are not used; `gate_mode: hidden` uses them", mode
            )
        std = getattr(config, "initializer_range", 0.02)  # as transformers initialises
        return {
            name: RandomTensor(
                name=name, shape=shape, mode=mode, std=std, seed=job.seed, dtype=str(dtype)
            )
            for name in names
        }
    if config.is_encoder_decoder and mode != "cheap_embed":
        raise UserError(
            f"gate_mode: {mode} reads the states of one stack of layers, and "
            f"{config.architectures[0]} has two; use cheap_embed or random"
        )
    options = job.merge_options
    states = PromptStates(
        model=job.donor,
        prompts=_tokenised_prompts(job),
        ffns=tuple(stack.ffn.format(layer=layer) for stack, layer in layers),
        mode=mode,
        embedding=embedding,
        device=options.device or "cpu",
        lora_merge_cache=options.lora_merge_cache,
        transformers_cache=options.transformers_cache,
        trust_remote_code=options.trust_remote_code,
        quiet=options.quiet,
    )
    return {
        name: PromptGate(states=states, index=index, shape=shape, dtype=str(dtype))
        for index, name in enumerate(names)
    }


def _tokenised_prompts(job: Job) -> tuple[tuple[Tokens, Tokens], ...]:
    texts = [
        (
            _texts(options.positive_prompts, f"positive_prompts under models[{index}].parameters"),
            _texts(options.negative_prompts, f"negative_prompts under models[{index}].parameters"),
        )
        for index, options in enumerate(job.model_options)
    ]
    for index, (positive, _negative) in enumerate(texts):
        if not positive:
            raise UserError(
                f"gate_mode: {job.options.gate_mode} needs `positive_prompts` under "
                f"models[{index}].parameters "
                f"({job.experts[index]}): texts that should be sent to this expert"
            )
    if len(texts) > 1 and all(pair == texts[0] for pair in texts):
        raise UserError(
            "the prompts are the same for all experts, so that a gate could not tell them apart; "
            "give each model `positive_prompts` of its own"
        )
    try:
        tokenizer = tokenizer_of(job.donor, job.merge_options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"gate_mode: {job.options.gate_mode} needs the tokenizer of {job.donor}, which cannot "
            f"be read: {str(error).splitlines()[0]}"
        ) from error

    def tokens(prompts: list[str]) -> Tokens:
        start = (
            tokenizer.bos_token or ""
        )  # by hand, as mergekit-moe does: not every tokenizer adds it
        return tuple(
            tuple(tokenizer(start + prompt, add_special_tokens=False)["input_ids"])
            for prompt in prompts
        )

    return tuple((tokens(positive), tokens(negative)) for positive, negative in texts)


def _texts(prompts: list[str] | str | None, where: str) -> list[str]:
    """The prompts, read from their file if a path is given."""
    if isinstance(prompts, str):
        path = Path(prompts)
        if not path.is_file():
            raise UserError(
                f"{where}: there is no text file {prompts!r}; a single prompt is a list of one"
            )
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(not prompt.strip() for prompt in prompts or ()):
        raise UserError(f"{where}: one of the prompts is empty")
    return prompts or []


class PromptGate(Task[torch.Tensor]):
    """One layer's gate, of shape (experts, hidden): the directions of the experts' prompts
    there."""

    states: PromptStates
    index: int
    shape: tuple[int, ...]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {"states": self.states}

    def execute(self, states: torch.Tensor) -> torch.Tensor:
        return states[self.index].to(dtype_from_name(self.dtype)).contiguous()
