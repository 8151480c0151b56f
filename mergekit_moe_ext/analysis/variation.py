"""How far fine-tuning moved attention and the MLPs, layer by layer, in models on disk (E-WEMoE,
figure 3).

`examples/task_vector_variation.py` prints and draws what is measured here. `upscale: auto` goes by
the same measure.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.analysis.fine_tunes import StoredModel, network_of
from mergekit_moe_ext.merging.manifest import hub_names
from mergekit_moe_ext.wemoe.groups import Part
from mergekit_moe_ext.wemoe.variation import Variation, measure, names_by_layer

# 1, 2 and 5 times the powers of ten from 1e-6 to 0.1
THRESHOLDS = tuple(float(f"{digit}e{power}") for power in range(-6, 0) for digit in (1, 2, 5))


def parameter_variation(
    base: str | Path,
    models: Mapping[str, str | Path],
    *,
    layers: Sequence[int] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    quiet: bool = True,
) -> dict[Part, Variation]:
    """How far each fine-tune is from the base in the attention and in the MLPs of every layer
    (E-WEMoE, figure 3).

    `base` is the directory of the model that all of `models` (name -> directory) were fine-tuned
    from: safetensors, in shards or not, in any floating dtype. Of a layer's attention and MLP the
    weights and biases count that
    `upscale: attention` and `upscale: mlp` would weigh: norms do not, nor does attention across.
    Measured are

    - the squared L2 norm of the change, ||theta_ft - theta_0||^2, in total per module and not per
      parameter. An MLP often has twice as many parameters as attention or more, and so would change
      more at the same rate;
    - the cosine similarity of theta_0 and theta_ft themselves, not of task vectors;
    - how many elements of the change are smaller in magnitude than each of `thresholds`, which must
      go up. E-WEMoE prunes task vectors because most of their elements are tiny (below 0.0005).

    `layers` are the numbers of those to measure, of every stack, all if None. Sums are in float64.
    One tensor of two models is in memory at a time. `UserError` for other architectures and shapes,
    missing tensors, and layers whose attention or MLP cannot be told.
    """
    if not models:
        raise UserError("there is no fine-tune to measure")
    network, state = network_of(base, models.values())
    names = names_by_layer(network, hub_names(network, state), layers)
    stored = {path: StoredModel.open(path, network) for path in (base, *models.values())}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for checkpoint in stored.values():
        checkpoint.check(
            {name: shapes[name] for part in names.values() for own in part.values() for name in own}
        )
    readers = {name: stored[path].read for name, path in models.items()}
    return measure(names, stored[base].read, readers, thresholds=thresholds, quiet=quiet)
