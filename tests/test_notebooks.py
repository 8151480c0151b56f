"""The notebooks of the site: each runs, cell by cell, on tiny models in place of the real ones.
Some keep outputs of the real models, which a page can show.
"""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Dinov2Config, Dinov2Model

from tests.conftest import NAMES
from tests.mergekit_moe_ext.mixtures.test_usage import words
from tests.peft_routing.adapters import save_lora
from tests.test_autoload import ROOT
from tests.test_wemoe_images import made_up
from tests.test_wemoe_pretrained import TINY
from tests.tokenizers import save_tokenizer

NOTEBOOKS = ROOT / "docs" / "notebooks"
EXECUTED = ("adapters", "images", "mixture")  # those that keep the outputs of the real models


def code_of(name: str) -> list[str]:
    """The text of each cell of code."""
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells]


def run_cells(name: str) -> dict[str, Any]:
    """What the notebook's variables are in the end. Cells run as they would in Jupyter, but that
    the value of a cell is not shown.
    """
    variables: dict[str, Any] = {}
    for number, text in enumerate(code_of(name)):
        exec(compile(text, f"{name}.ipynb, cell of code {number}", "exec"), variables)
    return variables


@pytest.fixture(autouse=True)
def from_examples(examples: Path, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """The modules of `examples/` can be imported, and a new directory for temporary files is here,
    since each notebook works in one of its own.
    """
    monkeypatch.setenv("TMPDIR", str(here))
    monkeypatch.setattr("tempfile.tempdir", str(here))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The HTML that a notebook has IPython show, which need not be installed."""
    texts: list[str] = []
    display = ModuleType("IPython.display")
    vars(display)["HTML"] = texts.append
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return texts


@pytest.fixture
def base(here: Path) -> Path:
    """A tiny model with a tokenizer."""
    made = shutil.copytree(here / NAMES[0], here / "a-base")
    save_tokenizer(made, 96)
    return made


def domains(names: Any) -> dict[str, Any]:
    """Made-up texts of each domain."""
    from real_data import Domain

    texts = {}
    for seed, name in enumerate(names):
        documents = [row["text"] for row in words(seed, 100)]
        texts[name] = Domain(documents, documents[50:])
    return texts


def test_the_mixture_is_merged_trained_and_writes(
    here: Path,
    base: Path,
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import demo

    def tiny_sources(*_: Any, quiet: bool) -> dict[str, Path]:
        folders = {}
        for seed, name in enumerate(demo.DOMAINS):
            model = AutoModelForCausalLM.from_pretrained(base)
            folders[name] = save_lora(here / f"{name}-lora", seed, model)
        return folders

    monkeypatch.setattr(demo, "BLOCK", 40)
    monkeypatch.setattr(demo, "smollm2", lambda quiet: base)
    monkeypatch.setattr(demo, "domains", lambda quiet: domains(demo.DOMAINS))
    monkeypatch.setattr(demo, "make_sources", tiny_sources)
    variables = run_cells("mixture")
    assert type(variables["model"]).__name__ == "MixtralForCausalLM"
    assert list(variables["usage"].tasks) == demo.DOMAINS
    assert len(shown) == 1 and "mixture-trained" in shown[0]
    printed = capsys.readouterr().out
    for name, (before, after) in variables["losses"].items():
        assert f"{name:8} {before:.3f} -> {after:.3f}" in printed


def test_the_adapters_are_routed_and_inspected(
    here: Path,
    base: Path,
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import grown_mixture

    def tiny_loras(base: str, *_: Any) -> dict[str, Path]:
        folders = {}
        for seed, name in enumerate(grown_mixture.NAMES):
            model = AutoModelForCausalLM.from_pretrained(base)
            folders[name] = save_lora(here / f"{name}-lora", seed, model, a_seed=0)
        return folders

    monkeypatch.setattr(grown_mixture, "BLOCK", 40)
    monkeypatch.setattr(grown_mixture, "smollm2", lambda: base)
    monkeypatch.setattr(grown_mixture, "domains", domains)
    monkeypatch.setattr(grown_mixture, "make_loras", tiny_loras)
    variables = run_cells("adapters")
    assert len(shown) == 1 and "learned-trained: linear" in shown[0]
    assert variables["results"][0].losses.keys() == set(grown_mixture.NAMES)
    rows = re.findall(r"^(\w+)((?: +[\d.]+){4})$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in rows] == grown_mixture.NAMES * 2
    for _, row in rows:
        assert sum(map(float, row.split())) == pytest.approx(1, abs=0.03)


def test_the_images_are_classified_before_and_after(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import real_images
    import wemoe_pretrained

    def tiny_network(side: int) -> Path:
        network = Dinov2Model(Dinov2Config(image_size=side, patch_size=14, **TINY))
        network.save_pretrained(here / "network")
        return here / "network"

    def made_up_tasks(names: list[str]) -> dict[str, Any]:
        return {name: made_up(real_images, seed) for seed, name in enumerate(names)}

    few = wemoe_pretrained.Scale(frozen=1, trained=16, tested=8, of_class=4, steps=4, batch=8)
    monkeypatch.setattr(wemoe_pretrained, "Scale", lambda: few)
    monkeypatch.setattr(wemoe_pretrained, "UPPER", {"upscale_layers": "1"})
    monkeypatch.setattr(wemoe_pretrained, "dinov2", tiny_network)
    monkeypatch.setattr(wemoe_pretrained, "tasks", made_up_tasks)
    monkeypatch.setattr(wemoe_pretrained, "cache_dir", lambda: here / "cache")
    variables = run_cells("images")
    assert list(variables["rows"])[-2:] == ["WEMoE, before", "WEMoE, after"]
    (after,) = re.findall(r"^WEMoE, after +(.*)$", capsys.readouterr().out, re.MULTILINE)
    mean = sum(variables["results"][task]["accuracy"][1] for task in wemoe_pretrained.TASKS) / 2
    assert after.split()[-1] == f"{mean:.1%}"
    # Routers that were adapted weigh differently from those that all start alike.
    assert variables["chosen"][wemoe_pretrained.TASKS[0]] != pytest.approx([0.3] * 2, abs=1e-4)


@pytest.mark.parametrize("name", EXECUTED)
def test_the_outputs_that_are_kept_are_of_a_whole_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 600_000
    for place in ("/root", "/home", "/tmp", "/work"):
        assert place not in text, "a path of the machine that ran it"
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    # A page shows every output, and refuses an error.
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pages = importlib.import_module("notebook_pages")
    page = pages.page(NOTEBOOKS / f"{name}.ipynb")
    assert page.startswith("# ") and page.count("```python") == len(cells)
    outputs = sum(len(cell["outputs"]) for cell in cells)
    assert page.count('class="output"') == outputs > 0
