"""What the site is made of, beyond its build (`make docs`): pictures, examples, generated pages."""

import importlib
import re

import pytest

from mergekit_moe_ext.methods import METHODS
from tests.test_autoload import ROOT

DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def from_docs(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))


def test_the_schematics_are_those_that_the_script_draws():
    drawing = importlib.import_module("draw_methods")
    page = (DOCS / "which_method.md").read_text()
    files = {path.stem: path.read_text() for path in (DOCS / "methods").glob("*.svg")}
    assert files == {name: drawing.svg(*method) for name, method in drawing.METHODS.items()}
    assert set(re.findall(r"methods/(\w+)\.svg", page)) == set(files)


def test_every_method_can_be_found():
    page = (DOCS / "which_method.md").read_text()
    for method in METHODS:
        # Experts are removed by whoever has added them.
        assert f"`{method.spec.name}`" in page or method.spec.name == "remove_experts"
    assert "`ROUTED_LORA`" in page


def test_every_example_has_its_line():
    listed = re.findall(r"^- \[`(.+?)`\]\((.+?)\)", (EXAMPLES / "README.md").read_text(), re.M)
    files = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yml"))
    assert sorted(name for name, _ in listed) == files
    assert all(name == target for name, target in listed)
    for name, _ in listed[:2]:
        assert len((EXAMPLES / name).read_text().splitlines()) <= 30


def test_the_reference_has_every_option():
    pytest.importorskip("mkdocs")
    generate = importlib.import_module("generate")
    page = generate.methods_page()
    for method in METHODS:
        _, _, section = page.partition(f"\n## `{method.spec.name}`\n")
        section = section.partition("\n## ")[0]
        options = {parameter.name for parameter in method.spec.parameters}
        if hasattr(method, "options_type"):
            options = set(method.options_type.model_fields)
        assert options <= set(re.findall(r"^`(\w+)` \(`", section, re.M))
    commands = generate.command_page("mergekit-moe-ext", generate.mergekit_moe_ext_command)
    assert "## add-expert" in commands and "`--margin" in commands
    routed = generate.command_page("peft-route", generate.peft_route_command)
    assert "## library add" in routed and "`--top-k" in routed


def test_examples_of_docstrings_reach_the_reference_as_code():
    pytest.importorskip("griffe")
    docstrings = importlib.import_module("docstrings")
    text = docstrings.with_fenced_examples("Do it.\n\n>>> do()\n1\n\nEnd.")
    assert text == "Do it.\n\n```pycon\n>>> do()\n1\n```\n\nEnd."
