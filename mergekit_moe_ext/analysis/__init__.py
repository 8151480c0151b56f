"""What the papers measure of models: similarity, variation, coefficients, usage, counts, loss landscapes.

Each name is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_moe_ext.analysis.batches import read_batches
    from mergekit_moe_ext.analysis.coefficients import EnsembleRouting, ensemble_routing
    from mergekit_moe_ext.analysis.landscape import HEADS, Landscape, loss_landscape
    from mergekit_moe_ext.analysis.parameter_counts import (
        ParameterCounts,
        count_parameters,
        planned_parameters,
    )
    from mergekit_moe_ext.analysis.similarity import PairSimilarity, task_vector_similarity
    from mergekit_moe_ext.analysis.variation import THRESHOLDS, parameter_variation

__all__ = [
    "HEADS",
    "THRESHOLDS",
    "EnsembleRouting",
    "Landscape",
    "PairSimilarity",
    "ParameterCounts",
    "count_parameters",
    "ensemble_routing",
    "loss_landscape",
    "parameter_variation",
    "planned_parameters",
    "read_batches",
    "task_vector_similarity",
]
# Which file of this folder each name is in.
_FILES = {
    "EnsembleRouting": "coefficients",
    "HEADS": "landscape",
    "Landscape": "landscape",
    "PairSimilarity": "similarity",
    "ParameterCounts": "parameter_counts",
    "THRESHOLDS": "variation",
    "count_parameters": "parameter_counts",
    "ensemble_routing": "coefficients",
    "loss_landscape": "landscape",
    "parameter_variation": "variation",
    "planned_parameters": "parameter_counts",
    "read_batches": "batches",
    "task_vector_similarity": "similarity",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
