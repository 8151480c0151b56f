"""Training a model that is spread over a device and main memory, against the same model whole.

Here the CPU is both, with accelerate's own hooks; tests/gpu has a GPU as the device.
"""

import logging
from types import SimpleNamespace

import click
import pytest
import torch

from _mergekit_moe_ext_common import placement
from _mergekit_moe_ext_common.placement import check_can_be_spread, check_device_map
from mergekit_moe_ext import Reading, Recipe, train
from tests.conftest import every_other_layer, read_tensors
from tests.mergekit_moe_ext.mixtures import test_sequence_training as sequences
from tests.mergekit_moe_ext.mixtures.test_usage import FAMILIES, make_moe, words, write

READING = Reading(max_length=24, quiet=True)
RECIPE = {"held_out": 2, "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.01}


@pytest.fixture
def moe(tmp_path, monkeypatch):
    """A working directory with ./moe, a Mixtral whose head is its embedding, and ./news.jsonl."""
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", "mixtral", **FAMILIES["mixtral"], tie_word_embeddings=True)
    write(tmp_path / "news.jsonl", words(1, 12))
    return tmp_path


def both_ways(path, monkeypatch, device_map, part, reading, recipe):
    """Trains the model in ./moe whole and spread; returns the names of what has changed."""
    monkeypatch.setattr(
        placement, "_device_map", lambda model, _: device_map(model, torch.device("cpu"))
    )
    keywords = {"reading": reading, "recipe": recipe}
    whole = train("moe", ["news.jsonl"], part, output="whole", **keywords)
    spread = train("moe", ["news.jsonl"], part, output="spread", device_map="auto", **keywords)
    assert spread == whole
    before, expected, got = (read_tensors(path / name) for name in ("moe", "whole", "spread"))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    return {name for name in before if not torch.equal(before[name], got[name])}


@pytest.mark.parametrize("saves", [False, True], ids=["plain", "gradient-checkpointing"])
def test_gates_are_trained_as_those_of_a_whole_model(moe, monkeypatch, caplog, saves):
    recipe = Recipe(**RECIPE, save_steps=1, router_aux_loss=0.1, gradient_checkpointing=saves)
    with caplog.at_level(logging.WARNING):
        changed = both_ways(moe, monkeypatch, every_other_layer, "gates", READING, recipe)
    assert len(changed) == 3 and all(".gate." in name for name in changed)
    assert ("give --gradient-checkpointing" in caplog.text) == (not saves)


def test_a_sequence_moe_is_trained_as_a_whole_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sequences.save(tmp_path / "moe", sequences.with_projectors())
    write(tmp_path / "news.jsonl", words(1, 9))

    def device_map(model, device):
        places = {f"experts.{number}": "cpu" for number in range(len(model.experts))}
        return {**places, "experts.1": device, **dict.fromkeys(_others(model), "cpu")}

    parts = ["router", "projectors"]
    recipe = sequences.recipe(held_out=2, router_aux_loss=0.5)
    changed = both_ways(tmp_path, monkeypatch, device_map, parts, sequences.READING, recipe)
    assert {sequences.part_of(name) for name in changed} == set(parts)


def _others(model):
    return [name for name, _ in model.named_children() if name != "experts"]


def test_what_would_lie_on_disk_is_refused_before_work_starts(moe, monkeypatch):
    monkeypatch.setattr(placement, "get_max_memory", lambda: {"cpu": 1000})
    with pytest.raises(click.ClickException, match="modules would lie on disk"):
        train(
            "moe",
            ["news.jsonl"],
            "gates",
            output="out",
            reading=READING,
            recipe=Recipe(**RECIPE),
            device_map="auto",
        )
    assert not list(moe.glob("out*"))


def test_other_maps_processes_and_models_are_refused(monkeypatch):
    check_device_map(None, processes=2)
    check_device_map("auto", processes=1)
    with pytest.raises(click.ClickException, match="the only one is auto"):
        check_device_map("balanced", processes=1)
    with pytest.raises(click.ClickException, match="and there are 2: start one"):
        check_device_map("auto", processes=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(click.ClickException, match="leave one of them out"):
        check_device_map("auto", processes=1)
    with pytest.raises(click.ClickException, match="which is quantised"):
        check_can_be_spread("moe", SimpleNamespace(quantization_config={"bits": 4}), [])
