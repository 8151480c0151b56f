"""Tasks from a file: prompts, metrics, answers by generation, and the best epoch."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from click.testing import CliRunner
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from _mergekit_moe_ext_common import metrics
from _mergekit_moe_ext_common.data import Source
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.generation import generated
from _mergekit_moe_ext_common.metrics import accuracy, exact_match, metric_of, rouge_l
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.analysis import task_scores
from mergekit_moe_ext.cli import main
from mergekit_moe_ext.mixtures import tasks as tasks_module
from mergekit_moe_ext.mixtures.metrics import overall_performance
from mergekit_moe_ext.mixtures.tasks import read_tasks, with_prompts
from mergekit_moe_ext.mixtures.training import train
from mergekit_moe_ext.recipes import Recipe
from tests.conftest import read_tensors
from tests.mergekit_moe_ext.mixtures.test_usage import FAMILIES, SWITCH, make_moe, words, write
from tests.test_autoload import ROOT

READING = Reading(max_length=24, quiet=True)


def recipe(**changes):
    settings = {
        "held_out": 3,
        "mixing": "per-task",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "learning_rate": 0.01,
        "num_train_epochs": 3,
    }
    return Recipe(**{**settings, **changes})


def write_tasks(path, **changes):
    tasks = {
        "news": {
            "data": "news.jsonl",
            "prompt": "Classify: {input}",
            "metric": "accuracy",
            "max_new_tokens": 3,
            "single_task_score": 0.5,
        },
        "law": {
            "data": "law.jsonl",
            "prompt": "Question: {input}",
            "metric": "exact_match",
            "max_new_tokens": 4,
            "single_task_score": 0.25,
        },
    }
    for name, values in changes.items():
        tasks[name].update(values)
    path.write_text(yaml.safe_dump(tasks, sort_keys=False))
    return path


@pytest.fixture(params=["mixtral", "switch_transformers"])
def moe(request, tmp_path, monkeypatch):
    """A working directory with ./moe, two tasks of 11 rows and tasks.yml."""
    monkeypatch.chdir(tmp_path)
    is_decoder = request.param == "mixtral"
    make_moe(tmp_path / "moe", request.param, **(FAMILIES["mixtral"] if is_decoder else SWITCH))
    for seed, name in enumerate(["news", "law"]):
        write(tmp_path / f"{name}.jsonl", words(seed + 1, 11, ("input", "target")))
    write_tasks(tmp_path / "tasks.yml")
    return tmp_path


# Answer, right answer, accuracy, exact match as SQuAD's script has it.
ANSWERS = [
    ("World", "World", 1, 1),
    (" World\n", "World", 1, 1),
    ("world", "World", 0, 1),
    ("The Eiffel Tower.", "Eiffel tower", 0, 1),
    ("an apple, a day", "apple day", 0, 1),
    ("theatre", "atre", 0, 0),
    ("U.S.", "us", 0, 1),
    ("forty-two", "forty two", 0, 0),
    ("", "", 1, 1),
    ("the", "", 0, 1),
    ("", "nothing", 0, 0),
    ("new  york", "New York", 0, 1),
]


@pytest.mark.parametrize("answer, right, same, match", ANSWERS)
def test_labels_are_compared_by_letter_and_spans_as_squad_does(answer, right, same, match):
    assert accuracy([answer], [right]) == same
    assert exact_match([answer], [right]) == match


def test_scores_are_means_over_answers():
    answers, references = ["a cat", "dogs", "x", "y"], ["cat", "dog", "x", "z"]
    assert accuracy(answers, references) == 0.25
    assert exact_match(answers, references) == 0.5


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    # 3 words in common and in order, of 4 and of 6; none; all but the punctuation.
    assert rouge_l(["the cat sat down"], ["the big cat then sat there"]) == pytest.approx(0.6)
    assert rouge_l(["", "A, b!"], ["cat", "a b"]) == pytest.approx(0.5)


def test_overall_performance_is_the_mean_of_ratios():
    scores = {"news": 0.9, "squad": 0.6, "xsum": 0.3}
    singles = {"news": 0.9, "squad": 0.8, "xsum": 0.2}
    assert overall_performance(scores, singles) == pytest.approx((1 + 0.75 + 1.5) / 3)


def test_prompts_are_made_of_columns(tmp_path):
    task = read_tasks(
        write_tasks(tmp_path / "tasks.yml", news={"prompt": "{{Q}} {q} of {c}", "target": "label"})
    )["news"]
    rows = Dataset.from_list([{"q": "who", "c": "a {b}", "label": 3}])
    (pair,) = with_prompts(rows, Source("news", "news.jsonl"), task)
    assert pair == {"input": "{Q} who of a {b}", "target": "3"}
    with pytest.raises(UserError, match="has no column 'label'"):
        with_prompts(rows.remove_columns("label"), Source("news", "news.jsonl"), task)
    for column in ("q", "label"):
        with_null = Dataset.from_list([{**rows[0], column: None}])
        with pytest.raises(UserError, match=f"null in the column '{column}'"):
            with_prompts(with_null, Source("news", "news.jsonl"), task)


def test_the_example_is_that_of_the_docs(monkeypatch):
    monkeypatch.setattr(tasks_module, "metric_of", lambda name: None)  # rouge-score is an extra
    example = ROOT / "examples" / "caem_tasks.yml"
    assert list(read_tasks(example)) == ["news", "squad", "xsum"]
    shown = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "caem.md").read_text(), re.DOTALL)
    assert yaml.safe_load(example.read_text()) in [yaml.safe_load(text) for text in shown]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"news": {"metric": "bleu"}}, "no metric 'bleu'"),
        ({"news": {"metric": "no_such_module:score"}}, "cannot be imported"),
        ({"news": {"metric": ":score"}}, "cannot be imported"),
        ({"news": {"prompt": "Classify: {text"}}, "news.prompt"),
        ({"news": {"prompt": "Classify:"}}, "names no column"),
        ({"news": {"prompt": "Classify: {text.title}"}}, "{text.title} means a part of a column"),
        ({"news": {"prompt": "Classify: {text[0]}"}}, "without dots and brackets"),
        ({"news": {"prompt": "Classify: {}"}}, "names no column"),
        ({"news": {"prompt": "Classify {}: {text}"}}, "{} names no column"),
        ({"news": {"prompt": "Classify: {text!r}"}}, "{text} has a format after"),
        ({"news": {"prompt": "{a}: {text:>9}"}}, "{text} has a format after"),
        ({"news": {"max_tokens": 3}}, r"news\.max_tokens"),
        ({"news": {"single_task_score": None}}, "news has no single_task_score"),
    ],
)
def test_mistakes_in_a_task_file_are_named(tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        read_tasks(write_tasks(tmp_path / "tasks.yml", **changes))


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("on: {data: a.jsonl, prompt: '{a}', metric: accuracy}", "True is no name of a task"),
        ("null: {data: a.jsonl, prompt: '{a}', metric: accuracy}", "None is no name of a task"),
        ("news: a.jsonl", "news: write `data:`"),
        ("news:", "news: write `data:`"),
        ("- news", "no file of tasks"),
    ],
)
def test_what_is_no_task_is_named(tmp_path, text, complaint):
    path = tmp_path / "tasks.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_tasks(path)


@pytest.mark.parametrize("repeated", ["news: {}", "law:\n  prompt: a\n  prompt: b"])
def test_what_stands_twice_in_a_task_file_is_named(tmp_path, repeated):
    path = tmp_path / "tasks.yml"
    text = "news: {data: a.jsonl, prompt: '{a}', metric: accuracy}\n"
    path.write_text(text)
    assert list(read_tasks(path)) == ["news"]
    path.write_text(text + repeated)
    with pytest.raises(UserError, match=r"line [24]: '(news|prompt)' stands there already"):
        read_tasks(path)


@pytest.mark.parametrize("moe", ["mixtral"], indirect=True)
def test_a_prompt_of_no_tokens_is_refused_before_work(moe):
    write(moe / "empty.jsonl", [{"input": "w1", "target": "w2"}, {"input": "", "target": "w2"}])
    write_tasks(moe / "tasks.yml", news={"prompt": "{input}", "eval_data": "empty.jsonl"})
    tasks = read_tasks(moe / "tasks.yml")
    with pytest.raises(UserError, match="'news' has a prompt without any token, in row 1"):
        train("moe", "out", "all", [], READING, recipe(), tasks=tasks)
    with pytest.raises(UserError, match="'news' has a prompt without any token, in row 1"):
        task_scores("moe", "tasks.yml", reading=READING)
    assert not list(moe.glob("out*"))


def test_scores_without_training_are_those_before_training(moe, monkeypatch):
    def score(answers, references):
        return len("".join([*answers, *references])) / 1000

    monkeypatch.setattr(metrics, "metric_of", lambda name: score)
    write(moe / "law-validation.jsonl", words(7, 5, ("input", "target")))
    write_tasks(
        moe / "tasks.yml",
        news={"eval_data": "news.jsonl"},
        law={"eval_data": "law-validation.jsonl"},
    )
    one_step = recipe(max_steps=1, max_target_length=24)
    trained = train("moe", "out", "all", [], READING, one_step, tasks=read_tasks(moe / "tasks.yml"))
    scores = task_scores("moe", "tasks.yml", reading=READING, batch_size=3)
    assert scores == {
        "news_score": trained["news"]["score"][0],
        "law_score": trained["law"]["score"][0],
        "overall_performance": trained["overall"]["performance"][0],
    }
    assert scores["news_score"] != scores["law_score"]


def test_a_metric_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text("def short(a, b):\n    return len(a) / 10\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert metric_of("my_metrics:short")(["a", "b"], ["c", "d"]) == 0.2


def test_a_batch_is_answered_as_each_prompt_alone(moe):
    is_decoder = json.loads((moe / "moe" / "config.json").read_text())["model_type"] == "mixtral"
    factory = AutoModelForCausalLM if is_decoder else AutoModelForSeq2SeqLM
    model, tokenizer = factory.from_pretrained("moe").eval(), AutoTokenizer.from_pretrained("moe")
    prompts = [tokenizer(row["input"])["input_ids"] for row in words(5, 5, ("input", "target"))]
    options = {"pad_token_id": 0, "max_new_tokens": 6}
    together = generated(model, tokenizer, prompts, **options)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(input_ids=ids, do_sample=False, max_new_tokens=6, pad_token_id=0)
        tokens = alone[0, len(prompt) :] if is_decoder else alone[0]
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("moe", ["mixtral"], indirect=True)
def test_a_metric_that_fails_leaves_nothing(moe, monkeypatch):
    def failing(answers, references):
        raise ZeroDivisionError

    monkeypatch.setattr(metrics, "metric_of", lambda name: failing)
    before = sorted(moe.iterdir())
    with pytest.raises(ZeroDivisionError):
        train("moe", "out", "all", [], READING, recipe(), tasks=read_tasks(moe / "tasks.yml"))
    assert sorted(moe.iterdir()) == before


@pytest.mark.parametrize("moe", ["mixtral"], indirect=True)
def test_the_epoch_of_the_best_answers_is_written(moe, monkeypatch):
    """Scores rise and fall: 2 of 3 held-out answers are right after the second of three epochs."""
    measured = iter([0, 0, 1, 0, 2, 1, 1, 0])  # before, and after each epoch: news, then law

    def score(answers, references):
        assert len(answers) == len(references) == 3
        return next(measured) / 3

    monkeypatch.setattr(metrics, "metric_of", lambda name: score)
    tasks = read_tasks(moe / "tasks.yml")
    constant = recipe(lr_scheduler_type="constant")
    best = replace(constant, load_best_model_at_end=True, save_total_limit=1)
    results = train("moe", "best", "all", [], READING, best, tasks=tasks)
    assert results["news"]["score"] == (0, pytest.approx(2 / 3))
    assert results["law"]["score"] == (0, pytest.approx(1 / 3))
    assert results["overall"]["performance"] == (0, pytest.approx((4 / 3 + 4 / 3) / 2))
    assert "overall" in (moe / "best" / "README.md").read_text()

    # It is the model of two epochs, and where the last epoch is the best, that of all three.
    measured = iter([0] * 6)
    train("moe", "two", "all", [], READING, replace(constant, num_train_epochs=2), tasks=tasks)
    assert_same(moe / "best", moe / "two")
    measured = iter([0, 0, 0, 0, 0, 0, 3, 3])
    train("moe", "last", "all", [], READING, best, tasks=tasks)
    measured = iter([0] * 8)
    train("moe", "three", "all", [], READING, constant, tasks=tasks)
    assert_same(moe / "last", moe / "three")


def assert_same(one, other):
    expected, got = read_tensors(one), read_tensors(other)
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())


def test_the_command_prints_scores_before_and_after(moe):
    arguments = ["train", "moe", "--train", "all", "--tasks", "tasks.yml", "--held-out", "3"]
    arguments += ["--max-steps", "1", "--max-length", "24", "--quiet"]
    result = CliRunner().invoke(main, [*arguments, "-o", "out"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["task", "measure", "before", "after"]
    assert [line[:2] for line in lines[1:]] == [
        ["news", "loss"],
        ["news", "score"],
        ["law", "loss"],
        ["law", "score"],
        ["overall", "performance"],
    ]
    both = CliRunner().invoke(main, [*arguments, "--data", "news.jsonl", "-o", "other"])
    assert both.exit_code != 0 and "leave out --data" in both.output


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"metric_for_best_model": "news_score"}, "is for --load-best-model-at-end"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "news_f1"},
            "there are news_loss, law_loss, news_score",
        ),
        ({"held_out": 0}, "nothing is held out of the task news"),
        ({"packing": True}, "--packing joins texts"),
    ],
)
@pytest.mark.parametrize("moe", ["mixtral"], indirect=True)
def test_mistakes_are_found_before_work_starts(moe, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        tasks = read_tasks(moe / "tasks.yml")
        train("moe", "out", "all", [], READING, recipe(**changes), tasks=tasks)
    assert not list(moe.glob("out*"))
