"""FFNs that are mixed layer by layer by the coefficients of a sequence (MergeME 3.1.1 and 3.1.3).

Where experts share everything but their FFNs, one stack of layers can run for all of them: the
first expert's, in which the output of every FFN is the sum of the chosen experts', weighed by the
coefficients of the sequence.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from .sequence_shares import Share, added


class _Running(threading.local):
    """The pass that is running in this thread: its shares, and its number of rows."""

    shares: Sequence[Share] | None = None
    rows: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _Running, ()


class MixedFFNs:
    """The FFNs of the first expert's stack, each a mixture while a pass is `running`."""

    def __init__(self, experts: Any, names: Sequence[str]) -> None:
        """`experts` is the model's list of experts, and `names` are the FFNs' in each decoder."""
        self.experts = experts
        self._running = _Running()
        # The modules keep their places, and so the names of their parameters.
        for name in names:
            first = experts[0].trunk.get_submodule(name)
            first.forward = partial(self._mix, name, first.forward)

    @contextmanager
    def running(self, shares: Sequence[Share] | None, rows: int) -> Iterator[None]:
        """A context in which the first expert's FFNs give the sum of these shares."""
        shares_before = self._running.shares
        rows_before = self._running.rows
        self._running.shares = shares
        self._running.rows = rows
        try:
            yield
        finally:
            self._running.shares = shares_before
            self._running.rows = rows_before

    def checkpoint(self, checkpointing: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a layer under a checkpoint, as part of the pass that is running now."""
        again = partial(self._within, self._running.shares, self._running.rows, function)
        return checkpointing(again, *args, **kwargs)

    def _within(
        self,
        shares: Sequence[Share] | None,
        rows: int,
        function: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        with self.running(shares, rows):
            return function(*args, **kwargs)

    def _mix(self, name: str, own: Any, x: Tensor) -> Any:
        """The output (rows, …) of the FFN of this name; `own` is the first expert's forward.

        An FFN that gives its router's scores as well (GPT-OSS, Llama 4) gives None in their place:
        a mixture has none, and no layer looks at them.
        """
        if self._running.shares is None:
            return own(x)
        if len(x) != self._running.rows:
            raise ValueError(
                f"{name} was given {len(x)} rows of a batch of {self._running.rows}: it cannot be "
                "told which sequence each belongs to; take mix: output"
            )
        total: Tensor | None = None
        others: tuple[None, ...] | None = None
        for share in self._running.shares:
            part = x if share.is_all else x[share.rows.to(x.device)]
            forward = own if share.expert == 0 else partial(self._of_other, share.expert, name)
            output = forward(part)
            if isinstance(output, tuple):
                output, *rest = output
                others = (None,) * len(rest)
            # What is added to the layer's input has its shape; Llama 4's puts all tokens in a row.
            output = output.reshape(part.shape)
            total = added(total, output, share, len(x), in_logarithms=False)
        assert total is not None
        total = total.to(x.device)
        return total if others is None else (total, *others)

    def _of_other(self, expert: int, name: str, x: Tensor) -> Any:
        """The output of another expert's FFN, which may lie on another device."""
        ffn = self.experts[expert].trunk.get_submodule(name)
        device = next(ffn.parameters()).device
        # What is offloaded comes to where its input is.
        return ffn(x if device.type == "meta" else x.to(device))
