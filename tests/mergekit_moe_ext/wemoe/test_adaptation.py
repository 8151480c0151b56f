"""Adaptation: against loops over single inputs and Adam written out, and one way of running against
another.
"""

import json
import logging
import math
import random
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from _mergekit_moe_ext_common.data import Source
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.cli import main
from mergekit_moe_ext.recipes import Adaptation
from mergekit_moe_ext.wemoe.adaptation import adapt
from mergekit_moe_ext.wemoe.inputs import Rounds, labels_of
from mergekit_moe_ext.wemoe.loading import load_ensemble, read_ensemble
from mergekit_moe_ext.wemoe.objective import Guard, entropy
from mergekit_moe_ext.wemoe.trainer import AdaptationTrainer
from mergekit_moe_ext.wemoe.unloading import unload
from tests.conftest import ON_CPU, TWO_PROCESSES, document, make_model, merge, read_tensors, run
from tests.tokenizers import save_tokenizer

READING = Reading(max_length=40, quiet=True)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLASSES = {"base": 3, "sun": 3, "cars": 4}
STRONG = {"router_init_std": 0.3}  # routers that tell inputs apart from the start


def adaptation(**changes):
    return Adaptation(
        **{"steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, **changes}
    )


def make_classifier(path, seed, classes, kind):
    """A random classifier; other seeds are fine-tunes of it with heads of their own."""
    torch.manual_seed(0)
    if kind == "vit":
        model = ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES)
        )
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(path)
    else:
        model = BertForSequenceClassification(BertConfig(vocab_size=96, num_labels=3, **SIZES))
        save_tokenizer(path, 96)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise) if seed else 0
        head = torch.nn.Linear(32, classes)
        head.weight.copy_(0.5 * torch.randn(head.weight.shape, generator=noise))
        head.bias.zero_()
    model.classifier, model.config.id2label = (
        head,
        {i: f"c{(i + 1) % classes}" for i in range(classes)},
    )
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    model.save_pretrained(path)


