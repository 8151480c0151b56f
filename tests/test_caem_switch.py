"""CAEM-MoE's experiment, `examples/caem_switch`, from one end to the other on made-up texts."""

import random
import sys

import pytest
from click.testing import CliRunner

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


def test_the_whole_experiment_runs_and_goes_on(example, tmp_path):
    from caem_switch.__main__ import main

    command = ["-o", str(tmp_path / "caem"), "--scale", "quick", "--seeds", "1"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
