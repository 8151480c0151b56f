"""The tensors of the experts and routers of an existing mixture, for any family that transformers
has.

Nothing is written down per family. transformers names the router's class. The tensors of single
experts are those that change when the config asks for twice as many experts: they have new names,
or axes that are twice as long.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import hub_state
from mergekit_moe_ext.merging.wrappers import NUMBERS_OF_EXPERTS, routing_config
from mergekit_moe_ext.mixtures.routers import routers_of, stack_of

_LAYER = re.compile(r".*?\.\d+\.")
_NUMBER = re.compile(r"\d+")
_NAMES = "expert_names"


@dataclass(frozen=True)
class MoeLayer:
    """The tensors of one layer's experts and router, by hub names.

    router: the name of the router's module in the model, as usage files have it.
    router_tensors: the router's own parameters.
    experts: templates with {expert} of the names of one expert's tensors.
    rows: by tensor of all experts, the router's included, the axis along which experts lie.
    """

    router: str
    router_tensors: tuple[str, ...]
    experts: tuple[str, ...]
    rows: Mapping[str, int]

    @property
    def stack(self) -> str:
        return stack_of(self.router)


def experts_per_token(config: PretrainedConfig) -> int:
    """The number of experts that a token is sent to. `UserError` where the config does not say."""
    inner = routing_config(config)
    for key in ("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_sequence"):
        if isinstance(getattr(inner, key, None), int):
            return getattr(inner, key)
    if config.model_type == "switch_transformers":  # always one, and no key
        return 1
    raise UserError(
        f"the config of {config.architectures[0]} does not say how many experts a token is sent to"
    )


def num_experts(config: PretrainedConfig) -> int:
    return getattr(routing_config(config), _key(config))


def with_num_experts(config: PretrainedConfig, number: int) -> PretrainedConfig:
    """The config with another number of experts, which are then without names."""
    changed = copy.deepcopy(config)
    setattr(routing_config(changed), _key(config), number)
    vars(changed).pop(_NAMES, None)
    return changed


def expert_names(config: PretrainedConfig) -> list[str | None]:
    """The name of every expert of a mixture, None for those without one."""
    number = num_experts(config)
    names = getattr(config, _NAMES, None)
    if names is None:
        return [None] * number
    if not isinstance(names, list) or len(names) != number:
        raise UserError(
            f"`{_NAMES}` in the config of {config.name_or_path or 'the mixture'} is not a list of "
            f"{number} names, one per expert"
        )
    return names


def index_of_expert(config: PretrainedConfig, expert: str) -> int:
    """The index of the expert of this name or number. `UserError` where there is none."""
    names = expert_names(config)
    if expert in names:
        return names.index(expert)
    if expert.isdigit() and int(expert) < len(names):
        return int(expert)
    named = [f"{index} ({name})" for index, name in enumerate(names) if name is not None]
    known = f"; of these have names: {', '.join(named)}" if named else ", none of which has a name"
    raise UserError(f"there is no expert {expert!r}: they are 0 to {len(names) - 1}{known}")


def _key(config: PretrainedConfig) -> str:
    for key in NUMBERS_OF_EXPERTS:
        if isinstance(getattr(routing_config(config), key, None), int):
            return key
    raise UserError(f"the config of {config.architectures[0]} does not say how many experts it has")


def moe_layers(config: PretrainedConfig) -> list[MoeLayer]:
    """The MoE layers of a model, in order. `UserError` for a model that is not a mixture of
    experts, or one of an unknown form.
    """
    model, state = hub_state(config)
    architecture = type(model).__name__
    routers = routers_of(model)
    number = num_experts(config)
    _, doubled = hub_state(with_num_experts(config, 2 * number))
    # Names that only the doubled model has are of experts whose tensors lie apart.
    experts: dict[str, set[str]] = {}
    for name in doubled.keys() - state.keys():
        template = _template(name, number, state)
        experts.setdefault(layer_of(name), set()).add(template)
    rows: dict[str, dict[str, int]] = {}
    for name, axis in _axes_of_experts(state, doubled, number, architecture).items():
        rows.setdefault(layer_of(name), {})[name] = axis
    hub_names = {id(tensor): name for name, tensor in state.items()}
    layers = {}
    for router_name, router in routers.items():
        router_tensors = _tensors_of(router, hub_names)
        # By the name of a tensor, since the module may lie elsewhere in the model (Nemotron-H).
        key = layer_of(router_tensors[0] if router_tensors else router_name)
        if key in layers or key not in rows:
            raise UserError(f"the experts of {architecture} do not lie as in other architectures")
        if not set(router_tensors) <= rows[key].keys():
            raise UserError(
                f"{router_name} of {architecture} has more than a row per expert, so it cannot be "
                "merged"
            )
        layers[key] = MoeLayer(
            router=router_name,
            router_tensors=router_tensors,
            experts=tuple(sorted(experts.get(key, ()))),
            rows=rows[key],
        )
    if experts.keys() - layers.keys() or rows.keys() - layers.keys():
        raise UserError(f"{architecture} has experts without a router that is known")
    return list(layers.values())


def _tensors_of(router: nn.Module, hub_names: Mapping[int, str]) -> tuple[str, ...]:
    """The hub names of a router's parameters, in the order of their names in the router."""
    names = []
    for _name, tensor in sorted(router.state_dict(keep_vars=True).items()):
        if id(tensor) in hub_names:
            names.append(hub_names[id(tensor)])
    return tuple(names)


def _axes_of_experts(
    state: Mapping[str, Tensor], doubled: Mapping[str, Tensor], number: int, architecture: str
) -> dict[str, int]:
    """By tensor that holds all of so many experts, the axis that they lie along: the one that is
    twice as long in the model with twice as many. `UserError` where it has no entry per expert.
    """
    axes_of_experts = {}
    for name, tensor in state.items():
        sizes = list(zip(tensor.shape, doubled[name].shape, strict=True))
        axes = [axis for axis, (size, doubled_size) in enumerate(sizes) if size != doubled_size]
        if not axes:
            continue
        if len(axes) > 1 or sizes[axes[0]] != (number, 2 * number):
            raise UserError(
                f"{name} of {architecture} does not hold one entry per expert, so experts cannot "
                "be taken from it one by one"
            )
        axes_of_experts[name] = axes[0]
    return axes_of_experts


def layer_of(name: str) -> str:
    """The beginning of a tensor's name, up to the number of its layer and the dot behind it; empty
    for a tensor outside of all layers.
    """
    match = _LAYER.match(name)
    return match.group() if match else ""


def _template(name: str, number: int, state: Mapping[str, object]) -> str:
    """The name of a tensor of expert `number` or above, with {expert} in place of its index."""
    for match in _NUMBER.finditer(name):
        template = f"{name[: match.start()]}{{expert}}{name[match.end() :]}"
        if int(match.group()) >= number and template.format(expert=0) in state:
            return template
    raise UserError(f"{name} does not belong to an expert")
