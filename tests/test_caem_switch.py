"""CAEM-MoE's experiment, `examples/caem_switch`, from one end to the other on made-up texts."""

import json
import random
import re

import pytest
import torch
from click.testing import CliRunner
from transformers import SwitchTransformersConfig

from tests.conftest import read_tensors

WORDS = [f"word{number}" for number in range(40)]


@pytest.fixture
def example(examples, monkeypatch, tmp_path):
    from caem_switch import texts

    monkeypatch.setattr(texts, "documents", made_up)
    # ROUGE-L needs a package that is not always there.
    monkeypatch.setitem(texts.METRICS, "code", "exact_match")
    return texts


def made_up(task):
    """Forty documents of a task, by name."""
    generator = random.Random(task)
    contents = {}
    for number in range(40):
        text = " ".join(generator.choices(WORDS, k=70))
        if task == "news":
            contents[f"bbcnews/data/{generator.choice(['sport', 'tech'])}/{number}.txt"] = text
        elif task == "dictionary":
            contents[f"{number} term"] = f"term{number}\n\n   <language> A {{thing}} of {text}"
        else:
            body = f"return {text.split()[0]}"
            source = f'def f{number}(x):\n    "Add {number} to x."\n    {body}\n'
            contents[f"{number}.py"] = source
    return contents


@pytest.fixture
def seed(example, tmp_path):
    """A seed of tiny runs with 8 experts, and its module."""
    from caem_switch import experiment, switch

    scale = experiment.SCALES["quick"]
    texts = tmp_path / "texts"
    example.write_texts(texts, scale.sizes)
    base = switch.pretrained(
        tmp_path / "pretrained", 8, scale.shape, scale.pretraining, texts, scale.reading
    )
    return experiment.Seed(1, tmp_path / "seed-1", texts, {8: base}, scale), experiment


def test_runs_with_8_experts_are_done_once(seed, tmp_path, monkeypatch):
    seed, experiment = seed

    def run():
        return [
            seed.multi_task("Baseline-8"),
            seed.multi_task("CAEM-8"),
            seed.soup("CAEM-8", "Baseline-8"),
            seed.similarity("CAEM-8", "Baseline-8", is_initial=True),
        ]

    records = run()
    measures = {"news_score", "dictionary_score", "code_score", "overall_performance"}
    for record in records[:3]:
        assert set(record["scores"]) == measures
    assert len(records[1]["epochs"]) == 2  # before the only epoch and after it
    models = tmp_path / "seed-1" / "models"
    assert "single-8-code" in (models / "CAEM-8-merged" / "README.md").read_text()
    assert_is_mean(experiment, tmp_path / "soup", [models / "CAEM-8", models / "Baseline-8"])

    def refuse(*_arguments, **_options):
        raise AssertionError("this was done already")

    for name in ("train", "task_scores", "cka"):
        monkeypatch.setattr(experiment, name, refuse)
    assert run() == records


@pytest.mark.slow
def test_the_whole_experiment_runs_and_goes_on(example, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from caem_switch import experiment
    from caem_switch.__main__ import main

    output = tmp_path / "caem"
    command = ["-o", str(output), "--scale", "quick", "--seeds", "1"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = (output / "results.txt").read_text()
    assert all(f"\n{name}  " in text for name in experiment.CONFIGURATIONS)
    assert text.count(" of 1  unclear") > 20  # one seed is not enough for a verdict
    for number in (2, 3, 4):
        assert (output / f"figure-{number}.png").stat().st_size

    # What is done is not done again, and what is missing is.
    def refuse(*_arguments, **_options):
        raise AssertionError("this was trained already")

    monkeypatch.setattr(experiment, "train", refuse)
    record = output / "seed-1" / "soup of CAEM-8 and Baseline-8.json"
    before = record.read_text()
    record.unlink()
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert record.read_text() == before
    assert (output / "results.txt").read_text() == text
    other = CliRunner().invoke(main, ["-o", str(output)])
    assert other.exit_code != 0 and "has other settings" in other.output


def test_models_of_other_numbers_of_experts_are_refused(example, tmp_path):
    """In the other order all tables would be wrong."""
    from caem_switch.__main__ import main

    folders = []
    for experts in (16, 8):
        folder = tmp_path / f"switch-{experts}"
        SwitchTransformersConfig(num_experts=experts).save_pretrained(folder)
        folders.append(str(folder))
    command = ["-o", str(tmp_path / "caem"), "--scale", "quick", "--model", *folders]
    result = CliRunner().invoke(main, command)
    assert result.exit_code != 0 and "no Switch Transformer with 8 experts" in result.output
    assert not (tmp_path / "caem").exists()


def assert_is_mean(experiment, output, models):
    """A soup by stock mergekit has every tensor of its two models, and each is their mean."""
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    experiment.merge({"merge_method": "linear", "models": entries, "dtype": "float32"}, output)
    soup, first, second = (read_tensors(path) for path in (output, *models))
    assert soup.keys() == first.keys() == second.keys()
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


def write_records(folder, number, report):
    """Made-up records of a seed, in which the Overall Performances fall in the order of Table 1,
    but for Baseline-16, which is above CAEM-16 in the first seed alone.
    """
    overall = {name: 0.9 - 0.1 * place for place, name in enumerate(report.CONFIGURATIONS)}
    overall["Baseline-16"] = 0.99 if number == 1 else 0.1
    usage = {
        "model": "single",
        "checkpoint": "",
        "architecture": "",
        "experts_per_token": 1,
        "tasks": {},
    }
    for task in report.TASKS:
        counts = [2, 2] if task == "code" else [3, 1]
        layer = {"tokens": 4, "counts": counts, "weights": [1.0, 1.0]}
        layers = {"encoder.block.1.router": layer, "decoder.block.1.router": layer}
        usage["tasks"][task] = {"data": "", "fingerprint": "", "samples": 1, "layers": layers}
    records = {}
    for name, value in overall.items():
        scores = {f"{task}_score": value for task in report.TASKS}
        stacks = {"encoder": value, "decoder": 1 - value}
        records[name] = {
            "scores": {**scores, "overall_performance": value},
            "epochs": [0.5, value],
            "entropies": dict.fromkeys(report.TASKS, stacks),
        }
    (folder / "models").mkdir(parents=True)
    for experts in (8, 16):
        for task in report.TASKS:
            records[f"single-{experts}-{task}"] = {"scores": {f"{task}_score": 0.5}}
            path = folder / "models" / f"single-{experts}-{task}.usage.json"
            path.write_text(json.dumps(usage))
    (folder / "models" / "CAEM-8.usage.json").write_text(json.dumps(usage))
    for first, second in report.SOUPS:
        scores = {"overall_performance": 0.05 if "to" in first else 0.95}
        records[f"soup of {first} and {second}"] = {"scores": scores}
    for first, second, _is_initial_too in report.COMPARISONS:
        for when, value in (("before", 0.4), ("after", 0.8)):
            layers = {"encoder": [value, value], "decoder": [value, value]}
            records[f"cka of {first} and {second}, {when}"] = dict.fromkeys(report.TASKS, layers)
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))


