"""The blocks of the guides: every one says what it is. Those of some pages are run here or by a
test that is named here, need what no test has, or are marked as output.

Such a page is a walk: its blocks run from the first to the last, in one directory with tiny models.
Blocks of `sh` are our commands, those of `python` a program that goes on from block to block. A
block of `text` is output or a formula.
"""

import importlib
import itertools
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

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
LANGUAGES = {"sh", "python", "yaml", "yml", "text"}
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAMS = {"mergekit-moe-ext": mergekit_moe_ext.cli.main, "peft-route": peft_routing.cli.main}
# What makes each command short.
SHORTER = {
    "train": ["--max-steps", "1", "--held-out", "2", "--quiet"],
    "inspect": ["--quiet"],
}
# Blocks that another test runs, by page and first words, with its file and name.
ELSEWHERE = {
    ("adapters.md", "base = AutoModelForSequenceClassification"): (
        "tests/peft_routing/test_heads.py",
        "test_heads_of_different_sizes",
    ),
    ("caem.md", "cd examples"): (
        "tests/test_caem_switch.py",
        "test_the_whole_experiment_runs_and_goes_on",
    ),
    ("extending.md", "@dataclass"): (
        "tests/test_extending.py",
        "test_the_router_s_option_is_saved_and_read_back",
    ),
    ("extending.md", "RoutedLoraConfig"): (
        "tests/test_extending.py",
        "test_the_router_s_option_is_saved_and_read_back",
    ),
    ("routed_options.md", "RoutedLoraConfig"): (
        "tests/test_extending.py",
        "test_the_router_s_option_is_saved_and_read_back",
    ),
}
# Pages that are walked. Of the others many blocks are run by the tests of what they show; that all
# of them run, one after the other, is not tested yet.
WALKED = (
    "extending.md",
    "how_it_works.md",
    "mergeme.md",
    "routed_choosing.md",
    "routed_lora.md",
    "routed_options.md",
    "routed_saving.md",
    "wemoe_analysis.md",
    "wemoe_texts.md",
)
# Pages on which `model` is a routed adapter that another page has made.
OF_A_ROUTED_MODEL = ("routed_choosing.md", "routed_saving.md")
# Blocks that no test can run, and why.
NOT_RUN = {
    ("adapters.md", "hf download"): "it needs the Hub",
    ("get_started.md", "pip install"): "it installs the package",
    ("index.md", "pip install"): "it installs the package",
    ("how_it_works.md", "lm_eval"): "lm_eval is no dependency",
    ("upcycling.md", "accelerate launch --use_fsdp"): "it needs eight processes",
    ("wemoe.md", "from transformers import AutoImageProcessor"): "it needs the Hub",
}


def blocks_of(page: str) -> list[tuple[str, str]]:
    """The language and text of each block of a page."""
    return FENCE.findall((DOCS / page).read_text(encoding="utf-8"))


def entry_of(table: dict[tuple[str, str], Any], page: str, text: str) -> Any:
    """The entry of a table whose page this is, and whose first words the block begins with."""
    for (name, beginning), entry in table.items():
        if name == page and text.startswith(beginning):
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
    for page, beginning in [*ELSEWHERE, *NOT_RUN]:
        assert any(text.startswith(beginning) for _, text in blocks_of(page)), (page, beginning)
    for file, test in ELSEWHERE.values():
        assert f"def {test}" in (ROOT / file).read_text(), (file, test)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the pages name, tiny."""
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
def walk(
    made: Path, tmp_path: Path, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The variables of a page's programs. The working directory is a copy of what is made."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained("base")
    return {"torch": torch, "tokenizer": tokenizer}


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
        check_script(*arguments)
        return
    name = arguments[0]
    if name == "doctor":  # which starts processes, and has tests of its own
        return
    for flag, value in itertools.pairwise(arguments):
        if flag in ("-o", "--output", "--output-dir", "--plot", "--html"):
            remove(value.rstrip("/"))
    if name == "train":
        remove(f"{arguments[1].rstrip('/')}-trained")
    result = CliRunner().invoke(PROGRAMS[program], [*arguments, *SHORTER.get(name, [])])
    assert result.exit_code == 0, (line, result.output)


def check_script(path: str, *arguments: str) -> None:
    """A script of `examples/` takes these arguments, and some test imports it."""
    script = Path(path).stem
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert re.search(rf"\b{script}\b", tests), script
    command: click.Command = importlib.import_module(script).main
    command.make_context(script, list(arguments))


@pytest.mark.parametrize("page", WALKED)
def test_the_blocks_of_a_page_run(page: str, request: pytest.FixtureRequest) -> None:
    blocks = []
    for language, text in blocks_of(page):
        is_left_out = entry_of(ELSEWHERE, page, text) or entry_of(NOT_RUN, page, text)
        if language != "text" and not is_left_out:
            blocks.append((language, text))
    if not blocks:
        return
    variables = request.getfixturevalue("walk")
    if page in OF_A_ROUTED_MODEL:
        experts = {"math": "math-lora/", "code": "code-lora/"}
        peft_routing.compose("base", experts, "routed")
        base = AutoModelForCausalLM.from_pretrained("base")
        variables["model"] = PeftModel.from_pretrained(base, "routed")
    for language, text in blocks:
        if language == "python":
            exec(compile(text, page, "exec"), variables)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                run_command(line)
