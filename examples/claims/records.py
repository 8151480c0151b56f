"""The experiments behind the claims: how each is run at each scale, and what is kept of it."""

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from caem_switch.experiment import CONFIGURATIONS, SOUPS
from caem_switch.report import Results, orderings
from caem_switch.texts import TASKS

from mergekit_moe_ext import UserError

EXAMPLES = Path(__file__).resolve().parents[1]
PACKAGES = ("mergekit-moe-ext", "torch", "transformers", "peft", "mergekit")
DIGITS = 6  # of what is kept
DOMAINS = ("bible", "music", "code")
IMAGES = ("mnist", "animals", "digits8", "letters")
Rows = dict[str, dict[str, dict[str, float]]]  # by row and seed, a number for each task
Margins = dict[str, dict[str, list[float]]]  # by claim and seed, by how much it is so


@dataclass
class Record:
    """What is kept of an experiment: one file of JSON.

    seconds: of all runs of the command together, while other work may have used the machine too;
        None where the outputs were there already.
    note: what a reader has to know of this run. Written by hand, as `reasons` are.
    reasons: by claim, a sentence why it does not hold, which an experiment has to have shown.
    rows: by row and seed a number for each task. A row that was measured once has one seed.
    margins: by claim and seed by how much it is so, where that is no difference of two rows.
    """

    experiment: str
    scale: str
    command: str
    seconds: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)
    margins: Margins = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_rounded(asdict(self)), indent=1) + "\n"
        (folder / f"{self.experiment}.json").write_text(text)


