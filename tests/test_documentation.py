"""The blocks of the guides: every one says what it is, and runs.

A page is a walk: its blocks go from the first to the last, in one directory with tiny models. A
block of `yaml` is a file, whose name is in its first line. One of `sh` has our commands, and those
of `python` are a program that goes on from block to block. A block of `text` is output or a
formula. What another test runs is named here with that test, and what no test runs with the reason.
"""

import importlib
import itertools
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import mergekit.scripts.run_yaml
import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import mergekit_moe_ext.cli
import peft_routing.cli
from tests.conftest import make_model
from tests.mergekit_moe_ext.mixtures.test_usage import words, write
from tests.peft_routing.adapters import save_lora
from tests.test_autoload import ROOT
from tests.tokenizers import save_tokenizer

DOCS = ROOT / "docs"
# `examples/claims` writes that page.
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "claims.md")
LANGUAGES = {"sh", "python", "yaml", "text"}
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAMS = {
    "mergekit-yaml": mergekit.scripts.run_yaml.main,
    "mergekit-moe-ext": mergekit_moe_ext.cli.main,
    "peft-route": peft_routing.cli.main,
}
# What makes each command short.
SHORTER = {
    "train": ["--max-steps", "1", "--held-out", "2", "--quiet"],
    "inspect": ["--quiet"],
    "first_models": ["--steps", "1"],
}
# Scripts of `examples/` that are quick enough to be run.
QUICK = ("first_models",)
# What another test runs, by its first words, with that test's file and name.
ELSEWHERE = {
    "base = AutoModelForSequenceClassification": (
        "tests/peft_routing/test_heads.py",
        "test_heads_of_different_sizes",
    ),
    "cd examples": (
        "tests/test_caem_switch.py",
        "test_the_whole_experiment_runs_and_goes_on",
    ),
    "@dataclass": (
        "tests/test_extending.py",
        "test_the_router_s_option_is_saved_and_read_back",
    ),
    "RoutedLoraConfig(": (
        "tests/test_extending.py",
        "test_the_router_s_option_is_saved_and_read_back",
    ),
    "mergekit-moe-ext doctor": (
        "tests/test_versions.py",
        "test_the_doctor_says_what_is_installed_and_tries_it",
    ),
}
# What no test runs, by its first words, and why.
NOT_RUN = {
    "pip install": "it installs packages",
    "hf download": "it needs the Hub",
    "lm_eval": "lm_eval is no dependency",
    "accelerate launch --use_fsdp": "it needs eight processes",
    "from transformers import AutoImageProcessor": "it needs the Hub",
}


def blocks_of(page: str) -> list[tuple[str, str]]:
    """The language and text of each block of a page."""
    return FENCE.findall((DOCS / page).read_text(encoding="utf-8"))


def steps_of(page: str) -> Iterator[tuple[str, str]]:
    """What a reader of the page does, one after the other: a block, or each command of one."""
    for language, text in blocks_of(page):
        if language == "sh":
            for command in text.replace("\\\n", " ").splitlines():
                yield language, command
        elif language != "text":
            yield language, text


def entry_of(table: dict[str, Any], text: str) -> Any:
    """The entry of a table whose words the text begins with."""
    for beginning, entry in table.items():
        if text.startswith(beginning):
            return entry
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert {language for language, _ in blocks_of(page)} <= LANGUAGES
    outside = FENCE.sub("", text)
    assert "```" not in outside
    # A block that is only indented has no language. Lines of a list are indented, too.
    for paragraph in outside.split("\n\n"):
        assert not paragraph.startswith("    ") or paragraph.lstrip()[0] in "-*0123456789", (
            paragraph
        )


def test_what_is_run_elsewhere_is_there() -> None:
    steps = [step for page in PAGES for _, step in steps_of(page)]
    for beginning in [*ELSEWHERE, *NOT_RUN]:
        assert any(step.startswith(beginning) for step in steps), beginning
    for file, test in ELSEWHERE.values():
        assert f"def {test}" in (ROOT / file).read_text(), (file, test)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that several pages name, tiny."""
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("base", "math", "code", "law")):
        make_model(root / name, seed)
        save_tokenizer(root / name, 96)
    for seed, name in enumerate(("math-lora", "code-lora", "law-lora", "wiki-lora")):
        save_lora(root / name, seed, AutoModelForCausalLM.from_pretrained(root / "base"))
    for name in ("math", "code"):
        shutil.copytree(root / f"{name}-lora", root / "adapters" / name)
    for seed, task in enumerate(("math", "code", "law")):
        write(root / f"{task}.jsonl", words(seed, 24))
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, examples: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a walk, with a copy of what is made; scripts can be imported."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compose_routed() -> None:
    """The routed adapter that docs/routed_lora.md composes."""
    peft_routing.compose("base", {"math": "math-lora/", "code": "code-lora/"}, "routed")


def start_with_nothing() -> None:
    """That page makes what it names."""
    remove(*(path.name for path in Path.cwd().iterdir()))


# What a page names besides.
MAKERS: dict[str, Callable[[], object]] = {
    "get_started.md": start_with_nothing,
    "routed_choosing.md": compose_routed,
    "routed_saving.md": compose_routed,
}


def remove(*outputs: str) -> None:
    """Removes what a page writes a second time."""
    for output in outputs:
        if Path(output).is_dir():
            shutil.rmtree(output)
        else:
            Path(output).unlink(missing_ok=True)


def run_command(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        run_script(*arguments)
        return
    if program == "accelerate":  # which starts one process where there is no GPU: this one
        package, *arguments = arguments[arguments.index("-m") + 1 :]
        program = package.replace("_", "-")
    command = arguments[0]
    for flag, value in itertools.pairwise(arguments):
        if flag in ("-o", "--output", "--output-dir", "--plot", "--html"):
            remove(value.rstrip("/"))
    if program == "mergekit-yaml":
        remove(arguments[1].rstrip("/"))
    if command in ("train", "adapt"):
        remove(f"{arguments[1].rstrip('/')}-{command}ed")
    invoke(PROGRAMS[program], command, arguments)


def invoke(program: click.Command, name: str, arguments: Sequence[str]) -> None:
    result = CliRunner().invoke(program, [*arguments, *SHORTER.get(name, [])])
    assert result.exit_code == 0, (name, arguments, result.output)


def run_script(path: str, *arguments: str) -> None:
    """A script of `examples/` is run where it is quick. Another takes these arguments, and some test
    imports it.
    """
    script = Path(path).stem
    command: click.Command = importlib.import_module(script).main
    if script in QUICK:
        invoke(command, script, arguments)
        return
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert re.search(rf"\b{script}\b", tests), script
    command.make_context(script, list(arguments))


def write_file(text: str) -> str:
    """Writes a block to the file that its first line names."""
    first_line = text.partition("\n")[0]
    assert re.fullmatch(r"# \S+\.yml", first_line), first_line
    name = first_line.removeprefix("# ")
    Path(name).write_text(text, encoding="utf-8")
    return name


@pytest.mark.parametrize("page", [page for page in PAGES if any(steps_of(page))])
def test_the_blocks_of_a_page_run(page: str, here: Path) -> None:
    if page in MAKERS:
        MAKERS[page]()
    not_used = set()
    variables: dict[str, Any] = {}
    for language, step in steps_of(page):
        not_used -= {name for name in not_used if name in step}
        if entry_of(ELSEWHERE, step) or entry_of(NOT_RUN, step):
            continue
        if language == "yaml":
            not_used.add(write_file(step))
        elif language == "sh":
            run_command(step)
        else:
            exec(compile(step, page, "exec"), variables)
    assert not not_used, "files that no later block names"