def words(seed, rows, least=3):
    """Texts of random words, `least` or up to 19 more in each."""
    generator = random.Random(seed)
    texts = []
    for _ in range(rows):
        length = generator.randrange(least, least + 20)
        texts.append(" ".join(f"w{generator.randrange(90)}" for _ in range(length)))
    return texts


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def draw(path, seed, number):
    path.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index in range(number):
        pixels = generator.random((9, 11, 3)) * 100 + generator.random(3) * 155
        Image.fromarray(pixels.astype("uint8")).save(path / f"{index}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weight-ensembling models of all kinds, and what they are adapted to."""
    root = tmp_path_factory.mktemp("adaptation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for kind in ("vit", "bert"):
            for seed, (name, classes) in enumerate(CLASSES.items()):
                make_classifier(root / kind / name, seed, classes, kind)
        for seed, name in enumerate(("base", "sun", "cars")):
            make_model(root / "llama" / name, seed)
            sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
            make_model(root / "t5" / name, seed, family="t5", decoder_start_token_id=0, **sizes)
            for kind in ("llama", "t5"):
                save_tokenizer(root / kind / name, 96)
        for out, method, parameters in (
            ("vit-2", "wemoe", STRONG),
            ("vit-0", "wemoe", {"router_layers": 0, "upscale": "attention+mlp"}),
            ("bert-2", "ewemoe", {**STRONG, "sparsity": 0.5}),
            ("llama-2", "wemoe", {**STRONG, "routing_tokens": 6}),
            ("llama-running", "wemoe", {**STRONG, "mode": "running"}),
            ("llama-0", "ewemoe", {"router_layers": 0, "init_lambda": 0.7}),
            ("vit-all", "wemoe", {"router_layers": 0, "upscale": "all"}),
            ("t5-2", "wemoe", STRONG),
        ):
            kind = out.split("-")[0]
            models = [f"{kind}/sun", f"{kind}/cars"]
            merge(
                document(method, models=models, base=f"./{kind}/base", parameters=parameters), out
            )
    for task, classes in (("sun", 3), ("cars", 4)):
        for number in range(classes):
            draw(root / "images" / task / f"c{number}", [len(task), number], 12 // classes)
        texts = words(len(task), 12)
        write(
            root / f"{task}.jsonl",
            [{"text": text, "label": i % classes} for i, text in enumerate(texts)],
        )
    draw(root / "images" / "flat", 7, 8)
    write(root / "long.jsonl", [{"text": text} for text in [*words(5, 6, least=9), "w1 w2"]])
    write(
        root / "pairs.jsonl",
        [{"input": a, "target": b} for a, b in zip(words(6, 5), words(7, 5), strict=True)],
    )
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A working directory with all that."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(path):
    return load_ensemble(str(path), *read_ensemble(str(path))).eval()


def pixels_of(path, directory):
    processor = AutoImageProcessor.from_pretrained(path)
    files = sorted(Path(directory).rglob("*.png"))
    return [
        processor([Image.open(file).convert("RGB")], return_tensors="pt")["pixel_values"]
        for file in files
    ]


def naive_entropy(logits):
    chances = [math.exp(value) for value in logits]
    return -sum(p / sum(chances) * math.log(p / sum(chances)) for p in chances)


def changed(before, after):
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


IMAGES = ["sun=images/sun", "cars=images/cars"]


def test_entropy_is_equation_5():
    logits = 3 * torch.randn(2, 3, 7, dtype=torch.float64)
    expected = [[naive_entropy(row.tolist()) for row in rows] for rows in logits]
    assert torch.allclose(entropy(logits), torch.tensor(expected, dtype=torch.float64))
    certain = torch.tensor([0.0, -math.inf, -200.0], requires_grad=True)
    entropy(certain).backward()
    assert entropy(certain).item() == 0 and certain.grad.isfinite().all()


def coefficients_of_batch(model, pixels, task):
    """The mean of all images' coefficients, group by group: a group reads what comes of the means
    of the groups before it.
    """
    chosen = torch.zeros(1, len(model.ensembling.groups), len(model.ensembling.experts))
    for index, name in enumerate(model.ensembling.groups):
        read = []
        group = model.get_submodule(name)
        hook = group.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        model(pixel_values=pixels, task=task, coefficients=chosen)
        hook.remove()
        mean = sum(model.routers[str(index)](h).mean(0) for h in read[0]) / len(pixels)
        chosen = torch.cat([chosen[:, :index], mean[None, None], chosen[:, index + 1 :]], dim=1)
    return chosen


SCHEDULED = {"lr_scheduler_type": "cosine", "adam_beta1": 0.8, "adam_beta2": 0.95}


@pytest.mark.parametrize("changes", [{}, SCHEDULED, {"coefficients_per": "batch"}], ids=str)
def test_a_step_is_adam_on_the_summed_entropies_of_all_tasks(here, changes):
    """Two steps, each over all twelve images of both tasks, so that their order does not matter."""
    plan = adaptation(per_device_train_batch_size=12, no_guard=True, **changes)
    adapt("vit-2", "out", IMAGES, READING, plan)
    # A cosine from 1 over two steps has 1 and ½.
    rates = {1: 0.01, 2: 0.005 if plan.lr_scheduler_type == "cosine" else 0.01}
    beta1, beta2 = plan.adam_beta1, plan.adam_beta2
    model = load("vit-2")
    routers = dict(model.routers.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in routers.items()}
    for step in (1, 2):
        total = 0.0
        for task in ("sun", "cars"):
            images = pixels_of("vit-2", f"images/{task}")
            given = {}
            if plan.coefficients_per == "batch":
                given["coefficients"] = coefficients_of_batch(model, torch.cat(images), task)
            for pixels in images:
                p = model(pixel_values=pixels, task=task, **given).logits[0].softmax(-1)
                total = total - (p * p.log()).sum() / 12
        gradients = torch.autograd.grad(total, list(routers.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(routers.items(), gradients, strict=True):
                first, second = moments[name]
                first.mul_(beta1).add_((1 - beta1) * gradient)
                second.mul_(beta2).add_((1 - beta2) * gradient**2)
                mean, square = first / (1 - beta1**step), second / (1 - beta2**step)
                p -= rates[step] * mean / (square.sqrt() + 1e-8)
    before, after = read_tensors(here / "vit-2"), read_tensors(here / "out")
    assert changed(before, after) == {f"routers.{name}" for name in routers}
    for name, parameter in routers.items():
        moved = (parameter - before[f"routers.{name}"]).abs().max()
        assert moved > 5e-3
        assert (after[f"routers.{name}"] - parameter).abs().max() < 0.02 * moved, name


def test_every_row_comes_once_before_any_comes_again():
    tasks = {"a": [f"a{i}" for i in range(5)], "b": [f"b{i}" for i in range(3)]}
    rounds = Rounds(tasks, batch=2, steps=10, seed=1)
    rows = [rounds[index] for index in range(len(rounds))]
    assert len(rows) == 40
    for number in range(20):
        assert {name for row in rows[2 * number : 2 * number + 2] for name in row} == {
            "ab"[number % 2]
        }
    for task, content in tasks.items():
        seen = [row[task] for row in rows if task in row]
        orders = [seen[start : start + len(content)] for start in range(0, 15, len(content))]
        assert all(sorted(order) == content for order in orders) and orders[0] != orders[1]


def test_images_are_measured_as_one_by_one(here, caplog):
    with caplog.at_level(logging.INFO, "mergekit_moe_ext"):
        measured = adapt("vit-2", None, IMAGES, READING, adaptation(learning_rate=0.005, steps=8))
    assert "sun: adapting to 12 inputs, the test inputs themselves" in caplog.text
    for task, classes in (("sun", 3), ("cars", 4)):
        for when, path in enumerate(("vit-2", "vit-2-adapted")):
            model = load(path)
            logits = [
                model(pixel_values=p, task=task).logits[0]
                for p in pixels_of(path, f"images/{task}")
            ]
            right = sum(
                (int(each.argmax()) + 1) % classes == i * classes // 12
                for i, each in enumerate(logits)
            )
            mean = sum(naive_entropy(each.tolist()) for each in logits) / 12
            assert measured[task]["entropy"][when] == pytest.approx(mean, abs=1e-5)
            assert measured[task]["accuracy"][when] == right / 12
    assert sum(after - before for before, after in (m["entropy"] for m in measured.values())) < 0
    card = (here / "vit-2-adapted" / "README.md").read_text()
    assert "## Adaptation" in card and "Measured on the inputs adapted to" in card
    assert (
        'AutoModelForImageClassification.from_pretrained("vit-2-adapted", trust_remote_code=True)'
        in card
    )
    assert '("vit-2"' not in card and 'task="sun"), or "cars"' in card
    assert (here / "vit-2-adapted" / "preprocessor_config.json").exists()


def test_images_without_classes_and_other_inputs_to_measure(here, caplog):
    arguments = [
        "--data",
        "sun=images/flat",
        "--eval-data",
        "sun=images/sun",
        "--steps",
        "1",
        "-o",
        "out",
    ]
    with caplog.at_level(logging.INFO, "mergekit_moe_ext"):
        done = CliRunner().invoke(main, ["adapt", "vit-2", *arguments])
    assert done.exit_code == 0, done.output
    assert (
        "sun: adapting to 8 inputs, which are not the ones measured; 12 others are measured"
        in caplog.text
    )
    assert [line.split()[1] for line in done.output.splitlines() if line.startswith("sun ")] == [
        "entropy",
        "accuracy",
    ]
    measured = adapt("vit-2", "flat", ["sun=images/flat"], READING, adaptation(held_out=2))
    assert measured["sun"].keys() == {"entropy"}


@pytest.mark.parametrize(
    ("path", "data", "rate"),
    [
        ("llama-2", "x=long.jsonl", 1e-4),
        ("llama-0", "x=long.jsonl", 1e-3),
        ("vit-2", "sun=images/sun", 1e-4),
    ],
)
def test_routers_take_smaller_steps_than_constants(here, path, data, rate):
    """The first step of Adam is as long as the learning rate, wherever there is a gradient."""
    adapt(path, "out", [data], READING, Adaptation(steps=1))
    before, after = read_tensors(here / path), read_tensors(here / "out")
    steps = [(after[name] - before[name]).abs().max().item() for name in changed(before, after)]
    assert max(steps) == pytest.approx(rate, rel=1e-2)


def test_coefficients_of_a_batch_are_refused_where_tokens_have_their_own(here):
    for path, data in (("t5-2", "pairs.jsonl"), ("llama-running", "long.jsonl")):
        with pytest.raises(click.ClickException, match="--coefficients-per batch"):
            adapt(path, "out", [data], READING, adaptation(coefficients_per="batch"))
    model = load("llama-2")
    tokens = torch.arange(20).reshape(2, 10)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens, coefficients="batch")
    with pytest.raises(ValueError, match='a tensor or "batch"'):
        model(tokens, coefficients="mean")
    mean_of_first_group = model.coefficients(input_ids=tokens)[:, :1].mean(0, keepdim=True)
    logits = model(tokens, coefficients="batch", use_cache=False).logits
    chosen = model._last_coefficients()
    assert torch.allclose(chosen[:, :1], mean_of_first_group, atol=1e-6)
    given = model(tokens, coefficients=chosen, use_cache=False).logits
    assert (logits - given).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("vit-2", IMAGES),
        ("vit-all", IMAGES),
        ("llama-2", ["x=long.jsonl"]),
        ("llama-running", ["x=long.jsonl"]),
        ("t5-2", ["x=pairs.jsonl"]),
    ],
)
def test_coefficients_far_from_those_of_good_models_are_told_once(here, path, data, caplog):
    for rate, warnings in ((1e-4, 0), (5.0, 1)):
        caplog.clear()
        adapt(path, f"out-{rate}", data, READING, adaptation(learning_rate=rate, steps=4))
        assert caplog.text.count("the --learning-rate is too high") == warnings


def test_labels_teach_what_entropy_does_not(here, caplog):
    supervised = adaptation(
        objective="supervised", steps=40, learning_rate=0.05, per_device_train_batch_size=12
    )
    measured = adapt("bert-2", "out", ["sun=sun.jsonl", "cars=cars.jsonl"], READING, supervised)
    before, after = read_tensors(here / "bert-2"), read_tensors(here / "out")
    assert {name.split(".")[0] for name in changed(before, after)} == {"routers"}
    tokenizer, rows = AutoTokenizer.from_pretrained("bert-2"), rows_of("sun.jsonl")

    def loss(model):
        texts = [
            (tokenizer(row["text"], return_tensors="pt")["input_ids"], row["label"]) for row in rows
        ]
        with torch.no_grad():
            return (
                -sum(
                    model(ids, task="sun").logits[0].log_softmax(-1)[label].item()
                    for ids, label in texts
                )
                / 12
            )

    assert loss(load("out")) < 0.9 * loss(load("bert-2"))
    assert all(after > before for before, after in (m["accuracy"] for m in measured.values()))
    assert "more often wrong" not in caplog.text


@pytest.mark.parametrize(
    ("values", "feature", "heads", "expected"),
    [
        ([0, 1], ClassLabel(names=["dog", "ant"]), {}, [2, 0]),  # by the names that the model has
        ([0, 1], ClassLabel(names=["a", "b", "c"]), {}, [0, 1]),  # by their order
        ([0, 1], ClassLabel(names=["dog", "ant"]), {"sun": ["ant", "cow", "dog"]}, [2, 0]),
        ([0, 1], ClassLabel(names=["dog", "ant"]), {"sun": ["LABEL_0", "LABEL_1"]}, [0, 1]),
        (["cow", "ant"], Value("string"), {"sun": ["ant", "cow"], "cars": ["cow"]}, [1, 0]),
        ([0, 1], ClassLabel(names=["a", "b"]), {}, None),
        (["dog", "cat"], Value("string"), {}, [2, 1]),
        (["dog", "cow"], Value("string"), {}, None),
        ([2, 0], Value("int64"), {}, [2, 0]),
        ([3, 0], Value("int64"), {}, None),
    ],
)
def test_classes_get_the_numbers_of_the_head(values, feature, heads, expected, caplog):
    config = ViTConfig(id2label={0: "ant", 1: "cat", 2: "dog"})
    config.ensembling = {"heads": heads}
    rows = Dataset.from_dict({"label": values}, Features({"label": feature}))
    assert labels_of(rows, Source("sun", "sun"), config, Adaptation()) == expected
    by_order = expected is not None and getattr(feature, "names", None) == ["a", "b", "c"]
    assert ("taken in order, 'a' for 'ant' and so on" in caplog.text) == by_order
    assert bool(caplog.text) == (by_order or expected is None)


@pytest.mark.parametrize(("path", "prefix"), [("llama-2", 6), ("llama-running", 1)])
def test_a_decoder_is_measured_after_the_prefix(here, path, prefix, caplog):
    measured = adapt(path, "out", ["long.jsonl"], READING, adaptation(steps=3, learning_rate=0.1))
    model, tokenizer, entropies, losses = load("out"), AutoTokenizer.from_pretrained(path), [], []
    for row in rows_of("long.jsonl"):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0].detach()
        for predicted in range(prefix, ids.shape[1]):
            entropies.append(naive_entropy(logits[predicted - 1].tolist()))
            losses.append(-logits[predicted - 1].log_softmax(-1)[ids[0, predicted]].item())
    assert measured["long"]["entropy"][1] == pytest.approx(
        sum(entropies) / len(entropies), abs=1e-5
    )
    assert measured["long"]["loss"][1] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    (before, after), (loss_before, loss_after) = (
        measured["long"]["entropy"],
        measured["long"]["loss"],
    )
    assert (
        loss_after > loss_before
        and "long: predictions are surer now and more often wrong" in caplog.text
    )
    assert after < before and {
        name.split(".")[0]
        for name in changed(read_tensors(here / path), read_tensors(here / "out"))
    } == {"routers"}


def test_a_model_in_bfloat16_stays_so_and_its_routers_move(here):
    parameters = {**STRONG, "routing_tokens": 6}
    config = document(
        "ewemoe", models=["llama/sun"], base="./llama/base", parameters=parameters, dtype="bfloat16"
    )
    merge(config, "half")
    adapt("half", "out", ["long.jsonl"], READING, adaptation(steps=3, learning_rate=0.01))
    before, after = read_tensors(here / "half"), read_tensors(here / "out")
    assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())
    assert after["routers.0.weight"].dtype == torch.bfloat16
    assert changed(before, after) == {name for name in before if name.startswith("routers.")}


