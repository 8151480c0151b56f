"""`compare` against separate PEFT models, interrupted, in two processes, with mistakes, and with
routers that it trains.
"""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import peft_routing
from peft_routing import Reading, UserError, compare, fusion
from peft_routing import training as training_module
from peft_routing.cli import main
from peft_routing.fusion import answers as answers_module
from peft_routing.fusion import cache as cache_module
from peft_routing.fusion import candidates, report, trained
from peft_routing.fusion.cache import Texts
from peft_routing.fusion.recommended import write_recommended
from peft_routing.fusion.strategies import TRAINED
from peft_routing.loading import empty_model
from tests.conftest import ON_CPU, TWO_PROCESSES, run
from tests.peft_routing.adapters import make_base, save_experts
from tests.tokenizers import save_tokenizer

NAMES = ("math", "code", "law")
FIRST_WORD = {"math": 0, "code": 30, "law": 60}


def texts_of(task, part, count=4):
    """Texts of a task: its own words, in another order in each."""
    start = FIRST_WORD[task]
    words = []
    for row in range(count):
        places = [(7 * row + 3 * step + part) % 25 for step in range(5 + row)]
        words.append(" ".join(f"w{start + place}" for place in places))
    return words


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    make_base().save_pretrained(root / "base")
    save_tokenizer(root / "base", 96)
    # Adapters of one initial A, so that low-rank mixing says something.
    save_experts(root / "experts", NAMES, a_seed=7)
    for task in NAMES:
        for part, split in enumerate(("train", "validation", "test")):
            write(root / f"{task}-{split}.jsonl", texts_of(task, part))
    return root


def three(task):
    return ",".join(f"{task}-{split}.jsonl" for split in ("train", "validation", "test"))


TASKS = {task: three(task) for task in NAMES}


def compare_here(output="report", tasks=TASKS, **options):
    return compare(
        "base", [], tasks, output, experts_from="experts", reading=Reading(quiet=True), **options
    )


@pytest.fixture(scope="module")
def compared(prepared):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        routed = {"experts": {"math": "experts/math", "law": "experts/law"}, "router": "linear"}
        peft_routing.compose("base", output="routed", **routed)
        return compare_here(fusions={"trained": "routed"}, batch_size=3)


