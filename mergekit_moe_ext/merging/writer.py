"""A writer of safetensors shards that puts each tensor into its file when it comes.

mergekit's own holds a whole shard and writes it when it is full, while nothing is merged. Here a
thread writes behind the merge, and another has the disk take what was written, so that neither the
shard's memory nor the time that the disk takes comes on top of the merge's.
"""

import functools
import json
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from mergekit.io.tasks import TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter

_ENTRY = 200  # bytes of a tensor's entry in a header beside its name: dtype, shape and offsets
_ALIGNMENT = 8  # bytes: readers map a tensor only at a multiple of its element's size
_MOST_WAITING = 1 << 28  # bytes of tensors that wait to be written
_FLUSHED_AT_ONCE = 1 << 28


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


class BehindWriter(TensorWriter):
    """A `TensorWriter` whose shards are written behind the merge, the tensors in the order in which
    they come.
    """

    current_shard_size: int  # which mergekit does not declare

    def __init__(self, out_path: str, max_shard_size: int, room: int):
        super().__init__(out_path, max_shard_size=max_shard_size)
        self._room = room  # of a header that names every tensor still to come
        self._shard: _Shard | None = None
        self._written_behind = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[int, Future[None]]] = deque()

    def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:
        """Hands a tensor on to be written; it must not be changed after that."""
        size = tensor.nbytes
        # Here, since on several GPUs each thread computes on a stream of its own, and the thread
        # that writes would not wait for that.
        tensor = tensor.detach().cpu()
        with self._lock:
            has_limit = self.max_shard_size > 0
            if has_limit and self.current_shard_size + size > self.max_shard_size:
                self._flush_current_shard()
            if self._shard is None:
                self._shard = _Shard(self._path_of_shard(), self._room)
            self._room -= header_room([name])
            self.weight_map[name] = self._path_of_shard().name
            self.current_shard_size += size
            self._await_room(size)
            write = self._written_behind.submit(self._shard.write, name, tensor)
            self._waiting.append((size, write))

    def finalize(self) -> None:
        """Waits until everything is on the disk, and names the shards. Errors of writing are raised
        here, or by an earlier `save_tensor`.
        """
        with self._lock:
            self._flush_current_shard()
            try:
                while self._waiting:
                    self._waiting.popleft()[1].result()
            finally:
                # After an error, too: nothing goes on writing into a directory that is taken away.
                self._written_behind.shutdown(cancel_futures=True)
            super().finalize()

    def _flush_current_shard(self) -> None:
        if self._shard is None:
            return
        self._waiting.append((0, self._written_behind.submit(self._shard.close)))
        self._shard = None
        self.total_size += self.current_shard_size
        self.current_shard_size = 0
        self.shards_written += 1

    def _path_of_shard(self) -> Path:
        prefix, extension = self._get_name_components()
        return Path(self.out_path, f"{prefix}-{self.shards_written + 1}.{extension}")

    def _await_room(self, size: int) -> None:
        """Waits until so few bytes wait to be written that the merge may go on."""
        waiting = size + sum(size_of_other for size_of_other, _ in self._waiting)
        while self._waiting and (waiting > _MOST_WAITING or self._waiting[0][1].done()):
            size_of_first, write = self._waiting.popleft()
            write.result()
            waiting -= size_of_first


class _Shard:
    """A safetensors file that is being written. Its header comes last, into room left for it."""

    def __init__(self, path: Path, room: int):
        self._path = path
        metadata = len(json.dumps({"__metadata__": {"format": "pt"}}))
        self._room = -(-(room + metadata) // _ALIGNMENT) * _ALIGNMENT
        self._entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._size = 0
        self._put_off: dict[str, torch.Tensor] = {}
        self._flushed = 0
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._file = path.open("wb")
        self._file.seek(8 + self._room)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        # A file has no gaps, so a tensor of an odd size would leave the next one unaligned.
        if tensor.nbytes % _ALIGNMENT:
            self._put_off[name] = tensor
        else:
            self._append(name, tensor)

    def close(self) -> None:
        """Writes what is lacking and waits until the file is on the disk."""
        # Wide elements first: so each tensor begins at a multiple of its element's size.
        by_width = sorted(self._put_off.items(), key=lambda item: -item[1].element_size())
        for name, tensor in by_width:
            self._append(name, tensor)
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise AssertionError(f"the header of {self._path} has no room")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.flush()
        if self._flushing:
            self._flushing.result()
        self._flusher.shutdown()
        os.fsync(self._file.fileno())
        self._file.close()

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        flat = tensor.contiguous().reshape(-1)
        end = self._size + flat.nbytes
        self._entries[name] = {
            "dtype": _dtype_code(flat.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [self._size, end],
        }
        self._file.write(flat.view(torch.uint8).numpy().data)
        self._size = end
        if end - self._flushed >= _FLUSHED_AT_ONCE:
            self._start_flushing()

    def _start_flushing(self) -> None:
        """Has the disk take what was written so far, unless it still takes what was before."""
        if self._flushing:
            if not self._flushing.done():
                return
            # The system tells an error of the disk once, so that the last fsync may not show it.
            self._flushing.result()
        self._file.flush()
        self._flushed = self._size
        self._flushing = self._flusher.submit(os.fsync, self._file.fileno())


@functools.cache
def _dtype_code(dtype: torch.dtype) -> str:
    """The name that safetensors has for a dtype."""
    content = safetensors.torch.save({"x": torch.empty(0, dtype=dtype, device="cpu")})
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["x"]["dtype"]
