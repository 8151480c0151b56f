"""A writer of safetensors shards that puts each tensor into its file when it comes.

mergekit's own holds a whole shard and writes it when it is full, while nothing is merged. Here a
thread writes behind the merge, and another has the disk take what was written, so that neither the
shard's memory nor the time that the disk takes comes on top of the merge's. What is only copied is
read by the thread that writes, while the merge goes on.
"""

import functools
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import safetensors.torch
import torch
from mergekit.io.tasks import TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter

_ENTRY = 200  # bytes of a tensor's entry in a header beside its name: dtype, shape and offsets
_ALIGNMENT = 8  # bytes: readers map a tensor only at a multiple of its element's size
_MOST_WAITING = 1 << 28  # bytes of tensors that wait to be written
_MOST_JOBS = 1 << 12  # that wait; what they copy is mapped until then
_FLUSHED_AT_ONCE = 1 << 28
# By directory the writer that writes to it.
_OPEN: dict[str, "BehindWriter"] = {}


def stop_writing(directory: Path) -> None:
    """Has nothing more written to a directory, if its merge ended before all of it was."""
    writer = _OPEN.get(str(directory))
    if writer is not None:
        writer.stop()


def header_room(names: Iterable[str]) -> int:
    """The bytes in which the header of a shard with these tensors has room."""
    return sum(len(json.dumps(name)) + _ENTRY for name in names)


class BehindWriterTask(TensorWriterTask):
    """The making of a `BehindWriter`.

    header_room: bytes in which a header has room that names every tensor of the output.
    """

    header_room: int

    def execute(self, **_kwargs: object) -> TensorWriter:
        return BehindWriter(self.out_path, self.max_shard_size, self.header_room)


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class BehindWriter(TensorWriter):
    """A `TensorWriter` whose shards are written behind the merge.

    Tensors lie in the shards in the order in which they come, but those of odd sizes lie last. They
    are written in another order: what holds memory first, and what is still to be read whenever
    there is nothing else.
    """

    current_shard_size: int  # which mergekit does not declare

    def __init__(self, out_path: str, max_shard_size: int, room: int):
        super().__init__(out_path, max_shard_size=max_shard_size)
        self._room = room  # of a header that names every tensor still to come
        self._shard: _Shard | None = None
        self._flushed: list[_Shard] = []
        self._jobs = _Jobs()
        _OPEN[out_path] = self

    def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:
        """Hands a tensor on to be written; it must not be changed after that."""
        # Here, since on several GPUs each thread computes on a stream of its own, and the thread
        # that writes would not wait for that.
        in_memory = tensor.detach().cpu()
        entry = Entry(name, in_memory.dtype, tuple(in_memory.shape))
        self.save_later(entry, lambda: in_memory, held=in_memory.nbytes)

    def save_later(self, entry: Entry, make: Callable[[], torch.Tensor], held: int) -> None:
        """Hands on what makes a tensor, which is called in the thread that writes.

        Until then it holds `held` bytes of memory, and this waits if too many are held.
        """
        with self._lock:
            if entry.name in self.weight_map:
                raise AssertionError(f"{entry.name} is written twice")
            has_limit = self.max_shard_size > 0
            if has_limit and self.current_shard_size + entry.nbytes > self.max_shard_size:
                self._flush_current_shard()
            if self._shard is None:
                self._shard = _Shard(self._path_of_shard(), self._room)
            self._room -= header_room([entry.name])
            self.weight_map[entry.name] = self._path_of_shard().name
            self.current_shard_size += entry.nbytes
            write = self._shard.place(entry, make, held)
            if write is not None:
                self._add(write, held)

    def finalize(self) -> None:
        """Waits until everything is on the disk, and names the shards. Errors of writing are raised
        here, or by an earlier `save_tensor`.
        """
        with self._lock:
            self._flush_current_shard()
            try:
                self._jobs.await_all()
            finally:
                self.stop()
            if not all(shard.is_closed for shard in self._flushed):
                raise AssertionError(f"a file in {self.out_path} lacks tensors")
            super().finalize()

    def stop(self) -> None:
        """Ends what is being written, and writes nothing more."""
        _OPEN.pop(self.out_path, None)
        self._jobs.stop()

    def _flush_current_shard(self) -> None:
        if self._shard is None:
            return
        for write, held in self._shard.complete():
            self._add(write, held)
        self._add(self._shard.close_if_whole, held=0, is_urgent=True)
        self._flushed.append(self._shard)
        self._shard = None
        self.total_size += self.current_shard_size
        self.current_shard_size = 0
        self.shards_written += 1

    def _add(self, job: Callable[[], None], held: int, *, is_urgent: bool = False) -> None:
        try:
            self._jobs.add(job, held, is_urgent=is_urgent)
        except BaseException:
            self.stop()
            raise

    def _path_of_shard(self) -> Path:
        prefix, extension = self._get_name_components()
        return Path(self.out_path, f"{prefix}-{self.shards_written + 1}.{extension}")


