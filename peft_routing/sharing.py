"""Which modules have a router in common, and the choice that they share.

`router_granularity` says which: mttl's word, for mttl's rule. The router of several modules reads
the input of the one that is called first, and has its width; the others, whatever their input, take
what it chose. Which one that is follows from the model: the first one in its order of modules.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.config import RoutedLoraConfig
from peft_routing.expert import Expert

# A block is what has a number in its name, the outermost such: model.layers.0, encoder.block.3.
_BLOCK = re.compile(r"(?:(?P<stack>.*?)\.)?\d+(?=\.)")
# Model types of transformers 5.24 in which modules see (tokens, batch, …): all of them, or some in
# each block. Elsewhere shapes tell, but not of a batch with as many sequences as tokens.
_TURNED = ("longformer", "xlnet")
_TURNED_IN_A_BLOCK = ("longformer",)


class _Held:
    """Whether a choice can be made, and the coefficients once it is made."""

    is_open = False
    coefficients: Tensor | None = None


class SharedChoice(threading.local):
    """The choice that several modules share, in this thread.

    It holds while the module that contains all of these is called.
    """

    # An object of its own: compiled code loses what it sets on a `threading.local` itself wherever
    # its graph is broken.
    now: _Held

    def __init__(self, where: str) -> None:
        self.where = where
        self.now = _Held()

    def __reduce__(self) -> Any:
        return SharedChoice, (self.where,)

    def begin(self) -> None:
        now = self.now
        now.is_open = True
        now.coefficients = None

    def end(self) -> None:
        now = self.now
        now.is_open = False
        now.coefficients = None

    def check_reader(self, router: Any, x: Tensor, module: str) -> None:
        """`UserError` where this module cannot be the one whose input x is read."""
        if not self.now.is_open:
            raise UserError(
                f"{module} was called alone, and its router's choice is made within a call of "
                f"{self.where}: call that, or a module that contains it"
            )
        if x.shape[-1] != router.in_features:
            raise UserError(
                f"{module} is called first in {self.where}, and its input has the width "
                f"{x.shape[-1]}; the router reads {router.in_features}, as the module that comes "
                "first in the model. Compose with router_granularity='module'"
            )

    def over(self, x: Tensor, module: str, granularity: str) -> Tensor:
        """The coefficients, so that they can be broadcast over the tokens of x (…, in).

        `UserError` where this module sees other tokens than the one that was read.
        """
        coefficients = self.now.coefficients
        assert coefficients is not None
        coefficients = coefficients.to(x.device)
        tokens = coefficients.shape[:-1]
        own = x.shape[:-1]
        if tokens == own or not tokens:
            return coefficients
        # One set per sequence is (batch, 1 …, experts), but for packed documents.
        is_per_sequence = granularity == "sequence" and tokens[1:].numel() == 1
        if is_per_sequence and len(tokens) == len(own) and tokens[0] == own[0]:
            return coefficients
        # Some models put the tokens of all sequences into one row.
        if len(tokens) != len(own) and tokens.numel() == own.numel():
            return coefficients.reshape(*own, -1)
        raise UserError(
            f"{module} has an input of shape {tuple(x.shape)}, and the router of {self.where} "
            f"chose for tokens of shape {tuple(tokens)}: compose with router_granularity='module'"
        )


HeldChoices = list[tuple[SharedChoice, Tensor | None]]


def open_choices(choices: Sequence[SharedChoice]) -> HeldChoices:
    """Those of the choices that hold now, with their coefficients."""
    return [(choice, choice.now.coefficients) for choice in choices if choice.now.is_open]


@contextmanager
def choices_held(chosen: HeldChoices) -> Iterator[None]:
    """A context in which choices of a pass that is over hold again.

    Gradient checkpointing repeats a part of a pass. In the pass itself nothing is changed.
    """
    again = [(choice, coefficients) for choice, coefficients in chosen if not choice.now.is_open]
    for choice, coefficients in again:
        choice.begin()
        choice.now.coefficients = coefficients
    try:
        yield
    finally:
        for choice, _ in again:
            choice.end()


def group_of(module: str, config: RoutedLoraConfig) -> str:
    """The name of the modules that have a router in common with this one."""
    if config.modules_per_router == "model":
        return ""
    block = _BLOCK.match(module)
    # A module outside all blocks, such as the head, is alone.
    return block[0] if block and config.modules_per_router == "block" else module


def groups_in(model: nn.Module, config: RoutedLoraConfig) -> dict[str, list[str]]:
    """The adapted modules that have a router in common, in the model's order."""
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        if name in config.sites:
            groups.setdefault(group_of(name, config), []).append(name)
    return groups


