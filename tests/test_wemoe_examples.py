"""The scripts of WEMoE's analyses in `examples/`, by the commands that docs/wemoe_analysis.md
shows.
"""

import json
import re
import statistics

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTForImageClassification

from tests.conftest import document, make_model, merge
from tests.mergekit_moe_ext.mixtures.test_usage import words, write
from tests.mergekit_moe_ext.wemoe.test_adaptation import CLASSES, draw, make_classifier, pixels_of
from tests.test_autoload import ROOT
from tests.tokenizers import save_tokenizer


@pytest.fixture
def with_texts(here):
    """Dense models with tokenizers, and texts of two tasks."""
    for seed, name in enumerate(("base", "math", "code")):
        (here / name).unlink()
        make_model(here / name, seed)
        save_tokenizer(here / name, 96)
        write(here / f"{name}.jsonl", words(seed, 40))
    return here


@pytest.fixture
def wemoe_scripts(examples):
    """The scripts of WEMoE's analyses, and the commands by which the docs run them."""
    import loss_landscape
    import wemoe_parameters
    import wemoe_routing

    docs = (ROOT / "docs" / "wemoe_analysis.md").read_text()
    scripts = {each.__name__: each for each in (loss_landscape, wemoe_parameters, wemoe_routing)}

    def invoke(name, *more):
        (command,) = re.findall(rf"^ *python examples/{name}.py (.*)$", docs, flags=re.MULTILINE)
        return CliRunner().invoke(scripts[name].main, [*command.split(), *more])

    return invoke, scripts


def test_the_docs_command_for_parameters_runs(wemoe_scripts, with_texts):
    invoke, scripts = wemoe_scripts
    result = invoke("wemoe_parameters", "-o", "counts.json")
    assert result.exit_code == 0, result.output
    counts = json.loads((with_texts / "counts.json").read_text())
    assert list(counts) == [f"{number} tasks" for number in range(2, 9)]
    merge(document("wemoe", models=("math", "code")))
    written = CliRunner().invoke(scripts["wemoe_parameters"].main, ["out"])
    assert written.exit_code == 0, written.output
    assert written.output.splitlines()[1].split()[1:] == result.output.splitlines()[1].split()[2:]
    for arguments, message in (
        ([], "name MODELS to count"),
        (
            ["--base", "base", "--router-layers", "3"],
            "router_layers: Input should be less than or equal to 2",
        ),
        (["--base", "base", "--upscale-layers", "7"], "there is no layer 7"),
        (["--base", "base", "--tasks", "many"], "--tasks many: write a number"),
    ):
        refused = CliRunner().invoke(scripts["wemoe_parameters"].main, arguments)
        assert refused.exit_code == 1 and message in refused.output


def test_the_docs_command_for_routing_weights_runs(wemoe_scripts, with_texts):
    invoke, _ = wemoe_scripts
    merge(
        document("wemoe", models=("math", "code"), parameters={"router_init_std": 0.3}),
        "out-adapted",
    )
    result = invoke("wemoe_routing", "--quiet", "--max-length", "20")
    assert result.exit_code == 0, result.output
    found = json.loads((with_texts / "routing.json").read_text())
    assert found["tasks"] == found["experts"] == ["math", "code"] and found["samples"] == [40, 40]
    model, tokenizer = (
        auto.from_pretrained("out-adapted", trust_remote_code=True)
        for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    for task, means in zip(found["tasks"], found["mean"], strict=True):
        texts = [
            json.loads(line)["text"]
            for line in (with_texts / f"{task}.jsonl").read_text().splitlines()
        ]
        rows = [tokenizer(text, return_tensors="pt")["input_ids"][:, :20] for text in texts]
        by_hand = sum(model.coefficients(input_ids=ids)[0] for ids in rows) / 40
        assert torch.allclose(by_hand, torch.tensor(means), atol=1e-5)
    for group, line in enumerate(result.output.splitlines()[-3:]):
        own = [100 * found["first_choice"][task][group][task] for task in (0, 1)]
        assert line.split()[1:] == [f"{percentage:.1f}" for percentage in own]
    for name in ("routing.png", "routing-coefficients.png"):
        assert (with_texts / name).read_bytes().startswith(b"\x89PNG")
    again = invoke("wemoe_routing", "--quiet")
    assert again.exit_code == 1 and "routing.json exists and is not overwritten" in again.output


def test_the_docs_command_for_the_landscape_runs(wemoe_scripts, with_texts):
    invoke, _ = wemoe_scripts
    few = ("--points", "3", "--max-samples", "6", "--batch-size", "4", "--quiet")
    result = invoke("loss_landscape", *few)
    assert result.exit_code == 0, result.output
    found = json.loads((with_texts / "landscape.json").read_text())
    assert found["scales"] == [-1, 0, 1] and (with_texts / "landscape.png").read_bytes().startswith(
        b"\x89PNG"
    )
    tokenizer = AutoTokenizer.from_pretrained("math")
    for name, place in (("base", (1, 1)), ("math", (2, 1)), ("code", (1, 2))):
        model = AutoModelForCausalLM.from_pretrained(name)
        for task, losses in found["losses"].items():
            texts = [
                json.loads(line)["text"]
                for line in (with_texts / f"{task}.jsonl").read_text().splitlines()
            ]
            rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts[:6]]
            with torch.no_grad():
                total = sum(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in rows)
            by_hand = total / sum(ids.shape[1] - 1 for ids in rows)
            assert losses[place[0]][place[1]] == pytest.approx(by_hand, abs=1e-4)