def test_verdicts_need_three_seeds_that_agree(example, tmp_path):
    pytest.importorskip("matplotlib")
    from caem_switch import report

    for number in (1, 2, 3):
        write_records(tmp_path / f"seed-{number}", number, report)
    verdicts = {}
    for line in report.report(tmp_path, 3).splitlines():
        cells = re.split(r"  +", line)
        if len(cells) == 3:
            verdicts[cells[0]] = cells[1:]
    expected = {
        "Table 2: CAEM-16 is above Baseline-16": ["2 of 3", "unclear"],
        "Table 2: CAEM-8-to-16 is above CAEM-16": ["3 of 3", "holds"],
        "Table 2: CAEM-8 is above Baseline-8": ["0 of 3", "does not hold"],
        "3.2: generation has a higher entropy than classification": ["3 of 3", "holds"],
        "Table 4: every soup keeps 80% of the worse model": ["3 of 3", "holds"],
        "Table 5: every soup falls below 0.1": ["3 of 3", "holds"],
        "Figure 2: training drives decoders apart (16 experts)": ["0 of 3", "does not hold"],
    }
    assert {name: verdicts[name] for name in expected} == expected
    of_one = report.report(tmp_path, 1)
    assert "1 of 1  unclear" in of_one and "holds" not in of_one
    report.draw(tmp_path, 3)
    report.draw(tmp_path, 3)  # over the earlier figures
    assert all((tmp_path / f"figure-{number}.png").stat().st_size for number in (2, 3, 4))


def test_hidden_spans_put_back_give_the_text(example):
    generator = random.Random(0)
    for length in (5, 20, 30, 41):
        words = [f"{number}" for number in range(length)]
        row = example.corrupted(words, generator)
        spans = re.split(r" ?<extra_id_\d> ?", row["target"])[1:-1]
        text = row["input"]
        for number, span in enumerate(spans):
            assert span  # at least a word is hidden
            text = text.replace(f"<extra_id_{number}>", span)
        assert text.split() == words


def test_rows_of_the_tasks(example):
    (news,) = example.news_rows("data/sport/001.txt", "Goal\n\nA late   one.")
    assert news == {"input": "Classify: Goal A late one.", "target": "sport"}
    entry = "hash table\n\n   <programming> A {table} of\n   {key}s."
    context = "Context: hash table <programming> A {table} of {key}s."
    assert list(example.dictionary_rows("1", entry)) == [
        {"input": f"Question: field? {context}", "target": "programming"}
    ]
    for other in ("hash\n\n   A {table}.", "hash\n\n   <rare> A {table}."):
        assert list(example.dictionary_rows("2", other)) == []
    source = 'def add_one(x):\n    """Add one to x.\n\n    Slowly.\n    """\n    return x + 1\n'
    assert list(example.code_rows("a.py", source + "def g():\n    pass\n")) == [
        {"input": "Summarize: def add one(x): return x + 1", "target": "Add one to x."}
    ]
    assert list(example.code_rows("b.py", "print 'Python 2'")) == []
