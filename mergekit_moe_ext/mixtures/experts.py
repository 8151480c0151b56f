"""Where the experts and routers of an existing mixture of experts lie, for any family that
transformers has.

Nothing is written down per family. transformers names the router's class; and what belongs to
single experts is what changes when the config asks for twice as many: names that are new, and axes
that are twice as long.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import hub_state
from mergekit_moe_ext.mixtures.routers import routers_of, stack_of

_LAYER = re.compile(r".*?\.\d+\.")
_NUMBER = re.compile(r"\d+")
_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class MoeLayer:
    """One layer's experts, by hub names."""

    router: str  # the module, by its name in the model, as usage files have it
    router_tensors: tuple[str, ...]  # the router's own parameters
    experts: tuple[str, ...]  # templates with {expert}: a tensor of one expert
    rows: Mapping[
        str, int
    ]  # tensor of all experts -> the axis along which they lie; the router's among them

    @property
    def stack(self) -> str:
        return stack_of(self.router)


def experts_per_token(config: PretrainedConfig) -> int:
    """How many experts a token passes. `UserError` where the config does not say."""
    for key in ("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_sequence"):
        if isinstance(getattr(config, key, None), int):
            return getattr(config, key)
    if config.model_type == "switch_transformers":  # always one, and no key
        return 1
    raise UserError(
        f"the config of {config.architectures[0]} does not say how many experts a token passes"
    )


def num_experts(config: PretrainedConfig) -> int:
    return getattr(config, _key(config))


def with_num_experts(config: PretrainedConfig, number: int) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    setattr(changed, _key(config), number)
    return changed


def _key(config: PretrainedConfig) -> str:
    for key in _KEYS:
        if isinstance(getattr(config, key, None), int):
            return key
    raise UserError(f"the config of {config.architectures[0]} does not say how many experts it has")


def moe_layers(config: PretrainedConfig) -> list[MoeLayer]:
    """The MoE layers of a model, in order. `UserError` for what is no mixture of experts that is
    known.
    """
    model, state = hub_state(config)
    routers = routers_of(model)
    number = num_experts(config)
    _, doubled = hub_state(with_num_experts(config, 2 * number))
    experts: dict[str, set[str]] = {}
    for name in doubled.keys() - state.keys():
        template = _template(name, number, state)
        experts.setdefault(_layer_of(name), set()).add(template)
    rows: dict[str, dict[str, int]] = {}
    for name, tensor in state.items():
        differing = [
            (axis, sizes)
            for axis, sizes in enumerate(zip(tensor.shape, doubled[name].shape, strict=True))
            if sizes[0] != sizes[1]
        ]
        if differing:
            (axis, sizes), *others = differing
            if others or sizes != (number, 2 * number):
                raise UserError(
                    f"{name} of {config.architectures[0]} does not hold one entry per expert, "
                    "so experts cannot be taken from it one by one"
                )
            rows.setdefault(_layer_of(name), {})[name] = axis
    hub_names = {id(tensor): name for name, tensor in state.items()}
    layers = {}
    for router_name, router in routers.items():
        key = _layer_of(router_name)
        if key in layers or key not in rows:
            raise UserError(
                f"the experts of {config.architectures[0]} do not lie as they do elsewhere"
            )
        own = [tensor for _name, tensor in sorted(router.state_dict(keep_vars=True).items())]
        router_tensors = tuple(hub_names[id(tensor)] for tensor in own if id(tensor) in hub_names)
        if not set(router_tensors) <= rows[key].keys():
            raise UserError(
                f"{router_name} of {config.architectures[0]} is more than a row per expert, so it "
                "cannot be merged"
            )
        layers[key] = MoeLayer(
            router=router_name,
            router_tensors=router_tensors,
            experts=tuple(sorted(experts.get(key, ()))),
            rows=rows[key],
        )
    if experts.keys() - layers.keys() or rows.keys() - layers.keys():
        raise UserError(f"{config.architectures[0]} has experts without a router that is known")
    return list(layers.values())


def _layer_of(name: str) -> str:
    match = _LAYER.match(name)
    return match.group() if match else ""


def _template(name: str, number: int, state: Mapping[str, object]) -> str:
    """The name of expert `number` or above, its index replaced by {expert}."""
    for match in _NUMBER.finditer(name):
        template = f"{name[: match.start()]}{{expert}}{name[match.end() :]}"
        if int(match.group()) >= number and template.format(expert=0) in state:
            return template
    raise UserError(f"{name} is of no expert")