def test_routing_and_landscape_of_images(wemoe_scripts, tmp_path, monkeypatch):
    """Each fine-tune has a head and classes of its own."""
    _, scripts = wemoe_scripts
    monkeypatch.chdir(tmp_path)
    for seed, (name, classes) in enumerate(CLASSES.items()):
        make_classifier(tmp_path / name, seed, classes, "vit")
        for number in range(classes):
            draw(tmp_path / "images" / name / f"c{number}", [seed, number], 2)
    merge(document("wemoe", models=("sun", "cars")))
    data = ["--data", "sun=images/sun", "--data", "cars=images/cars", "--quiet"]
    routed = CliRunner().invoke(
        scripts["wemoe_routing"].main, ["out", *data, "--data", "new=images/base"]
    )
    assert routed.exit_code == 0, routed.output
    assert all(line.split()[3] == "-" for line in routed.output.splitlines()[-2:])
    models = ["--base", "base", "--model", "sun=sun", "--model", "cars=cars"]
    arguments = [*models, *data, "--points", "2", "-o", "landscape.json", "--range", "0", "1"]
    done = CliRunner().invoke(scripts["loss_landscape"].main, arguments)
    assert done.exit_code == 0, done.output
    losses = json.loads((tmp_path / "landscape.json").read_text())["losses"]
    for name, (row, column) in (("sun", (1, 0)), ("cars", (0, 1))):
        model = ViTForImageClassification.from_pretrained(name)
        by_hand = []
        for number in range(CLASSES[name]):
            label = model.config.label2id.get(f"c{number}", number)
            for pixels in pixels_of(name, tmp_path / "images" / name / f"c{number}"):
                by_hand.append(-model(pixels).logits[0].log_softmax(-1)[label].item())
        assert losses[name][row][column] == pytest.approx(statistics.mean(by_hand), abs=1e-4)


def test_mistakes_in_the_script_for_the_landscape(wemoe_scripts, with_texts):
    _, scripts = wemoe_scripts
    make_model(with_texts / "gpt2", 1, family="gpt2", hidden_size=32)
    data = ["--data", "math=math.jsonl", "--data", "code=code.jsonl"]
    for arguments, message in (
        (["--model", "math=math", *data], "give two --model TASK=DIR"),
        (["--model", "math=math", "--model", "law=code", *data], "and --data TASK=SOURCE for both"),
        (
            ["--model", "math=math", "--model", "code=gpt2", *data],
            "gpt2 is GPT2LMHeadModel; both must be one",
        ),
        (
            ["--model", "math=math", "--model", "code=code", *data, "--range", "1", "0"],
            "the first must be below",
        ),
    ):
        result = CliRunner().invoke(
            scripts["loss_landscape"].main, ["--base", "base", *arguments, "--quiet"]
        )
        assert result.exit_code == 1 and message in result.output, result.output
