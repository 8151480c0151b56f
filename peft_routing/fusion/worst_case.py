"""Ensembles for the worst task: the paper's linear program (Trade-offs B.5) and the optimum."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.fusion.ensembles import learned, mixture
from peft_routing.fusion.tables import task_means

# Of each learned ensemble: near the edge of the simplex the last digits would take very many.
_MOST_INNER_STEPS = 1000


@dataclass(frozen=True)
class WorstCase:
    """Coefficients whose worst task is as good as can be, by one measure or the other.

    coefficients: (experts,), not negative, of sum 1.
    worst: the loss of the worst task, in nats.
    bound: for the linear program its own value, which `worst` is never above (Jensen); for the
    true optimum a value below which no coefficients bring the worst task.
    """

    coefficients: Tensor
    worst: float
    bound: float


PROGRAM_NEEDS_SCIPY = "the linear program (B.5) needs scipy"


def check_scipy(needs: str) -> None:
    """`UserError` where scipy is not installed; `needs` says in words what needs it."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise UserError(f"{needs}: pip install scipy") from error


def linear_program(log_probabilities: Tensor, tasks_of: Tensor, tasks: int) -> WorstCase:
    """The least c such that sum of lambda_i M_it <= c for every task t (B.5).

    M is the mean loss of each expert on each task. The loss of a mixture of probabilities is at
    most that mean of losses, so that c bounds its worst task and need not be near it. `UserError`
    without scipy.

    Args:
        log_probabilities: (tokens, experts), in nats.
        tasks_of: (tokens,), the index of each token's task.
    """
    check_scipy(PROGRAM_NEEDS_SCIPY)
    from scipy.optimize import linprog

    losses = task_means(-log_probabilities, tasks_of, tasks)  # (tasks, experts)
    experts = losses.shape[1]
    # The unknowns are the coefficients and c, of which c is minimised.
    objective = torch.zeros(experts + 1).double()
    objective[-1] = 1
    below_c = torch.cat([losses, -torch.ones(tasks, 1).double()], dim=1)
    sum_to_one = torch.ones(1, experts + 1).double()
    sum_to_one[0, -1] = 0
    solution = linprog(
        objective.numpy(),
        A_ub=below_c.numpy(),
        b_ub=[0.0] * tasks,
        A_eq=sum_to_one.numpy(),
        b_eq=[1.0],
        bounds=[(0, None)] * experts + [(None, None)],
        method="highs",
    )
    if not solution.success:
        raise UserError(f"the linear program (B.5) was not solved: {solution.message}")
    coefficients = torch.as_tensor(solution.x[:-1]).clamp(min=0)
    coefficients = coefficients / coefficients.sum()
    worst = _task_losses(log_probabilities, tasks_of, tasks, coefficients).max().item()
    return WorstCase(coefficients, worst, float(solution.fun))


def true_worst_case(
    log_probabilities: Tensor,
    tasks_of: Tensor,
    tasks: int,
    *,
    tolerance: float = 1e-3,
    most_steps: int = 200,
) -> WorstCase:
    """The coefficients with the least worst task.

    By duality that is the weighing of tasks whose learned ensemble has the highest loss. The loss
    of the best ensemble is concave in the tasks' weights q, and its slope is the task's loss: q is
    multiplied by exp(step times that). A step that lowers the dual value is halved and taken again.
    It stops where the worst task is within `tolerance` of the bound, or after `most_steps`.

    Args:
        log_probabilities: (tokens, experts), in nats.
        tasks_of: (tokens,), the index of each token's task.
    """
    counts = torch.bincount(tasks_of, minlength=tasks).double()
    q = torch.full((tasks,), 1 / tasks, dtype=torch.float64)
    start = None
    best: WorstCase | None = None
    bound = -math.inf
    step = 1.0
    slopes = torch.zeros(tasks, dtype=torch.float64)
    for _ in range(most_steps):
        trial = torch.softmax(q.log() + step * slopes, dim=0)
        # Exact enough to tell a step up from a step down, and no more than that.
        gap = math.inf if best is None else best.worst - bound
        solution = learned(
            log_probabilities,
            (trial / counts)[tasks_of],
            start=start,
            tolerance=min(tolerance, gap) / 100,
            most_steps=_MOST_INNER_STEPS,
        )
        # No ensemble has a lower loss, by these weights, than this one less its certificate.
        bound_of_trial = solution.loss - solution.certificate
        losses = _task_losses(log_probabilities, tasks_of, tasks, solution.coefficients)
        if best is None or losses.max().item() < best.worst:
            best = WorstCase(solution.coefficients, losses.max().item(), bound)
        if solution.loss < bound:
            step /= 2
        else:
            q = trial
            slopes = losses
            step *= 2
            # An expert that was of no use may be of use by other weights.
            start = 0.999 * solution.coefficients + 0.001 / len(solution.coefficients)
        bound = max(bound, bound_of_trial)
        if best.worst - bound <= tolerance:
            break
    assert best is not None
    return WorstCase(best.coefficients, best.worst, bound)


def _task_losses(
    log_probabilities: Tensor, tasks_of: Tensor, tasks: int, coefficients: Tensor
) -> Tensor:
    """(tasks,): the loss of an ensemble on each task."""
    return task_means(-mixture(log_probabilities, coefficients), tasks_of, tasks)
