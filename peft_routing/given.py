"""Coefficients from outside the hidden states, in place of every router's.

They hold for one call, or inside a `with`, in the thread that gave them. They are not kept in a
ContextVar, which torch.compile cannot read.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.routers import over_tokens, wide

_NOW = threading.local()


class ChosenExperts:
    """Which experts coefficients (sets, experts) choose: those that are not 0."""

    def __init__(self, coefficients: Tensor) -> None:
        self.sets: list[list[float]] = coefficients.tolist()
        self.count = coefficients.shape[-1]
        self._groups: dict[Any, Any] = {}
        self.experts: list[int] = []  # of any set
        self.is_one_each = True
        for index in range(self.count):
            if any(of_set[index] for of_set in self.sets):
                self.experts.append(index)
        for of_set in self.sets:
            if sum(coefficient != 0 for coefficient in of_set) > 1:
                self.is_one_each = False

    def groups(
        self, rows: int, device: torch.device
    ) -> tuple[Tensor | None, list[tuple[int, float, int]]]:
        """The rows of a batch sorted by their one expert, and the groups that they form.

        A group is an expert, its coefficient and a number of rows. Rows are None where all of them
        are one group; those without an expert are left out.
        """
        key = rows, device
        if key not in self._groups:
            members: dict[tuple[int, float], list[int]] = {}
            for row in range(rows):
                # A batch of several rows per set has those of one set beside each other.
                of_row = self.sets[row * len(self.sets) // rows]
                for expert, coefficient in enumerate(of_row):
                    if coefficient:
                        members.setdefault((expert, coefficient), []).append(row)
            groups: list[tuple[int, float, int]] = []
            order: list[int] = []
            for (expert, coefficient), rows_of_group in sorted(members.items()):
                groups.append((expert, coefficient, len(rows_of_group)))
                order += rows_of_group
            is_all = len(groups) == 1 and len(order) == rows
            places = None if is_all else torch.tensor(order, dtype=torch.long, device=device)
            self._groups[key] = places, groups
        return self._groups[key]


@dataclass(frozen=True)
class Given:
    """Coefficients (experts,) or (sequences, experts), and the forward pass that they are for.

    Without a forward pass `model` and `batch_size` are None.
    """

    coefficients: Tensor
    model: Any = None
    batch_size: int | None = None
    outer: "Given | None" = None
    # What follows from them, by how often they were changed.
    _chosen_at: dict[int, ChosenExperts | None] = field(default_factory=dict, compare=False)

    @property
    def chosen(self) -> ChosenExperts | None:
        """Which experts have a coefficient, looked up once for all modules; None where it is of no
        use: where the others' gradients are wanted, or most experts are chosen.
        """
        if self.coefficients.requires_grad:
            return None
        # Their owner may change them in place between two calls, which torch counts.
        is_counted = not self.coefficients.is_inference()
        version = self.coefficients._version if is_counted else 0
        if version not in self._chosen_at:
            sets = self.coefficients.detach().reshape(-1, self.coefficients.shape[-1])
            chosen = ChosenExperts(sets)
            is_of_use = 2 * len(chosen.experts) <= chosen.count or chosen.is_one_each
            self._chosen_at.clear()
            self._chosen_at[version] = chosen if is_of_use else None
        return self._chosen_at[version]

    def over(self, x: Tensor, adapter: str, experts: Sequence[str]) -> Tensor:
        """The coefficients for the input `x` of a module with these experts.

        They can be broadcast over its tokens. `UserError` where they do not fit.
        """
        coefficients = wide(self.coefficients)
        if coefficients.shape[-1] != len(experts):
            raise UserError(
                f"coefficients: they are for {coefficients.shape[-1]} experts, and adapter "
                f"{adapter!r} has {len(experts)}: {', '.join(experts)}"
            )
        coefficients = coefficients.to(x.device)
        if coefficients.ndim == 1 or len(coefficients) == 1:
            return coefficients.flatten()
        # One set per sequence: the first axis of x must be the sequences, which a module that
        # flattens or routes tokens hides.
        if self.batch_size is None:  # a part of the model, such as the encoder in `generate`
            has_rows = x.ndim == 3
            check_batch(self.coefficients, len(x))
        else:
            has_rows = len(x) == self.batch_size
        if not has_rows:
            raise UserError(
                "coefficients: cannot tell the sequences apart in an input of shape "
                f"{tuple(x.shape)}; give one set for all, of shape (experts,)"
            )
        repeats = len(x) // len(coefficients)
        return over_tokens(coefficients.repeat_interleave(repeats, dim=0), x)


@contextmanager
def given_coefficients(coefficients: Tensor) -> Iterator[None]:
    """A context in which every active routed adapter has these coefficients.

    They hold in every module and for every token. They are (experts,), or (batch, experts) for a
    set per sequence; a batch that is a multiple of that has them repeated, each beside itself, as
    `generate` does for beams and returned sequences. They may have any sum, and get a gradient if
    they require one. `UserError` if they are not finite, are not as many as the experts or
    sequences, or if an adapter is merged.
    """
    with held(Given(checked(coefficients))):
        yield


def current() -> Given | None:
    """The coefficients that hold now, in this thread."""
    return getattr(_NOW, "override", None)


@contextmanager
def held(override: Given | None) -> Iterator[None]:
    """A context in which these coefficients hold; with None those of the routers."""
    outer = current()
    _NOW.override = override
    try:
        yield
    finally:
        _NOW.override = outer


def enter(model: Any, coefficients: Tensor, example: Any) -> None:
    """Start a forward pass of the model, one of whose inputs is `example` (batch, …)."""
    batch_size = None
    if example is not None:
        batch_size = len(example)
        coefficients = coefficients.to(example.device)
        check_batch(coefficients, batch_size)
    _NOW.override = Given(coefficients, model, batch_size, current())


def leave(model: Any) -> bool:
    """End the model's forward pass; returns whether `enter` had started one."""
    override = current()
    if override is None or override.model is not model:
        return False
    _NOW.override = override.outer
    return True


def checked(coefficients: Any) -> Tensor:
    """The coefficients. `UserError` unless they are a finite float tensor of a shape that fits."""
    is_float = isinstance(coefficients, Tensor) and coefficients.is_floating_point()
    if not is_float or coefficients.ndim not in (1, 2) or not coefficients.numel():
        kind = type(coefficients).__name__
        if isinstance(coefficients, Tensor):
            kind = f"{coefficients.dtype} of shape {tuple(coefficients.shape)}"
        raise UserError(
            f"coefficients: give a float tensor (experts,) or (batch, experts), not {kind}",
        )
    if not torch.isfinite(coefficients).all():
        raise UserError("coefficients: there is NaN or infinity among them")
    return coefficients


def check_batch(coefficients: Tensor, batch_size: int) -> None:
    """`UserError` unless the batch is a multiple of the sequences that they are for."""
    sequences = len(coefficients)
    if coefficients.ndim == 2 and batch_size % sequences:
        raise UserError(
            f"coefficients: they are for {sequences} sequences, and the batch has {batch_size}",
        )


def refuse_merged(adapters: Sequence[str]) -> None:
    """`UserError` if coefficients hold now: merged weights cannot take them."""
    if current() is not None:
        raise UserError(
            f"coefficients: adapter {adapters[0]!r} is merged into the weights: unmerge it first",
        )
