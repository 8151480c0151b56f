"""The experiment on a pretrained network, `examples/wemoe_pretrained.py`, on a made-up one."""

import argparse
import json
import statistics
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional
from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification, Dinov2Model

from tests.test_wemoe_images import made_up

STOCK = Dinov2ForImageClassification.__init__
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def experiment(examples, monkeypatch, tmp_path):
    monkeypatch.setenv("MERGEKIT_MOE_EXT_CACHE", str(tmp_path / "cache"))
    import real_images
    import wemoe_pretrained

    def tiny_network(side):
        torch.manual_seed(0)
        network = Dinov2Model(Dinov2Config(image_size=side, patch_size=14, **TINY))
        network.save_pretrained(tmp_path / "network")
        return tmp_path / "network"

    def made_up_tasks(names):
        return {name: made_up(real_images, seed) for seed, name in enumerate(names)}

    # Whatever is made of the class in these tests is undone after them.
    monkeypatch.setattr(Dinov2ForImageClassification, "__init__", STOCK)
    wemoe_pretrained.use_cosine_heads()
    monkeypatch.setattr(wemoe_pretrained, "dinov2", tiny_network)
    monkeypatch.setattr(wemoe_pretrained, "tasks", made_up_tasks)
    upper = {"upscale_layers": "1"}
    rows = {}
    for name in (
        "AdaMerging (layer)",
        "WEMoE (2-layer)",
        "WEMoE (0-layer)",
        *wemoe_pretrained.AT_LOW_RATES,
    ):
        row = wemoe_pretrained.ADAPTED[name]
        if "upscale_layers" in row.method["parameters"]:
            method = {**row.method, "parameters": {**row.method["parameters"], **upper}}
            row = replace(row, method=method)
        rows[name] = row
    monkeypatch.setattr(wemoe_pretrained, "ADAPTED", rows)
    monkeypatch.setattr(wemoe_pretrained, "UPPER", upper)
    monkeypatch.setattr(wemoe_pretrained, "TRIMMED", ("AdaMerging++ (layer)",))
    monkeypatch.setattr(wemoe_pretrained, "COMPARED", ["Task arithmetic", "WEMoE (2-layer)"])
    low = wemoe_pretrained.AT_LOW_RATES[0]
    monkeypatch.setattr(wemoe_pretrained, "ON_CORRUPTED", ["Task arithmetic", low])
    monkeypatch.setattr(wemoe_pretrained, "CORRUPTIONS", ["dark"])
    for name in ("LAMBDAS", "LAMBDAS_ROUTED", "SWEPT"):
        values = getattr(wemoe_pretrained, name)
        monkeypatch.setattr(wemoe_pretrained, name, values[:1])
    monkeypatch.setattr(wemoe_pretrained, "corrupted", darkened)
    once = {"AdaMerging (layer)": (1e-3,), "WEMoE (2-layer)": (1e-3,)}
    monkeypatch.setattr(wemoe_pretrained, "RATES", once)
    few = wemoe_pretrained.Scale(frozen=1, trained=16, tested=4, of_class=4, steps=4, batch=8)
    monkeypatch.setattr(wemoe_pretrained, "Scale", lambda: few)
    return wemoe_pretrained


