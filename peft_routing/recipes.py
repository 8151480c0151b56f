"""The options of `peft-route train` and `peft-route distil`."""

from dataclasses import dataclass

from _mergekit_moe_ext_common.options import TrainingOptions, option

LEARNING_RATES = (1e-3, 1e-4, 1e-5)  # the paper tunes over these


@dataclass(frozen=True)
class Recipe(TrainingOptions):
    """The settings of a router's training. Most defaults are transformers', some the paper's."""

    num_train_epochs: float = option(
        5.0, "Number of times that the data is read (the paper's 5).", at_least=0
    )
    completions_only: bool = option(
        False,
        "Compute the loss on answers alone: the last turn of a chat, or a target after its input. "
        "[default: on all tokens]",
    )
    router_aux_loss: float = option(
        0.0,
        "Weight of the load-balancing loss, averaged over modules.",
        at_least=0,
    )


@dataclass(frozen=True)
class Distilling(TrainingOptions):
    """The settings of a LoRA's training to match an ensemble. The defaults are transformers'."""

    completions_only: bool = option(
        False,
        "Match the ensemble on answers alone: the last turn of a chat, or a target after its "
        "input. [default: on all tokens]",
    )
