"""The rule of `examples/verdicts.py`, and the page of the papers' claims."""

import json
import math
import sys

import pytest
import torch

from tests.test_autoload import ROOT
from tests.test_caem_switch import write_records


@pytest.fixture
def verdicts(examples):
    import verdicts

    return verdicts


@pytest.mark.parametrize(
    ("differences", "is_drawn", "word"),
    [
        ([[0.2], [0.21], [0.19]], True, "holds"),
        ([[-0.2], [-0.21], [-0.19]], True, "does not hold"),
        ([[0.2], [0.21], [-0.01]], True, "unclear"),  # one seed is the other way
        ([[0.01], [0.5], [0.01]], True, "unclear"),  # all are above 0, but far from each other
        ([[0.2], [0.21]], True, "unclear"),  # two seeds
        ([[0.0], [0.0], [0.0]], True, "unclear"),
        ([[0.1], [0.1], [0.1]], True, "holds"),  # no spread at all
        ([[0.9, -0.1, -0.1]] * 3, True, "unclear"),  # one task of three makes the mean
        ([[0.9, 0.1, -0.1]] * 3, True, "holds"),
        ([[0.1, 0.2, 0.15, 0.1, 0.2]], True, "unclear"),  # one seed, where there could be several
        ([[0.1, 0.2, 0.15, 0.1, 0.2]], False, "holds"),
        ([[0.1, 0.2, 0.15, 0.1]], False, "unclear"),  # four tasks
    ],
)
def test_the_rule(verdicts, differences, is_drawn, word):
    assert verdicts.judge(differences, is_drawn).word == word


def test_a_verdict_tells_what_it_rests_on(verdicts):
    verdict = verdicts.judge([[1.0, -2.0], [3.0, 1.0], [2.0, -2.0]])
    assert (verdict.of_seeds, verdict.of_tasks) == ((-0.5, 2.0, 0.0), (2.0, -1.0))
    error = torch.tensor([-0.5, 2.0, 0.0]).std().item() / math.sqrt(3)
    assert verdict.text(2) == f"unclear (+0.50 ± {error:.2f}, 1 of 3 seeds, 1 of 2 tasks)"
    assert verdicts.single([0.25]).text() == "unclear (+0.250, 1 of 1 seeds)"


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_quantiles_are_student_s(verdicts, count):
    """By the integral of the density up to the quantile: 95 percent lie below it."""
    degrees = count - 1
    quantile = verdicts._student([0.0] * count)
    x = torch.linspace(0, quantile, 100_001, dtype=torch.float64)
    density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    constant = (
        math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    )
    below = 0.5 + constant * torch.trapezoid(density, x).item()
    assert below == pytest.approx(0.95, abs=1e-3)


@pytest.fixture
def claims(examples):
    import claims.__main__
    import claims.page
    import claims.papers
    import claims.records

    return claims


def test_the_page_is_made_of_its_records(claims):
    records = claims.records.read_records(ROOT / "docs" / "claims")
    assert records
    page = (ROOT / "docs" / "claims.md").read_text()
    assert claims.page.render(records) == page, "make the page anew: python -m claims --no-run"
    for name, record in records.items():
        parts = [part for paper in claims.papers.PAPERS for part in paper.parts]
        names = {claim.name for part in parts if part.experiment == name for claim in part.claims}
        assert record.reasons.keys() <= names


def test_a_verdict_on_the_page_by_a_plain_loop(claims):
    """MergeME's table 4 with own embeddings, against three experts, from the file alone."""
    rows = json.loads((ROOT / "docs" / "claims" / "mergeme_hetero.json").read_text())["rows"]
    differences = []
    for seed, losses in rows["own embeddings, after"].items():
        of_control = rows["3 experts, after"][seed]
        differences.append(sum(of_control[name] - losses[name] for name in losses) / len(losses))
    mean = sum(differences) / len(differences)
    squares = sum((each - mean) ** 2 for each in differences) / (len(differences) - 1)
    error = math.sqrt(squares / len(differences))
    (line,) = [
        line
        for line in (ROOT / "docs" / "claims.md").read_text().splitlines()
        if "three experts trained on the same texts in the mean (own embeddings)" in line
    ]
    assert f"| {mean:+.3f} ± {error:.3f} |" in line
    assert ("**holds**" in line) == (mean > 2.92 * error)