def test_an_encoder_decoder_is_measured_along_its_targets(here):
    measured = adapt("t5-2", "out", ["pairs.jsonl"], READING, adaptation(learning_rate=0.1))
    model, tokenizer, entropies = load("out"), AutoTokenizer.from_pretrained("t5-2"), []
    for row in rows_of("pairs.jsonl"):
        ids, labels = (
            tokenizer(row[name], return_tensors="pt")["input_ids"] for name in ("input", "target")
        )
        entropies += [
            naive_entropy(each.tolist()) for each in model(input_ids=ids, labels=labels).logits[0]
        ]
    assert measured["pairs"]["entropy"][1] == pytest.approx(
        sum(entropies) / len(entropies), abs=1e-5
    )


@pytest.fixture
def collapsing(here):
    """Models of images that have a coefficient which, as it grows, moves all of them to the first
    class.
    """
    model = ViTForImageClassification.from_pretrained("vit/base")
    with torch.no_grad():
        features = [
            model.vit(pixels).last_hidden_state[0, 0]
            for pixels in pixels_of("vit/base", "images/sun")
        ]
        centres = torch.stack(features).unflatten(0, (3, 4)).mean(dim=1)
        away = centres - centres.mean(dim=0)
        model.classifier.weight.copy_(2 * away / (away**2).sum(dim=1, keepdim=True))
        model.classifier.bias.copy_(-model.classifier.weight @ centres.mean(dim=0))
    model.config.id2label = dict(
        enumerate(("dawn", "noon", "dusk"))
    )  # classes of one name have one head
    model.save_pretrained("steep")
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.bias += 0.1 * away[0]
    model.save_pretrained("steep-sun")
    for name in ("steep", "steep-sun"):
        AutoImageProcessor.from_pretrained("vit/base").save_pretrained(name)
    parameters = {"router_layers": 0, "init_lambda": 1.5, "lambda": 0.0}
    merge(document("wemoe", models=["steep-sun"], base="./steep", parameters=parameters), "model")
    merge(
        document(
            "ewemoe",
            models=["steep-sun"],
            base="./steep",
            parameters={**parameters, "router_layers": 2},
        ),
        "sparse",
    )
    return here


