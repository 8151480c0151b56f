"""`oracle`: the expert of each example's task, or its cluster (Trade-offs 2.4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.choosers.experts import check_known, expert_names


def oracle(
    names: Sequence[str],
    experts: Sequence[str] | nn.Module,
    clusters: Mapping[str, Any] | None = None,
) -> Tensor:
    """Coefficients (examples, experts): 1 for the expert that `names` has for an example.

    `experts` are all names in the order of the coefficients, or a model with one active routed
    adapter. With `clusters`, which has the cluster of each expert as in `RoutedLoraConfig`, all
    experts in the cluster of the named one get equal shares. `UserError` for a name that is not an
    expert, with the nearest one that is.
    """
    known = expert_names(experts)
    check_known(names, known, "names")
    chosen = torch.eye(len(known))
    if clusters is not None:
        check_known(clusters, known, "clusters")
        for name in known:
            if name not in clusters:
                raise UserError(f"clusters: every expert has one, and {name!r} has none")
        ids = [clusters[name] for name in known]
        # A cluster can be called anything that can be compared: its number is the first place at
        # which it stands.
        cluster_of = torch.tensor([ids.index(each) for each in ids])
        # (experts, experts): a row per expert, with equal shares for all that are in its cluster
        together = (cluster_of[:, None] == cluster_of).float()
        chosen = together / together.sum(dim=1, keepdim=True)
    return chosen[[known.index(name) for name in names]]