def test_claims_of_caem_are_those_of_its_report(claims, tmp_path):
    pytest.importorskip("matplotlib")
    from caem_switch import report

    for number in (1, 2, 3):
        write_records(tmp_path / f"seed-{number}", number, report)
    (tmp_path / "seed-4").mkdir()  # begun, and not a seed yet
    experiment = claims.records.EXPERIMENTS["caem_switch"]
    record = claims.records.record_of("caem_switch", experiment, "small", tmp_path)
    (part,) = claims.papers.CAEM.parts
    assert {claim.margin for claim in part.claims} == record.margins.keys()
    for claim in part.claims:
        assert list(record.margins[claim.margin]) == ["1", "2", "3"]
        if claim.better:
            for seed, margin in record.margins[claim.margin].items():
                better = record.rows[claim.better][seed].values()
                worse = record.rows[claim.worse][seed].values()
                expected = [a - b for a, b in zip(better, worse, strict=True)]
                assert margin == pytest.approx(expected)


def test_rows_of_claims_are_rows_of_the_examples(claims):
    """A row that no experiment has would be "not run" for ever."""
    import mergeme_homogeneous
    import mergeme_small
    import wemoe_images
    import wemoe_texts

    rows = {
        "mergeme_homogeneous": {
            "Random routing",
            "Router fine-tuning",
            *mergeme_homogeneous.SHARED,
        },
        "mergeme_small": {"Random routing", *mergeme_small.ROWS},
        "wemoe_images": {
            *("Pre-trained", "Individual", "Traditional MTL"),
            *("Fisher merging", "RegMean"),
            *wemoe_images.STATIC,
            *wemoe_images.ROUTED,
            *wemoe_images.TRIMMED,
        },
        "wemoe_texts": set(wemoe_texts.ROWS),
    }
    parts = [part for paper in claims.papers.PAPERS for part in paper.parts]
    for name, known in rows.items():
        of_claims = set()
        for part in parts:
            if part.experiment == name:
                of_claims |= {row for claim in part.claims for row in (claim.better, claim.worse)}
        assert of_claims <= known


def test_a_row_that_was_measured_once_is_paired_with_every_seed(claims):
    claim = claims.papers.Claim("", "", "", "a", "b")
    once = {"0": {"bible": 2.0, "music": 3.0, "code": 4.0}}
    seeds = {}
    for seed, lower in (("0", 0.1), ("1", 0.2), ("2", 0.15)):
        seeds[seed] = {name: loss - lower for name, loss in once["0"].items()}
    experiment = claims.records.EXPERIMENTS["mergeme_hetero"]
    record = claims.records.Record("", "", "", rows={"a": seeds, "b": once})
    verdict = claims.page.verdict_of(claim, record, experiment)
    assert verdict.word == "holds" and verdict.of_seeds == pytest.approx((0.1, 0.2, 0.15))
    record.rows = {"a": seeds}
    assert claims.page.verdict_of(claim, record, experiment) is None


def test_a_command_that_fails_is_told(claims, tmp_path, monkeypatch):
    assert claims.records.start([sys.executable, "-c", "raise SystemExit(3)"], tmp_path) == 3
    experiment = claims.records.EXPERIMENTS["mergeme_hetero"]
    monkeypatch.setattr(claims.records, "start", lambda command, place: 3)
    with pytest.raises(claims.records.UserError, match="mergeme_hetero: its command ended with 3"):
        claims.records.run("mergeme_hetero", experiment, "quick", tmp_path)


def test_trained_and_untrained_rows_are_paired(examples):
    """What is not trained stands beside every seed of what is."""
    import tradeoffs_report as experiment

    untrained = experiment.Measured("ensemble", False, {0: [2.0, 3.0]})
    trained = experiment.Measured("routed", True, {0: [1.0, 3.0], 1: [1.5, 2.0], 2: [1.0, 1.0]})
    once = experiment.Measured("routed", True, {0: [2.0, 2.0]})
    assert experiment.gains(trained, untrained) == [[1.0, 0.0], [0.5, 1.0], [1.0, 2.0]]
    assert experiment.gains(untrained, trained) == [[-1.0, 0.0], [-0.5, -1.0], [-1.0, -2.0]]
    assert experiment.gains(trained, once) == [[1.0, -1.0]]
    rows = {"linear": trained, "global": untrained}
    (line,) = experiment.orderings(rows)
    assert "(linear, global): holds (+0.9167 ± 0.3005, 3 of 3 seeds, 2 of 2 tasks)" in line
    # Routers are grouped by their best rate on validation texts.
    for rates, best in (({"0.1": 2.0, "1": 3.0}, "0.1"), ({"0.1": 2.0, "1": 1.0}, "1")):
        trained.of_rates.update(rates)
        assert experiment.by_best_rate({"a": trained, "b": trained}, ["a", "b"]) == {
            best: ["a", "b"]
        }
    with pytest.raises(experiment.UserError, match="linear diverged at every learning rate"):
        experiment.by_best_rate({"linear": once}, ["linear"])
    # One seed of what is trained decides nothing.
    (line,) = experiment.orderings({"linear": once, "global": untrained})
    assert "unclear" in line
