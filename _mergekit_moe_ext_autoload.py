"""The entry point by which `mergekit-yaml` learns of our merge methods.

torch calls `activate` at the end of `import torch` (entry point group `torch.backends`), and mergekit
imports torch before anything of its own that we extend. Nothing else happens then: a finder is put on
`sys.meta_path` that waits for two mergekit modules and hands each to `mergekit_moe_ext.host` once it is
loaded. An exception in here would break `import torch` for the whole environment, so there is none:
what goes wrong becomes one warning. Standard library only, and nothing is imported before mergekit is.
"""

import contextlib
import sys
import warnings
from importlib.abc import MetaPathFinder
from types import ModuleType

_EXTENDED_BY = {
    "mergekit.merge_methods.registry": "register_methods",
    "mergekit.merge": "extend_merge_module",
}
_warned = False


def activate() -> None:
    """Wait for mergekit, and extend what of it is loaded already. Calling it again changes nothing."""
    try:
        _activate()
    except Exception as error:
        _stay_off(error)


def _activate() -> None:
    if not any(isinstance(finder, _WaitForMergekit) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForMergekit())
    for name in _EXTENDED_BY:
        module = sys.modules.get(name)
        if module is None:
            continue
        if getattr(getattr(module, "__spec__", None), "_initializing", False):
            module.__class__ = _StillLoading
        else:
            _extend(module)


def mergekit_is_known() -> bool:
    """Whether the installed mergekit is one whose insides we know: 0.1.5 up to, not including, 0.2."""
    from importlib.metadata import version

    release = version("mergekit").split("+")[0].split(".")
    return release[:2] == ["0", "1"] and int("".join(filter(str.isdigit, release[2]))) >= 5


class _WaitForMergekit(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in _EXTENDED_BY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_extend(module: ModuleType) -> None:
                load(module)
                _extend(module)

            spec.loader.exec_module = load_and_extend  # type: ignore[method-assign]
        return spec


class _StillLoading(ModuleType):
    """What mergekit.merge is while its body still runs, where that body's imports brought torch and us.

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
        _extend(self)


def _extend(module: ModuleType) -> None:
    try:
        if not mergekit_is_known():
            raise RuntimeError("this version of mergekit is not one it knows (it knows >=0.1.5,<0.2)")
        import mergekit_moe_ext.host

        getattr(mergekit_moe_ext.host, _EXTENDED_BY[module.__name__])(module)
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