@pytest.fixture
def here(tmp_path, monkeypatch, prepared):
    for path in prepared.iterdir():
        if not path.name.startswith("report"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def naive(prepared, adapter=None):
    """Per task the log-probabilities of the test's tokens, a text at a time, by stock PEFT."""
    model = make_base()
    if adapter:
        model = PeftModel.from_pretrained(model, str(prepared / adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(prepared / "base")
    tasks = []
    for task in NAMES:
        values = []
        for text in texts_of(task, 2):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
            values.append(logits.gather(1, ids[0, 1:, None])[:, 0])
        tasks.append(values)
    return tasks


def losses_of(tasks):
    return [-torch.cat(values).mean().item() for values in tasks]


@pytest.fixture(scope="module")
def alone(prepared):
    """What `naive` gives for each adapter and, last, for the base model."""
    return [naive(prepared, f"experts/{name}") for name in sorted(NAMES)] + [naive(prepared)]


def test_the_rows_of_one_adapter_are_what_peft_gives(compared, alone):
    losses = torch.tensor([losses_of(each) for each in alone]).T
    torch.testing.assert_close(compared.tables.test.losses, losses.double(), atol=2e-5, rtol=0)
    assert compared.row("base").test == pytest.approx(losses_of(alone[-1]), abs=2e-5)
    best = compared.row("best_expert")
    own = losses_of(alone[sorted(NAMES).index(best.note)])
    assert best.test == pytest.approx(own, abs=2e-5)
    diagonal = [losses_of(alone[sorted(NAMES).index(task)])[place]
                for place, task in enumerate(NAMES)]  # fmt: skip
    assert compared.row("own_expert").test == pytest.approx(diagonal, abs=2e-5)


def test_the_rows_of_ensembles_are_mixtures_of_what_peft_gives(compared, alone):
    for name in ("uniform_ensemble", "learned_ensemble", "sparse_ensemble", "program_ensemble"):
        if name in compared.left_out:  # without scipy
            continue
        row = compared.row(name)
        coefficients = [row.values["coefficients"][each] for each in sorted(NAMES)]
        assert sum(coefficients) == pytest.approx(1)
        expected = []
        for task in range(3):
            probabilities = 0.0
            for coefficient, of_expert in zip(coefficients, alone[:-1], strict=True):
                probabilities = probabilities + coefficient * torch.cat(of_expert[task]).exp()
            expected.append(-probabilities.log().mean().item())
        assert row.test == pytest.approx(expected, abs=2e-5), name
        assert row.passes == sum(coefficient > 0 for coefficient in coefficients)


def test_the_logit_ensemble_is_the_mean_of_peft_s_logits(compared, prepared):
    row = compared.row("logit_ensemble")
    models = []
    for name in NAMES:
        path = str(prepared / "experts" / name)
        models.append(PeftModel.from_pretrained(make_base(), path).eval())
    tokenizer = AutoTokenizer.from_pretrained(prepared / "base")
    losses = []
    for task in NAMES:
        of_texts = []
        for text in texts_of(task, 2):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                mean = sum(model(input_ids=ids).logits[0, :-1].double() for model in models) / 3
            of_texts.append(mean.log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0])
        losses.append(of_texts)
    assert row.test == pytest.approx(losses_of(losses), abs=2e-5)
    assert (row.kind, row.passes) == ("ensemble", 3)


def naive_answers(models, weights, prompts, tokenizer, number):
    """Greedy answers by a mixture of the models' probabilities, a token and a prompt at a time."""
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        while len(ids) - start < number and ids[-1] != tokenizer.eos_token_id:
            mixture = 0.0
            with torch.no_grad():
                for model, weight in zip(models, weights, strict=True):
                    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
                    mixture = mixture + weight * logits.softmax(dim=-1)
            ids.append(int(mixture.argmax()))
        answers.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return answers


OVERLAP = """
CALLS = []

def overlap(answers, references):
    CALLS.append((answers, references))
    common = [set(a.split()) & set(b.split()) for a, b in zip(answers, references, strict=True)]
    return sum(map(len, common)) / len(common)
"""


def test_a_metric_measures_what_every_row_answers(here, monkeypatch):
    (here / "own_metric.py").write_text(OVERLAP)
    monkeypatch.syspath_prepend(here)
    tasks = {}
    prompts = {}
    targets = {}
    for task in ("math", "law"):
        prompts[task] = texts_of(task, 0)
        targets[task] = [" ".join(text.split()[:3]) for text in texts_of(task, 1)]
        rows = []
        for prompt, target in zip(prompts[task], targets[task], strict=True):
            rows.append(json.dumps({"input": prompt, "target": target}) + "\n")
        (here / f"pairs-{task}.jsonl").write_text("".join(rows))
        tasks[task] = ",".join([f"pairs-{task}.jsonl"] * 3)
    names = ["best_expert", "own_expert", "own_cluster", "learned_ensemble", "uniform_ensemble",
             "arrow_all"]  # fmt: skip
    (here / "own-clusters.json").write_text('{"clusters": {"code": 0, "law": 0, "math": 1}}')
    options = {"strategies": names, "metric": "own_metric:overlap", "completions_only": True,
               "clusters_from": "own-clusters.json"}  # fmt: skip
    found = compare_here("one", tasks, cache="kept", **options)
    import own_metric

    tokenizer = AutoTokenizer.from_pretrained("base")
    experts = {}
    for name in NAMES:
        path = f"experts/{name}"
        experts[name] = PeftModel.from_pretrained(make_base(), path).eval()

    def expected(models, weights):
        scores = []
        for task in tasks:
            answers = naive_answers(models, weights, prompts[task], tokenizer, 4)
            scores.append(own_metric.overlap(answers, targets[task]))
        return scores

    assert own_metric.CALLS[0][1] == targets["math"]
    assert found.row("base").scores == expected([make_base()], [1])
    assert found.row("best_expert").scores == expected(
        [experts[found.row("best_expert").note]], [1]
    )
    own = [expected([experts[task]], [1])[place] for place, task in enumerate(tasks)]
    assert found.row("own_expert").scores == own
    of_cluster = expected([experts["code"], experts["law"]], [0.5, 0.5])
    assert found.row("own_cluster").scores == [own[0], of_cluster[1]]
    for row in (found.row("learned_ensemble"), found.row("uniform_ensemble")):
        weights = row.values["coefficients"]
        assert row.scores == expected(list(experts.values()), [weights[name] for name in experts])
    peft_routing.compose("base", [], "arrow", experts_from="experts", router="arrow", top_k=3)
    arrow = PeftModel.from_pretrained(make_base(), "arrow").eval()
    assert found.row("arrow_all").scores == expected([arrow], [1])
    assert "| own\\_metric:overlap |" in Path("one/report.md").read_text()
    content = json.loads(Path("one/report.json").read_text())
    assert content["metric"] == "own_metric:overlap"
    best = found.row(found.best)
    score = sum(best.scores) / len(best.scores)
    assert any(f"own_metric:overlap {score:.3f}" in each for each in found.sentences)
    assert content["rows"][0]["scores"] == found.row("base").scores

    # Nothing is generated twice.
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(answers_module, "answers_to", never)
    again = compare_here("two", tasks, cache="kept", **options)
    assert [row.scores for row in again.rows] == [row.scores for row in found.rows]
    file = next(Path("kept").glob("*.answers-4.json"))
    file.write_text("[]")
    with pytest.raises(UserError, match="does not hold 4 answers; remove it"):
        compare_here("three", tasks, cache="kept", **options)


def test_a_decoder_s_prompt_of_no_tokens_is_refused():
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}])
    texts = Texts.of("math", "test", rows, is_encoder_decoder=False)
    with pytest.raises(UserError, match="task 'math', test: a prompt has no token"):
        answers_module.Questions.of(texts, None, is_encoder_decoder=False, max_length=None)


