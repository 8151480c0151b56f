"""Ensembles against naive loops, long gradient descent, and what theory promises."""

import math
from dataclasses import replace

import pytest
import torch

from peft_routing.fusion import (
    learned,
    learned_beta,
    linear_program,
    loss_of,
    mixture,
    posterior,
    sparse,
    true_worst_case,
    uniform,
)
from tests.peft_routing.fusion.tables import make_table


def naive_losses(table, coefficients):
    """The loss of an ensemble on each task, a token at a time."""
    losses = []
    for task in range(len(table.tasks)):
        values = []
        for row, of_task in zip(table.of_experts.tolist(), table.tasks_of.tolist(), strict=True):
            if of_task == task:
                pairs = zip(row, coefficients.tolist(), strict=True)
                values.append(-math.log(sum(c * math.exp(value) for value, c in pairs)))
        losses.append(sum(values) / len(values))
    return losses


def random_coefficients(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, generator=generator, dtype=torch.float64)
    return values / values.sum()


def by_descent(table, steps=1000):
    """The least loss by Adam on a softmax's logits."""
    logits = torch.zeros(len(table.experts), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    best = math.inf
    for _ in range(steps):
        optimizer.zero_grad()
        value = -(table.weights * mixture(table.of_experts, logits.softmax(dim=0))).sum()
        value.backward()
        optimizer.step()
        best = min(best, value.item())
    return best


def least_worst_task(table):
    """The least c that is above the loss of every task, by scipy's own solver."""
    optimize = pytest.importorskip("scipy.optimize")
    experts = len(table.experts)

    def slack(unknowns):
        coefficients = torch.tensor(unknowns[:-1]).clamp(min=1e-12)
        losses = table.task_losses(mixture(table.of_experts, coefficients))
        return unknowns[-1] - losses.numpy()

    constraints = [
        {"type": "ineq", "fun": slack},
        {"type": "eq", "fun": lambda unknowns: unknowns[:-1].sum() - 1},
    ]
    start = [1 / experts] * experts + [5.0]
    bounds = [(0, 1)] * experts + [(0, None)]
    options = {"ftol": 1e-10, "maxiter": 200}
    solution = optimize.minimize(
        lambda unknowns: unknowns[-1],
        start,
        method="SLSQP",
        bounds=bounds,
        constraints=constraints,
        options=options,
    )
    assert solution.success
    return solution.x[-1]


@pytest.mark.parametrize("coefficients", [uniform(4), random_coefficients(4)])
def test_a_mixture_is_of_probabilities(coefficients):
    table = make_table()
    found = table.task_losses(mixture(table.of_experts, coefficients)).tolist()
    assert found == pytest.approx(naive_losses(table, coefficients), abs=1e-12)
    loss = loss_of(mixture(table.of_experts, coefficients), table.weights)
    assert loss == pytest.approx(sum(found) / len(found), abs=1e-12)


def test_a_coefficient_of_zero_leaves_an_expert_out():
    table = make_table()
    alone = mixture(table.of_experts, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(alone, table.of_experts[:, 1])


def test_what_is_learned_equals_long_gradient_descent_and_is_certified():
    table = make_table(experts=5, tasks=3)
    solution = learned(table.of_experts, table.weights, tolerance=1e-9)
    by_adam = by_descent(table)
    assert solution.loss == pytest.approx(by_adam, abs=1e-4)
    assert solution.loss <= by_adam + 1e-9 and solution.certificate <= 1e-9
    assert solution.coefficients.sum().item() == pytest.approx(1, abs=1e-12)
    assert solution.loss < loss_of(mixture(table.of_experts, uniform(5)), table.weights)


def test_what_is_learned_fulfils_the_conditions_of_an_optimum():
    table = make_table(experts=5, tasks=3)
    solution = learned(table.of_experts, table.weights, tolerance=1e-10)
    coefficients = solution.coefficients.clone().requires_grad_()
    probabilities = table.of_experts.exp()
    loss = -(table.weights * (probabilities @ coefficients).log()).sum()
    (slopes,) = torch.autograd.grad(loss, coefficients)
    # On the simplex: the slope is the same, -1, where a coefficient is above 0, and not below it
    # elsewhere.
    assert (slopes >= -1 - 1e-9).all()
    assert (slopes[solution.coefficients > 1e-3] + 1).abs().max() < 1e-6
    assert (solution.coefficients < 1e-6).any()  # both kinds are there


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_certificate_bounds_what_is_left_after_any_number_of_steps(steps):
    table = make_table(experts=5, tasks=3)
    least = learned(table.of_experts, table.weights, tolerance=1e-10).loss
    early = learned(table.of_experts, table.weights, most_steps=steps)
    assert early.steps == steps and least - 1e-9 <= early.loss <= least + early.certificate + 1e-12
    assert early.certificate > 0
    later = learned(table.of_experts, table.weights, most_steps=steps + 1)
    assert later.loss < early.loss


def by_multiplying(table, steps):
    """What `steps` updates lambda_i <- lambda_i g_i give, from uniform coefficients."""
    probabilities = table.of_experts.exp()
    coefficients = uniform(probabilities.shape[1])
    for _ in range(steps):
        gains = probabilities.T @ (table.weights / (probabilities @ coefficients))
        coefficients = coefficients * gains
    return loss_of(mixture(table.of_experts, coefficients), table.weights)


@pytest.mark.parametrize("copies", [1, 2])
def test_few_steps_reach_what_many_multiplications_do(copies):
    table = make_table(experts=24, tasks=6, texts=6, length=12)
    # Copies of all experts, between which nothing decides.
    table = replace(
        table,
        experts=table.experts * copies,
        log_probabilities=torch.cat(
            [table.log_probabilities[:, :-1]] * copies + [table.log_probabilities[:, -1:]], dim=1
        ),
    )
    solution = learned(table.of_experts, table.weights, tolerance=1e-8)
    assert solution.certificate <= 1e-8 and solution.steps <= 30
    assert solution.coefficients.min() >= 0
    assert solution.coefficients.sum().item() == pytest.approx(1, abs=1e-12)
    by_many = by_multiplying(table, 20_000)
    assert by_many - 1e-5 < solution.loss <= by_many + 1e-8


def test_an_expert_without_a_coefficient_at_the_start_may_get_one():
    table = make_table(experts=5, tasks=3)
    expected = learned(table.of_experts, table.weights, tolerance=1e-9)
    start = torch.zeros(5)
    start[int(expected.coefficients.argmin())] = 1
    solution = learned(table.of_experts, table.weights, start=start, tolerance=1e-9)
    torch.testing.assert_close(solution.coefficients, expected.coefficients, atol=1e-5, rtol=0)


def test_equal_experts_are_learned_at_once():
    values = torch.randn(7, 1).expand(7, 3)
    solution = learned(values, torch.full((7,), 1 / 7, dtype=torch.float64))
    assert solution.steps == 0 and solution.certificate == 0
    assert solution.coefficients.tolist() == pytest.approx([1 / 3] * 3)


def test_very_small_probabilities_are_no_zeros():
    table = make_table()
    shifted = table.of_experts - 2000
    solution = learned(shifted, table.weights)
    expected = learned(table.of_experts, table.weights)
    torch.testing.assert_close(solution.coefficients, expected.coefficients)
    assert solution.loss == pytest.approx(expected.loss + 2000)


@pytest.mark.parametrize("tolerance", [0.001, 0.02, 0.2])
def test_sparse_is_the_fewest_of_the_largest_that_lose_little(tolerance):
    table = make_table(experts=6, tasks=4)
    whole = learned(table.of_experts, table.weights)
    found = sparse(table.of_experts, table.weights, whole, tolerance=tolerance)
    order = whole.coefficients.argsort(descending=True)
    losses = [
        learned(table.of_experts[:, order[:count]], table.weights).loss for count in range(1, 7)
    ]
    fewest = next(count for count in range(6) if losses[count] <= whole.loss + tolerance) + 1
    assert found.loss == pytest.approx(losses[fewest - 1], abs=1e-6)
    kept = found.coefficients.nonzero()[:, 0].tolist()
    assert set(kept) <= set(order[:fewest].tolist())
    value = loss_of(mixture(table.of_experts, found.coefficients), table.weights)
    assert value == pytest.approx(found.loss)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_posterior_follows_each_text_alone(beta):
    table = make_table(seed=3)
    prior = random_coefficients(4, seed=1)
    expected = []
    products: list[float] = []
    last = None
    rows = zip(table.of_experts.tolist(), table.texts_of.tolist(), strict=True)
    for row, text in rows:
        if text != last:
            products = prior.tolist()
            last = text
        total = sum(products)
        pairs = list(zip(products, row, strict=True))
        expected.append(math.log(sum(of * math.exp(value) for of, value in pairs) / total))
        products = [of * math.exp(value) ** beta for of, value in pairs]
    found = posterior(table.of_experts, table.texts_of, prior, beta)
    assert found.tolist() == pytest.approx(expected, abs=1e-10)
    if beta == 0:
        torch.testing.assert_close(found, mixture(table.of_experts, prior))


@pytest.mark.parametrize("seed", range(5))
def test_a_posterior_loses_at_most_the_prior_s_surprise_against_the_best_expert(seed):
    table = make_table(experts=6, tasks=3, length=12, seed=seed)
    prior = random_coefficients(6, seed)
    found = posterior(table.of_experts, table.texts_of, prior)
    losses = []
    for text in table.texts_of.unique().tolist():
        of_text = table.texts_of == text
        own = -found[of_text].sum()
        of_experts = -table.of_experts[of_text].sum(dim=0)
        assert (own <= of_experts - prior.log() + 1e-9).all()
        losses.append((own - of_experts.min()).item())
    assert max(losses) > 0.01  # the bound is not met by being the best expert


def test_beta_is_learned_between_the_ends():
    table = make_table(experts=4, tasks=4, texts=6, length=10)
    beta = learned_beta(table.of_experts, table.texts_of, uniform(4), table.weights)

    def loss(value):
        found = posterior(table.of_experts, table.texts_of, uniform(4), value)
        return loss_of(found, table.weights)

    on_a_grid = min(loss(value / 50) for value in range(101))
    assert 0 <= beta <= 2 and loss(beta) <= on_a_grid + 1e-4


def test_the_linear_program_bounds_its_worst_task():
    pytest.importorskip("scipy")
    table = make_table(experts=5, tasks=3)
    found = linear_program(table.of_experts, table.tasks_of, 3)
    losses = naive_losses(table, found.coefficients)
    assert found.worst == pytest.approx(max(losses), abs=1e-9)
    assert found.worst <= found.bound
    means = table.losses[:, :-1] @ found.coefficients
    assert means.max().item() == pytest.approx(found.bound, abs=1e-7)
    # Nothing on a fine grid of pairs of experts has a lower value.
    for first in range(5):
        for second in range(5):
            for share in torch.linspace(0, 1, 21).tolist():
                mixed = share * table.losses[:, first] + (1 - share) * table.losses[:, second]
                assert mixed.max().item() >= found.bound - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_true_worst_case_is_that_of_a_general_solver(seed):
    table = make_table(experts=4, tasks=3, seed=seed)
    found = true_worst_case(table.of_experts, table.tasks_of, 3)
    assert found.bound <= found.worst <= found.bound + 1e-3
    assert found.worst == pytest.approx(max(naive_losses(table, found.coefficients)), abs=1e-9)
    least = least_worst_task(table)
    assert found.bound <= least + 1e-6 and found.worst == pytest.approx(least, abs=1e-3)
    by_program = linear_program(table.of_experts, table.tasks_of, 3)
    assert found.worst <= by_program.worst + 1e-3


def test_without_scipy_the_linear_program_says_what_it_needs(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    table = make_table()
    with pytest.raises(ValueError, match=r"\(B\.5\) needs scipy: pip install scipy"):
        linear_program(table.of_experts, table.tasks_of, 4)
