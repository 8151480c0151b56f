"""Which experts are of use, against exhaustive search."""

import itertools
import math

import pytest
import torch

from peft_routing.fusion import (
    best_expert,
    best_per_task,
    curve_on,
    greedy,
    least_that_reaches,
    not_first,
    own_experts,
    random_curves,
)
from peft_routing.fusion.tables import joined
from tests.peft_routing.fusion.tables import make_table


def random_losses(tasks=6, experts=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.rand(tasks, experts + 1, generator=generator, dtype=torch.float64)


def mean_loss(losses, chosen):
    """The mean over tasks of the least loss of these experts and the base model."""
    total = 0.0
    for row in losses.tolist():
        total += min([row[-1], *[row[expert] for expert in chosen]])
    return total / len(losses)


def test_the_best_expert_and_the_best_per_task():
    losses = torch.tensor([[1.0, 2.0, 0.5], [4.0, 2.0, 3.0]])
    assert best_expert(losses) == 1  # the base model is a choice per task alone
    assert best_per_task(losses) == [2, 1]


@pytest.mark.parametrize("seed", range(6))
def test_greedy_takes_what_gains_most_and_is_near_the_best_of_all(seed):
    losses = random_losses(seed=seed)
    selection = greedy(losses)
    assert sorted(selection.order) == list(range(7)) and len(selection.curve) == 8
    chosen: list[int] = []
    for expert in selection.order:
        rest = [other for other in range(7) if other not in chosen]
        least = min(mean_loss(losses, [*chosen, other]) for other in rest)
        chosen.append(expert)
        assert mean_loss(losses, chosen) == pytest.approx(least)
        assert selection.curve[len(chosen)] == pytest.approx(least)
    of_base = mean_loss(losses, [])
    for count in range(1, 5):
        sets = itertools.combinations(range(7), count)
        gain = of_base - min(mean_loss(losses, each) for each in sets)
        assert of_base - selection.curve[count] >= (1 - 1 / math.e) * gain


def test_greedy_looks_again_only_at_what_may_lead():
    # e1 has a bound of 2 beside e0, and gains nothing once e0 is there; e2 gains what it did.
    losses = torch.tensor([[0.0, 1.0, 4.0, 4.0], [5.0, 5.0, 4.0, 5.0]]).double()
    assert greedy(losses).order == [0, 2, 1]


def test_experts_that_are_of_no_use_come_last_in_their_order():
    losses = torch.full((3, 5), 2.0).double()
    losses[:, 2] = 1.0
    selection = greedy(losses)
    assert selection.order == [2, 0, 1, 3] and selection.curve == [2.0, 1.0, 1.0, 1.0, 1.0]
    assert selection.elbow == 1
    assert least_that_reaches(selection.curve, 1.0) == 1
    assert least_that_reaches(selection.curve, 0.5) is None


def test_a_curve_is_chosen_on_one_table_and_told_on_another():
    choosing = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    losses = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
    # Without experts the base; with e1 it is better on both tasks; with e0 the first task changes.
    assert curve_on([1, 0], choosing, losses) == [45.0, 35.0, 30.0]
    selection = greedy(random_losses())
    assert curve_on(selection.order, random_losses(), random_losses()) == pytest.approx(
        selection.curve
    )


def test_random_orders_end_where_greedy_ends_and_are_above_it_before():
    losses = random_losses(tasks=20)
    curves = random_curves(losses, draws=30)
    curve = torch.tensor(greedy(losses).curve)
    assert curves.shape == (30, 8) and torch.equal(random_curves(losses, draws=30), curves)
    torch.testing.assert_close(curves[:, -1], curve[-1].expand(30).double())
    assert (curves.mean(dim=0)[1:5] > curve[1:5]).all()


def test_own_experts_are_those_of_the_tasks_names():
    table = make_table(experts=2, tasks=3)
    assert own_experts(table) == [0, 1, None]
    assert own_experts(table, {"e2": "e0"}) == [0, 1, 0]


def test_an_expert_that_is_beaten_on_its_own_task_is_named_and_tested_on_texts():
    # On its task e0 is worse than e1 by 1 nat in each token: 2 in the first text, 3 in the second.
    own = torch.tensor([-2.0] * 5)
    columns = [[own, own + 1, own - 1], [own - 1, own, own]]
    table = joined(["e0", "e1"], ["e0", "e1"], columns, [[2, 3], [5]])
    (beaten,) = not_first(table, table, own_experts(table))
    assert (beaten.expert, beaten.better) == ("e0", "e1")
    assert beaten.difference == pytest.approx(2.5)
    assert beaten.standard_error == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    assert not_first(table, table, [None, 1]) == []
    short = joined(["e0", "e1"], ["e0"], [[own, own + 1, own]], [[5]])
    assert math.isnan(not_first(short, short, [0])[0].standard_error)
