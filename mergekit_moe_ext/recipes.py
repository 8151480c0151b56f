"""The options of the commands `train` and `adapt`, each set a dataclass, and the values that
options of several commands and methods can have.
"""

from dataclasses import dataclass
from typing import Literal

from _mergekit_moe_ext_common.options import Schedule, TrainingOptions, option

# What `train` can be asked to train; gates and router are two names of one thing.
Part = Literal["gates", "router", "projectors", "all"]
# What is counted as usage: all that a router chose, or what fitted into the expert capacity.
Counted = Literal["chosen", "dispatched"]


@dataclass(frozen=True)
class Recipe(TrainingOptions):
    """The settings by which a mixture of experts is trained. Most defaults are transformers', some
    are MergeME's.
    """

    learning_rate: float | None = option(
        None,
        "Initial learning rate of AdamW. [default: 1e-5 for all (MergeME), else 1e-3]",
        at_least=0,
    )
    router_learning_rate: float | None = option(
        None, "Learning rate of the router or gates. [default: --learning-rate]", at_least=0
    )
    projector_learning_rate: float | None = option(
        None, "Learning rate of projectors. [default: --learning-rate]", at_least=0
    )
    weight_decay: float = option(0.01, "AdamW's weight decay (MergeME's).", at_least=0)
    adam_beta1: float = option(0.9, "AdamW's decay of the mean of gradients.", at_least=0)
    adam_beta2: float = option(0.999, "AdamW's decay of the mean of their squares.", at_least=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", at_least=0)
    mixing: Literal["shuffled", "per-task"] = option(
        "shuffled",
        "Rows of a step: those of all sources shuffled, or as many batches of every source, one "
        "source after the other, each with the same weight in the loss (CAEM-MoE).",
    )
    samples_per_task: int | None = option(
        None,
        "Number of rows of each source in an epoch of --mixing per-task, rounded up to whole "
        "steps. The next epoch goes on where this one ended. [default: the smallest source's]",
        at_least=1,
    )
    completions_only: bool = option(
        False,
        "Compute a decoder's loss on answers alone: the last turn of a chat, or a target after its "
        "input. [default: on all tokens]",
    )
    max_source_length: int | None = option(
        None, "Number of tokens of an input before its target. [default: --max-length]", at_least=1
    )
    max_target_length: int | None = option(
        None, "Number of tokens of a target. [default: --max-length]", at_least=1
    )
    metric_for_best_model: str | None = option(
        None,
        "Measure that the best checkpoint has the best of: overall_performance, NAME_score or "
        "NAME_loss. [default with --tasks: overall_performance, or the score of the only task]",
    )
    load_best_model_at_end: bool = option(
        False,
        "Write the model of the best measurement, not of the last step; with --tasks, every epoch "
        "is measured and has a checkpoint.",
    )
    save_total_limit: int = option(
        2, "Number of checkpoints that are kept, the last ones and the best.", at_least=1
    )
    router_aux_loss: float | None = option(
        None,
        "Weight of the load-balancing loss, per layer. [default: a sequence MoE's own "
        "router_aux_loss_coef, else 0; MergeME trains without]",
        at_least=0,
    )
    bf16: bool = option(
        False,
        "Compute in bfloat16, as autocast does; what is trained is kept in float32. Always on "
        "where only parts are trained of a model that is stored in bfloat16.",
    )


@dataclass(frozen=True)
class Adaptation:
    """The settings by which the routers of a weight-ensembling model are adapted. Defaults are
    WEMoE's, and its authors' code's where the paper states none.
    """

    objective: Literal["entropy", "supervised"] = option(
        "entropy", "Minimise the entropy of the predictions, or, with labels, their cross-entropy."
    )
    steps: int = option(1000, "Number of steps, each with one batch of every task.", at_least=1)
    learning_rate: float | None = option(
        None,
        "Learning rate of Adam. [default: 1e-4 for routers (as FusionBench); 1e-3 for constants "
        "(WEMoE's own code)]",
        at_least=0,
    )
    lr_scheduler_type: Schedule = option(  # noqa: RUF009
        "constant", "Schedule of the learning rate; WEMoE's own code has cosine."
    )
    adam_beta1: float = option(0.9, "Adam's decay of the mean of gradients.", at_least=0)
    adam_beta2: float = option(0.999, "Adam's decay of the mean of their squares.", at_least=0)
    coefficients_per: Literal["sample", "batch"] = option(
        "sample",
        "What has its own coefficients, in steps and when measuring. With batch, all rows of a "
        "batch have the mean of theirs, as FusionBench's published runs do; the adapted model has "
        "them per sample all the same.",
    )
    per_device_train_batch_size: int = option(
        16, "Number of rows of each task per process and step.", at_least=1
    )
    per_device_eval_batch_size: int = option(
        16, "Number of rows per process and forward pass when measuring.", at_least=1
    )
    patience: int | None = option(
        None,
        "Number of steps after which to stop, if the running mean of the objective has not fallen "
        "by 0.1 percent. [default: never stop early]",
        at_least=1,
    )
    no_guard: bool = option(
        False, "Minimise the entropy alone, as in the paper, even where predictions collapse."
    )
    held_out: int = option(
        0,
        "Number of rows of each task that are measured, not adapted to; see --eval-data. With 0, "
        "the rows adapted to are measured, as in the paper, which adapts to the test inputs.",
        at_least=0,
    )
    eval_steps: int | None = option(
        None,
        "Number of steps from one measurement to the next. [default: only before and after]",
        at_least=1,
    )
    save_steps: int = option(100, "Number of steps from one checkpoint to the next.", at_least=1)
    image_column: str = option("image", "Column of images.")
    label_column: str = option("label", "Column of classes, where there are any.")
    seed: int = option(42, "Seed of the order of the data and of the choice of held-out rows.")