def test_two_processes_adapt_as_one(collapsing):
    """Sparse task vectors, the guard at work, and a number of rows that does not fit the
    batches."""
    arguments = [
        "adapt",
        "sparse",
        "--data",
        "sun=images/sun",
        "--data",
        "flat=images/flat",
        "--quiet",
    ]
    arguments += ["--steps", "20", "--learning-rate", "0.1", "--held-out", "3"]
    command = (*TWO_PROCESSES, "-m", "mergekit_moe_ext", *arguments)
    two = run(
        *command, "--per-device-train-batch-size", "2", "-o", "two", cwd=collapsing, env=ON_CPU
    )
    assert two.returncode == 0, two.stderr
    one = CliRunner().invoke(main, [*arguments, "--per-device-train-batch-size", "4", "-o", "one"])
    assert one.exit_code == 0 and one.output.splitlines()[-4:] == two.stdout.splitlines()[-4:]
    cards = [(collapsing / name / "README.md").read_text() for name in ("one", "two")]
    assert "processes 2" in cards[1]
    acted = [card[card.index(" The collapse guard acted on") :].splitlines()[0] for card in cards]
    assert acted[0] == acted[1]
    first, second, before = (read_tensors(collapsing / name) for name in ("one", "two", "sparse"))
    assert changed(before, first)
    for name in changed(before, first) | changed(before, second):
        moved = (first[name] - before[name]).abs().max()
        assert (first[name] - second[name]).abs().max() < 0.01 * moved, name


