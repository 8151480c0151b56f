"""The blocks of the guides: every one says what it is, and runs.

A page is a walk: its blocks go from the first to the last, in one directory with tiny models, and
nothing is removed between them. A block of `yaml` is a file, whose name is in its first line. One
of `sh` has our commands, and those of `python` are a program that goes on from block to block. A
block of `text` is output or a formula. What another test runs is named here with that test, and
what no test runs with the reason.
"""

import gc
import importlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import mergekit.scripts.run_yaml
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import mergekit_moe_ext.cli
import peft_routing.cli
from peft_routing.fusion import report
from tests.conftest import document, make_model, merge
from tests.mergekit_moe_ext.mixtures.test_usage import SWITCH, make_moe, words, write
from tests.mergekit_moe_ext.wemoe import test_adaptation, test_clip_heads
from tests.peft_routing import test_mttl
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
# What makes a command with one of these words short.
SHORTER = {
    "adapt": ["--steps", "1", "--quiet"],
    "train": ["--max-steps", "1", "--held-out", "2", "--quiet"],
    "distil": ["--max-steps", "1", "--held-out", "2", "--quiet"],
    "inspect": ["--quiet"],
    "compare": ["--strategy", "learned_ensemble", "--quiet"],
    "--trained": ["--strategy", "linear", "--learning-rate", "1e-3"],
    "first_models": ["--steps", "1"],
}
# What these options are given in place of what the page says.
FEWER = {"--max-steps": "1", "--steps": "1", "--num-train-epochs": "1"}
# What is written in place of what the page says: rouge-score is an extra.
INSTEAD = {"rouge_l": "exact_match"}
# Scripts of `examples/` that are quick enough to be run.
QUICK = ("clip_heads", "first_models")
# What another test runs, by its first words, with that test's file and name.
ELSEWHERE = {
    "cd examples": (
        "tests/test_caem_switch.py",
        "test_the_whole_experiment_runs_and_goes_on",
    ),
    # Other pages have programs that begin alike.
    "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
    "import extending_router": (
        "tests/test_extending.py",
        "test_a_new_process_loads_what_the_page_shows",
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
    "peft-route compare base --experts-from adapters/ --task math=math.jsonl --task "
    "code=code.jsonl --lm-eval": "it needs lm_eval, an extra",
    "accelerate launch --use_fsdp": "it needs eight processes",
    "from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel": "it needs the Hub",
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
def here(
    made: Path, tmp_path: Path, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The working directory of a walk, with a copy of what is made; scripts can be imported."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # The figures of a report take half the time of all commands, and have a test of their own.
    monkeypatch.setattr(report, "draw", lambda comparison, directory: None)
    gc.freeze()  # a training collects garbage often, which takes time for all that is imported
    yield tmp_path
    gc.unfreeze()


def compose_routed() -> None:
    """The routed adapter of docs/routed_lora.md."""
    peft_routing.compose("base", {"math": "math-lora/", "code": "code-lora/"}, "routed")


def make_classifier_loras_and_a_library() -> None:
    """LoRAs of classifiers of different labels, and four experts as mttl publishes them."""
    torch.manual_seed(0)
    for name, labels in (("topic", 2), ("tone", 4)):
        base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=labels)
        save_lora(Path(f"{name}-lora"), labels, base, task_type="SEQ_CLS")
    for seed, name in enumerate(("anli", *test_mttl.NAMES)):
        test_mttl.write(Path("library"), name, test_mttl.weights(seed), test_mttl.info(name))


def make_switches() -> None:
    """Fine-tunes of a Switch Transformer on three tasks, rows of these, and what is compared."""
    models = ("moe-news", "moe-squad", "moe-xsum", "baseline", "baseline-trained")
    for seed, name in enumerate(models):
        make_moe(Path(name), "switch_transformers", seed, **{**SWITCH, "num_experts": 8})
    columns = ("input", "target", "text", "label", "question", "context", "answer", "document")
    for seed, task in enumerate(("news", "news-validation", "squad", "xsum")):
        texts = [row["text"] for row in words(seed, 5)]
        rows = [{**dict.fromkeys(columns, text), "summary": "w1 w2"} for text in texts]
        write(Path(f"{task}.jsonl"), rows)


def make_gpt2s() -> None:
    for seed, name in enumerate(("gpt2", "gpt2-math", "gpt2-code")):
        make_model(Path(name), seed, family="gpt2")
    Path("code.txt").write_text("w20 w21 w22\nw23 w24\n")


def make_another_architecture() -> None:
    """A GPT-2 with a place for as many tokens as a text has, and texts longer than a prefix."""
    make_model(Path("stories-gpt2"), 9, family="gpt2", max_position_embeddings=2048)
    save_tokenizer(Path("stories-gpt2"), 96)
    for seed, task in enumerate(("math", "code")):
        texts = [row["text"] for row in words(seed, 24)]
        write(Path(f"{task}.jsonl"), [{"text": " ".join(texts)}] * 4)


def make_image_models() -> None:
    """Classifiers of images with classes of their own, images of these, and parts of CLIP."""
    for seed, (name, classes) in enumerate(test_adaptation.CLASSES.items()):
        test_adaptation.make_classifier(Path("vit", name), seed, classes, "vit")
        for number in range(classes):
            test_adaptation.draw(Path("images", name, f"c{number}"), [seed, number], 4)
    shutil.copy("images/cars/c0/0.png", "car.png")
    test_clip_heads.make_clips(Path("clip"))
    for task, names in test_clip_heads.CLASSES.items():
        Path(f"{task}.txt").write_text("\n".join(names))


def merge_ensemble() -> None:
    """A model of an architecture of ours, which was written earlier."""
    merge(document("wemoe", models=("math", "code")))


def start_with_nothing() -> None:
    """That page makes what it names."""
    for path in Path.cwd().iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_tasks_and_requests() -> None:
    """Texts that are split, pairs of a prompt and an answer, and requests without an answer."""
    for seed, split in enumerate(("train", "val", "test")):
        write(Path(f"code-{split}.jsonl"), words(seed, 8))
    texts = [row["text"] for row in words(0, 12)]
    write(Path("pairs.jsonl"), [{"input": text, "target": "w1 w2"} for text in texts])
    write(Path("requests.jsonl"), [{"text": text} for text in texts])


# What a page names besides.
MAKERS: dict[str, Callable[[], object]] = {
    "adapters.md": make_classifier_loras_and_a_library,
    "caem.md": make_switches,
    "fusion.md": write_tasks_and_requests,
    "get_started.md": start_with_nothing,
    "routed_choosing.md": compose_routed,
    "routed_saving.md": compose_routed,
    "sequence_moe.md": make_another_architecture,
    "upcycling.md": make_gpt2s,
    "versions.md": merge_ensemble,
    "wemoe.md": make_image_models,
}


def run_command(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        run_script(*arguments)
        return
    if program == "accelerate":  # which starts one process where there is no GPU: this one
        package, *arguments = arguments[arguments.index("-m") + 1 :]
        program = package.replace("_", "-")
    invoke(PROGRAMS[program], [program, *arguments])


def invoke(program: click.Command, line: Sequence[str]) -> None:
    """Runs a command in this process, shortened."""
    _, *arguments = line
    for index, flag in enumerate(arguments[:-1]):
        arguments[index + 1] = FEWER.get(flag, arguments[index + 1])
    for word in line:
        arguments += SHORTER.get(word, [])
    result = CliRunner().invoke(program, arguments, catch_exceptions=False)
    assert result.exit_code == 0, (line, result.output)


def run_script(path: str, *arguments: str) -> None:
    """A script of `examples/` is run where it is quick. Another takes these arguments, and some
    test imports it.
    """
    script = Path(path).stem
    command: click.Command = importlib.import_module(script).main
    if script in QUICK:
        invoke(command, [script, *arguments])
        return
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert re.search(rf"\b{script}\b", tests), script
    command.make_context(script, list(arguments))


def write_file(text: str) -> str:
    """Writes a block to the file that its first line names."""
    first_line = text.partition("\n")[0]
    assert re.fullmatch(r"# \S+\.yml", first_line), first_line
    name = first_line.removeprefix("# ")
    for said, written in INSTEAD.items():
        text = text.replace(said, written)
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
