"""What a family declares: the dense architecture, the MoE that holds it, and where FFNs go."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from transformers import PretrainedConfig

# Of the dense model only. `model_type` in particular: passed on it stays the dense one in memory,
# and transformers then silently skips the weight conversion.
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
    """One stack of layers. Names have {layer} in them; those of experts {expert} as well."""

    ffn: str  # the dense FFN, a module; the gate reads what it reads
    gate: str  # hub name
    experts: Mapping[str, str] = field(
        default_factory=dict
    )  # dense tensor -> the expert's, by its hub name
    # hub name -> dense tensors that are joined along their first axis; those of all experts lie on
    # one another in it
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layers: str = "num_hidden_layers"  # the config key that counts them
    merged: Mapping[str, str] = field(
        default_factory=dict
    )  # hub name -> the dense tensors that are merged into it
    zeros: tuple[str, ...] = ()  # hub names


@dataclass(frozen=True)
class Upcycling:
    """A dense architecture and the stock MoE architecture that holds it."""

    dense: Mapping[str, str]  # model type -> architecture
    moe: str  # architecture
    stacks: tuple[Stack, ...]
    output_config: Callable[
        ..., PretrainedConfig
    ]  # (dense, number of experts, experts per token, **options)
    refuse: Callable[
        [PretrainedConfig], str | None
    ]  # what in this dense config has no place in the MoE
    experts_per_token: int | None = None  # if the architecture leaves no choice
    options: frozenset[str] = frozenset()  # of the merge, that only this architecture has


def moe_config(
    config_class: type[PretrainedConfig],
    dense: PretrainedConfig,
    drop: Iterable[str] = (),
    **changes: object,
) -> PretrainedConfig:
    """The dense config's values in a config of another class, where they mean the same."""
    left_out = {*_DENSE_ONLY, *drop, *changes}
    kept = {key: value for key, value in dense.to_dict().items() if key not in left_out}
    return config_class(**kept, **changes)
