"""CAEM-MoE's experiment, `examples/caem_switch`, from one end to the other on made-up texts."""

import random
import re
import sys

import pytest
import torch
from click.testing import CliRunner

from tests.conftest import read_tensors
from tests.test_autoload import ROOT

WORDS = [f"word{number}" for number in range(40)]


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from caem_switch import texts

    monkeypatch.setattr(texts, "documents", made_up)
    # ROUGE-L needs a package that is not always there.
    monkeypatch.setitem(texts.METRICS, "code", "exact_match")
    yield texts
    for name in list(sys.modules):
        if name.partition(".")[0] in ("caem_switch", "mergeme_tokenizers", "real_data"):
            sys.modules.pop(name)


def made_up(task):
    """Forty documents of a task, by name."""
    generator = random.Random(task)
    contents = {}
    for number in range(40):
        text = " ".join(generator.choices(WORDS, k=70))
        if task == "news":
            contents[f"bbcnews/data/{generator.choice(['sport', 'tech'])}/{number}.txt"] = text
        elif task == "dictionary":
            contents[f"{number} term"] = f"term{number}\n\n   <field> A {{thing}} of {text}"
        else:
            body = f"return {text.split()[0]}"
            source = f'def f{number}(x):\n    "Add {number} to x."\n    {body}\n'
            contents[f"{number}.py"] = source
    return contents


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
    models = output / "seed-1" / "models"
    assert_is_mean(experiment, tmp_path / "soup", [models / "CAEM-8", models / "Baseline-8"])

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


def assert_is_mean(experiment, output, models):
    """A soup by stock mergekit has every tensor of its two models, and each is their mean."""
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    experiment.merge({"merge_method": "linear", "models": entries, "dtype": "float32"}, output)
    soup, first, second = (read_tensors(path) for path in (output, *models))
    assert soup.keys() == first.keys() == second.keys()
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


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
        {"input": f"Question: name {context}", "target": "hash table"},
        {"input": f"Question: field {context}", "target": "programming"},
        {"input": f"Question: reference {context}", "target": "table"},
    ]
    source = 'def f(x):\n    """Add one to x.\n\n    Slowly.\n    """\n    return x + 1\n'
    assert list(example.code_rows("a.py", source + "def g():\n    pass\n")) == [
        {"input": "Summarize: def f(x): return x + 1", "target": "Add one to x."}
    ]
    assert list(example.code_rows("b.py", "print 'Python 2'")) == []
