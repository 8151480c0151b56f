"""`hierarchical`: a learned merge inside each cluster, and learned routing between clusters
(Trade-offs 5.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.routers.base import RouterSettings
from peft_routing.routers.linear import LinearOptions, LinearRouter
from peft_routing.routers.tensors import wide


@dataclass(frozen=True)
class HierarchicalOptions(LinearOptions):
    clusters: dict[str, Any] | None = None  # the cluster of each expert; `top_k` counts clusters


class HierarchicalRouter(LinearRouter):
    """A router that gives expert i of cluster c the coefficient rho_c(x) mu_i: routing times
    merging.

    For both ways of mixing this is the mixture of the clusters' merged experts. `top_k` counts
    clusters. `init="arrow"` is the paper's Arrow HC: a cluster's row starts as the prototype of its
    uniform merge.
    """

    name = "hierarchical"
    options = HierarchicalOptions
    rows = {"weight": "cluster", "logits": "expert"}  # noqa: RUF012
    cluster_of: Tensor

    def __init__(self, config: RouterSettings, experts: Sequence[str], in_features: int) -> None:
        options = self.options_of(config)
        of_expert = {str(name): str(cluster) for name, cluster in (options.clusters or {}).items()}
        self.clusters = sorted({of_expert[name] for name in experts})
        super().__init__(config, experts, in_features)
        self.k = min(options.top_k or len(self.clusters), len(self.clusters))
        self.logits = nn.Parameter(torch.zeros(len(experts)))
        ids = torch.tensor([self.clusters.index(of_expert[name]) for name in experts])
        self.register_buffer("cluster_of", ids, persistent=False)

    @classmethod
    def check(cls, config: RouterSettings) -> None:
        super().check(config)
        options = cls.options_of(config)
        if options.clusters is None:
            raise UserError("router='hierarchical' needs clusters={'math': 0, 'code': 0, 'fr': 1}")
        if options.clusters.keys() != config.experts.keys():
            wrong = min(options.clusters.keys() ^ config.experts.keys())
            raise UserError(
                f"clusters must name exactly the experts; {wrong!r} is in only one of the two"
            )
        count = len(set(options.clusters.values()))
        if options.top_k is not None and options.top_k > count:
            raise UserError(f"top_k={options.top_k} counts clusters, and there are {count}")

    @property
    def learns(self) -> bool:
        return len(self.experts) > 1

    def labels(self, of: str) -> list[str]:
        return self.clusters if of == "cluster" else self.experts

    def coefficients(self, scores: Tensor) -> Tensor:
        return self.load(scores)[..., self.cluster_of] * self._inside()

    def load(self, scores: Tensor) -> Tensor:
        return super().coefficients(scores)

    def _inside(self) -> Tensor:
        """(experts,): each expert's share mu_i of its cluster, a softmax over the cluster."""
        # Row i of the table has the logits of the experts in i's cluster, and minus infinity for
        # the others, which exp turns into 0.
        logits = wide(self.logits)
        together = self.cluster_of[:, None] == self.cluster_of
        table = torch.where(together, logits, float("-inf"))
        return torch.exp(logits - table.logsumexp(dim=-1))

    @torch.no_grad()
    def start(
        self, factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float], mixing: str
    ) -> None:
        if not self.from_arrow:
            return
        # The factors of each cluster's uniform merge. A common factor of all its experts, 1 over
        # their number, changes no singular vector and is left out.
        merged = []
        for cluster in range(len(self.clusters)):
            members = [i for i, of in enumerate(self.cluster_of.tolist()) if of == cluster]
            down = [factors[i][0].double() for i in members]
            up = [factors[i][1].double() * scalings[i] for i in members]
            if mixing == "low_rank":
                merged.append((sum(down[1:], down[0]), sum(up[1:], up[0])))
            else:  # the sum of the updates, as one update whose rank is the sum of their ranks
                merged.append((torch.cat(down), torch.cat(up, dim=1)))
        self._start_as_prototypes(merged)
