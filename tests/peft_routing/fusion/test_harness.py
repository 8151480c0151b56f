"""`compare --lm-eval` against separate PEFT models, whose probabilities are added one by one."""

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoTokenizer

import peft_routing
from peft_routing import Reading, UserError, compare
from peft_routing.cli import main
from peft_routing.fusion import harness as harness_module
from tests.conftest import ON_CPU, TWO_PROCESSES, run
from tests.peft_routing.adapters import make_base, save_experts
from tests.peft_routing.fusion.test_compare import naive_answers, texts_of, write
from tests.tokenizers import save_tokenizer

NAMES = ("code", "law", "math")
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
SHARED = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "metadata": {"version": 1},
}
CHOICE = {
    **SHARED,
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_target": "label",
    "doc_to_choice": "{{answers}}",
}
# A number that hangs on every probability, and is the better the lower it is.
SURPRISE = {
    **SHARED,
    "task": "surprise",
    "output_type": "loglikelihood",
    "doc_to_target": " {{answers[0]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    ],
}
# Right where the answer begins as the documents say.
WRITTEN = {
    **SHARED,
    "task": "written",
    "output_type": "generate_until",
    "doc_to_target": "{{written}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
TASKS = {"choice": CHOICE, "surprise": SURPRISE, "written": WRITTEN}


def documents(written):
    made = []
    for number, of_base in enumerate(written):
        question = " ".join(f"w{(5 * number + 3 * place) % 90}" for place in range(6))
        answers = [f"w{(11 * number) % 90} w{number}", f"w{(11 * number + 40) % 90} w{number + 9}"]
        made.append(
            {"question": question, "answers": answers, "label": number % 2, "written": of_base}
        )
    return made


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    make_base().save_pretrained(root / "base")
    save_tokenizer(root / "base", 96)
    save_experts(root / "experts", NAMES, a_seed=7)
    for task in ("math", "law"):
        write(root / f"{task}.jsonl", texts_of(task, 0, count=8))
    # What the base model answers to every second question, so that it is not always wrong.
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    questions = [each["question"] for each in documents(["w1"] * 12)]
    answers = naive_answers([make_base()], [1], questions, tokenizer, 3)
    written = [answer if place % 2 else "w1" for place, answer in enumerate(answers)]
    rows = [json.dumps(row) + "\n" for row in documents(written)]
    (root / "questions.jsonl").write_text("".join(rows))
    for name, task in TASKS.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return root


@pytest.fixture
def here(tmp_path, monkeypatch, prepared):
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path


def compare_here(output, **options):
    tasks = {"math": "math.jsonl", "law": "law.jsonl"}
    reading = Reading(quiet=True)
    return compare("base", [], tasks, output, experts_from="experts", reading=reading, **options)


def expected(models, weights, beta=0.0):
    """What a mixture of models' probabilities is worth on each task, a text at a time."""
    tokenizer = AutoTokenizer.from_pretrained("base")

    def log_likelihood(question, answer):
        ids = tokenizer(f"{question} {answer}")["input_ids"]
        start = len(tokenizer(question)["input_ids"])
        of_models = []
        for model in models:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double()
            of_models.append(logits.softmax(dim=-1))
        total = 0.0
        current = torch.tensor(weights, dtype=torch.float64)
        for place in range(1, len(ids)):
            seen = torch.stack([each[place - 1, ids[place]] for each in of_models])
            if place >= start:
                total += math.log((current * seen).sum().item())
            current = current * seen**beta
            current = current / current.sum()
        return total

    rows = [json.loads(line) for line in Path("questions.jsonl").read_text().splitlines()]
    hits = 0
    surprises = 0.0
    for row in rows:
        values = [log_likelihood(row["question"], answer) for answer in row["answers"]]
        hits += values.index(max(values)) == row["label"]
        surprises += values[0]
    scores = {"choice": hits / len(rows), "surprise": math.exp(-surprises / len(rows))}
    if beta == 0:
        questions = [row["question"] for row in rows]
        answers = naive_answers(models, weights, questions, tokenizer, 3)
        right = [answer == row["written"] for answer, row in zip(answers, rows, strict=True)]
        scores["written"] = sum(right) / len(right)
    return scores


def found(row):
    return {task: score.value for task, score in row.lm_eval.items()}


@needs_lm_eval
def test_every_fusion_is_shown_the_same_examples(here, monkeypatch):
    """Examples are drawn at random, and anew in each evaluation."""
    import lm_eval

    asked = []
    stock = lm_eval.evaluate

    def recorded(model, tasks, **options):
        found = stock(model, tasks, **options)
        asked.append([request.args[0] for request in tasks["tasks"]["shots"].instances])
        return found

    monkeypatch.setattr(lm_eval, "evaluate", recorded)
    task = {**CHOICE, "task": "shots", "num_fewshot": 2, "fewshot_split": "test"}
    Path("shots.yaml").write_text(yaml.safe_dump(task))
    compare_here("one", strategies=["best_expert", "arrow_all"], lm_eval=["shots.yaml"])
    assert len(asked) == 3  # with the base
    assert asked[0] == asked[1] == asked[2]
    assert asked[0][0].count("w") > asked[0][0].splitlines()[-1].count("w")  # there are examples


@needs_lm_eval
def test_lm_eval_measures_every_row_that_needs_no_task(here, monkeypatch):
    names = ["best_expert", "own_expert", "learned_ensemble", "posterior_ensemble", "arrow_all"]
    options = {
        "strategies": names,
        "lm_eval": ["choice.yaml", "surprise.yaml", "written.yaml"],
        "cache": "kept",
    }
    report = compare_here("one", **options)
    experts = {name: PeftModel.from_pretrained(make_base(), f"experts/{name}").eval()
               for name in NAMES}  # fmt: skip
    peft_routing.compose("base", [], "arrow", experts_from="experts", router="arrow", top_k=3)
    arrow = PeftModel.from_pretrained(make_base(), "arrow").eval()
    learned = report.row("learned_ensemble").values["coefficients"]
    by_hand = {
        "base": expected([make_base()], [1]),
        "best_expert": expected([experts[report.row("best_expert").note]], [1]),
        "learned_ensemble": expected(list(experts.values()), [learned[name] for name in NAMES]),
        "arrow_all": expected([arrow], [1]),
    }
    for name, values in by_hand.items():
        assert found(report.row(name)) == pytest.approx(values, rel=1e-4), name
    assert 0 < by_hand["base"]["written"] < 1
    assert by_hand["base"] != by_hand["arrow_all"]
    row = report.row("posterior_ensemble")
    of_posterior = expected(list(experts.values()), [1 / 3] * 3, row.values["beta"])
    assert found(row)["surprise"] == pytest.approx(of_posterior["surprise"], rel=1e-4)
    assert row.lm_eval["choice"].metrics["acc,none"] == of_posterior["choice"]
    # The error of a share of 12, as lm_eval counts it.
    share = by_hand["base"]["choice"]
    error = math.sqrt(share * (1 - share) / 11)
    assert report.row("base").lm_eval["choice"].standard_error == pytest.approx(error)

    # Which adapter a text of lm_eval belongs to is not known.
    assert report.row("own_expert").lm_eval == {}
    cells = dict(zip([row.name for row in report.rows], report.cells(), strict=True))
    assert cells["own_expert"][-6:] == [""] * 6
    assert report.headings[-6::2] == ["choice: acc ↑", "surprise: perplexity ↓",
                                      "written: exact_match ↑"]  # fmt: skip
    assert cells["base"][-6] == f"{share:.3f}"
    content = json.loads(Path("one/report.json").read_text())
    kept = content["rows"][0]["lm_eval"]["surprise"]
    assert kept["value"] == found(report.row("base"))["surprise"]
    assert kept["higher_is_better"] is False
    best = report.row(report.best).lm_eval["choice"].value
    assert any(f"choice acc {best:.3f}" in sentence for sentence in report.sentences)

    # Nothing is asked twice, until a task's documents change.
    asked = []
    monkeypatch.setattr(harness_module, "_asked", lambda *given: asked.append(given) or 1 / 0)
    again = compare_here("two", **options)
    assert [found(row) for row in again.rows] == [found(row) for row in report.rows]
    lines = Path("questions.jsonl").read_text().splitlines()[:-1]
    Path("questions.jsonl").unlink()
    Path("questions.jsonl").write_text("\n".join(lines))
    with pytest.raises(ZeroDivisionError):
        compare_here("three", **options)
    assert len(asked) == 1


@needs_lm_eval
def test_two_processes_ask_what_one_does_and_so_many_documents(here):
    words = ["--task", "math=math.jsonl", "--strategy", "uniform_ensemble", "--max-samples", "8"]
    command = ["compare", "base", "--experts-from", "experts", *words, "--lm-eval", "choice.yaml",
               "--quiet"]  # fmt: skip
    done = run(*TWO_PROCESSES, "-m", "peft_routing", *command, "-o", "two", env=ON_CPU)
    assert done.returncode == 0, done.stderr
    result = CliRunner().invoke(main, [*command, "-o", "one"])
    assert result.exit_code == 0, result.output
    assert "choice: acc" in result.output
    rows = {}
    for output in ("one", "two"):
        content = json.loads(Path(output, "report.json").read_text())
        rows[output] = [row["lm_eval"]["choice"] for row in content["rows"]]
    assert rows["one"] == rows["two"]
    # A share of eight documents.
    assert all((8 * row["value"]).is_integer() for row in rows["one"])


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("choyce.yaml", {}, "there is no such task of lm_eval, and no such file"),
        ("own.yaml", {"doc_to_text": "{{question"}, "own.yaml: TemplateSyntaxError"),
        ("own.yaml", {"test_split": "tests"}, "own.yaml: "),
        ("own.yaml", {"unsafe_code": True}, "runs code that a model writes"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(here, monkeypatch, task, change, message):
    # The index of what comes with lm_eval takes long to read.
    monkeypatch.setattr("lm_eval.tasks._index.TaskIndex.build", lambda self, paths: {})
    Path("own.yaml").write_text(yaml.safe_dump({**CHOICE, **change}))
    with pytest.raises(UserError, match=message):
        compare_here("report", lm_eval=[task])
    assert not Path("report").exists() and not Path("report.cache").exists()


@needs_lm_eval
def test_a_group_is_measured_by_its_own_metric_or_refused(here, monkeypatch):
    from lm_eval import tasks

    # What is registered are the files of a directory, in place of all that come with lm_eval.
    manager = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda **_: manager(include_defaults=False, include_path="groups")
    )
    members = [{**CHOICE, "task": "first"}, {**CHOICE, "task": "second"}]
    group = {"group": "both", "task": members}
    Path("groups").mkdir()
    Path("groups/both.yaml").write_text(yaml.safe_dump(group))
    with pytest.raises(UserError, match="name them: both::first, both::second"):
        compare_here("report", lm_eval=["both"])
    with pytest.raises(UserError, match="did you mean 'both'"):
        compare_here("report", lm_eval=["boths"])
    with pytest.raises(UserError, match=r"groups/both.yaml: a file of a group; name its tasks"):
        compare_here("report", lm_eval=["groups/both.yaml"])
    mean = {"metric": "acc", "weight_by_size": True}
    Path("groups/both.yaml").write_text(yaml.safe_dump({**group, "aggregate_metric_list": [mean]}))
    report = compare_here("report", strategies=["base"], lm_eval=["both", "choice.yaml"])
    base = report.row("base").lm_eval
    assert base["both"].metric == "acc" and base["both"].value == base["choice"].value


def test_what_is_lacking_is_said_in_one_sentence(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    with pytest.raises(UserError, match="--lm-eval needs lm_eval: pip install"):
        compare_here("report", lm_eval=["choice.yaml"])
    assert not Path("report").exists()