class _Jobs:
    """What is done by a thread of its own, one after the other: of what waits, first that which
    holds memory or is urgent, in the order in which it came.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()  # those not yet known to be done
        self._lock = threading.Lock()
        self._first: deque[tuple[Callable[[], None], int]] = deque()
        self._others: deque[Callable[[], None]] = deque()
        self._held = 0  # bytes

    def add(self, job: Callable[[], None], held: int, *, is_urgent: bool) -> None:
        """Adds a job that holds so many bytes of memory, once there is room for it. Raises what an
        earlier job raised.
        """
        while self._pending and (self._pending[0].done() or self._lacks_room(held)):
            self._pending.popleft().result()
        with self._lock:
            self._held += held
            if held or is_urgent:
                self._first.append((job, held))
            else:
                self._others.append(job)
        # One call per job, whichever job it takes: when all calls are over, all jobs are done.
        self._pending.append(self._thread.submit(self._do_next))

    def await_all(self) -> None:
        """Waits for all jobs. Raises what one of them raised."""
        while self._pending:
            self._pending.popleft().result()

    def stop(self) -> None:
        """Waits for the job that is being done; the others are not done any more."""
        self._thread.shutdown(cancel_futures=True)

    def _lacks_room(self, held: int) -> bool:
        if len(self._pending) >= _MOST_JOBS:
            return True
        # A tensor that is larger than the bound by itself waits until it is alone.
        return held > 0 and self._held > 0 and self._held + held > _MOST_WAITING

    def _do_next(self) -> None:
        held = 0
        with self._lock:
            if self._first:
                job, held = self._first.popleft()
            else:
                job = self._others.popleft()
        job()
        with self._lock:
            self._held -= held


class _Shard:
    """A safetensors file that is being written. Its header comes last, into room left for it.

    `place` and `complete` are called by the merge. What they return is called, in any order, by the
    thread that writes, and so is `close_if_whole`, once and after `complete`. The file is open from
    the first tensor that is written to the last.
    """

    def __init__(self, path: Path, room: int):
        self._path = path
        metadata = len(json.dumps({"__metadata__": {"format": "pt"}}))
        self._room = -(-(room + metadata) // _ALIGNMENT) * _ALIGNMENT
        self._entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._size = 0
        self._put_off: list[tuple[Entry, Callable[[], torch.Tensor], int]] = []
        self.is_closed = False
        self._is_complete = False  # whether all of its tensors have their places
        self._written = 0  # tensors
        self._unflushed = 0  # bytes
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._file: BufferedWriter | None = None

    def place(
        self, entry: Entry, make: Callable[[], torch.Tensor], held: int
    ) -> Callable[[], None] | None:
        """Gives a tensor its place, and returns what writes it there; None if `complete` will."""
        # A file has no gaps, so a tensor of an odd size would leave the next one unaligned.
        if entry.nbytes % _ALIGNMENT:
            self._put_off.append((entry, make, held))
            return None
        return self._placed(entry, make)

    def complete(self) -> list[tuple[Callable[[], None], int]]:
        """Places what is lacking, and returns what writes it, with the bytes that each holds."""
        # Wide elements first: so each tensor begins at a multiple of its element's size.
        by_width = sorted(self._put_off, key=lambda each: -each[0].dtype.itemsize)
        self._put_off = []
        writes = [(self._placed(entry, make), held) for entry, make, held in by_width]
        self._is_complete = True
        return writes

    def close_if_whole(self) -> None:
        """Closes the file once it is on the disk, if all of its tensors are written. If not, the
        last of them does it.
        """
        is_whole = self._is_complete and self._written == len(self._entries) - 1
        if is_whole and self._file is not None:
            self._close(self._file)
            self._file = None

    def _placed(self, entry: Entry, make: Callable[[], torch.Tensor]) -> Callable[[], None]:
        start = self._size
        self._size += entry.nbytes
        self._entries[entry.name] = {
            "dtype": _dtype_code(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [start, self._size],
        }
        return functools.partial(self._write, entry, make, start)

    def _write(self, entry: Entry, make: Callable[[], torch.Tensor], start: int) -> None:
        tensor = make()
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise AssertionError(f"{entry} is {tensor.dtype} of shape {tuple(tensor.shape)}")
        if self._file is None:
            self._file = self._path.open("wb")
        self._file.seek(8 + self._room + start)
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._written += 1
        self._unflushed += entry.nbytes
        if self._unflushed >= _FLUSHED_AT_ONCE:
            self._start_flushing(self._file)
        self.close_if_whole()

    def _close(self, file: BufferedWriter) -> None:
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise AssertionError(f"the header of {self._path} has no room")
        file.seek(0)
        file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        file.flush()
        if self._flushing:
            self._flushing.result()
        self._flusher.shutdown()
        os.fsync(file.fileno())
        file.close()
        self.is_closed = True

    def _start_flushing(self, file: BufferedWriter) -> None:
        """Has the disk take what was written so far, unless it still takes what was before."""
        if self._flushing:
            if not self._flushing.done():
                return
            # The system tells an error of the disk once, so that the last fsync may not show it.
            self._flushing.result()
        file.flush()
        self._unflushed = 0
        self._flushing = self._flusher.submit(os.fsync, file.fileno())


@functools.cache
def _dtype_code(dtype: torch.dtype) -> str:
    """The name that safetensors has for a dtype."""
    content = safetensors.torch.save({"x": torch.empty(0, dtype=dtype, device="cpu")})
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["x"]["dtype"]