def darkened(data, corruption):
    assert corruption == "dark"
    return {task: replace(images, test=images.test // 8) for task, images in data.items()}


def test_it_runs_and_goes_on(experiment, tmp_path, monkeypatch):
    command = ["-o", str(tmp_path / "out"), "--seed", "0", "--steps", "2"]
    done = CliRunner().invoke(experiment.main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out" / "table2-0.json").read_text())["rows"]
    assert {"Pre-trained", "Individual", "Own task's MLPs", *experiment.ADAPTED} <= rows.keys()
    assert {"Fisher merging", "RegMean", "AdaMerging++ (layer)"} <= rows.keys()
    average = statistics.mean(rows["Individual"][task] for task in experiment.TASKS)
    assert f"{100 * average:.1f}" in done.stdout and "AdaMerging (layer)" in done.stdout

    # A second time nothing is measured, so nothing that measures is called.
    monkeypatch.setattr(experiment, "adapt", None)
    again = CliRunner().invoke(experiment.main, command, catch_exceptions=False)
    assert again.stdout == done.stdout
    other = CliRunner().invoke(experiment.main, [*command, "--steps", "3"])
    assert other.exit_code == 1 and "is of other settings" in other.output


def test_unseen_tasks_corruptions_and_rates(experiment, tmp_path):
    command = ["-o", str(tmp_path / "out"), "--steps", "1"]
    for part in ("table4", "table5", "rates"):
        command += ["--only", part]
    done = CliRunner().invoke(experiment.main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    better = experiment.AT_LOW_RATES[0]
    assert f"{better}, dark above Task arithmetic, dark" in done.stdout
    assert "WEMoE (2-layer): best at 0.001" in done.stdout
    rows = {}
    for part in ("table4", "table5", "rates"):
        rows[part] = json.loads((tmp_path / "out" / f"{part}-0.json").read_text())["rows"]
    # Only two experts were merged, but all tasks are measured.
    adapted = rows["table4"]["WEMoE (2-layer)"]
    assert adapted.keys() >= set(experiment.TASKS)
    assert adapted["coefficients"].keys() == set(experiment.SEEN)
    for of_task in adapted["coefficients"].values():
        assert len(of_task["mean"]) == 1 and len(of_task["mean"][0]) == 2  # blocks, experts
        assert sum(of_task["first"][0]) == pytest.approx(1)
    assert rows["table5"].keys() == {"Task arithmetic, dark", f"{better}, dark"}
    assert {"AdaMerging (layer), 0.001", "WEMoE (2-layer), 0.001"} <= rows["rates"].keys()


def test_all_rates_are_tried_with_one_seed_and_its_best_two_with_others(experiment, monkeypatch):
    row = "WEMoE (2-layer)"
    monkeypatch.setattr(experiment, "RATES", {row: (1e-4, 1e-3, 1e-2)})

    def cells(accuracy):
        return dict.fromkeys(experiment.TASKS, accuracy)

    measured = {"Task arithmetic": {0: cells(0.5) | {"entropy": 1.0}}}
    results = argparse.Namespace(cells=measured)
    for rate, accuracy in ((1e-4, 0.6), (1e-3, 0.9), (1e-2, 0.7)):
        assert experiment.tried_rates(row, 0, results) == (1e-4, 1e-3, 1e-2)
        measured[f"{row}, {rate:g}"] = {0: cells(accuracy) | {"entropy": 1.0}}
    assert experiment.tried_rates(row, 0, results) == (1e-4, 1e-3, 1e-2)
    assert experiment.tried_rates(row, 1, results) == [1e-3, 1e-2]
    assert f"{row}: best at 0.001" in experiment.text_of_rates(results)
    # With the second seed the order of the two is another, and so it is in the mean.
    measured["Task arithmetic"][1] = cells(0.5) | {"entropy": 1.0}
    measured[f"{row}, 0.001"][1] = cells(0.1) | {"entropy": 1.0}
    measured[f"{row}, 0.01"][1] = cells(0.8) | {"entropy": 1.0}
    assert experiment.tried_rates(row, 2, results) == [1e-3, 1e-2]
    assert f"{row}: best at 0.01" in experiment.text_of_rates(results)


def test_the_figures_are_measured_and_drawn(experiment, tmp_path):
    pytest.importorskip("matplotlib")
    command = ["-o", str(tmp_path / "out"), "--steps", "2", "--plot", str(tmp_path / "figures")]
    for part in ("table6", *experiment.DRAWN):
        command += ["--only", part]
    done = CliRunner().invoke(experiment.main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = {}
    for part, (_, figure) in experiment.DRAWN.items():
        rows[part] = json.loads((tmp_path / "out" / f"{part}-0.json").read_text())["rows"]
        assert (tmp_path / "figures" / figure).read_bytes().startswith(b"\x89PNG")
    curve = rows["figure4"]["0.01"]["curve"]
    assert list(curve) == ["0", "1", "2"]
    last = [rows["figure4"]["0.01"][task] for task in experiment.TASKS]
    assert curve["2"] == pytest.approx(statistics.mean(last))
    assert "Attention + MLP above MLP only" in done.stdout
    assert "WEMoE (2-layer), 0.1" in rows["figure5"] and "Ties-Merging, 0.1" in rows["figure5"]
    assert rows["table2"]["WEMoE (2-layer)"]["coefficients"].keys() == set(experiment.TASKS)


def test_unseen_tasks_are_measured_by_their_own_heads(experiment, tmp_path):
    """A merge of two fine-tunes with constants of 0 is the base."""
    data = experiment.tasks(experiment.TASKS)
    scale = experiment.Scale()
    prepared = {task: experiment.prepared(images, scale) for task, images in data.items()}
    beyond = {task: experiment.held_back(images, scale) for task, images in data.items()}
    for task, images in data.items():
        both = len(prepared[task].test) + len(beyond[task].test)
        assert both == len(images.test) and len(beyond[task].test) == 4
    bench = experiment.make_bench(prepared, beyond, scale, 0, tmp_path, 1)
    nothing = {"lambda": 0.0, "init_lambda": 0.0, "upscale": "all", "router_layers": 0}
    method = {"merge_method": "wemoe", "parameters": nothing}
    still = experiment.Adapted(method, "", {"learning_rate": 0.0})
    row = bench.merging(experiment.SEEN).adapted(still)
    assert {task: row[task] for task in experiment.TASKS} == {
        task: bench.pretrained()[task] for task in experiment.TASKS
    }


@torch.no_grad()
def test_logits_are_cosines(experiment):
    torch.manual_seed(0)
    features = torch.randn(12, 6) + 3
    labels = torch.arange(12) % 3
    head = experiment.prototype_head(features, labels, 3, experiment.Scale())
    logits = experiment.logits_of(features, head, experiment.Scale())
    center = features.mean(dim=0)
    for number in range(3):
        mean = features[labels == number][:4].mean(dim=0)
        cosines = functional.cosine_similarity(features - center, (mean - center)[None])
        assert torch.allclose(logits[:, number], 20 * cosines, atol=1e-4)


def test_the_kind_of_head_changes_how_sure_predictions_are_and_not_what_they_are(
    experiment, tmp_path
):
    rows = []
    for kind in ("cosine", "linear"):
        scale = replace(experiment.Scale(), head=kind)
        images = experiment.tasks(experiment.TASKS)
        data = {task: experiment.prepared(each, scale) for task, each in images.items()}
        if kind == "linear":
            Dinov2ForImageClassification.__init__ = STOCK
        bench = experiment.make_bench(data, {}, scale, 0, tmp_path / kind, 1)
        rows.append(bench.pretrained())
    cosine, linear = rows
    assert cosine["entropy"] != pytest.approx(linear["entropy"], rel=1e-3)
    for task in experiment.TASKS:
        assert cosine[task] == linear[task]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@torch.no_grad()
def test_the_halves_of_the_network_are_the_whole_that_is_saved(experiment, tmp_path, kind):
    if kind == "linear":
        Dinov2ForImageClassification.__init__ = STOCK
    scale = replace(experiment.Scale(), trained=8, head=kind)
    data = experiment.prepared(made_up(experiment, 0), scale)
    trunk = Dinov2Model.from_pretrained(experiment.dinov2(experiment.SIDE))
    hidden = experiment.lower_part(trunk, data.train, scale.frozen)
    features = experiment.features_of(trunk, hidden, scale.frozen)
    head = experiment.prototype_head(features, torch.as_tensor(data.train_labels), 2, scale)
    experiment.save(trunk, head, data.classes, scale, tmp_path / "saved")
    processor = BitImageProcessor.from_pretrained(tmp_path / "saved")
    images = [image[..., None].repeat(3, axis=-1) for image in data.train]
    model = Dinov2ForImageClassification.from_pretrained(tmp_path / "saved").eval()
    logits = model(**processor(images, return_tensors="pt")).logits
    assert torch.allclose(logits, experiment.logits_of(features, head, scale), atol=1e-4)
