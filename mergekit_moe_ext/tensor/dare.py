"""The tensor method `dare`: DARE as MergeME 3.1.2 and its own paper write it, where mergekit's
rescales by L1 norms.

A mask depends on torch's seed (that is `--random-seed`), the source's position among the models
that are not the base, and the tensor's name. It does not depend on the order of execution, so
reruns, threads, shards and GPUs agree.
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
from mergekit_moe_ext.tensor.kernels.drop import mask_key
from mergekit_moe_ext.tensor.kernels.on_gpu import merge_dare


def _merge(group: TensorGroup, **parameters: Any) -> torch.Tensor:
    base = group.base
    entries = group.non_base
    if not entries:
        return base.tensor
    # mergekit seeds torch's generator with --random-seed; a tensor method sees nothing else of it.
    seed = torch.initial_seed()
    name = group.metadata.name or ""
    return merge_dare(
        base.tensor,
        [entry.tensor for entry in entries],
        [parameters["weight"][entry.id] for entry in entries],
        [parameters["density"][entry.id] for entry in entries],
        [mask_key(seed, position, name) for position in range(len(entries))],
        scale=parameters["lambda"],
        elect_sign=parameters["elect_sign"],
    )


_SHARED = ParameterScope.SHARED
_NON_BASE = ParameterScope.NON_BASE
DARE = TensorMethod(
    MergeMethodSpec(
        name="dare",
        pretty_name="DARE",
        reference_url="https://arxiv.org/abs/2311.03099",
        contract=InputContract(base=BasePolicy.REQUIRED),
        parameters=(
            ParameterSpec("weight", float, _NON_BASE, 1.0, "weight of the model's task vector"),
            ParameterSpec("density", Fraction, _NON_BASE, 1.0, "probability that a value is kept"),
            ParameterSpec("lambda", float, _SHARED, 1.0, "factor of the merged task vector"),
            ParameterSpec(
                "elect_sign",
                bool,
                _SHARED,
                False,
                "sum only the values that agree with the sign that TIES elects",
            ),
        ),
    ),
    _merge,
)
