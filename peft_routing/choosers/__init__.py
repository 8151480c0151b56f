"""Choosers: functions that compute one set of coefficients per sequence, for `coefficients=`.

    model.generate(**batch, coefficients=perplexity(model, **batch, top_k=1))

They choose from outside the hidden states. `perplexity` and `task_vector` read the prompt (MergeME
3.1.3 and appendix C), `Nearest` reads its text, and `oracle` knows the answer (Trade-offs 2.4).
Give them the prompt alone: the choice depends on everything that they read.
"""

from peft_routing.choosers.nearest import Nearest
from peft_routing.choosers.oracle import oracle
from peft_routing.choosers.perplexity import perplexity
from peft_routing.choosers.task_vector import task_vector

__all__ = ["Nearest", "oracle", "perplexity", "task_vector"]