def test_the_posterior_follows_the_texts_that_peft_read(compared, alone):
    row = compared.row("posterior_ensemble")
    beta = row.values["beta"]
    expected = []
    for task in range(3):
        losses = []
        for text in range(4):
            values = torch.stack([of_expert[task][text] for of_expert in alone[:-1]])
            weights = torch.full((3,), 1 / 3, dtype=torch.float64)
            for step in values.T:
                losses.append(-(weights * step.exp()).sum().log().item())
                weights = weights * step.exp() ** beta
                weights = weights / weights.sum()
        expected.append(sum(losses) / len(losses))
    assert row.test == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("uniform_full", {"router": "uniform", "mixing": "full"}),
        ("uniform_low_rank", {"router": "uniform", "mixing": "low_rank"}),
        ("arrow_top1", {"router": "arrow", "top_k": 1}),
        ("arrow_all", {"router": "arrow", "top_k": 3}),
    ],
)
def test_a_composed_row_is_the_composed_adapter_s(compared, prepared, tmp_path, name, options):
    out = str(tmp_path / "adapter")
    peft_routing.compose(
        str(prepared / "base"), [], out, experts_from=str(prepared / "experts"), **options
    )
    assert compared.row(name).test == pytest.approx(losses_of(naive(prepared, out)), abs=2e-5)
    assert compared.row(name).passes == 1


@pytest.mark.parametrize("name", ["ties", "dare"])
def test_a_merge_is_a_plain_adapter_in_the_cache(compared, prepared, name):
    (merged,) = (prepared / "report.cache").glob(f"{name}-*")
    found = losses_of(naive(prepared, f"report.cache/{merged.name}"))
    assert compared.row(name).test == pytest.approx(found, abs=2e-5)
    assert compared.row(name).kind == "plain LoRA"


def test_an_adapter_of_the_users_own_is_a_row(compared, prepared):
    row = compared.row("trained")
    assert row.test == pytest.approx(losses_of(naive(prepared, "routed")), abs=2e-5)
    assert row.kind == "routed" and row.megabytes > 0


