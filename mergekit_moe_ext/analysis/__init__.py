"""What the papers measure of models, for Python: similarity, variation, coefficients, counts, loss landscapes."""

from mergekit_moe_ext.analysis.batches import read_batches
from mergekit_moe_ext.analysis.coefficients import EnsembleRouting, ensemble_routing
from mergekit_moe_ext.analysis.landscape import HEADS, Landscape, loss_landscape
from mergekit_moe_ext.analysis.parameter_counts import ParameterCounts, count_parameters, planned_parameters
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
