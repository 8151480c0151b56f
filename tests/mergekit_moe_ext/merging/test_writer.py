"""Shards that are written behind a merge, read back with safetensors' own reader."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_moe_ext.merging.views import Derivation, is_mapped, seen_through
from mergekit_moe_ext.merging.writer import BehindWriter, Entry, header_room, stop_writing

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.bool,
    torch.float8_e4m3fn,
)
OPEN_FILES = Path("/proc/self/fd")
SHAPES = ((), (0, 3), (1,), (3,), (5, 7), (8, 4), (2, 3, 5))


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for shape in SHAPES:
        for dtype in DTYPES:
            values = torch.randint(0, 2, shape, generator=generator)
            tensors[f"{dtype}.{shape}.weïght"] = values.to(dtype)
    tensors["of a transposed view"] = torch.arange(12.0).view(3, 4).T
    return tensors


def read(directory):
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                assert name not in tensors
                tensors[name] = shard.get_tensor(name)
    return tensors


@pytest.mark.parametrize("limit", [5_000_000, 200, 1, -1])
def test_what_is_written_is_read_back(tmp_path, limit):
    tensors = tensors_of_all_kinds()
    writer = BehindWriter(str(tmp_path), limit, header_room(tensors))
    for name, tensor in tensors.items():
        writer.save_tensor(name, tensor)
    writer.finalize()

    loaded = read(tmp_path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].double(), tensor.double()), name
    index = tmp_path / "model.safetensors.index.json"
    if limit in (5_000_000, -1):
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    else:
        stated = json.loads(index.read_text())
        assert stated["weight_map"].keys() == tensors.keys()
        assert stated["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for name, file in stated["weight_map"].items():
            with safe_open(tmp_path / file, framework="pt") as shard:
                assert name in shard.keys()  # noqa: SIM118 (not a dictionary)


def test_every_tensor_begins_at_a_multiple_of_its_elements_size(tmp_path):
    tensors = tensors_of_all_kinds()
    writer = BehindWriter(str(tmp_path), -1, header_room(tensors))
    for name, tensor in tensors.items():
        writer.save_tensor(name, tensor)
    writer.finalize()
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_an_error_of_writing_is_raised(tmp_path, monkeypatch):
    def fail(self, entry, make, start):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mergekit_moe_ext.merging.writer._Shard._write", fail)
    writer = BehindWriter(str(tmp_path), -1, header_room(["x"]))
    with pytest.raises(OSError, match="No space left"):
        writer.save_tensor("x", torch.ones(4))
        writer.finalize()


def test_an_error_of_the_disk_that_is_told_once_is_raised(tmp_path, monkeypatch):
    stock = os.fsync
    told = []

    def fsync(descriptor):
        if not told:
            told.append(descriptor)
            raise OSError(5, "Input/output error")
        stock(descriptor)

    monkeypatch.setattr("mergekit_moe_ext.merging.writer._FLUSHED_AT_ONCE", 64)
    monkeypatch.setattr(os, "fsync", fsync)
    writer = BehindWriter(str(tmp_path), -1, header_room(["x", "y"]))
    with pytest.raises(OSError, match="Input/output"):
        writer.save_tensor("x", torch.ones(64))
        writer.save_tensor("y", torch.ones(64))
        writer.finalize()


def test_a_merge_waits_for_what_is_to_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_moe_ext.merging.writer._MOST_WAITING", 64)
    writer = BehindWriter(str(tmp_path), -1, header_room(["a"] * 20))
    for number in range(20):
        writer.save_tensor(chr(ord("a") + number), torch.ones(4))
        assert writer._jobs._held <= 64
    writer.finalize()
    assert len(read(tmp_path)) == 20


@pytest.mark.parametrize("elements", [4, 3])
def test_few_jobs_and_little_memory_wait(tmp_path, monkeypatch, elements):
    """Tensors of odd sizes, too, which are written at the end of a shard."""
    monkeypatch.setattr("mergekit_moe_ext.merging.writer._MOST_WAITING", 64)
    monkeypatch.setattr("mergekit_moe_ext.merging.writer._MOST_JOBS", 3)
    most_held = []
    writer = BehindWriter(str(tmp_path), -1, header_room(["a"] * 20))
    stock = writer._jobs.add

    def add(job, held, *, is_urgent):
        stock(job, held, is_urgent=is_urgent)
        most_held.append(writer._jobs._held)
        assert len(writer._jobs._pending) <= 3

    monkeypatch.setattr(writer._jobs, "add", add)
    for number in range(20):
        entry = entry_of(chr(ord("a") + number), torch.ones(elements))
        writer.save_later(entry, lambda: torch.ones(elements), held=16 * (number % 2))
    writer.finalize()
    assert 0 < max(most_held) <= 64 and len(read(tmp_path)) == 20


def entry_of(name, tensor):
    return Entry(name, tensor.dtype, tuple(tensor.shape))


@pytest.mark.parametrize("limit", [-1, 100])
def test_what_holds_memory_is_written_first(tmp_path, limit):
    """The others are made later, and lie where they would have lain."""
    names = ["c0", "m0", "c1", "odd c", "m1", "c2", "m2"]
    tensors = {name: torch.full((8,), float(place)) for place, name in enumerate(names)}
    tensors["odd c"] = torch.ones(3)
    began = threading.Event()
    goes_on = threading.Event()
    made = []

    def making(name):
        def make():
            made.append(name)
            if name == "c0":
                began.set()
                goes_on.wait()
            return tensors[name]

        return make

    writer = BehindWriter(str(tmp_path), limit, header_room(tensors))
    for name, tensor in tensors.items():
        held = tensor.nbytes if name.startswith("m") else 0
        writer.save_later(entry_of(name, tensor), making(name), held)
        if name == "c0":
            began.wait()
    goes_on.set()
    writer.finalize()
    assert made[:4] == ["c0", "m0", "m1", "m2"] and sorted(made) == sorted(names)
    loaded = read(tmp_path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name

    in_order = BehindWriter(str(tmp_path / "in order"), limit, header_room(tensors))
    for name, tensor in tensors.items():
        in_order.save_tensor(name, tensor)
    in_order.finalize()
    for path in (tmp_path / "in order").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="this system does not list open files")
def test_few_shards_are_open_at_a_time(tmp_path):
    began = threading.Event()
    goes_on = threading.Event()
    counts = []

    def make():
        began.set()
        goes_on.wait()
        counts.append(len(list(OPEN_FILES.iterdir())))
        return torch.ones(4)

    names = [f"{kind}{number}" for number in range(30) for kind in "cm"]
    writer = BehindWriter(str(tmp_path), 1, header_room(names))
    before = len(list(OPEN_FILES.iterdir()))
    for name in names:
        if name.startswith("m"):
            writer.save_tensor(name, torch.ones(4))
        else:
            writer.save_later(entry_of(name, torch.ones(4)), make, held=0)
        began.wait()
    goes_on.set()
    writer.finalize()
    assert len(counts) == 30 and max(counts) <= before + 1
    assert len(read(tmp_path)) == 60


def test_an_error_of_what_is_written_later_is_raised(tmp_path):
    def fail():
        raise ValueError("NaN in an expert")

    writer = BehindWriter(str(tmp_path), -1, header_room(["x"]))
    with pytest.raises(ValueError, match="NaN in an expert"):
        writer.save_later(entry_of("x", torch.ones(4)), fail, held=0)
        writer.finalize()
    stop_writing(tmp_path)


def test_a_merge_that_ends_early_writes_nothing_more(tmp_path):
    began = threading.Event()
    goes_on = threading.Event()
    made = []

    def make():
        made.append(len(made))
        began.set()
        goes_on.wait()
        return torch.ones(4)

    writer = BehindWriter(str(tmp_path), -1, header_room(["a"] * 9))
    for number in range(9):
        writer.save_later(entry_of(str(number), torch.ones(4)), make, held=0)
    began.wait()
    stop_writing(tmp_path / "another")
    stopping = threading.Thread(target=stop_writing, args=(tmp_path,))
    stopping.start()
    stopping.join(0.2)
    assert stopping.is_alive()  # it waits for what has begun
    goes_on.set()
    stopping.join()
    assert made == [0]
    stop_writing(tmp_path)  # which has nothing to do any more


def test_what_takes_no_memory_until_it_is_written(tmp_path):
    """A stored tensor that is mapped does not; what is computed of one does."""
    (tmp_path / "mapped").mkdir()
    (tmp_path / "pickled").mkdir()
    tensors = {"a": torch.ones(4, 2), "b": torch.ones(3)}
    save_file(tensors, tmp_path / "mapped" / "model.safetensors")
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    loader = LazyTensorLoader.from_disk(str(tmp_path / "mapped"))
    halves = Derivation("a", ("a.0", "a.1"), lambda tensor: tensor.chunk(2))
    quarters = Derivation("a.0", ("a.0.0", "a.0.1"), lambda tensor: tensor.chunk(2))
    view = seen_through(loader, ((halves,), (quarters,)))
    assert is_mapped(loader, "a") and not is_mapped(loader, "c")
    assert is_mapped(view, "b")
    for name in ("a", "a.0", "a.1", "a.0.0", "c"):
        assert not is_mapped(view, name), name
    assert not is_mapped(LazyTensorLoader.from_disk(str(tmp_path / "pickled")), "a")
