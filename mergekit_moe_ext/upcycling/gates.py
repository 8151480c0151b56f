"""The initial gates of an upcycled mixture of experts: random, or made of the states of prompts."""

import logging
from collections.abc import Mapping, Sequence
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
from mergekit_moe_ext.merging.wrappers import language_config
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
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Task]:
    """A task per gate, by its name in the output.

    `shapes` are those of the gates, where their widths are not all the config's hidden size.
    `UserError` for prompts that are lacking, empty, or the same for all experts.
    """
    mode = job.options.gate_mode
    inner = language_config(config)
    names = [stack.gate.format(layer=layer) for stack, layer in layers]
    if shapes is None:
        shapes = dict.fromkeys(names, (len(job.experts), inner.hidden_size))
    if mode in DISTRIBUTIONS:
        std = getattr(inner, "initializer_range", 0.02)  # as transformers initialises
        return _gates_without_prompts(job, names, shapes, std, dtype)
    if config.is_encoder_decoder and mode != "cheap_embed":
        raise UserError(
            f"gate_mode: {mode} reads the states of one stack of layers, and "
            f"{config.architectures[0]} has two; use cheap_embed or random"
        )
    options = job.merge_options
    states = PromptStates(
        model=job.donor,
        prompts=tokenised_prompts(job, f"gate_mode: {mode}"),
        ffns=tuple(stack.ffn.format(layer=layer) for stack, layer in layers),
        mode=mode,
        embedding=embedding,
        device=options.device or "cpu",
        lora_merge_cache=options.lora_merge_cache,
        transformers_cache=options.transformers_cache,
        trust_remote_code=options.trust_remote_code,
        quiet=options.quiet,
    )
    gates: dict[str, Task] = {}
    for index, name in enumerate(names):
        gates[name] = PromptGate(states=states, index=index, shape=shapes[name], dtype=str(dtype))
    return gates


def _gates_without_prompts(
    job: Job,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    std: float,
    dtype: torch.dtype,
) -> dict[str, Task]:
    """A task per gate that starts at random, or with zeros; a warning where models have prompts."""
    mode = job.options.gate_mode
    if any(each.positive_prompts or each.negative_prompts for each in job.model_options):
        LOG.warning(
            "gate_mode is %s, so the prompts are not used; `gate_mode: hidden` uses them", mode
        )
    gates: dict[str, Task] = {}
    for name in names:
        gates[name] = RandomTensor(
            name=name, shape=shapes[name], mode=mode, std=std, seed=job.seed, dtype=str(dtype)
        )
    return gates


def untrained_gates(job: Job) -> dict[str, str]:
    """The `untrained` of a plan: gates that are made of no prompts, where there is a choice."""
    starts = {"random": "random", "uniform_random": "random", "zeros": "all 0"}
    start = starts.get(job.options.gate_mode)
    return {"gates": start} if start and len(job.experts) > 1 else {}


def tokenised_prompts(job: Job, asked: str) -> tuple[tuple[Tokens, Tokens], ...]:
    """The positive and negative prompts of every expert, as token ids of the donor's tokenizer.

    `asked` is the option, with its value, that needs them.
    """
    texts = []
    for index, options in enumerate(job.model_options):
        where = f"under models[{index}].parameters"
        positive = _texts(options.positive_prompts, f"positive_prompts {where}")
        negative = _texts(options.negative_prompts, f"negative_prompts {where}")
        if not positive:
            raise UserError(
                f"{asked} needs `positive_prompts` {where} "
                f"({job.experts[index]}): texts that should be sent to this expert"
            )
        texts.append((positive, negative))
    if len(texts) > 1 and all(pair == texts[0] for pair in texts):
        raise UserError(
            "the prompts are the same for all experts, so that a gate could not tell them apart; "
            "give each model `positive_prompts` of its own"
        )
    try:
        tokenizer = tokenizer_of(job.donor, job.merge_options)
    except UserError as error:
        raise UserError(f"{error.message} (it is needed for {asked})") from error

    # By hand, as mergekit-moe does: not every tokenizer adds the token that begins a text.
    start = tokenizer.bos_token or ""

    def tokens(prompts: list[str]) -> Tokens:
        ids = []
        for prompt in prompts:
            ids.append(tuple(tokenizer(start + prompt, add_special_tokens=False)["input_ids"]))
        return tuple(ids)

    return tuple((tokens(positive), tokens(negative)) for positive, negative in texts)


def _texts(prompts: list[str] | str | None, where: str) -> list[str]:
    """The prompts as a list; a text is the path of a file that holds one per line."""
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
    """One layer's gate (experts, hidden): the directions of the states of the experts' prompts at
    that layer.
    """

    states: PromptStates
    index: int
    shape: tuple[int, ...]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {"states": self.states}

    def execute(self, states: torch.Tensor) -> torch.Tensor:
        return states[self.index].to(dtype_from_name(self.dtype)).contiguous()
