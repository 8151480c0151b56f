"""Coefficients from outside the hidden states, in place of every router's: for one call, or inside a `with`.

What is given holds for the thread that gave it. It is no ContextVar, which torch.compile cannot read.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_routing.routers import over_tokens, wide

_NOW = threading.local()


@dataclass(frozen=True)
class Given:
    """Coefficients, (experts,) or (sequences, experts), and the forward pass that they are for, where there is one."""

    coefficients: Tensor
    model: Any = None
    batch_size: int | None = None
    outer: "Given | None" = None

    def over(self, x: Tensor, adapter: str, experts: Sequence[str]) -> Tensor:
        """To be broadcast over the tokens of `x`, the input of a module with these experts."""
        given = wide(self.coefficients)
        if given.shape[-1] != len(experts):
            raise ValueError(
                f"coefficients: they are for {given.shape[-1]} experts, and adapter {adapter!r} has {len(experts)}: "
                + ", ".join(experts)
            )
        given = given.to(x.device)
        if given.ndim == 1 or len(given) == 1:
            return given.flatten()
        if self.batch_size is None:  # a part of the model, such as the encoder in `generate`
            has_rows = x.ndim == 3
            check_batch(self.coefficients, len(x))
        else:
            has_rows = len(x) == self.batch_size
        if not has_rows:
            raise ValueError(
                f"coefficients: cannot tell the sequences apart in an input of shape {tuple(x.shape)}; give one set "
                "for all, of shape (experts,)"
            )
        return over_tokens(given.repeat_interleave(len(x) // len(given), dim=0), x)


@contextmanager
def given_coefficients(coefficients: Tensor) -> Iterator[None]:
    """Inside, these are the coefficients of every active routed adapter, in every module and for every token.

    (experts,), or (batch, experts) for a set per sequence. A batch that is a multiple of that has them repeated, each
    beside itself, as `generate` does for beams and returned sequences. They may have any sum, and get a gradient if
    they want one. `ValueError` if they are not finite, are not as many as the experts or sequences, or if an adapter
    is merged.
    """
    with held(Given(checked(coefficients))):
        yield


def current() -> Given | None:
    return getattr(_NOW, "given", None)


@contextmanager
def held(given: Given | None) -> Iterator[None]:
    outer = current()
    _NOW.given = given
    try:
        yield
    finally:
        _NOW.given = outer


def enter(model: Any, coefficients: Tensor, example: Any) -> None:
    """Start a forward pass of the model, one of whose inputs is `example` (batch, …)."""
    batch_size = None
    if example is not None:
        batch_size, coefficients = len(example), coefficients.to(example.device)
        check_batch(coefficients, batch_size)
    _NOW.given = Given(coefficients, model, batch_size, current())


def leave(model: Any) -> bool:
    """End it; whether there was one."""
    given = current()
    if given is None or given.model is not model:
        return False
    _NOW.given = given.outer
    return True


def checked(coefficients: Any) -> Tensor:
    is_float = isinstance(coefficients, Tensor) and coefficients.is_floating_point()
    if not is_float or coefficients.ndim not in (1, 2) or not coefficients.numel():
        found = (
            f"{coefficients.dtype} of shape {tuple(coefficients.shape)}"
            if isinstance(coefficients, Tensor)
            else type(coefficients).__name__
        )
        raise ValueError(f"coefficients: give a float tensor (experts,) or (batch, experts), not {found}")
    if not torch.isfinite(coefficients).all():
        raise ValueError("coefficients: there is NaN or infinity among them")
    return coefficients


def check_batch(coefficients: Tensor, batch_size: int) -> None:
    if coefficients.ndim == 2 and batch_size % len(coefficients):
        raise ValueError(f"coefficients: they are for {len(coefficients)} sequences, and the batch has {batch_size}")


def refuse_merged(adapters: Sequence[str]) -> None:
    if current() is not None:
        raise ValueError(f"coefficients: adapter {adapters[0]!r} is merged into the weights: unmerge it first")
