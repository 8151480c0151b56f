"""The declaration of a family: the dense architecture, the MoE that holds it, and where FFNs go."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

# Values of the dense model only. `model_type` in particular: passed on it would stay the dense one
# in memory, and transformers then silently skips the weight conversion.
_DENSE_ONLY = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "model_type",
    "pretraining_tp",
    "transformers_version",
}


@dataclass(frozen=True)
class Stack:
    """One stack of layers.

    All names are hub names with {layer} in them; those of single experts have {expert} as well.

    ffn: the dense FFN, a module. The gate reads its input.
    gate: the gate's tensor.
    experts: {dense tensor: the expert's tensor that takes it}.
    stacked: {tensor of all experts: the dense tensors of one expert}, which are joined along their
        first axis.
    layers: the key of the output's config that holds the number of layers.
    merged: {tensor of the output: the dense tensor that is merged over the sources to make it}.
    zeros: tensors that start at zero.
    constants: {tensor of the output: the value that all its elements have}.
    shared_expert: {tensor of the expert that every token goes through: the dense tensor that it is
        made of, where the user names a model for that}.
    """

    ffn: str
    gate: str
    experts: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layers: str = "num_hidden_layers"
    merged: Mapping[str, str] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)
    shared_expert: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewriting:
    """What a tensor of the dense model becomes before anything is merged.

    All names are hub names with {layer} in them, or names outside the layers.

    name: the dense tensor; where a model has none of this name, nothing is done.
    becomes: the tensors that it becomes, of which a later one may keep its name. One that the model
        has itself stays the model's own. Where there are none, the tensor has no place in the
        output, and a source in which it is not zero everywhere is refused.
    make: a function of the dense tensor and the dense config that gives these, in this order. It
        must take tensors on torch's meta device.
    """

    name: str
    becomes: tuple[str, ...] = ()
    make: Callable[[torch.Tensor, PretrainedConfig], Sequence[torch.Tensor]] = lambda *_: ()


@dataclass(frozen=True)
class Upcycling:
    """A dense architecture and the stock MoE architecture that holds it.

    dense: the dense architectures, by model type.
    moe: the MoE architecture.
    output_config: a function of the dense config, the number of experts and the number that a token
        is sent to, and of `options` as keywords; it gives the output's config.
    refuse: a function of the dense config that says what in it has no place in the MoE, or None.
    experts_per_token: the number of experts that a token is sent to, if the architecture leaves no
        choice.
    options: the names of options of the merge that only this architecture has.
    rewritings: by model type, the tensors of dense models that are stored or used in another way
        than the MoE's. All other names are those of the dense architecture.
    with_shared_expert: the config's values with a shared expert, in an architecture that need not
        have one.
    """

    dense: Mapping[str, str]
    moe: str
    stacks: tuple[Stack, ...]
    output_config: Callable[..., PretrainedConfig]
    refuse: Callable[[PretrainedConfig], str | None]
    experts_per_token: int | None = None
    options: frozenset[str] = frozenset()
    rewritings: Mapping[str, tuple[Rewriting, ...]] = field(default_factory=dict)
    with_shared_expert: Mapping[str, object] = field(default_factory=dict)


def shared_expert(ffn: str, expert: str) -> dict[str, str]:
    """The tensors of a shared expert, by the names of the modules of the dense FFN and of the
    expert.
    """
    tensors = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"{expert}.{name}.weight"] = f"{ffn}.{name}.weight"
    return tensors


def moe_config(
    config_class: type[PretrainedConfig],
    dense: PretrainedConfig,
    drop: Iterable[str] = (),
    **changes: object,
) -> PretrainedConfig:
    """A config of another class with the dense config's values, but those in `drop`, and with
    `changes`.
    """
    left_out = {*_DENSE_ONLY, *drop, *changes}
    kept = {key: value for key, value in dense.to_dict().items() if key not in left_out}
    return config_class(**kept, **changes)
