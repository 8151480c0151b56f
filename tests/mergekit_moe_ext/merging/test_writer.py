"""Shards that are written behind a merge, read back with safetensors' own reader."""

import json
import os

import pytest
import torch
from safetensors import safe_open

from mergekit_moe_ext.merging.writer import BehindWriter, header_room

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
    def fail(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mergekit_moe_ext.merging.writer._Shard.write", fail)
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
        assert sum(size for size, _ in writer._waiting) <= 64
    writer.finalize()
    assert len(read(tmp_path)) == 20
