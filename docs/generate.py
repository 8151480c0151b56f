"""A hook of MkDocs that makes the pages of the site that nobody should write by hand.

The reference of merge methods is made from the fields of their options, that of the commands from
their help, and that of Python from what the packages export. A page per file in `examples/` shows
its text, one per folder there its README, and links to these lead there. A page per notebook shows
it with its outputs.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import notebook_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from mergekit_moe_ext.cli import main as mergekit_moe_ext_command
from mergekit_moe_ext.descriptions import (
    Parameter,
    description_of,
    options_of_method,
    tensor_parameters_of,
)
from mergekit_moe_ext.methods import METHODS
from peft_routing.cli import main as peft_route_command

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = Path(__file__).parent / "notebooks"
LANGUAGES = {".py": "python", ".yml": "yaml"}
# What a program may import, and what it is for.
PUBLIC = {
    "mergekit_moe_ext": "Merges, mixtures and their training",
    "mergekit_moe_ext.analysis": "The papers' measurements",
    "peft_routing": "Routed adapters",
    "peft_routing.choosers": "Coefficients from outside the hidden states",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to those that lie in `docs/`."""
    pages = {
        "reference/methods.md": methods_page(),
        "reference/mergekit-moe-ext.md": command_page("mergekit-moe-ext", mergekit_moe_ext_command),
        "reference/peft-route.md": command_page("peft-route", peft_route_command),
        "reference/python.md": python_page(),
        "examples/README.md": (EXAMPLES / "README.md").read_text(),
    }
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for path in NOTEBOOKS.glob("*.ipynb"):
        uri = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, uri, content=notebook_pages.page(path)))
    for path in _example_files():
        # A search for a word shall find the guides.
        text = "---\nsearch: {exclude: true}\n---\n\n"
        text += f"# {path.name}\n\n```{LANGUAGES[path.suffix]}\n{path.read_text()}```\n"
        uri = f"examples/{path.name}.md"
        page = File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    for readme in EXAMPLES.glob("*/README.md"):
        uri = f"examples/{readme.parent.name}/README.md"
        # What lies in docs/ is the root of the site.
        text = readme.read_text().replace("](../../docs/", "](../../")
        page = File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to what lies in `examples/`, and to notebooks, to the pages that show it."""
    markdown = re.sub(r"\]\(((?:\.\./|notebooks/)*\w+)\.ipynb\)(?!\{)", r"](\1.md)", markdown)
    folder = "" if page.file.src_uri.startswith("examples/") else r"\.\./examples/"
    to_folder = "" if not folder else "examples/"
    names = "|".join(re.escape(path.name) for path in _example_files())
    markdown = re.sub(rf"\]\({folder}({names})\)", rf"]({to_folder}\1.md)", markdown)
    return re.sub(rf"\]\({folder}(\w+/README\.md)\)", rf"]({to_folder}\1)", markdown)


def _example_files() -> list[Path]:
    return sorted(path for path in EXAMPLES.iterdir() if path.suffix in LANGUAGES)


# Merge methods


def methods_page() -> str:
    """A section per merge method, with its options."""
    parts = [
        "# Merge methods",
        "Every option of every merge method of this package, made from the program. "
        "`mergekit-moe-ext methods NAME` prints the same.",
        "An option stands under the merge's `parameters:`; *per model* means under the "
        "`parameters:` of an entry of `models:`. A method with a `shared` option takes every "
        "parameter of the method that it names as well.",
    ]
    for method in METHODS:
        parts.append(f"## `{method.spec.name}`")
        parts.append(f"{_sentence(description_of(method))}")
        for parameter in options_of_method(method) + tensor_parameters_of(method):
            parts.append(_parameter(parameter))
    return "\n\n".join(parts) + "\n"


def _parameter(parameter: Parameter) -> str:
    default = f"{parameter.default}, per model" if parameter.per_model else parameter.default
    term = f"`{parameter.name}` (`{parameter.kind}`, {default})"
    return _definition(term, parameter.meaning) if parameter.meaning else term


# Commands


def command_page(name: str, group: click.Group) -> str:
    """A section per subcommand: how it is called, what it does, and its options."""
    parts = [f"# {name}", group.get_short_help_str(200)]
    for path, command in _commands(group, (name,)):
        # Some commands are built when they are used: the context has the one that was built.
        context = command.make_context(" ".join(path), [], resilient_parsing=True)
        arguments = " ".join(context.command.collect_usage_pieces(context))
        parts.append(f"## {' '.join(path[1:])}")
        parts.append(f"```\n{' '.join(path)} {arguments}\n```")
        parts.append(_paragraphs(context.command.help or ""))
        for parameter in context.command.get_params(context):
            flags, meaning = parameter.get_help_record(context) or ("", "")
            if meaning:  # an argument has none: the text above names it
                parts.append(_definition(f"`{flags}`", meaning))
    return "\n\n".join(parts) + "\n"


def _commands(
    group: click.Group, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The commands of a group, and those of the groups in it, with the words that call them."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


# Python


def python_page() -> str:
    """The packages' public names, each with its docstring."""
    parts = ["# Python", "What a program may import. Everything else may change at any time."]
    for name, subject in PUBLIC.items():
        parts.append(f"## {subject}: `{name}`")
        package: Any = importlib.import_module(name)
        for public in sorted(package.__all__, key=str.lower):
            if not public.startswith("__") and f"{name}.{public}" not in PUBLIC:
                parts.append(f"::: {name}.{public}\n    options:\n      heading_level: 3")
    return "\n\n".join(parts) + "\n"


# Markdown


def _definition(term: str, meaning: str) -> str:
    """An entry of a list of definitions. Outside of code, brackets and `<` would have a meaning."""
    parts = meaning.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = parts[index].replace("[", "\\[").replace("<", "&lt;")
    return f"{term}\n:   {' '.join('`'.join(parts).split())}"


def _paragraphs(text: str) -> str:
    """A help text without its indent and the marks by which click wraps it."""
    return inspect.cleandoc(text).replace("\b\n", "").replace("<", "&lt;")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
