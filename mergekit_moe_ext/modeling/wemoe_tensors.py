"""Parameters that, whenever they are read, are the base's plus a weighed sum of task vectors.

The modules that read them stay transformers' own, whatever they compute (AdaMerging).
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from .configuration_wemoe import vectors_of
from .wemoe_calls import Current


class WeighedTensor:
    """A parameter that in a forward pass is the base's plus a weighed sum of task vectors.

    Its module keeps the task vectors, as a buffer.
    """

    def __init__(
        self,
        module: nn.Module,
        part: str,
        experts: int,
        group: str,
        current: Current,
    ) -> None:
        base = module.get_parameter(part)
        module.register_buffer(vectors_of(part), base.new_zeros(experts, *base.shape))
        self.module = module
        self.part = part
        self.group = group
        self.current = current

    def initialise(self) -> None:
        """Makes the task vectors 0 where they were not loaded."""
        initialization.zeros_(getattr(self.module, vectors_of(self.part)))

    def read(self, base: Tensor) -> Tensor:
        """The parameter, in the shape of `base`; outside a forward pass `base` itself."""
        call = self.current.call
        if call is None or base.is_meta:  # while it is loaded, saved or offloaded
            return base
        # A module reads its parameter in every pass; with a cache it is merged in the first alone.
        c = call.values[self.group]
        if self.group not in call.keeping:
            return self.merged(base, c)
        if id(self) not in call.carried.merged:
            call.carried.merged[id(self)] = self.merged(base, c), None
        return call.carried.merged[id(self)][0]

    def merged(self, base: Tensor, c: Tensor) -> Tensor:
        """The parameter for coefficients (experts,)."""
        vectors = getattr(self.module, vectors_of(self.part)).to(base)
        flat = torch.addmv(base.flatten(), vectors.reshape(len(c), -1).T, c.to(base))
        return flat.view_as(base)

    def replace_in(self, module: Any, part: str) -> None:
        """Make a module, its own or one tied to it, read this instead of its parameter."""
        # A second parameter of the module starts from its stock class again, not from the subclass
        # that the first one made.
        stock: Any = type(module).__base__ if hasattr(module, "weighed") else type(module)
        module.weighed = {**getattr(module, "weighed", {}), part: self}
        module.__class__ = _reading(stock, tuple(module.weighed))


# A property of a class comes before what `nn.Module.__getattr__` finds among the parameters, so
# that the module's own code reads the weighed tensor, and the parameter itself stays where saving,
# loading and moving look for it. One class per set of names, for `torch.compile` and for pickle.
@cache
def _reading(stock: Any, parts: tuple[str, ...]) -> Any:
    """A subclass of a module's class, under the same name, that reads these from `weighed`."""

    def read(part: str, module: Any) -> Tensor:
        if part not in module._parameters:
            raise AttributeError(part)
        return module.weighed[part].read(module._parameters[part])

    def reduce(module: Any, _protocol: Any) -> tuple[Any, ...]:
        return _unpickled, (stock, parts), module.__dict__

    members: dict[str, Any] = {part: property(partial(read, part)) for part in parts}
    members["__reduce_ex__"] = reduce
    members["__module__"] = stock.__module__
    members["__qualname__"] = stock.__qualname__
    return type(stock.__name__, (stock,), members)


def _unpickled(stock: Any, parts: tuple[str, ...]) -> Any:
    module_class = _reading(stock, parts)
    return module_class.__new__(module_class)
