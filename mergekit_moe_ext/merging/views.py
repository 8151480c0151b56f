"""Views of a source: tensors that a merge reads under other names, or of another shape, than those
in the source's files.

A view is a sequence of layers. The first stands on the files, each further one on the one before.
Nothing is computed until a tensor is read, and mergekit's own tasks read through a view without
knowing of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache


@dataclass(frozen=True)
class Derivation:
    """Tensors that are made of one tensor, the origin.

    origin: its name in the layer below. The view hides it, unless it is one of `names`.
    names: the names of what is made.
    make: a function of the origin that gives them, in this order. It also takes tensors on torch's
        meta device, from which shapes are read.
    """

    origin: str
    names: tuple[str, ...]
    make: Callable[[torch.Tensor], Sequence[torch.Tensor]]


def unchanged(tensor: torch.Tensor) -> tuple[torch.Tensor]:
    """What a derivation makes that renames alone."""
    return (tensor,)


Layer = tuple[Derivation, ...]
View = tuple[Layer, ...]


def derived_shapes(
    shapes: Mapping[str, tuple[int, ...]], layer: Iterable[Derivation]
) -> dict[str, tuple[int, ...]]:
    """The names and shapes that a layer shows on top of those below it."""
    layer = list(layer)
    origins = {each.origin for each in layer}
    shown = {name: shape for name, shape in shapes.items() if name not in origins}
    for derivation in layer:
        made = derivation.make(torch.empty(shapes[derivation.origin], device="meta"))
        for name, tensor in zip(derivation.names, made, strict=True):
            shown[name] = tuple(tensor.shape)
    return shown


class ViewLoader(LazyTensorLoader):
    """A loader of mergekit's that shows one layer of a view on top of another loader.

    What was made of an origin is kept until another is asked for, since its tensors are mostly read
    one after the other.
    """

    def __init__(self, below: LazyTensorLoader, layer: Iterable[Derivation]):
        layer = list(layer)
        self._below = below
        self._derivations = {}
        paths = dict(below.index.tensor_paths)
        for derivation in layer:
            paths.pop(derivation.origin)
        for derivation in layer:
            for name in derivation.names:
                self._derivations[name] = derivation
                paths[name] = below.index.tensor_paths[derivation.origin]
        self._kept: tuple[tuple[str, str], dict[str, torch.Tensor]] | None = None
        index = ShardedTensorIndex(
            base_path=below.index.base_path,
            is_safetensors=below.index.is_safetensors,
            tensor_paths=paths,
            shards=[],
        )
        super().__init__(index, below.lazy_unpickle)

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> torch.Tensor | None:
        if key not in self.index.tensor_paths:
            key = next((name for name in aliases or () if name in self.index.tensor_paths), key)
        derivation = self._derivations.get(key)
        if derivation is None:
            if key in self.index.tensor_paths:
                return self._below.get_tensor(key, device=device)
            if raise_on_missing:
                raise KeyError(key)
            return None
        with self.lock:
            kept_as = (derivation.origin, str(device))
            if self._kept is None or self._kept[0] != kept_as:
                self._kept = None  # so that not both are in memory at once
                origin = self._below.get_tensor(derivation.origin, device=device)
                made = derivation.make(origin)
                self._kept = (kept_as, dict(zip(derivation.names, made, strict=True)))
            # A copy, since a part would keep the whole in memory.
            return self._kept[1][key].clone(memory_format=torch.contiguous_format)

    def flush(self) -> None:
        with self.lock:
            self._kept = None
        self._below.flush()

    def is_mapped(self, name: str) -> bool:
        """What the function `is_mapped` says of this loader."""
        is_stored = name in self.index.tensor_paths and name not in self._derivations
        return is_stored and is_mapped(self._below, name)


def is_mapped(loader: LazyTensorLoader, name: str) -> bool:
    """Whether what a loader reads by this name is a part of a file, which takes no memory until it
    is used.
    """
    if isinstance(loader, ViewLoader):
        return loader.is_mapped(name)
    return loader.index.is_safetensors and name in loader.index.tensor_paths


def seen_through(loader: LazyTensorLoader, view: View) -> LazyTensorLoader:
    """A loader that shows a source as the view does."""
    for layer in view:
        loader = ViewLoader(loader, layer)
    return loader


def install_views(views: Mapping[ModelReference, View]) -> None:
    """Make mergekit read these sources through their views, in this process."""
    cache = LoaderCache()
    for model, view in views.items():
        if view:
            cache.loaders.pop(model, None)  # one of another merge, if this one is not ours to stage
            cache.loaders[model] = seen_through(cache.get(model), view)
