"""mergekit's execution on several GPUs, without the results that it loses."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

from mergekit.multigpu_executor import MultiGPUExecutor


class CollectingExecutor(MultiGPUExecutor):
    """A `MultiGPUExecutor` that ends when all results are collected.

    mergekit's (0.1.5) stops collecting them as soon as the last task on a GPU is done. On a busy
    machine some still wait then, and what needs them says that a required tensor has no value. Nor
    does it stop at Ctrl-C, so that the process would not end.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.done_event = _DoneWhenEmpty(self.task_completion_queue)

    def run(self, quiet: bool = False) -> Iterator[tuple[Any, Any]]:
        try:
            yield from super().run(quiet)
        finally:
            self.done_event.set()


class _DoneWhenEmpty(threading.Event):
    """An event that is not seen before a queue is empty."""

    def __init__(self, waiting: queue.Queue) -> None:
        super().__init__()
        self._waiting = waiting

    def is_set(self) -> bool:
        return super().is_set() and self._waiting.empty()
