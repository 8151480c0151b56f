"""The rule of `examples/verdicts.py`, and the page of the papers' claims."""

import math

import pytest
import torch

from tests.test_autoload import ROOT


@pytest.fixture
def verdicts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
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
