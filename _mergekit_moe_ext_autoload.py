"""The entry point by which `mergekit-yaml` learns of our merge methods.

torch calls `activate` at the end of `import torch` (entry point group `torch.backends`), and
mergekit imports torch before anything of its own that we extend. Nothing else happens then: a
finder is put on `sys.meta_path` that waits for a few modules of our hosts, and has each extended
once it is loaded. An exception in here would break `import torch` for the whole environment, so
there is none: what goes wrong becomes one warning. Standard library only, and nothing is imported
before its host is.

Both packages call `activate` when they are imported, so that they need not import their hosts.
mergekit is extended in any case; transformers and PEFT only where a program has imported the
package that extends them.
"""

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType

# A module of a host: what extends it, and the function there that takes the module.
_EXTENDED_BY = {
    "mergekit.merge_methods.registry": ("mergekit_moe_ext.host", "register_methods"),
    "mergekit.merge": ("mergekit_moe_ext.host", "extend_merge_module"),
    "transformers.models.auto.configuration_auto": (
        "mergekit_moe_ext.modeling.on_demand",
        "extend_configurations",
    ),
    "transformers.models.auto.modeling_auto": (
        "mergekit_moe_ext.modeling.on_demand",
        "extend_models",
    ),
    "peft": ("peft_routing.registration", "register"),
}
_PACKAGES = ("mergekit_moe_ext", "peft_routing")
_awaited: set[str] = set()  # modules of hosts that the finder extends when their bodies have run
_loading: list[str] = []  # modules of ours whose bodies are running
_postponed: list[tuple[str, ModuleType]] = []  # modules of hosts that were loaded meanwhile
_warned = False


def activate() -> None:
    """Wait for our hosts, and extend what of them is loaded already. Calling it again is
    harmless."""
    try:
        _activate()
    except Exception as error:
        _stay_off(error)


def _activate() -> None:
    if not any(isinstance(finder, _WaitForHosts) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForHosts())
    for name in _EXTENDED_BY:
        module = sys.modules.get(name)
        if module is None:
            continue
        if not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _extend(name, module)
        # What the finder awaits is extended at the end of its body. Of the rest, only
        # mergekit.merge can be loading while something has to be extended: torch, which brought us,
        # is imported from its body.
        elif name == "mergekit.merge" and name not in _awaited:
            module.__class__ = _StillLoading


def mergekit_is_known() -> bool:
    """Whether the installed mergekit is one whose insides we know: 0.1.5 up to, not including,
    0.2."""
    from importlib.metadata import version

    release = version("mergekit").split("+")[0].split(".")
    return release[:2] == ["0", "1"] and int("".join(filter(str.isdigit, release[2]))) >= 5


class _WaitForHosts(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        is_ours = name.partition(".")[0] in _PACKAGES
        if not is_ours and name not in _EXTENDED_BY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module
            watched = _load_ours if is_ours else _load_and_extend
            spec.loader.exec_module = functools.partial(watched, name, load)  # type: ignore[method-assign]
            if not is_ours:
                _awaited.add(name)
        return spec


def _load_and_extend(name: str, load: Callable[[ModuleType], None], module: ModuleType) -> None:
    load(module)
    _extend(name, module)


def _load_ours(name: str, load: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Load a module of ours, and then do what had to wait for it.

    What extends a host imports most of our modules. Where the body of one of them is running, and
    has just imported that host, it would be found half done.
    """
    _loading.append(name)
    try:
        load(module)
    finally:
        _loading.remove(name)
        while _postponed and not _loading:
            _extend(*_postponed.pop(0))


class _StillLoading(ModuleType):
    """What mergekit.merge is while its body still runs, where that body's imports brought torch and
    us.

    What we replace would be overwritten by the rest of the body, so we wait for the first
    `mergekit.merge.run_merge`. A data descriptor wins over the module's own dictionary.
    """

    @property
    def run_merge(self):  # type: ignore[no-untyped-def]
        self._finish()
        return self.run_merge

    @run_merge.setter
    def run_merge(self, value) -> None:  # type: ignore[no-untyped-def]
        self._finish()
        self.run_merge = value

    def _finish(self) -> None:
        if "run_merge" not in self.__dict__:
            raise AttributeError(f"module {self.__name__!r} has no attribute 'run_merge' yet")
        self.__class__ = ModuleType  # type: ignore[assignment]
        _extend(self.__name__, self)


def _extend(name: str, module: ModuleType) -> None:
    extension, function = _EXTENDED_BY[name]
    is_mergekit = name.startswith("mergekit.")
    if not is_mergekit and extension.partition(".")[0] not in sys.modules:
        return
    if _loading:
        _postponed.append((name, module))
        return
    try:
        if is_mergekit and not mergekit_is_known():
            raise RuntimeError(
                "this version of mergekit is not one it knows (it knows >=0.1.5,<0.2)"
            )
        getattr(importlib.import_module(extension), function)(module)
    except Exception as error:
        _stay_off(error)


def _stay_off(error: Exception) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    with contextlib.suppress(Warning):  # where warnings are errors
        warnings.warn(
            f"mergekit-moe-ext stays off: {type(error).__name__}: {error}. "
            "`mergekit-moe-ext doctor` says more; mergekit itself is unchanged.",
            RuntimeWarning,
            stacklevel=3,
        )