def test_interrupted_and_resumed_equals_uninterrupted(here):
    settings = adaptation(
        steps=7, save_steps=2, learning_rate=0.1, per_device_train_batch_size=5, patience=6
    )
    whole = adapt("vit-2", "whole", IMAGES, READING, settings)
    calls = []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 12:  # within step 6, after the checkpoint of step 4
            raise KeyboardInterrupt
        return stock(self, *args)

    stock = AdaptationTrainer.training_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AdaptationTrainer, "training_step", interrupted)
        adapt("vit-2", "out", IMAGES, READING, settings)
    assert not (here / "out").exists()
    with pytest.raises(click.ClickException, match="--resume goes on"):
        adapt("vit-2", "out", IMAGES, READING, settings)
    with pytest.raises(click.ClickException, match="had another learning rate"):
        adapt(
            "vit-2",
            "out",
            IMAGES,
            READING,
            adaptation(**{**vars(settings), "learning_rate": 0.5}),
            resume=True,
        )
    with pytest.raises(click.ClickException, match="had another data"):
        adapt("vit-2", "out", ["sun=images/flat", IMAGES[1]], READING, settings, resume=True)
    assert adapt("vit-2", "out", IMAGES, READING, settings, resume=True) == whole
    assert not changed(read_tensors(here / "whole"), read_tensors(here / "out"))
    assert not (here / "out.checkpoints").exists()


