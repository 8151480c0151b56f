"""Which fusion of many LoRA adapters is best, by the log-probabilities of target tokens (Trade-offs).

One pass per adapter and task writes them (`cache`). What follows from them alone is arithmetic on a
`Table`: ensembles of probabilities (3.1, 3.2.1, B.5) and the choice of experts (2.4, 5.1, B.6).
"""

from peft_routing.fusion.tables import Table

__all__ = ["Table"]
