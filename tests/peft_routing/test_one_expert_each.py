"""Coefficients from outside that choose few experts: only these are computed."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peft_routing import RoutedLoraConfig, choosers
from peft_routing.config import Site
from peft_routing.given import Given, held
from peft_routing.layer import RoutedLoraLinear
from tests.peft_routing.adapters import make_base, save_experts

IN, OUT, COUNT = 6, 10, 8
RANKS = {"equal": (2,) * COUNT, "mixed": (2, 0, 3, 1, 2, 4, 0, 1)}


def make_layer(ranks: tuple[int, ...], mixing: Any, general: int = 0) -> RoutedLoraLinear:
    torch.manual_seed(0)
    names = {f"e{index}": f"e{index}" for index in range(COUNT)}
    config = RoutedLoraConfig(experts=names, router="linear", mixing=mixing)
    scalings = tuple(0.5 + index for index in range(COUNT + general))
    config.sites = {"linear": Site(ranks + (2,) * general, scalings, general)}
    router = config.router_class(config, config.names, IN)
    layer = RoutedLoraLinear(nn.Linear(IN, OUT), "default", config, "linear", router)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.double().requires_grad_(False)


def by_sets(*sets: dict[int, float]) -> torch.Tensor:
    coefficients = torch.zeros(len(sets), COUNT, dtype=torch.float64)
    for row, of_set in enumerate(sets):
        for expert, coefficient in of_set.items():
            coefficients[row, expert] = coefficient
    return coefficients


CHOICES = {
    "one for all": by_sets({3: 1.0}),
    "nothing": by_sets({}),
    "few for all": by_sets({3: 0.7, 5: -0.2}),
    "each its own": by_sets({3: 1.0}, {1: 1.0}, {3: 1.0}, {7: 0.5}),
    "some none": by_sets({3: 1.0}, {}, {0: 2.0}, {3: 0.5}),
    "few": by_sets({3: 1.0}, {5: 0.5, 3: 0.1}, {}, {5: 1.0}),
    "all": torch.ones(4, COUNT, dtype=torch.float64),
    "two sets for four rows": by_sets({2: 1.0}, {0: 1.0}),
}


def output(layer: RoutedLoraLinear, x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    with held(Given(coefficients)):
        return layer(x)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("ranks", "mixing", "general"),
    [("equal", "full", 0), ("equal", "low_rank", 0), ("mixed", "full", 0), ("equal", "full", 2)],
)
def test_it_is_what_all_experts_give(ranks: str, mixing: str, general: int, choice: str) -> None:
    layer = make_layer(RANKS[ranks], mixing, general)
    x = torch.randn(4, 3, IN, dtype=torch.float64, requires_grad=True)
    coefficients = CHOICES[choice]
    # Where coefficients have a gradient, every expert is computed.
    expected = output(layer, x, coefficients.clone().requires_grad_())
    found = output(layer, x, coefficients)
    assert torch.allclose(found, expected, atol=1e-10)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    (right,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.allclose(gradient, right, atol=1e-8)


def operations(layer: RoutedLoraLinear, x: torch.Tensor, coefficients: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output(layer, x, coefficients)
    return counter.get_total_flops() - 2 * x.shape[:-1].numel() * IN * OUT


@pytest.mark.parametrize("mixing", ["full", "low_rank"])
def test_each_row_costs_one_expert(mixing: str) -> None:
    layer = make_layer(RANKS["equal"], mixing)
    x = torch.randn(4, 3, IN, dtype=torch.float64)
    of_one_lora = 2 * 4 * 3 * 2 * (IN + OUT)  # tokens times rank times both sides
    for choice in ("one for all", "each its own", "two sets for four rows"):
        assert operations(layer, x, CHOICES[choice]) == of_one_lora
    assert operations(layer, x, CHOICES["few for all"]) == 2 * of_one_lora
    assert operations(layer, x, CHOICES["all"]) == COUNT * of_one_lora


def test_perplexity_costs_a_pass_of_one_expert_for_each(tmp_path: Any) -> None:
    paths = list(save_experts(tmp_path).values())
    ids = torch.arange(30).reshape(2, 15)
    costs = []
    for times in (1, 4):
        experts = {f"e{index}": path for index, path in enumerate(paths * times)}
        config = RoutedLoraConfig(experts=experts, router="arrow")
        model = get_peft_model(make_base(), config).eval()
        with FlopCounterMode(display=False) as counter:
            choosers.perplexity(model, ids)
        costs.append(counter.get_total_flops())
    assert costs[1] == 4 * costs[0]
