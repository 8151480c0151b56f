"""The change of attention and of the MLPs by fine-tuning, layer by layer, in models on disk
(E-WEMoE, figure 3).

`examples/task_vector_variation.py` prints and draws what is measured here. `upscale: auto` goes by
the same measure.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.analysis.fine_tunes import StoredModel, network_of
from mergekit_moe_ext.merging.manifest import hub_names
from mergekit_moe_ext.wemoe.groups import Part
from mergekit_moe_ext.wemoe.variation import Variation, measure, names_by_layer

# 1, 2 and 5 times the powers of ten from 1e-6 to 0.1.
_POWERS_AND_DIGITS = itertools.product(range(-6, 0), (1, 2, 5))
THRESHOLDS = tuple(float(f"{digit}e{power}") for power, digit in _POWERS_AND_DIGITS)


def parameter_variation(
    base: str | Path,
    models: Mapping[str, str | Path],
    *,
    layers: Sequence[int] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    quiet: bool = True,
) -> dict[Part, Variation]:
    """The change of each fine-tune from the base in the attention and in the MLPs of every layer
    (E-WEMoE, figure 3).

    `base` is the directory of the model that all of `models` (name -> directory) were fine-tuned
    from: safetensors, in shards or not, in any floating dtype. The weights and biases that count
    are those that `upscale: attention` and `upscale: mlp` would weigh, so that norms and cross
    attention are left out. Measured are

    - the squared L2 norm of the change, ||theta_ft - theta_0||^2, in total per module and not per
      parameter. An MLP often has twice as many parameters as attention or more, and so would change
      more at the same rate;
    - the cosine similarity of theta_0 and theta_ft themselves, not of task vectors;
    - the number of elements of the change that are smaller in magnitude than each of `thresholds`,
      which must go up. E-WEMoE prunes task vectors because most of their elements are tiny (below
      0.0005).

    `layers` are the numbers of those to measure, of every stack; None measures all. Sums are in
    float64. One tensor of two models is in memory at a time. `UserError` for other architectures
    and shapes, missing tensors, and layers whose attention or MLP cannot be told.
    """
    if not models:
        raise UserError("there is no fine-tune to measure")
    network, state = network_of(base, models.values())
    names = names_by_layer(network, hub_names(network, state), layers)
    stored = {path: StoredModel.open(path, network) for path in (base, *models.values())}
    shapes = {}
    for by_layer in names.values():
        for name in itertools.chain.from_iterable(by_layer.values()):
            shapes[name] = tuple(state[name].shape)
    for checkpoint in stored.values():
        checkpoint.check(shapes)
    readers = {name: stored[path].read for name, path in models.items()}
    return measure(names, stored[base].read, readers, thresholds=thresholds, quiet=quiet)