@pytest.mark.parametrize(
    "name",
    ["best_expert", "uniform_low_rank", "uniform_full", "arrow_all", "ties", "learned_ensemble",
     "posterior_ensemble", "logit_ensemble"],
)  # fmt: skip
def test_what_is_recommended_gives_its_row_s_figures(compared, prepared, tmp_path, name):
    row = compared.row(name)
    experts = {each: str(prepared / path) for each, path in compared.experts.items()}
    merged = [str(path) for path in (prepared / "report.cache").glob(f"{name}-*")]
    out = tmp_path / "recommended"
    empty = empty_model(make_base().config, Reading())
    assert write_recommended(row, experts, "".join(merged), empty, out)
    if "ensemble" not in name:
        assert losses_of(naive(prepared, out)) == pytest.approx(row.test, abs=2e-5)
        return
    mixture = peft_routing.ensemble(
        PeftModel.from_pretrained(make_base(), str(out)).eval(),
        **json.loads((out / "ensemble.json").read_text()),
    )
    tokenizer = AutoTokenizer.from_pretrained(prepared / "base")
    losses = []
    for task in NAMES:
        of_texts = []
        for text in texts_of(task, 2):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = mixture(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
            of_texts.append(logits.gather(1, ids[0, 1:, None])[:, 0])
        losses.append(of_texts)
    assert losses_of(losses) == pytest.approx(row.test, abs=2e-5)


def test_the_base_model_needs_no_files(compared, tmp_path):
    row = compared.row("base")
    assert not write_recommended(row, compared.experts, "", make_base(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_calibration_is_the_gap_of_rows_with_fewer_experts(compared, prepared):
    gaps = {gap.one: gap for gap in compared.calibration}
    assert gaps.keys() == {"arrow_top1", "trained, top 1"}
    assert gaps["arrow_top1"].many == "arrow_all"
    model = PeftModel.from_pretrained(make_base(), str(prepared / "routed")).eval()
    model.base_model.set_routing(top_k=1)
    losses = []
    tokenizer = AutoTokenizer.from_pretrained(prepared / "base")
    for task in NAMES:
        ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts_of(task, 2)]
        with torch.no_grad():
            of_texts = [model(input_ids=row, labels=row).loss * (row.shape[1] - 1) for row in ids]
        losses.append((sum(of_texts) / sum(row.shape[1] - 1 for row in ids)).item())
    assert compared.row("trained, top 1").test == pytest.approx(losses, abs=2e-5)
    # Of two experts, two are all.
    assert compared.row("trained, top 2").test == pytest.approx(compared.row("trained").test)
    gap = gaps["trained, top 1"].gap
    whole = compared.row("trained").test_loss
    assert gap == pytest.approx(sum(losses) / 3 - whole, abs=4e-5)
    assert any(line.startswith("calibration (B.4)") for line in report.notes(compared))


def test_the_pareto_front_has_what_nothing_cheaper_beats(compared):
    front = report.pareto(compared.rows)
    for row in compared.rows:
        cheaper = [each for each in front if each.passes <= row.passes]
        assert min(each.test_loss for each in cheaper) <= row.test_loss
    losses = [row.test_loss for row in front]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == len(losses)


def test_times_of_another_machine_are_left_out(compared, here, monkeypatch, prepared):
    monkeypatch.setattr(cache_module, "this_machine", lambda: "elsewhere")
    again = compare_here(
        strategies=["learned_ensemble", "arrow_all"], cache=str(prepared / "report.cache")
    )
    assert all(row.milliseconds is None for row in again.rows)
    assert "another machine" in "".join(report.notes(again))
    assert all(row.milliseconds > 0 for row in compared.rows)


def test_a_merge_that_cannot_be_written_is_an_error(compared, here, monkeypatch, prepared):
    def full(*_, **__):
        raise UserError("no room to write it")

    monkeypatch.setattr(candidates, "write_merge", full)
    with pytest.raises(UserError, match="no room"):
        compare_here(strategies=["ties"])


def test_an_adapter_of_another_type_is_not_called_a_router(compared, here, prepared):
    get_peft_model(make_base(), IA3Config(task_type="CAUSAL_LM")).save_pretrained("ia3")
    again = compare_here(
        strategies=["base"], fusions={"ia3": "ia3"}, cache=str(prepared / "report.cache")
    )
    assert again.row("ia3").kind == "other adapter"


def test_choices_are_of_validation_and_figures_of_test(compared):
    validation = compared.tables.validation.losses
    best = compared.row("best_expert")
    place = validation[:, :-1].mean(dim=0).argmin()
    assert best.note == sorted(NAMES)[place]
    contenders = [row for row in compared.rows if row.kind != "by task"]
    assert compared.best == min(contenders, key=lambda row: row.validation_loss).name
    learned = compared.row("learned_ensemble")
    train = compared.tables.train
    solution = fusion.learned(train.of_experts, train.weights)
    assert list(learned.values["coefficients"].values()) == pytest.approx(
        solution.coefficients.tolist(), abs=1e-5
    )


def test_the_report_has_the_table_the_sentences_and_figures(compared, prepared):
    out = prepared / "report"
    figures = {"losses.png", "pareto.png", "loss_matrix.png", "coefficients.png", "selection.png"}
    others = {"report.json", "report.md", "recommended"}
    assert {path.name for path in out.iterdir()} == {*others, *figures}
    for name in figures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    told = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in told["rows"]] == [row.name for row in compared.rows]
    row = next(row for row in told["rows"] if row["name"] == "arrow_all")
    differences = torch.tensor(compared.row("arrow_all").test) - torch.tensor(
        compared.row(compared.best).test
    )
    assert row["difference_to_best"] == pytest.approx(differences.mean().item(), abs=1e-6)
    assert row["standard_error_of_difference"] == pytest.approx(
        differences.std().item() / math.sqrt(3), abs=1e-6
    )
    markdown = (out / "report.md").read_text()
    assert markdown.count("\n| ") == len(compared.rows) + 1
    assert compared.sentences[0].startswith("one pass, one plain LoRA: ")
    assert len(report.table(compared).splitlines()) == len(compared.rows) + 1
    assert told["losses"]["columns"] == [*sorted(NAMES), "base model"]
    assert sorted(told["selected"]["order"]) == sorted(NAMES)


def test_a_second_report_measures_nothing_and_is_the_same(compared, here, monkeypatch, prepared):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(cache_module, "measure", never)
    again = compare_here(
        "again", fusions={"trained": "routed"}, cache=str(prepared / "report.cache")
    )
    first = json.loads((prepared / "report" / "report.json").read_text())
    second = json.loads(Path("again/report.json").read_text())
    assert first == second and again.rows == compared.rows


def test_an_interrupted_comparison_goes_on_where_it_was(compared, here, monkeypatch):
    stock = cache_module.measure
    measured = []

    def interrupted(*arguments):
        if len(measured) == 7:
            raise KeyboardInterrupt
        measured.append(1)
        return stock(*arguments)

    monkeypatch.setattr(cache_module, "measure", interrupted)
    strategies = ["base", "learned_ensemble", "arrow_all"]
    with pytest.raises(KeyboardInterrupt):
        compare_here(strategies=strategies, batch_size=3)
    assert not Path("report").exists() and len(list(Path("report.cache").iterdir())) == 7
    measured[:] = [1] * 10
    again = compare_here(strategies=strategies, batch_size=3)
    # Four columns on three splits of three tasks, and arrow on two splits of them.
    assert len(measured) == 10 + 4 * 9 + 6 - 7
    for row in again.rows:
        assert row.test == compared.row(row.name).test


def test_one_more_adapter_costs_one_adapter(compared, here, monkeypatch, prepared):
    stock = cache_module.measure
    measured = []

    def counted(*arguments):
        measured.append(1)
        return stock(*arguments)

    monkeypatch.setattr(cache_module, "measure", counted)
    save_experts(here / "more", ("news",), a_seed=9)
    compare(
        "base", {"news": "more/news"}, TASKS, "report", experts_from="experts",
        strategies=["learned_ensemble"], cache=str(prepared / "report.cache"),
        reading=Reading(quiet=True),
    )  # fmt: skip
    assert len(measured) == 9


def test_one_source_is_split_and_rows_in_two_splits_are_told(here, caplog):
    rows = [f"w{row} w{row + 1} w{row + 2}" for row in range(12)]
    write(here / "all.jsonl", rows)
    write(here / "same.jsonl", rows[:4])
    with caplog.at_level(logging.WARNING):
        one = compare_here("one", {"all": "all.jsonl"}, strategies=["base", "best_expert"])
    assert "are in train" not in caplog.text
    splits = [one.tables.train, one.tables.validation, one.tables.test]
    assert [int(table.texts_of.max()) + 1 for table in splits] == [6, 3, 3]
    with caplog.at_level(logging.WARNING):
        compare_here(
            "two", {"same": "same.jsonl,same.jsonl,same.jsonl"}, strategies=["base"],
            cache="one.cache",
        )  # fmt: skip
    assert "task 'same': 4 of 4 rows of the test are in train or validation" in caplog.text
    # One task says nothing of how sure its mean is.
    told = json.loads(Path("one/report.json").read_text())
    assert all(row["standard_error"] is None for row in told["rows"])


def test_what_cannot_be_fused_is_left_out_with_its_reason(here):
    save_experts(here / "wide", ("wide",), r=6)
    comparison = compare(
        "base", {"math": "experts/math", "wide": "wide/wide"}, {"code": three("code")}, "report",
        strategies=["best_expert", "own_expert", "uniform_low_rank", "arrow_top4"],
        reading=Reading(quiet=True),
    )  # fmt: skip
    assert "needs one rank per module" in comparison.left_out["uniform_low_rank"]
    assert "no expert is called 'code'" in comparison.left_out["own_expert"]
    assert "as arrow_all does" in comparison.left_out["arrow_top4"]
    assert [row.name for row in comparison.rows] == ["base", "best_expert"]


def test_experts_that_are_first_on_the_test_are_not_clearly_beaten(compared):
    beaten = [
        fusion.NotFirst("math", "law", 2.0, 0.1, 12),
        fusion.NotFirst("code", "law", -2.0, 0.1, 12),
    ]
    line = report.notes(replace(compared, not_first=beaten))[-1]
    assert line.startswith("2 of 3 experts are not first") and "1 of them clearly so" in line


def test_notes_are_sentences_with_few_tasks_and_few_experts(compared):
    gap = report.Calibration("linear, top 1", "linear", 0.1, math.nan)
    for reached, words in ((0, "the base model alone is as good"), (2, "the first 2 of it do as")):
        selected = replace(compared.selected, reaches_own=reached)
        lines = report.notes(replace(compared, selected=selected, calibration=[gap]))
        assert sum(words in line for line in lines) == 1
        assert "calibration (B.4): linear, top 1 is +0.1000 to linear" in lines


def test_two_processes_measure_what_one_does(compared, here):
    tasks = [word for task in NAMES for word in ("--task", f"{task}={three(task)}")]
    wanted = ["--strategy", "learned_ensemble", "--strategy", "arrow_all"]
    result = run(
        *TWO_PROCESSES, "-m", "peft_routing", "compare", "base", "--experts-from", "experts",
        *tasks, *wanted, "-o", "report", "--batch-size", "3", "--quiet", env=ON_CPU,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("learned_ensemble  ") == 1  # one process prints
    for row in json.loads(Path("report/report.json").read_text())["rows"]:
        assert row["test"] == compared.row(row["name"]).test


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "math=a.jsonl,b.jsonl"], "name one source, which is split, or three"),
        (["--task", "math=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--task", "math=law-test.jsonl", "--metric", "exact"], "there is no metric 'exact'"),
        (["--task", "math=law-test.jsonl", "--metric", "accuracy"], "give --completions-only"),
        (["--task", "math=law-test.jsonl", "--strategy", "arow"], "there is no strategy 'arow'"),
        (["--task", "math=law-test.jsonl", "--fusion", "arrow_all=routed"], "a row has that name"),
        (["--task", "math=law-test.jsonl", "--fusion", "x=./nothing"], "no such directory"),
        (["--task", "math=law-test.jsonl", "--fusion", "x=per-text"], "chooses per sequence"),
        (["--task", "math=law-test.jsonl", "--fusion", "x=misfit"], "x=misfit does not fit"),
        (["--task", "math=law-test.jsonl", "--fusion", "x=prompt"], "a prompt (PROMPT_TUNING)"),
        (["--task", "math=law-test.jsonl", "--expert", "broken=broken"], "holds NaN or infinity"),
        (["--task", "math=law-test.jsonl", "-o", "experts"], "is not empty"),
        (["--task", "math=law-test.jsonl", "--own", "maths=law"], "there is no task 'maths'"),
        (["--task", "math=law-test.jsonl", "--own", "math=laws"], "there is no adapter 'laws'"),
        (["--task", "math=law-test.jsonl", "--beside", "x=experts"], "there is no report.json"),
        (["--task", "math=law-test.jsonl", "--cache", "report/kept"], "lies in the output"),
        (["--task", "math=law-test.jsonl", "--cache", "base"], "base holds a config.json"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(here, options, message):
    if "x=per-text" in options:
        peft_routing.compose("base", [], "per-text", experts_from="experts", granularity="sequence")
    if "x=misfit" in options:
        save_experts(here, ("misfit",), base=make_base(hidden_size=64))
    if "x=prompt" in options:
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        get_peft_model(make_base(), prompt).save_pretrained("prompt")
    if "broken=broken" in options:
        path = Path(save_experts(here, ("broken",))["broken"]) / "adapter_model.safetensors"
        tensors = load_file(path)
        first = next(iter(tensors))
        save_file({**tensors, first: tensors[first] * torch.nan}, path)
    output = [] if "-o" in options else ["-o", "report"]
    result = CliRunner().invoke(
        main, ["compare", "base", "--experts-from", "experts", *options, *output, "--quiet"]
    )
    assert result.exit_code == 1 and message in result.output, result.output
    assert not Path("report").exists() and not Path("report.cache").exists()


def test_an_adapter_may_be_of_several_tasks(compared, alone, here, prepared):
    row = compare_here(
        own={"math": "law"}, strategies=["own_expert"], cache=str(prepared / "report.cache")
    ).row("own_expert")
    code, law, _ = sorted(NAMES)
    expected = []
    for task, name in enumerate((law, code, law)):
        expected.append(losses_of(alone[sorted(NAMES).index(name)])[task])
    assert row.test == pytest.approx(expected, abs=2e-5)


def test_the_oracle_of_clusters_mixes_the_own_expert_s_neighbours(compared, alone, here, prepared):
    (here / "own-clusters.json").write_text('{"clusters": {"code": 0, "law": 0, "math": 1}}')
    found = compare_here(
        strategies=["own_expert", "own_cluster"], clusters_from="own-clusters.json",
        cache=str(prepared / "report.cache"),
    )  # fmt: skip
    row = found.row("own_cluster")
    of_code, of_law, of_math, _ = alone
    expected = [losses_of(of_math)[0]]
    for task in (1, 2):
        pair = [torch.cat(of_expert[task]).exp() for of_expert in (of_code, of_law)]
        expected.append(-((pair[0] + pair[1]) / 2).log().mean().item())
    assert row.test == pytest.approx(expected, abs=2e-5)
    assert row.passes == pytest.approx(5 / 3)
    # An ensemble is no answer to who serves one LoRA per request.
    (sentence,) = [each for each in found.sentences if each.startswith("one plain LoRA per req")]
    assert "own_cluster" not in sentence


def test_reports_of_other_adapters_are_set_beside(compared, here, prepared):
    cache = str(prepared / "report.cache")
    other = compare("base", ["experts/math", "experts/law"], dict(reversed(TASKS.items())), "few",
                    strategies=["best_expert", "uniform_ensemble", "arrow_all"], cache=cache,
                    reading=Reading(quiet=True))  # fmt: skip
    words = [word for task in NAMES for word in ("--task", f"{task}={three(task)}")]
    chosen = ["--strategy", "uniform_ensemble", "--strategy", "arrow_all", "--strategy", "ties"]
    result = CliRunner().invoke(
        main,
        ["compare", "base", "--experts-from", "experts", *words, *chosen, "-o", "report",
         "--beside", "few=few", "--cache", cache, "--quiet"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    pairs = json.loads(Path("report/report.json").read_text())["beside"]
    assert [pair["name"] for pair in pairs] == ["uniform_ensemble", "arrow_all"]
    for pair in pairs:
        own = compared.row(pair["name"]).test
        losses = other.row(pair["name"]).test[::-1]
        differences = [mine - his for mine, his in zip(own, losses, strict=True)]
        assert pair["test"] == pytest.approx(losses)
        assert pair["difference"] == pytest.approx(sum(differences) / 3, abs=1e-6)
        spread = torch.tensor(differences).std().item() / math.sqrt(3)
        assert pair["standard_error"] == pytest.approx(spread, abs=1e-6)
    assert "## Beside few" in Path("report/report.md").read_text()
    assert Path("report/beside.png").read_bytes().startswith(b"\x89PNG")
    assert "uniform_ensemble is " in result.output and "to that of few" in result.output
    best = json.loads(Path("report/report.json").read_text())["best"]
    line = f"report/recommended: {best}, the best on validation\n"
    assert result.output.endswith(line) == Path("report/recommended").exists() == (best != "base")


def test_a_report_of_other_texts_or_another_model_is_refused(compared, here, prepared):
    report_json = json.loads((prepared / "report" / "report.json").read_text())
    (here / "earlier").mkdir()
    wrong = {"of other texts": {"texts": {**report_json["texts"], "law": "0"}},
             "of another base model": {"model": "0"},
             "is damaged|give its compare again": {"rows": [{}]}}  # fmt: skip
    for message, change in wrong.items():
        (here / "earlier" / "report.json").write_text(json.dumps({**report_json, **change}))
        with pytest.raises(UserError, match=message.replace("of other texts", "the same texts")):
            compare_here(beside={"earlier": "earlier"})
    assert not Path("report.cache").exists()


def test_one_adapter_alone_is_not_compared(here):
    with pytest.raises(ValueError, match="at least two adapters"):
        compare("base", ["experts/math"], TASKS, "report")


SHORT = {"max_steps": 2, "learning_rates": [1e-2, 1e-4]}


@pytest.fixture(scope="module")
def with_trained(prepared):
    """A comparison with all routers that can be trained."""
    clusters = {"clusters": {"code": 0, "law": 0, "math": 1}}
    (prepared / "clusters.json").write_text(json.dumps(clusters))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        return compare_here(
            "report-trained", strategies=["best_expert"], trained=True,
            clusters_from="clusters.json", **SHORT,
        )  # fmt: skip


def never_trains(monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(trained, "train", never)


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_row_is_what_peft_loads(with_trained, prepared, name):
    row = with_trained.row(name)
    (directory,) = (prepared / "report-trained.cache").glob(f"{name}-*")
    assert losses_of(naive(prepared, directory)) == pytest.approx(row.test, abs=2e-5)
    assert row.kind == ("plain LoRA" if name in ("global", "layer") else "routed")
    # Three modules in each of three layers, two of them 32 wide and one 48.
    width = 3 * (32 + 32 + 48)
    parameters = {"global": 3, "layer": 9 * 3}
    if name.startswith("hierarchical"):
        parameters[name] = 2 * width + 9 * 3
    assert row.parameters == parameters.get(name, 3 * width)


@pytest.mark.parametrize("name", TRAINED)
def test_the_learning_rate_of_a_trained_row_is_chosen_on_validation(with_trained, name):
    row = with_trained.row(name)
    losses = {float(rate): loss for rate, loss in row.values["validation_losses"].items()}
    assert losses.keys() == {1e-2, 1e-4}
    assert row.values["learning_rate"] == min(losses, key=losses.get)
    assert row.validation_loss == pytest.approx(min(losses.values()), abs=2e-5)


@pytest.mark.parametrize("name", ["layer", "linear", "linear, top 1"])
def test_what_is_recommended_of_trained_rows_gives_their_figures(
    with_trained, prepared, tmp_path, name
):
    (directory,) = (prepared / "report-trained.cache").glob(f"{name.split(',')[0]}-*")
    row = with_trained.row(name)
    out = tmp_path / "recommended"
    assert write_recommended(row, with_trained.experts, str(directory), make_base(), out)
    assert losses_of(naive(prepared, out)) == pytest.approx(row.test, abs=2e-5)


def test_a_second_comparison_trains_nothing(with_trained, here, monkeypatch, prepared):
    never_trains(monkeypatch)
    tasks = [word for task in NAMES for word in ("--task", f"{task}={three(task)}")]
    rates = ["--learning-rate", "1e-2", "--learning-rate", "1e-4", "--max-steps", "2"]
    result = CliRunner().invoke(
        main,
        ["compare", "base", "--experts-from", "experts", *tasks, "-o", "report", "--quiet",
         "--strategy", "best_expert", "--trained", "--clusters-from", "clusters.json", *rates,
         "--cache", str(prepared / "report-trained.cache")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads(Path("report/report.json").read_text())
    assert content == json.loads((prepared / "report-trained/report.json").read_text())
    assert "linear: trained at the learning rate" in result.output


def test_an_interrupted_training_goes_on_where_it_was(with_trained, here, monkeypatch):
    stock = training_module._write_result
    ended = []

    def interrupted(*arguments):
        if len(ended) == 1:
            raise KeyboardInterrupt
        ended.append(arguments[2])
        return stock(*arguments)

    monkeypatch.setattr(training_module, "_write_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_here(strategies=["linear"], **SHORT)
    assert ended == [1e-2] and not Path("report").exists()
    ended.clear()
    again = compare_here(strategies=["linear"], **SHORT)
    assert ended == [1e-4]
    row = again.row("linear")
    whole = with_trained.row("linear")
    assert row.test == pytest.approx(whole.test, abs=1e-6)
    losses = row.values["validation_losses"]
    assert losses == pytest.approx(whole.values["validation_losses"])
    assert not list(Path("report.cache").glob("*.unfinished"))


def test_nothing_is_trained_unasked(here, monkeypatch, prepared):
    never_trains(monkeypatch)
    found = compare_here(cache=str(prepared / "report-trained.cache"))
    assert not TRAINED.keys() & {*[row.name for row in found.rows], *found.left_out}


def test_a_router_that_would_be_too_large_is_left_out(with_trained, here, monkeypatch, prepared):
    never_trains(monkeypatch)
    monkeypatch.setattr(trained, "MOST_PER_MODULE", 3 * 48 - 1)
    found = compare_here(
        strategies=["global", "linear"], cache=str(prepared / "report-trained.cache"), **SHORT
    )
    assert [row.name for row in found.rows] == ["base", "global"]
    (line,) = [line for line in report.notes(found) if line.startswith("linear is left out")]
    assert "144 numbers in one module (experts times width), and none of more than 143" in line


def test_clusters_are_asked_for_where_they_matter(here):
    with pytest.raises(UserError, match="needs the cluster of each expert"):
        compare_here(strategies=["hierarchical_arrow"])
    (here / "own-clusters.json").write_text('{"clusters": {"code": 0, "law": 0, "math": 1}}')
    with pytest.raises(UserError, match="--clusters-from is for --strategy with one of own_clus"):
        compare_here(clusters_from="own-clusters.json", strategies=["linear"])
    for options in ({"max_steps": 3}, {"num_train_epochs": 1.0}, {"learning_rates": [0.1]}):
        with pytest.raises(UserError, match="are for routers that are trained"):
            compare_here(strategies=["uniform_full"], **options)


def test_a_learning_rate_that_diverged_is_noted_as_json_can():
    results = [
        training_module.Result(1e-3, {"math": (2.0, 1.0), "law": (2.0, 1.5)}),
        training_module.Result(1e3, {"math": (2.0, math.nan), "law": (2.0, math.nan)}),
    ]
    notes = trained._notes(results)
    assert notes == {"learning_rate": 1e-3, "validation_losses": {"0.001": 1.25, "1000": None}}


def test_several_processes_do_not_train(here):
    planned = {"global": trained.Planned("plain LoRA", {"router": "global"}, 2)}
    recipe = trained.Training(peft_routing.Recipe(), [1e-3])
    texts = {"train": [], "validation": []}
    setting = trained.Setting("base", {}, make_base(), {}, texts, here, Reading(), recipe)
    with pytest.raises(UserError, match="global is yet to be trained, which one process does"):
        trained.add_trained({}, planned, setting, SimpleNamespace(num_processes=2))
