"""CAEM-MoE's Overall Performance."""

from collections.abc import Mapping


def overall_performance(
    scores: Mapping[str, float], single_task_scores: Mapping[str, float]
) -> float:
    """The mean over tasks of a model's score divided by that of a single-task model (CAEM-MoE,
    equation 2). Both are by the names of the tasks.
    """
    ratios = [scores[name] / single for name, single in single_task_scores.items()]
    return sum(ratios) / len(ratios)
