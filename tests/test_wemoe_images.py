"""The experiment on images, `examples/wemoe_images.py`, and what fetches them, on made-up ones."""

import io
import json
import pickle
import statistics

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

CLASSES = ["left", "right"]


@pytest.fixture
def experiment(examples, monkeypatch, tmp_path):
    monkeypatch.setenv("MERGEKIT_MOE_EXT_CACHE", str(tmp_path / "cache"))
    import wemoe_images

    few = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    monkeypatch.setattr(wemoe_images, "SHAPE", {**wemoe_images.SHAPE, **few})
    monkeypatch.setattr(wemoe_images, "HIDDEN", 16)
    for name in ("PRETRAINING", "FINE_TUNING", "TOGETHER"):
        monkeypatch.setattr(
            wemoe_images, name, wemoe_images.Recipe(steps=12, batch=8, learning_rate=3e-3)
        )
    monkeypatch.setattr(
        wemoe_images,
        "tasks",
        lambda names: {n: made_up(wemoe_images, i) for i, n in enumerate(names)},
    )
    monkeypatch.setattr(wemoe_images, "pretraining", lambda: made_up(wemoe_images, 9))
    return wemoe_images


def made_up(experiment, seed):
    """Images with a light spot in one half or the other. Each task has its own names for these."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(2, size=24)
    spots = generator.integers(60, size=(24, 28, 28), dtype=np.uint8)
    for spot, label in zip(spots, labels, strict=True):
        spot[8:20, 16 * label : 16 * label + 12] += 180
    classes = [f"{name} {seed}" for name in CLASSES]
    return experiment.Images(classes, spots[:16], labels[:16], spots[16:], labels[16:])


def test_the_whole_experiment_runs_and_goes_on(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "LAMBDAS", (0.3,))
    monkeypatch.setattr(experiment, "LAMBDAS_ROUTED", ())
    monkeypatch.setattr(experiment, "RATES", (3e-4,))
    monkeypatch.setattr(experiment, "CORRUPTIONS", ["contrast"])
    monkeypatch.setattr(experiment, "corrupted", lambda data, corruption: data)
    monkeypatch.setattr(experiment, "COMPARED", ["Task arithmetic"])
    monkeypatch.setattr(experiment, "TRIMMED", ["AdaMerging++ (layer)"])
    kept = {row: experiment.ROUTED[row] for row in ("AdaMerging (layer)", "WEMoE (2-layer)")}
    for name, rows in (("ROUTED", kept), ("STRATEGIES", {}), ("SPARSE", {})):
        monkeypatch.setattr(experiment, name, rows)
    command = [
        "-o",
        str(tmp_path / "out"),
        "--seed",
        "0",
        "--steps",
        "2",
        "--plot",
        str(tmp_path / "figures"),
    ]
    result = CliRunner().invoke(experiment.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Table 2" in result.stdout and "Individual above Pre-trained" in result.stdout
    for figure in ("wemoe_routing.png", "wemoe_figure4.png", "wemoe_figure5.png"):
        assert (tmp_path / "figures" / figure).read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "out" / "table2-0.json").read_text())["rows"]
    assert rows.keys() >= {
        "Pre-trained",
        "Individual",
        "Traditional MTL",
        *experiment.STATIC,
        "Fisher merging",
        "RegMean",
        "AdaMerging++ (layer)",
        *kept,
    }
    lambdas = json.loads((tmp_path / "out" / "figure5-0.json").read_text())["rows"]
    assert lambdas["Task arithmetic, 0.3"] == rows["Task arithmetic"]  # the same merge, made again
    curve = json.loads((tmp_path / "out" / "figure4-0.json").read_text())["rows"]["0.0003"]["curve"]
    adapted = rows["WEMoE (2-layer)"]
    assert list(curve) == ["0", "2"] and curve["2"] == statistics.mean(
        adapted[task] for task in experiment.TASKS
    )

    monkeypatch.setattr(experiment.Bench, "measure", None)  # nothing is measured again
    again = CliRunner().invoke(experiment.main, command[:6], catch_exceptions=False)
    assert again.exit_code == 0 and again.stdout == result.stdout
    other = CliRunner().invoke(experiment.main, [*command[:5], "3"])
    assert other.exit_code == 1 and "other settings" in other.output


def test_unadapted_routers_are_task_arithmetic(experiment, tmp_path):
    """Up to the spread of the routers' first weights: what `adapt` measures before, and a stock
    merge.
    """
    data = experiment.tasks([*experiment.TASKS, *experiment.UNSEEN])
    sources = experiment.make_sources(experiment.make_base(), data, 0)
    tests = experiment.write_tests(data, tmp_path / "tests")
    bench = experiment.Bench(sources, data, tests, tmp_path, {"steps": 1, "learning_rate": 0.0})
    constant = bench.adapted(experiment.ROUTED["WEMoE (0-layer)"])
    stock = bench.static(experiment.STATIC["Task arithmetic"])
    assert {task: constant[task] for task in stock} == stock
    for task, accuracy in bench.own().items():  # whole, as a user loads it
        model = AutoModelForImageClassification.from_pretrained(sources.models[task])
        processor = AutoImageProcessor.from_pretrained(sources.models[task])
        in_colour = [Image.fromarray(one).convert("RGB") for one in data[task].test]
        right = model(**processor(in_colour, return_tensors="pt")).logits.argmax(
            -1
        ) == torch.as_tensor(data[task].test_labels)
        assert right.float().mean().item() == accuracy
        assert model.config.id2label == dict(enumerate(data[task].classes))


def test_only_arrays_are_unpickled(experiment):
    import real_images

    arrays = np.arange(6, dtype=np.uint8).reshape(2, 3)
    read = real_images._Arrays(io.BytesIO(pickle.dumps(arrays))).load()
    assert np.array_equal(read, arrays)
    with pytest.raises(pickle.UnpicklingError, match="asks for"):
        real_images._Arrays(io.BytesIO(pickle.dumps(print))).load()
