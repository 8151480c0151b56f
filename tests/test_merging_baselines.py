"""The baselines of `examples/merging_baselines.py`, against plain computations of their own."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from mergekit_moe_ext.analysis import load_ensemble, read_ensemble

SHAPE = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DENSITY = 0.2
TASKS = ("cats", "dogs", "owls")


@pytest.fixture
def baselines(examples):
    import merging_baselines

    return merging_baselines


def classifier(baselines, seed):
    torch.manual_seed(seed)
    trunk = ViTModel(ViTConfig(**SHAPE), add_pooling_layer=False).eval()
    head = torch.randn(3, SHAPE["hidden_size"] + 1)
    return baselines.Classifier(trunk, lambda trunk, x: trunk(x).last_hidden_state[:, 0], head)


def test_the_fisher_diagonal_is_that_of_single_gradients(baselines):
    network = classifier(baselines, 0)
    network.trunk.embeddings.requires_grad_(False)
    inputs = torch.randn(5, 3, 8, 8)
    labels = torch.tensor([0, 2, 1, 1, 0])
    fisher = baselines.diagonal_fisher(network, inputs, labels, at_once=2)
    squares = {name: [] for name, p in network.named_parameters() if p.requires_grad}
    for one, label in zip(inputs, labels, strict=True):
        network.zero_grad()
        network(one[None]).log_softmax(-1)[0, label].backward()
        for name in squares:
            squares[name].append(network.get_parameter(name).grad ** 2)
    assert fisher.keys() == squares.keys() and "trunk.embeddings.cls_token" not in fisher
    for name, of_samples in squares.items():
        torch.testing.assert_close(
            fisher[name], torch.stack(of_samples).mean(0), rtol=1e-4, atol=1e-12
        )
    whole = baselines.normalized(fisher)
    assert torch.cat([each.flatten() for each in whole.values()]).norm() == pytest.approx(1)
    name = "trunk.layers.1.mlp.fc1.weight"
    torch.testing.assert_close(whole[name] / whole[name].max(), fisher[name] / fisher[name].max())


def test_fisher_merging_weighs_each_number(baselines):
    models = [{"w": torch.tensor([1.0, 5.0, 3.0]), "n": torch.tensor([2.0])}]
    models += [{"w": torch.tensor([2.0, 9.0, 7.0]), "n": torch.tensor([4.0])}]
    # In the first place 1 of 4 parts, in the second only the second model, in the third none;
    # products of the smallest with anything are zero in single precision.
    fishers = [{"w": torch.tensor([1e-38, 0.0, 0.0])}, {"w": torch.tensor([3e-38, 1e-4, 0.0])}]
    merged = baselines.fisher_merge(models, fishers)
    torch.testing.assert_close(merged["w"], torch.tensor([1.75, 9.0, 5.0]))
    assert merged["w"].dtype == torch.float32 and merged["n"] == 3


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_regmean_solves_the_regression(baselines, off_diagonal):
    """Against least squares over the rows of all models, to which a diagonal adds rows of its own;
    inputs come from a forward pass that is written out.
    """
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2, bias=False))
        networks.append(network.double())
    data = [torch.randn(rows, 5, 4, dtype=torch.float64) for rows in (7, 9, 3)]
    pairs = list(zip(networks, data, strict=True))
    grams = [baselines.gram_matrices(network, x, at_once=2) for network, x in pairs]
    models = [dict(network.named_parameters()) for network in networks]
    merged = baselines.regmean_merge(models, grams, off_diagonal)

    targets = []
    rows = []
    for network, x in pairs:
        inputs = torch.tanh(x @ network[0].weight.T + network[0].bias).flatten(0, 1)
        inputs = inputs / len(inputs) ** 0.5
        diagonal = torch.diag((inputs**2).sum(0).sqrt())
        weighed = [off_diagonal**0.5 * inputs, (1 - off_diagonal) ** 0.5 * diagonal]
        rows.append(torch.cat(weighed))
        targets.append(rows[-1] @ network[2].weight.T)
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T
    torch.testing.assert_close(merged["2.weight"], solution)
    assert not torch.allclose(solution, torch.stack([m["2.weight"] for m in models]).mean(0))
    torch.testing.assert_close(merged["0.bias"], sum(m["0.bias"] for m in models) / 3)


def test_models_that_agree_are_what_is_merged(baselines):
    network = classifier(baselines, 0)
    model = dict(network.named_parameters())
    x = torch.randn(6, 3, 8, 8)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    fisher = baselines.diagonal_fisher(network, x, labels)
    gram = baselines.gram_matrices(network, x)
    assert "trunk.layers.0.mlp.fc1.weight" in gram
    for merged in (
        baselines.fisher_merge([model, model], [fisher, fisher]),
        baselines.regmean_merge([model, model], [gram, gram]),
    ):
        assert merged.keys() == model.keys()
        for name in model:
            torch.testing.assert_close(merged[name], model[name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_trimmed_vectors_add_up_to_ties_and_adamerging_weighs_them(baselines, tmp_path):
    """With equal coefficients the sum is mergekit's `ties`. With others, what `wemoe` computes is a
    plain ViT whose parameters are the explicit sum.
    """
    from wemoe_images import merge, routed

    base, models = made_up_fine_tunes(tmp_path)
    trimmed = baselines.write_trimmed(base, models, "classifier.", DENSITY, tmp_path / "trimmed")
    start = load_file(base / "model.safetensors")
    states = {task: load_file(path / "model.safetensors") for task, path in trimmed.items()}
    for task, state in states.items():
        own = load_file(models[task] / "model.safetensors")
        assert torch.equal(state["classifier.weight"], own["classifier.weight"])

    parameters = {"weight": 1.0, "density": DENSITY, "normalize": False, "lambda": 0.3}
    stock = {"merge_method": "ties", "parameters": parameters}
    ties = load_file(
        merge(stock, base, models.values(), tmp_path / "ties", 0) / "model.safetensors"
    )
    body = [name for name in ties if not name.startswith("classifier.")]
    for name in body:
        total = sum(state[name] - start[name] for state in states.values())
        assert total.abs().max() > 0
        torch.testing.assert_close(start[name] + 0.3 * total, ties[name], rtol=0, atol=1e-6)

    adamerging = routed(upscale="all", router_layers=0)
    out = str(merge(adamerging, base, trimmed.values(), tmp_path / "out", 0))
    ensemble = load_ensemble(out, *read_ensemble(out)).eval()
    groups = list(ensemble.ensembling.groups)
    coefficients = torch.rand(len(groups), len(TASKS))
    x = torch.randn(2, 3, 8, 8)
    for task in TASKS:
        plain = ViTForImageClassification.from_pretrained(models[task]).eval()
        for name, parameter in plain.named_parameters():
            if name in body:
                weights = coefficients[groups.index(name)]
                parameter.copy_(start[name])
                for weight, other in zip(weights, states.values(), strict=True):
                    parameter += weight * (other[name] - start[name])
        given = coefficients.expand(len(x), -1, -1)
        logits = ensemble(pixel_values=x, task=task, coefficients=given).logits
        torch.testing.assert_close(logits, plain(x).logits, rtol=1e-4, atol=1e-5)


def made_up_fine_tunes(folder):
    """A base and a fine-tune of each task, with classes of its own."""
    torch.manual_seed(0)
    network = ViTForImageClassification(ViTConfig(**SHAPE, num_labels=3))
    # Stock mergekit looks for the names that transformers has in memory.
    network.save_pretrained(folder / "base", save_original_format=False)
    models = {}
    for task in TASKS:
        names = [f"{task} {number}" for number in range(3)]
        network.config.id2label = dict(enumerate(names))
        network.config.label2id = {name: number for number, name in enumerate(names)}
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        models[task] = folder / "models" / task
        network.save_pretrained(models[task], save_original_format=False)
    return folder / "base", models
