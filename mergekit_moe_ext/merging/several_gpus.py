"""mergekit's execution on several GPUs, without the results that it loses."""

import queue
import threading
import time
from typing import Any

from mergekit.multigpu_executor import MultiGPUExecutor


class CollectingExecutor(MultiGPUExecutor):
    """A `MultiGPUExecutor` that ends when all results are collected.

    mergekit's (0.1.5) stops collecting them as soon as the last task on a GPU is done. On a busy
    machine some still wait then, and what needs them says that a required tensor has no value.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.done_event = _SetWhenEmpty(self.task_completion_queue)


class _SetWhenEmpty(threading.Event):
    """An event that is not set before a queue is empty."""

    def __init__(self, waiting: queue.Queue) -> None:
        super().__init__()
        self._waiting = waiting

    def set(self) -> None:
        while not self._waiting.empty():
            time.sleep(0.001)
        super().set()
