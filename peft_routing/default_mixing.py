"""The way in which experts are mixed: as stated, or low-rank where that loses little of the update.

Low-rank mixing is (sum of c_i B_i)(sum of c_i A_i). Its cross terms assume that the experts were
trained from one A (Trade-offs B.2). Of N experts whose A are of one length and have the mean cosine
c, and whose B have nothing in common, it keeps the share sqrt(c + (1 - c) / N) of the norm of the
mean update, and that is also its cosine with the mean update.
"""

import logging
from collections.abc import Sequence

import torch

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.config import Mixing, RoutedLoraConfig
from peft_routing.expert import Expert

LOG = logging.getLogger(__name__)
# The mean cosine from which on experts share their A: from there low-rank mixing keeps 0.89 or more
# of the norm, of however many experts. Four experts from one A had the cosines 0.99, 0.93, 0.72 and
# 0.50, the longer they were trained (kept: 0.99, 0.96, 0.88 and 0.79), and from an A each 0.00
# (kept: 0.49).
SHARED_A = 0.8


def mixing_of(config: RoutedLoraConfig, experts: Sequence[Expert]) -> Mixing:
    """How updates are mixed: as stated, else by the router's default where the experts allow it.

    What was low-rank by default may become full when experts change; full never becomes low-rank. A
    line in the log says why low-rank mixing is not the default. `UserError` where the experts do
    not allow what is stated.
    """
    is_stated = config.mixing is not None and not config.mixing_by_default
    mixing: Mixing = config.mixing or config.router_class.mixing
    if mixing == "full" or config.general_experts:
        return "full"
    obstacle = _different_ranks(experts)
    if is_stated and obstacle:
        raise UserError(
            f"mixing='low_rank' needs one rank per module; {obstacle}. Compose with mixing='full'"
        )
    if is_stated:
        return mixing
    if not obstacle:
        cosine = mean_cosine_of_a(experts)
        if cosine < SHARED_A:
            obstacle = (
                f"the experts do not share their initial A (mean cosine {cosine:.2f}, below "
                f"{SHARED_A}), so that low_rank would lose part of the update"
            )
    if not obstacle:
        return mixing
    # Said as a warning, since Python shows no other lines unless told to.
    change = "mixing is now full, and was low_rank" if config.mixing else "mixing is full"
    LOG.warning("%s: %s", change, obstacle)
    return "full"


def _different_ranks(experts: Sequence[Expert]) -> str:
    """The first module in alphabetical order at which experts differ in rank, with their ranks.

    It is empty where there is none. An expert that has nothing at a module has the rank 0 there.
    """
    modules: set[str] = set()
    for expert in experts:
        modules.update(expert.factors)
    for module in sorted(modules):
        if len({expert.rank(module) for expert in experts}) > 1:
            ranks = [f"{expert.name} {expert.rank(module)}" for expert in experts]
            return f"{module} has the ranks {', '.join(ranks)}"
    return ""


def mean_cosine_of_a(experts: Sequence[Expert]) -> float:
    """The mean cosine between the A of two experts, over pairs and modules, 0 where it is negative
    and 1 for one expert. It is less where the A differ in length: of two, by the factor
    2 |A_1| |A_2| / (|A_1|² + |A_2|²).

    The experts have one rank per module.
    """
    if len(experts) == 1:
        return 1.0
    cosines = []
    for module in experts[0].factors:
        total = torch.zeros(())
        squares = torch.zeros(())
        for expert in experts:
            a = expert.factors[module][0].flatten().cpu().float()
            total = total + a
            squares = squares + a.square().sum()
        # The squared norm of a sum is the sum of all products, each pair's twice: no pair has to be
        # looked at by itself. Lengths count: the longer A would be multiplied with the B of others.
        products = total.square().sum() - squares
        smallest = torch.finfo(squares.dtype).tiny
        cosines.append(products / ((len(experts) - 1) * squares).clamp(min=smallest))
    return torch.stack(cosines).mean().clamp(min=0).item()
