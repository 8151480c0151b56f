"""The papers' measurements of models: scores, similarity, CKA, variation, coefficients, usage,
counts, loss landscapes.

Beside them are functions with which scripts read models and inputs and draw figures. Each name is
imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _mergekit_moe_ext_common.data import parse_sources
    from _mergekit_moe_ext_common.figures import (
        check_new_figure,
        heat_map,
        pyplot,
    )
    from _mergekit_moe_ext_common.loading import load_config, silence
    from _mergekit_moe_ext_common.staging import check_new_file
    from mergekit_moe_ext.analysis.answers import task_scores
    from mergekit_moe_ext.analysis.batches import read_batches
    from mergekit_moe_ext.analysis.coefficients import EnsembleRouting, ensemble_routing
    from mergekit_moe_ext.analysis.landscape import HEADS, Landscape, loss_landscape
    from mergekit_moe_ext.analysis.layer_similarity import (
        LayerSimilarity,
        LinearCKA,
        cka,
        plot_layers,
        plot_pairs,
    )
    from mergekit_moe_ext.analysis.parameter_counts import (
        ParameterCounts,
        count_parameters,
        planned_parameters,
    )
    from mergekit_moe_ext.analysis.similarity import PairSimilarity, task_vector_similarity
    from mergekit_moe_ext.analysis.variation import THRESHOLDS, parameter_variation
    from mergekit_moe_ext.caem.entropies import layer_entropies, mean_entropies
    from mergekit_moe_ext.mixtures.plots import plot_usage
    from mergekit_moe_ext.mixtures.routers import coefficients_of_sequences
    from mergekit_moe_ext.mixtures.usage import format_table, routing_probability
    from mergekit_moe_ext.sequence.tokens import Tokens
    from mergekit_moe_ext.wemoe.groups import Part
    from mergekit_moe_ext.wemoe.loading import load_ensemble, read_ensemble
    from mergekit_moe_ext.wemoe.variation import Variation, decide

__all__ = [
    "HEADS",
    "THRESHOLDS",
    "EnsembleRouting",
    "Landscape",
    "LayerSimilarity",
    "LinearCKA",
    "PairSimilarity",
    "ParameterCounts",
    "Part",
    "Tokens",
    "Variation",
    "check_new_figure",
    "check_new_file",
    "cka",
    "coefficients_of_sequences",
    "count_parameters",
    "decide",
    "ensemble_routing",
    "format_table",
    "heat_map",
    "layer_entropies",
    "load_config",
    "load_ensemble",
    "loss_landscape",
    "mean_entropies",
    "parameter_variation",
    "parse_sources",
    "planned_parameters",
    "plot_layers",
    "plot_pairs",
    "plot_usage",
    "pyplot",
    "read_batches",
    "read_ensemble",
    "routing_probability",
    "silence",
    "task_scores",
    "task_vector_similarity",
]
# The module of each public name, which is imported when the name is first used.
_MODULES = {
    "Part": "mergekit_moe_ext.wemoe.groups",
    "Variation": "mergekit_moe_ext.wemoe.variation",
    "decide": "mergekit_moe_ext.wemoe.variation",
    "layer_entropies": "mergekit_moe_ext.caem.entropies",
    "mean_entropies": "mergekit_moe_ext.caem.entropies",
    "plot_usage": "mergekit_moe_ext.mixtures.plots",
    "task_scores": "mergekit_moe_ext.analysis.answers",
    "coefficients_of_sequences": "mergekit_moe_ext.mixtures.routers",
    "format_table": "mergekit_moe_ext.mixtures.usage",
    "routing_probability": "mergekit_moe_ext.mixtures.usage",
    "Tokens": "mergekit_moe_ext.sequence.tokens",
    "load_ensemble": "mergekit_moe_ext.wemoe.loading",
    "read_ensemble": "mergekit_moe_ext.wemoe.loading",
    "check_new_figure": "_mergekit_moe_ext_common.figures",
    "check_new_file": "_mergekit_moe_ext_common.staging",
    "heat_map": "_mergekit_moe_ext_common.figures",
    "pyplot": "_mergekit_moe_ext_common.figures",
    "parse_sources": "_mergekit_moe_ext_common.data",
    "load_config": "_mergekit_moe_ext_common.loading",
    "silence": "_mergekit_moe_ext_common.loading",
    "EnsembleRouting": "mergekit_moe_ext.analysis.coefficients",
    "HEADS": "mergekit_moe_ext.analysis.landscape",
    "LayerSimilarity": "mergekit_moe_ext.analysis.layer_similarity",
    "LinearCKA": "mergekit_moe_ext.analysis.layer_similarity",
    "cka": "mergekit_moe_ext.analysis.layer_similarity",
    "plot_layers": "mergekit_moe_ext.analysis.layer_similarity",
    "plot_pairs": "mergekit_moe_ext.analysis.layer_similarity",
    "Landscape": "mergekit_moe_ext.analysis.landscape",
    "PairSimilarity": "mergekit_moe_ext.analysis.similarity",
    "ParameterCounts": "mergekit_moe_ext.analysis.parameter_counts",
    "THRESHOLDS": "mergekit_moe_ext.analysis.variation",
    "count_parameters": "mergekit_moe_ext.analysis.parameter_counts",
    "ensemble_routing": "mergekit_moe_ext.analysis.coefficients",
    "loss_landscape": "mergekit_moe_ext.analysis.landscape",
    "parameter_variation": "mergekit_moe_ext.analysis.variation",
    "planned_parameters": "mergekit_moe_ext.analysis.parameter_counts",
    "read_batches": "mergekit_moe_ext.analysis.batches",
    "task_vector_similarity": "mergekit_moe_ext.analysis.similarity",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