# The guard, and stopping.


def test_the_guard_is_what_is_missing_to_half_of_the_most_entropy_in_the_beginning():
    """Batches of two predictions of three classes: a sixth of the twelve that the running mean
    holds.
    """

    def h(p):
        return -sum(x * math.log(x) for x in p if x)

    guard = Guard()
    batches = [
        [0.5, 0.5, 0.0],
        [0.2, 0.2, 0.6],
        [0.9, 0.1, 0.0],
        *[[1.0, 0.0, 0.0]] * 14,
        *[[0.3, 0.3, 0.4]] * 9,
    ]
    running, most, penalties = batches[0], 0.0, []
    for number, values in enumerate(batches):
        running = (
            [r * 5 / 6 + m / 6 for r, m in zip(running, values, strict=True)] if number else running
        )
        mean = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        penalties.append(guard.penalty("task", mean, 2))
        most = max(most, h(running)) if number < 6 else most
        assert penalties[-1].item() == pytest.approx(max(0.0, 0.5 * most - h(running)), abs=1e-6)
        (gradient,) = torch.autograd.grad(penalties[-1], mean)
        slope = [math.log(r) + 1 if penalties[-1] > 0 else 0.0 for r in running]
        assert gradient.tolist() == pytest.approx(slope, abs=1e-5)
    assert (
        most > h(batches[0]) and h(running) > most
    )  # what the mean holds last is not looked at for the floor
    assert (
        guard.acted["task"] == sum(penalty > 0 for penalty in penalties) < len(batches)
        and penalties[16] > 0.2
    )
    large = Guard()
    large.penalty("task", torch.tensor([0.5, 0.5]), 100)
    assert large.penalty("task", torch.tensor([1.0, 0.0]), 100).item() == pytest.approx(
        0.5 * math.log(2)
    )


