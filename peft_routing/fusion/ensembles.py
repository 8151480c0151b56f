"""Ensembles of probabilities, by arithmetic on log-probabilities (Trade-offs 3).

All functions take log-probabilities (tokens, experts) in nats and are computed in float64. A loss
is the sum over tokens of a weight times minus the log-probability of the mixture; `Table.weights`
makes it the mean over tasks of the mean over tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_BETA = 2.0  # beyond 1 a posterior is more certain than Bayes' rule
_MOST_HALVINGS = 8  # of a Newton step
_ROUNDING = 1e-13  # of a loss: what two ways to add up the same numbers may differ by


@dataclass(frozen=True)
class Learned:
    """Learned coefficients.

    coefficients: (experts,), not negative, of sum 1.
    loss: the loss that was minimised.
    certificate: what the loss is at most above the least one, in nats.
    steps: the number of updates.
    """

    coefficients: Tensor
    loss: float
    certificate: float
    steps: int


def uniform(experts: int) -> Tensor:
    """(experts,): equal coefficients (3.1)."""
    return torch.full((experts,), 1 / experts, dtype=torch.float64)


def mixture(log_probabilities: Tensor, coefficients: Tensor) -> Tensor:
    """(tokens,): the log-probability of the sum of coefficients times probabilities (2.2)."""
    return torch.logsumexp(log_probabilities.double() + coefficients.double().log(), dim=1)


def loss_of(log_probabilities: Tensor, weights: Tensor) -> float:
    """The loss of a fusion by its log-probabilities (tokens,)."""
    return -(weights * log_probabilities.double()).sum().item()


def learned(
    log_probabilities: Tensor,
    weights: Tensor,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    most_steps: int = 500,
) -> Learned:
    """The coefficients of the least loss (3.2.1), which is a convex problem.

    With g_i = sum over tokens of w_t P_ti / (P lambda)_t, coefficients are optimal when all
    g_i <= 1, and the loss is at most log max g above the least one, which is the certificate. It
    stops where that is `tolerance`, or after `most_steps`. A step is Newton's, on the simplex, or
    lambda_i <- lambda_i g_i where that is better; the loss never rises.

    Args:
        weights: (tokens,), not negative, of sum 1.
        start: (experts,) to start from, of sum 1; uniform if None.
    """
    probabilities = _relative(log_probabilities)
    coefficients = uniform(probabilities.shape[1]) if start is None else start.double()
    steps = 0
    while True:
        gains = probabilities.T @ (weights / (probabilities @ coefficients))
        certificate = max(0.0, math.log(gains.max().item()))
        if certificate <= tolerance or steps == most_steps:
            break
        coefficients = _better(probabilities, weights, coefficients, gains)
        steps += 1
    loss = loss_of(mixture(log_probabilities, coefficients), weights)
    return Learned(coefficients, loss, certificate, steps)


def _better(probabilities: Tensor, weights: Tensor, coefficients: Tensor, gains: Tensor) -> Tensor:
    """(experts,): coefficients with a lower loss, by the gains of those that there are."""

    def loss(of: Tensor) -> float:
        return -(weights * (probabilities @ of).log()).sum().item()

    # The multiplicative step always lowers the loss, but near the optimum by little.
    multiplied = coefficients * gains
    multiplied = multiplied / multiplied.sum()  # 1 but for rounding
    enough = loss(multiplied) + _ROUNDING

    # The parabola that touches the loss plus the sum of the coefficients, whose least value on all
    # that is not negative lies on the simplex. Its slope is 1 - gains, and H lambda = gains.
    scaled = probabilities * (weights.sqrt() / (probabilities @ coefficients))[:, None]
    lowest = _least_not_negative(scaled.T @ scaled, 2 * gains - 1)
    # Along the way to it, halved until the loss is as low as after the other step.
    direction = lowest / lowest.sum() - coefficients
    length = 1.0
    for _ in range(_MOST_HALVINGS):
        trial = coefficients + length * direction
        if loss(trial) <= enough:
            return trial
        length /= 2
    return multiplied


def _least_not_negative(h: Tensor, slopes: Tensor) -> Tensor:
    """(n,): where x H x / 2 - slopes x is least among x that are not negative.

    The active-set method of Lawson and Hanson: the entry whose slope is steepest becomes free, and
    those that would fall below 0 are held there, until no slope is left.

    Args:
        h: (n, n), positive semidefinite.
    """
    count = len(h)
    # What keeps equal experts, of which one is as good as the other, from being undecided.
    h = h + 1e-12 * h.diagonal().mean() * torch.eye(count, dtype=h.dtype)
    values = torch.zeros_like(slopes)
    is_free = torch.zeros(count, dtype=torch.bool)
    for _ in range(3 * count):
        left = (slopes - h @ values).masked_fill(is_free, -math.inf)
        steepest = int(left.argmax())
        if left[steepest] <= 1e-12:
            break
        is_free[steepest] = True
        while True:
            free = is_free.nonzero()[:, 0]
            trial = torch.zeros_like(values)
            trial[free] = torch.linalg.solve(h[free][:, free], slopes[free])
            falls = is_free & (trial <= 0)
            if not falls.any():
                values = trial
                break
            # As far as the first that reaches 0, which is held there.
            share = (values / (values - trial))[falls].min()
            values = (values + share * (trial - values)).clamp(min=0)
            is_free &= values > 1e-15
            values = values.masked_fill(~is_free, 0)
    return values


def _relative(log_probabilities: Tensor) -> Tensor:
    """The probabilities of each token over the largest of any expert, which cancels in gains."""
    log_probabilities = log_probabilities.double()
    return (log_probabilities - log_probabilities.amax(dim=1, keepdim=True)).exp()


def sparse(
    log_probabilities: Tensor, weights: Tensor, whole: Learned, *, tolerance: float = 0.01
) -> Learned:
    """Learned coefficients of the fewest experts, by `whole`, that lose at most `tolerance` nats.

    Experts with the smallest coefficients of `whole` are dropped, and the others' are learned
    again. With one more expert the loss is never higher, so that the number is found by halving.
    """
    order = whole.coefficients.argsort(descending=True)

    def of_largest(count: int) -> Learned:
        kept = order[:count]
        again = learned(log_probabilities[:, kept], weights)
        coefficients = torch.zeros_like(whole.coefficients)
        coefficients[kept] = again.coefficients
        return Learned(coefficients, again.loss, again.certificate, again.steps)

    too_few = 0
    best = whole
    enough = len(order)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        solution = of_largest(middle)
        if solution.loss <= whole.loss + tolerance:
            enough = middle
            best = solution
        else:
            too_few = middle
    return best


def posterior(
    log_probabilities: Tensor, texts_of: Tensor, prior: Tensor, beta: float = 1.0
) -> Tensor:
    """(tokens,): the log-probability of a mixture whose coefficients follow each text.

    Before a text's token t they are proportional to prior_i times the product, over the tokens s
    before it, of p_i(x_s)^beta. With beta 0 they are the prior. With beta 1, Bayes' rule, a text
    loses at most -log prior_i nats in all against any expert i.

    Args:
        texts_of: (tokens,), the text of each token; those of a text are one after the other.
        prior: (experts,), of sum 1.
        beta: how much what was read counts.
    """
    values = log_probabilities.double()
    # The sum over the tokens before: of all texts, less what it was where this text begins.
    before = values.cumsum(dim=0) - values
    is_first = torch.ones(len(values), dtype=torch.bool)
    is_first[1:] = texts_of[1:] != texts_of[:-1]
    text = is_first.long().cumsum(dim=0) - 1
    before = before - before[is_first][text]
    coefficients = torch.log_softmax(prior.double().log() + beta * before, dim=1)
    return torch.logsumexp(coefficients + values, dim=1)


def learned_beta(
    log_probabilities: Tensor, texts_of: Tensor, prior: Tensor, weights: Tensor
) -> float:
    """The beta between 0 and 2 of the least loss, to 0.01, by golden sections.

    The loss need not be convex in beta, so that it may be a local minimum.
    """

    def loss(beta: float) -> float:
        return loss_of(posterior(log_probabilities, texts_of, prior, beta), weights)

    return _least(loss, 0.0, _MOST_BETA, 0.01)


def _least(loss: Callable[[float], float], low: float, high: float, width: float) -> float:
    """Where a function of one minimum is least, to within `width`."""
    # By the golden ratio one of the two points inside a section is also one of the next, shorter
    # section, so that each step computes one loss.
    ratio = (math.sqrt(5) - 1) / 2
    left = high - ratio * (high - low)
    right = low + ratio * (high - low)
    at_left = loss(left)
    at_right = loss(right)
    while high - low > width:
        if at_left <= at_right:
            high = right
            right = left
            at_right = at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low = left
            left = right
            at_left = at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return (low + high) / 2