def _rounded(value: Any) -> Any:
    """The same JSON with all numbers cut to a few digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value


def read_records(folder: Path) -> dict[str, Record]:
    """The records in a folder, by experiment."""
    records = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = Record(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not the record of an experiment: {error}") from None
        records[record.experiment] = record
    return records


def goes_on(earlier: Record, later: Record) -> bool:
    """Whether two records are of one run: the same command, and what was measured is unchanged."""
    if earlier.command != later.command:
        return False
    rows = _rounded(later.rows)
    for row, seeds in earlier.rows.items():
        for seed, numbers in seeds.items():
            if rows.get(row, {}).get(seed) != _rounded(numbers):
                return False
    return True


@dataclass(frozen=True)
class Experiment:
    """An example that measures what a paper claims.

    script: its name in `examples/`.
    arguments: by scale, what stands behind the script's name; OUTPUT stands for its output.
    output: the name of what is read in the experiment's folder; empty for the folder itself.
    is_file: whether the command is given that file as its output, not the folder.
    tasks: what a claim about the mean is over.
    collect: reads that output. Files that are not there yet are left out.
    lower_is_better: whether its numbers are losses.
    percent: whether its numbers are shares that are shown in percent.
    page: the page of the documentation that describes it.
    splits: which data choices and figures rest on.
    resumes: whether the same command goes on after an interruption.
    """

    script: str
    arguments: Mapping[str, tuple[str, ...]]
    output: str
    is_file: bool
    tasks: tuple[str, ...]
    collect: Callable[[Path], tuple[Rows, Margins]]
    lower_is_better: bool
    percent: bool
    page: str
    splits: str
    resumes: bool = True

    def command(self, scale: str, output: str) -> list[str]:
        """The command as a user would type it in the root of the repository."""
        is_module = self.script == "caem_switch"
        script = ["-m", self.script] if is_module else [f"examples/{self.script}.py"]
        arguments = [output if each == "OUTPUT" else each for each in self.arguments[scale]]
        return ["python", *script, *arguments]


def run(name: str, experiment: Experiment, scale: str, folder: Path) -> float:
    """Runs an experiment, or goes on with it, and returns the seconds that it took.

    `UserError` where its command fails.
    """
    output = folder / experiment.output if experiment.output else folder
    is_done = experiment.output and output.exists() and not experiment.resumes
    if is_done:
        return 0.0
    if not experiment.resumes and folder.exists():
        shutil.rmtree(folder)  # what an interrupted run has left
    folder.mkdir(parents=True, exist_ok=True)
    target = output if experiment.is_file else folder
    _, *command = experiment.command(scale, str(target.resolve()))
    place = EXAMPLES if "-m" in command else EXAMPLES.parent
    begun = time.monotonic()
    code = start([sys.executable, *command], place)
    if code:
        raise UserError(f"{name}: its command ended with {code}; see what it said above")
    return time.monotonic() - begun


def start(command: list[str], place: Path) -> int:
    """Runs a command in a folder and returns its exit status."""
    return subprocess.run(command, cwd=place, check=False).returncode


def record_of(name: str, experiment: Experiment, scale: str, folder: Path) -> Record | None:
    """What the output of an experiment holds so far; None where it holds nothing."""
    output = folder / experiment.output if experiment.output else folder
    if not output.exists():
        return None
    rows, margins = experiment.collect(output)
    if not rows and not margins:
        return None
    shown = f"{name}{output.suffix}" if experiment.is_file else f"{name}/"
    command = " ".join(experiment.command(scale, shown))
    if command.startswith("python -m"):
        command = f"cd examples && {command}"
    versions = {package: version(package) for package in PACKAGES}
    versions["python"] = platform.python_version()
    return Record(name, scale, command, versions=versions, rows=rows, margins=margins)


# What is read of each experiment's output


def caem_switch(folder: Path) -> tuple[Rows, Margins]:
    """Scores relative to the single-task models, task by task, and the margins of all orderings.

    A seed counts when all of its runs are there.
    """
    rows: Rows = {}
    margins: Margins = {}
    for path in sorted(folder.glob("seed-*")):
        seed = Results(path)
        number = path.name.removeprefix("seed-")
        try:
            of_seed = orderings(seed)
            for name in CONFIGURATIONS:
                relative = dict(zip(TASKS, seed.relative(name), strict=True))
                rows.setdefault(name, {})[number] = relative
            for first, second in SOUPS:
                overall = {"overall": seed.soup(first, second)}
                rows.setdefault(f"soup of {first} and {second}", {})[number] = overall
            for experts in (8, 16):
                for task in TASKS:
                    row = f"single-{experts}-{task}"
                    rows.setdefault(row, {})[number] = seed.record(row)["scores"]
        except FileNotFoundError:
            continue
        for claim, values in of_seed.items():
            margins.setdefault(claim, {})[number] = values
    return rows, margins


def mergeme_homogeneous(path: Path) -> tuple[Rows, Margins]:
    """Losses after the training of each mixture, by domain, and of the dense models."""
    content = json.loads(path.read_text())
    rows: Rows = {name: {"0": losses} for name, losses in content["dense"].items()}
    for name, runs in content["runs"].items():
        for seed, of_seed in enumerate(runs):
            losses = {domain: values[-1] for domain, values in of_seed["losses"].items()}
            rows.setdefault(name, {})[str(seed)] = losses
            if name == "BTX merging":  # before any training its gates are random
                first = {domain: values[0] for domain, values in of_seed["losses"].items()}
                rows.setdefault("Random routing", {})[str(seed)] = first
    return rows, {}


def mergeme_sequence(path: Path) -> tuple[Rows, Margins]:
    """Losses of everything that needs no training, by domain."""
    rows: Rows = {}
    for name, seeds in json.loads(path.read_text())["losses"].items():
        rows[name] = {str(seed): losses for seed, losses in enumerate(seeds)}
    return rows, {}


def mergeme_hetero(path: Path) -> tuple[Rows, Margins]:
    """Losses by domain, from a file with a line per row and seed."""
    rows: Rows = {}
    for line in path.read_text().splitlines():
        content = json.loads(line)
        if "row" in content:
            rows.setdefault(content["row"], {})[str(content["seed"])] = content["losses"]
    # The dense model that is best in the mean is known only when all are measured.
    whole = {}
    for name in ("base", "bible expert", "code expert"):
        if name in rows:
            whole[name] = rows[name]["0"]
    if whole:
        best = min(whole, key=lambda name: sum(whole[name].values()))
        rows["best dense model in the mean"] = {"0": whole[best]}
    return rows, {}


def wemoe(folder: Path) -> tuple[Rows, Margins]:
    """Accuracies by task, from a file per part and seed. Rows of other parts than Table 2 have the
    part's name before theirs.
    """
    rows: Rows = {}
    for path in sorted(folder.glob("*-*.json")):
        part, _, seed = path.stem.rpartition("-")
        prefix = "" if part == "table2" else f"{part}: "
        for row, cell in json.loads(path.read_text())["rows"].items():
            numbers = {key: value for key, value in cell.items() if isinstance(value, float)}
            if numbers:
                rows.setdefault(prefix + row, {})[seed] = numbers
    return rows, {}


def wemoe_texts(path: Path) -> tuple[Rows, Margins]:
    """Losses by domain, row and seed."""
    rows: Rows = {}
    for name, seeds in json.loads(path.read_text())["losses"].items():
        rows[name] = {str(seed): losses for seed, losses in seeds.items()}
    return rows, {}


def tradeoffs_report(path: Path) -> tuple[Rows, Margins]:
    """Test losses by task, of all reports together."""
    content = json.loads(path.read_text())
    rows: Rows = {}
    for name, row in content["rows"].items():
        for seed, losses in row["of_seeds"].items():
            of_seed = dict(zip(content["tasks"], losses, strict=True))
            rows.setdefault(name, {})[seed] = of_seed
    return rows, {}


THREE_SEEDS = ("--seed", "0", "--seed", "1", "--seed", "2")
TABLES = ("--only", "table2", "--only", "table4", "--only", "table5", "--only", "table6")
SWEEPS = ("--only", "figure4", "--only", "figure5")
ADAPTED_TO_TESTS = (
    "Routers and constants are adapted to the test images without labels, as in the paper. "
)
EXPERIMENTS = {
    "caem_switch": Experiment(
        "caem_switch",
        {
            "quick": ("-o", "OUTPUT", "--scale", "quick", "--seeds", "1"),
            "small": ("-o", "OUTPUT", "--scale", "small", "--seeds", "3"),
            "full": ("-o", "OUTPUT", "--scale", "small", "--seeds", "5"),
        },
        output="",
        is_file=False,
        tasks=TASKS,
        collect=caem_switch,
        lower_is_better=False,
        percent=False,
        page="caem.md#the-papers-experiments-at-small-scale",
        splits="The best epoch is chosen on validation rows, figures are of test rows.",
    ),
    "mergeme_homogeneous": Experiment(
        "mergeme_homogeneous",
        {
            "quick": ("--output", "OUTPUT", "--steps", "2", "--seeds", "1"),
            "small": ("--output", "OUTPUT", "--steps", "9"),
            "full": ("--output", "OUTPUT", "--steps", "200"),
        },
        output="results.json",
        is_file=False,
        tasks=DOMAINS,
        collect=mergeme_homogeneous,
        lower_is_better=True,
        percent=False,
        page="mergeme.md",
        splits="Figures are of held-out texts. Learning rates were not searched for.",
    ),
    "mergeme_small": Experiment(
        "mergeme_small",
        {
            "quick": ("--output", "OUTPUT", "--scale", "quick", "--seeds", "1"),
            "small": ("--output", "OUTPUT"),
            "full": ("--output", "OUTPUT", "--seeds", "5"),
        },
        output="results.json",
        is_file=False,
        tasks=DOMAINS,
        collect=mergeme_homogeneous,
        lower_is_better=True,
        percent=False,
        page="mergeme.md#with-144-steps",
        splits="Each row's learning rate is the best of three on validation texts, figures are of "
        "held-out texts.",
    ),
    "mergeme_sequence": Experiment(
        "mergeme_sequence",
        {
            "quick": ("--base", "quick", "--held-out", "1", "--seeds", "1", "-o", "OUTPUT"),
            "small": ("-o", "OUTPUT"),
            "full": ("--held-out", "16", "-o", "OUTPUT"),
        },
        output="sequence.json",
        is_file=True,
        tasks=DOMAINS,
        collect=mergeme_sequence,
        lower_is_better=True,
        percent=False,
        page="mergeme.md#without-training",
        splits="Figures are of held-out texts, and nothing is chosen.",
        resumes=False,
    ),
    "mergeme_sequence_small": Experiment(
        "mergeme_sequence",
        {
            "quick": ("--base", "quick", "--held-out", "1", "--seeds", "1", "-o", "OUTPUT"),
            "small": ("--base", "small", "--held-out", "32", "-o", "OUTPUT"),
            "full": ("--base", "small", "--held-out", "32", "--seeds", "5", "-o", "OUTPUT"),
        },
        output="sequence.json",
        is_file=True,
        tasks=DOMAINS,
        collect=mergeme_sequence,
        lower_is_better=True,
        percent=False,
        page="mergeme.md#with-three-small-models",
        splits="Figures are of held-out texts, and nothing is chosen.",
        resumes=False,
    ),
    "mergeme_hetero": Experiment(
        "mergeme_hetero",
        {
            "quick": ("-o", "OUTPUT", "--scale", "quick", "--seeds", "1"),
            "small": ("-o", "OUTPUT"),
            "full": ("-o", "OUTPUT", "--seeds", "5"),
        },
        output="hetero.jsonl",
        is_file=True,
        tasks=DOMAINS,
        collect=mergeme_hetero,
        lower_is_better=True,
        percent=False,
        page="mergeme.md#table-4-with-another-tokenizer",
        splits="Each row's learning rates are the best on validation texts, figures are of "
        "held-out texts. The tokenizer of the music expert had been changed twice after figures of "
        "an earlier run on these had been seen.",
    ),
    "wemoe_pretrained": Experiment(
        "wemoe_pretrained",
        {
            "quick": ("-o", "OUTPUT", "--seed", "0", "--steps", "2"),
            "small": ("-o", "OUTPUT", *THREE_SEEDS, *TABLES, *SWEEPS),
            "full": ("-o", "OUTPUT", *THREE_SEEDS, *TABLES, *SWEEPS, "--steps", "500"),
        },
        output="",
        is_file=False,
        tasks=IMAGES,
        collect=wemoe,
        lower_is_better=False,
        percent=True,
        page="wemoe_images.md#on-a-pretrained-network",
        splits=f"{ADAPTED_TO_TESTS}Where nothing else is said, routers have the rate of the "
        "authors' code, 1e-3 falling by a cosine. Constants have the best of five rates on "
        "validation images.",
    ),
    "wemoe_pretrained_linear": Experiment(
        "wemoe_pretrained",
        {
            "quick": ("-o", "OUTPUT", "--seed", "0", "--steps", "2", "--head", "linear"),
            "small": ("-o", "OUTPUT", *THREE_SEEDS, "--head", "linear"),
            "full": ("-o", "OUTPUT", *THREE_SEEDS, "--head", "linear", "--steps", "500"),
        },
        output="",
        is_file=False,
        tasks=IMAGES,
        collect=wemoe,
        lower_is_better=False,
        percent=True,
        page="wemoe_images.md#what-the-head-decides",
        splits=f"{ADAPTED_TO_TESTS}Where nothing else is said, routers have the rate of the "
        "authors' code, 1e-3 falling by a cosine. Constants have the best rate on validation "
        "images in the mean over three seeds, of the two that were best of five with the first. "
        "AdaMerging by tasks has 1e-2.",
    ),
    "wemoe_images": Experiment(
        "wemoe_images",
        {
            "quick": ("-o", "OUTPUT", "--seed", "0", "--steps", "2", "--only", "table2"),
            "small": ("-o", "OUTPUT"),
            "full": ("-o", "OUTPUT", "--steps", "1000"),
        },
        output="",
        is_file=False,
        tasks=IMAGES,
        collect=wemoe,
        lower_is_better=False,
        percent=True,
        page="wemoe_images.md",
        splits=f"{ADAPTED_TO_TESTS}Their rate was chosen by test accuracy with one seed and other "
        "fine-tunes.",
    ),
    "wemoe_texts": Experiment(
        "wemoe_texts",
        {
            "quick": ("-o", "OUTPUT", "--seeds", "1", "--steps", "1", "--held-out", "2"),
            "small": ("-o", "OUTPUT", "--seeds", "3"),
            "full": ("-o", "OUTPUT", "--seeds", "3", "--steps", "300"),
        },
        output="texts.json",
        is_file=True,
        tasks=DOMAINS,
        collect=wemoe_texts,
        lower_is_better=True,
        percent=False,
        page="wemoe_texts.md",
        splits="Routers are adapted to the held-out texts that are measured, as in the paper. The "
        "rate of 1e-4 was taken after seeing such figures.",
    ),
    "tradeoffs_report": Experiment(
        "tradeoffs_report",
        {
            "quick": (
                *("-o", "OUTPUT", "--domains", "2", "--expert-steps", "2", "--epochs", "1"),
                *("--seeds", "1", "--clusters", "2"),
            ),
            "small": ("-o", "OUTPUT"),
            "full": ("-o", "OUTPUT", "--expert-steps", "200", "--blocks", "16"),
        },
        output="summary.json",
        is_file=False,
        tasks=("bible", "math", "news", "french", "dictionary", "code", "music", "german"),
        collect=tradeoffs_report,
        lower_is_better=True,
        percent=False,
        page="fusion.md",
        splits="Coefficients and routers learn on training rows. Learning rates, each the best of "
        "three with the first seed, and all other choices are made on validation rows. Figures are "
        "of test rows.",
    ),
}
