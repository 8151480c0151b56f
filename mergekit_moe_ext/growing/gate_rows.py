"""The gate's rows for experts that are added to a mixture.

With r the mean of the rows of the experts that are there, a new row is r + v. A token x then gives
the new expert a logit that is v·x above the mean of the others' logits. v is the shortest vector
for which v·n = -margin, where n is the mean state of the tokens that the expert is not for, and,
where there are prompts that it is for, v·p = margin, with p their mean state. States are those that
the gate itself receives.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor

from mergekit_moe_ext.merging.tasks import cast_finite
from mergekit_moe_ext.upcycling.prompts import Tokens, hidden_states, opened

# Texts of random tokens, which stand for any text where no prompts say what an expert is not for.
_TEXTS = 8
_LENGTH = 64
# Per expert the states (gates, hidden) that a new row is made of, each with the sign of its margin.
States = list[list[tuple[float, torch.Tensor]]]


class MixtureStates(Task[States]):
    """The mean states of prompts at every gate of a mixture, per new expert.

    prompts: the positive and the negative prompts of every new expert, each of which may be empty.
    routers: the modules whose inputs count.
    vocab_size: the number of tokens that there are.
    """

    model: ModelReference
    prompts: tuple[tuple[Tokens, Tokens], ...]
    routers: tuple[str, ...]
    vocab_size: int
    seed: int
    device: str
    transformers_cache: str | None
    trust_remote_code: bool
    quiet: bool

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self, **_kwargs: object) -> States:
        path = self.model.local_path(self.transformers_cache)
        model = opened(path, self.device, self.trust_remote_code, self.quiet)
        longest = getattr(model.config, "max_position_embeddings", None) or _LENGTH
        any_text = random_tokens(self.vocab_size, min(_LENGTH, longest), self.seed)
        means: dict[Tokens, torch.Tensor] = {}
        states: States = []
        for positive, negative in self.prompts:
            of_expert = []
            for sign, texts in ((1.0, positive), (-1.0, negative or any_text)):
                if not texts:
                    continue
                if texts not in means:
                    means[texts] = hidden_states(model, self.routers, texts, average=True)
                of_expert.append((sign, means[texts]))
            states.append(of_expert)
        return states


def random_tokens(vocab_size: int, length: int, seed: int) -> Tokens:
    """Texts of tokens drawn evenly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocab_size, (_TEXTS, length), generator=generator, device="cpu")
    return tuple(tuple(row) for row in drawn.tolist())


def offset_of_row(states: Sequence[tuple[float, torch.Tensor]], margin: float) -> torch.Tensor:
    """The shortest vector (hidden,), in float64, whose product with each of the states (hidden,) is
    the margin times the state's sign.
    """
    matrix = torch.stack([state.double() for _, state in states])
    targets = matrix.new_tensor([sign * margin for sign, _ in states])
    # The pseudo-inverse gives the shortest of all solutions: other tokens' logits move least.
    return torch.linalg.pinv(matrix) @ targets


class NewRows(Task[torch.Tensor]):
    """The part of a router's tensor that is of the new experts: (new, …), whatever the axis that
    experts lie along in the tensor.

    start: "zeros", or "mean" of the rows of the experts that are there.
    states: the task of the states by which the rows of the router's matrix differ from that mean,
        None where they do not; `gate` is the router's index in them.
    """

    name: str
    old: LoadTensor
    axis: int
    number: int
    start: str
    margin: float = 0.0
    states: MixtureStates | None = None
    gate: int = 0

    def arguments(self) -> dict[str, Task]:
        return {"states": self.states} if self.states else {}

    def group_label(self) -> str:
        return self.name

    def execute(self, states: States | None = None, **_kwargs: Any) -> torch.Tensor:
        old: Any = self.old.execute()
        row = torch.zeros_like(old.select(self.axis, 0), dtype=torch.float64)
        if self.start != "zeros":
            row = old.double().mean(dim=self.axis)
        rows = [row.clone() for _ in range(self.number)]
        for index, of_expert in enumerate(states or ()):
            here = [(sign, state[self.gate].to(row.device)) for sign, state in of_expert]
            rows[index] += offset_of_row(here, self.margin)
        return cast_finite(torch.stack(rows), old.dtype, self.name)