def give_choices(
    model: nn.Module, config: RoutedLoraConfig, routers: dict[str, Any]
) -> list[tuple[nn.Module, SharedChoice]]:
    """Give a choice to each router of several modules, by group, where it depends on the input.

    Returns each with the part of the model during whose call it holds.
    """
    if not config.shares_choices:
        return []
    choices = []
    for group, modules in groups_in(model, config).items():
        if len(modules) == 1:
            continue
        # Of the whole model this is what calls the blocks, which the list that they are in is not.
        where = group or _stack_of(modules[0]).rpartition(".")[0]
        routers[group].choice = SharedChoice(where or "the model")
        choices.append((model.get_submodule(where), routers[group].choice))
    return choices


def check_groups(model: nn.Module, config: RoutedLoraConfig) -> None:
    """`UserError` where modules that would have a router in common do not see the same tokens."""
    if not config.shares_choices:
        return
    stated = f"router_granularity={config.modules_per_router!r}"
    if _model_type(model) in _TURNED_IN_A_BLOCK:
        raise UserError(
            f"{stated}: between the modules of a block of a {_model_type(model)}, sequences and "
            "tokens change places. Use router_granularity='module'"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            f"{stated}: in an encoder-decoder, modules of one block read the tokens of two "
            "sequences. Use router_granularity='module'"
        )
    if config.modules_per_router == "block":
        return
    stacks: dict[str | None, str] = {}
    for modules in groups_in(model, config).values():
        for module in modules:
            stacks.setdefault(_stack_of(module) if _BLOCK.match(module) else None, module)
    if len(stacks) > 1 or None in stacks:
        raise UserError(
            f"{stated} is for modules in the blocks of one stack, which see the same tokens; there "
            f"are {', '.join(stacks.values())}. Use router_granularity='block'"
        )


def check_sequences(model: nn.Module, config: RoutedLoraConfig) -> None:
    """`UserError` where modules do not see the sequences that are to choose."""
    if config.granularity != "sequence":
        return
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            "granularity='sequence' is for models with one stack: the decoder of an "
            "encoder-decoder starts from a single token, which has nothing to choose by. Use "
            "granularity='token'"
        )
    if config.routes_sequences and _model_type(model) in _TURNED:
        raise UserError(
            f"granularity='sequence': the modules of a {_model_type(model)} see tokens in the "
            "place of sequences. Use granularity='token'"
        )


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def check_prototypes(model: nn.Module, config: RoutedLoraConfig, experts: Sequence[Expert]) -> None:
    """`UserError` where a router would start from experts that have nothing at the module that it
    reads.
    """
    if not (config.shares_choices and config.router_class.starts_from_experts(config)):
        return
    for modules in groups_in(model, config).values():
        for expert in experts:
            if expert.name in config.experts and not expert.rank(modules[0]):
                raise UserError(
                    f"router_granularity={config.modules_per_router!r}: the router reads "
                    f"{modules[0]}, where it starts from the experts' prototypes, and expert "
                    f"{expert.name!r} has no update there. Use router_granularity='module'"
                )


def check_readers(model: nn.Module, before: RoutedLoraConfig, after: RoutedLoraConfig) -> None:
    """`UserError` where a router that is kept would have to read another module's input."""
    if not after.shares_choices:
        return
    groups_before = groups_in(model, before)
    for group, modules in groups_in(model, after).items():
        first = groups_before.get(group, modules)[0]
        if modules[0] != first:
            raise UserError(
                f"the router of {group or 'the model'} reads the input of {first}, and with these "
                f"experts it would read that of {modules[0]}: compose an adapter of these experts"
            )


def _stack_of(module: str) -> str:
    """The list of blocks that a module lies in, empty where the model itself is the list."""
    block = _BLOCK.match(module)
    return (block and block["stack"]) or ""
