"""Which fusion of many LoRA adapters is best, by log-probabilities of target tokens (Trade-offs).

One pass per adapter and task writes them (`cache`). What follows from them alone is arithmetic on a
`Table`: ensembles of probabilities (3.1, 3.2.1, B.5) and the choice of experts (2.4, 5.1, B.6).
"""

from peft_routing.fusion.ensembles import (
    Learned,
    learned,
    learned_beta,
    loss_of,
    mixture,
    posterior,
    sparse,
    uniform,
)
from peft_routing.fusion.selection import (
    NotFirst,
    Selection,
    best_expert,
    best_per_task,
    curve_on,
    greedy,
    least_that_reaches,
    not_first,
    own_experts,
    random_curves,
)
from peft_routing.fusion.tables import Table
from peft_routing.fusion.worst_case import WorstCase, linear_program, true_worst_case

__all__ = [
    "Learned",
    "NotFirst",
    "Selection",
    "Table",
    "WorstCase",
    "best_expert",
    "best_per_task",
    "curve_on",
    "greedy",
    "learned",
    "learned_beta",
    "least_that_reaches",
    "linear_program",
    "loss_of",
    "mixture",
    "not_first",
    "own_experts",
    "posterior",
    "random_curves",
    "sparse",
    "true_worst_case",
    "uniform",
]