def spread(path):
    """The entropy of the mean prediction."""
    model = load(path)
    with torch.no_grad():
        chances = [
            model(pixel_values=p).logits[0].softmax(-1) for p in pixels_of("vit-2", "images/sun")
        ]
    mean = sum(chances) / len(chances)
    return -(mean * mean.clamp(min=1e-30).log()).sum().item()


def test_the_guard_keeps_predictions_from_collapsing(collapsing, caplog):
    to_all = adaptation(steps=60, learning_rate=0.1, per_device_train_batch_size=12)
    data = ["sun=images/sun"]
    adapt("model", "plain", data, READING, adaptation(**{**vars(to_all), "no_guard": True}))
    adapt("model", "guarded", data, READING, to_all)
    start, plain, guarded = spread("model"), spread("plain"), spread("guarded")
    assert plain < 0.1 * start and guarded > 0.4 * start
    assert caplog.text.count("the guard acts") == 1
    assert (
        "The collapse guard acted on sun in" in (collapsing / "guarded" / "README.md").read_text()
    )
    assert "guard" not in (collapsing / "plain" / "README.md").read_text()


def test_it_stops_where_the_entropy_falls_no_more(here):
    stopping = adaptation(steps=50, learning_rate=0.0, per_device_train_batch_size=12, patience=4)
    measured = adapt("vit-2", "out", IMAGES, READING, stopping)
    history = json.loads((here / "out" / "trainer_state.json").read_text())
    assert history["global_step"] == 5
    assert measured["sun"]["entropy"][0] == pytest.approx(measured["sun"]["entropy"][1])
    assert not changed(read_tensors(here / "vit-2"), read_tensors(here / "out"))


# Unloading.

SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
vit = AutoModelForImageClassification
for path, auto in {"vit-0": vit, "vit-all": vit, "llama-0": AutoModelForCausalLM}.items():
    model = auto.from_pretrained(f"{path}-stock")
    assert type(model).__module__.startswith("transformers."), type(model)
    if path == "vit-0":
        labels = [model.config.id2label[i] for i in range(4)]
        assert labels == ["c1", "c2", "c3", "c0"], labels
        assert model.config.label2id == {"c1": 0, "c2": 1, "c3": 2, "c0": 3}, model.config.label2id
    with torch.no_grad():
        torch.save(model(torch.load(f"{path}.pt", weights_only=True)).logits, f"{path}-logits.pt")
