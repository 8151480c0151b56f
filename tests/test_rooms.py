"""Which file may import which: arrows between rooms go one way, by the table below. Nothing is
imported here.
"""

import ast
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "_mergekit_moe_ext_autoload",
    "_mergekit_moe_ext_common",
    "mergekit_moe_ext",
    "peft_routing",
)
# A room is a folder of a package, or a file beside these folders. It may import itself, and what
# stands behind it.
MAY_IMPORT = {
    "common": "",
    "autoload": "",
    # mergekit_moe_ext, from the ground up
    "modeling": "",
    "recipes": "common",
    "merging": "modeling common",
    "tensor": "merging",
    "upcycling": "mixtures merging modeling common",
    "sequence": "merging modeling common",
    "mixtures": "merging modeling recipes common",
    "caem": "mixtures merging recipes common",
    "growing": "caem mixtures upcycling merging modeling common",
    "wemoe": "merging modeling recipes common",
    "analysis": "caem sequence wemoe mixtures merging modeling recipes common",
    "methods": "tensor upcycling growing sequence caem wemoe",
    "host": "methods merging modeling common",
    "commands": "methods mixtures wemoe merging recipes common",
    "__init__": "commands analysis mixtures wemoe recipes autoload common",
    "selftest": "modeling common",
    "descriptions": "",
    "cli": "__init__ commands descriptions methods caem mixtures wemoe merging recipes autoload "
    "common",
    "__main__": "cli",
    # peft_routing, whose files at the top are one room
    "peft_routing.routers": "common",
    "peft_routing": "peft_routing.routers peft_routing.fusion peft_routing.library autoload common",
    "peft_routing.choosers": "peft_routing peft_routing.routers common",
    # commands, at the top, calls this room, which reads adapters through other files at the top
    "peft_routing.fusion": "peft_routing peft_routing.choosers peft_routing.routers common",
    "peft_routing.library": "peft_routing peft_routing.fusion common",
}


def sources() -> dict[str, str]:
    """The text of every file of the packages, by its module's name."""
    paths = [
        path
        for package in PACKAGES
        for path in [ROOT / f"{package}.py", *(ROOT / package).rglob("*.py")]
    ]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in paths
        if path.exists()
    }


@cache
def imported_names(module: str, text: str) -> list[tuple[str, str]]:
    """(module, name in it) of every import: at the top, inside functions, and for type hints
    alone."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            names += [(start, alias.name) for alias in node.names]
    return names


def imports(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Per file the files of ours that it imports."""

    def file_of(start: str, name: str) -> str:
        # what is imported from a package is a file of it, or else something that its __init__.py
        # has
        candidates = (f"{start}.{name}", f"{start}.{name}.__init__", start, f"{start}.__init__")
        return next((file for file in candidates if file in files), "")

    return {
        module: {file_of(*each) for each in imported_names(module, files[module])} - {""}
        for module in files
    }


def room(module: str) -> str:
    package, *parts = module.split(".")
    if package == "peft_routing":
        return ".".join([package, *parts[:-1][:1]])
    return parts[0] if package == "mergekit_moe_ext" else package.removeprefix("_mergekit_moe_ext_")


def mistakes(files: Mapping[str, str]) -> list[str]:
    """Imports that should not be, in words."""
    imports_of = imports(files)
    sentences = []
    try:
        TopologicalSorter(imports_of).prepare()
    except CycleError as error:
        sentences.append("in a circle: " + ", ".join(error.args[1]))
    for module, imported in imports_of.items():
        package, here = module.split(".")[0], room(module)
        if here not in MAY_IMPORT:
            sentences.append(f"{module} is in no room of the table")
            continue
        for other in sorted(imported):
            if room(other) != here and room(other) not in MAY_IMPORT[here].split():
                sentences.append(f"{module} imports {other}, which the table does not allow")
            if {package, other.split(".")[0]} == {"mergekit_moe_ext", "peft_routing"}:
                sentences.append(f"{module} imports {other} of the other package")
            if other.endswith(".cli") and not module.endswith(".__main__"):
                sentences.append(f"{module} imports {other}, the commands")
            if here == "modeling" and not other.startswith("mergekit_moe_ext.modeling."):
                sentences.append(f"{module} imports {other}, which does not lie beside the weights")
    return sentences


def test_every_import_goes_down():
    files = sources()
    assert len(files) > 100
    found = mistakes(files)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        (
            "merging.card",
            "from mergekit_moe_ext.wemoe.method import WEMOE_METHODS",
            "the table does not allow",
        ),
        (
            "merging.card",
            "def f():\n    from mergekit_moe_ext import host",
            "mergekit_moe_ext.host, which the table",
        ),
        ("merging.card", "import mergekit_moe_ext", "mergekit_moe_ext.__init__, which the table"),
        (
            "merging.method",
            "if True:\n    import mergekit_moe_ext.merging.planner as planner",
            "in a circle",
        ),
        ("wemoe.groups", "import peft_routing", "of the other package"),
        ("modeling.on_demand", "from ..merging import card", "does not lie beside the weights"),
        (
            "modeling.on_demand",
            "from _mergekit_moe_ext_common import data",
            "does not lie beside the weights",
        ),
        ("host", "from .cli import main", "the commands"),
        ("new.file", "", "in no room"),
    ],
)
def test_a_wrong_import_is_found(module, line, expected):
    files, name = sources(), f"mergekit_moe_ext.{module}"
    found = mistakes({**files, name: f"{files.get(name, '')}\n{line}\n"})
    assert any(expected in said for said in found), found
