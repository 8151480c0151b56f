"""The tensor method `fast_ties`: mergekit's `ties`, with the same parameters and results, in linear
time and constant extra memory.
"""

from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from mergekit_moe_ext.merging.method import Fraction, TensorMethod
from mergekit_moe_ext.tensor.kernels.on_gpu import merge_ties


def _merge(group: TensorGroup, **parameters: Any) -> torch.Tensor:
    base = group.base
    entries = group.non_base
    if not entries:
        return base.tensor
    return merge_ties(
        base.tensor,
        [entry.tensor for entry in entries],
        [parameters["weight"][entry.id] for entry in entries],
        [parameters["density"][entry.id] for entry in entries],
        normalize=parameters["normalize"],
        scale=parameters["lambda"],
    )


_SHARED = ParameterScope.SHARED
_NON_BASE = ParameterScope.NON_BASE
FAST_TIES = TensorMethod(
    MergeMethodSpec(
        name="fast_ties",
        pretty_name="TIES (linear time)",
        reference_url="https://arxiv.org/abs/2306.01708",
        contract=InputContract(base=BasePolicy.REQUIRED),
        parameters=(
            ParameterSpec(
                "weight", float, _NON_BASE, description="weight of the model's task vector"
            ),
            ParameterSpec(
                "density", Fraction, _NON_BASE, 1.0, "fraction of the task vector that is kept"
            ),
            ParameterSpec(
                "normalize", bool, _SHARED, True, "divide by the weights of the values that agree"
            ),
            ParameterSpec("lambda", float, _SHARED, 1.0, "factor of the merged task vector"),
            ParameterSpec(
                "int8_mask",
                bool,
                _SHARED,
                False,
                "no effect: accepted because mergekit's ties has it",
            ),
        ),
    ),
    _merge,
)
