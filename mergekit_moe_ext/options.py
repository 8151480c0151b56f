"""The options of `train`."""

from dataclasses import dataclass

from _mergekit_moe_ext_common import options
from _mergekit_moe_ext_common.options import option


@dataclass(frozen=True)
class Recipe(options.Recipe):
    """How a mixture of experts is trained. Defaults are MergeME's or, mostly, transformers'."""

    learning_rate: float | None = option(
        None, "AdamW's initial learning rate. [default: 1e-5 for all (MergeME), 1e-3 for gates]", at_least=0
    )
    weight_decay: float = option(0.01, "AdamW's (MergeME).", at_least=0)
    router_aux_loss: float = option(
        0.0, "Weight of the load-balancing loss, per layer (MergeME trains without).", at_least=0
    )
    bf16: bool = option(
        False,
        "Compute in bfloat16, as autocast does; what is trained is kept in float32. Always on for the gates of a "
        "model that is stored in bfloat16.",
    )