assert "mergekit_moe_ext" not in sys.modules
"""


def test_unloaded_is_equal_by_logits_where_this_package_is_missing(here):
    images, task = torch.randn(3, 3, 8, 8), {"task": "cars"}
    inputs = {"vit-0": images, "vit-all": images, "llama-0": torch.randint(2, 96, (2, 20))}
    heads = {"vit-0": task, "vit-all": task, "llama-0": {}}
    data = {"vit-0": IMAGES, "vit-all": IMAGES, "llama-0": ["long.jsonl"]}
    for path in inputs:
        measured = adapt(
            path, f"{path}-adapted", data[path], READING, adaptation(steps=5, learning_rate=0.1)
        )
        assert (
            sum(after - before for before, after in (m["entropy"] for m in measured.values())) < 0
        )
        moved = changed(read_tensors(here / path), read_tensors(here / f"{path}-adapted"))
        assert moved and all(name.startswith("routers.") for name in moved)
        unload(f"{path}-adapted", f"{path}-stock", **heads[path])
        torch.save(inputs[path], f"{path}.pt")
    done = run("python", "-c", SCRIPT, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, cwd=here)
    assert done.returncode == 0, done.stderr
    for path in inputs:
        with torch.no_grad():
            before, expected = (
                load(each)(inputs[path], **heads[path]).logits for each in (path, f"{path}-adapted")
            )
        got = torch.load(f"{path}-logits.pt", weights_only=True)
        assert torch.allclose(got, expected, atol=1e-5) and (expected - before).abs().max() > 1e-3
        files = {file.name for file in (here / f"{path}-stock").iterdir()}
        assert not any(file.endswith(".py") for file in files)
        card = (here / f"{path}-stock" / "README.md").read_text()
        shown: dict = {}
        exec(card.split("## Load it")[1].split("```python\n")[1].split("```")[0], shown)
        assert type(shown["model"]).__name__ in card.split("## Unloaded")[1]
    assert (here / "vit-0-stock" / "preprocessor_config.json").exists()
    assert (here / "llama-0-stock" / "tokenizer.json").exists()


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["adapt", "./nowhere", "--data", "sun=images/sun"], "./nowhere does not exist"),
        (["adapt", "./vit/base", "--data", "sun=images/sun"], "has no routed task vectors"),
        (
            ["adapt", "images", "--data", "sun=images/sun"],
            "images has no config.json: it is not a model",
        ),
        (
            ["adapt", "vit-2", "--data", "images/flat"],
            "no head 'flat'; write --data TASK=SOURCE with one of",
        ),
        (["adapt", "vit-2", "--data", "sun=sun.jsonl"], "no column 'image' of images"),
        (
            ["adapt", "vit-2", "--data", "sun=images/sun", "--eval-data", "cars=images/cars"],
            "no --data of this name",
        ),
        (
            ["adapt", "vit-2", "--data", "sun=images/flat", "--objective", "supervised"],
            "no column 'label' of classes",
        ),
        (
            ["adapt", "vit-2", "--data", "sun=images/cars", "--objective", "supervised"],
            "4 classes, which are not the 3",
        ),
        (
            ["adapt", "bert-2", "--data", "sun=cars.jsonl", "--objective", "supervised"],
            "none of 0 to 2",
        ),
        (["adapt", "bert-2", "--data", "sun=pairs.jsonl"], "no column 'text'"),
        (
            ["adapt", "llama-2", "--data", "sun.jsonl", "--max-length", "6"],
            "no row with a token to predict",
        ),
        (
            ["adapt", "vit-2", "--data", "sun=images/sun", "--held-out", "12"],
            "12 are to be held out",
        ),
        (["adapt", "vit-2", "--data", "sun=images/sun", "--resume"], "no checkpoint"),
        (["adapt", "vit-2", "--data", "sun=images/sun", "-o", "vit"], "not empty"),
        (["adapt", "bare", "--data", "sun=images/sun"], "has no image processor"),
        (["unload", "vit-2"], "depend on the input (router_layers: 2)"),
        (["unload", "vit-0"], "choose one with --task"),
        (["unload", "vit-0", "--task", "moon"], "has no head 'moon'"),
        (["unload", "llama-0", "--task", "sun"], "leave --task out"),
        (["unload", "./llama/base"], "has no routed task vectors"),
    ],
)
def test_mistakes_are_found_before_work_starts(here, arguments, complaint):
    (here / "bare").mkdir()
    for file in (here / "vit-2").iterdir():
        if file.name != "preprocessor_config.json":
            (here / "bare" / file.name).symlink_to(file)
    if "-o" not in arguments:
        arguments = [*arguments, "-o", "out"]
    done = CliRunner().invoke(main, [*arguments, *(["--quiet"] if arguments[0] == "adapt" else [])])
    assert done.exit_code != 0 and complaint in " ".join(done.output.split()), done.output
    assert isinstance(done.exception, SystemExit) and not list(here.glob("out*"))
