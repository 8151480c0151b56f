"""The entry point by which mergekit, PEFT and transformers learn of what we add to them.

torch calls `activate` at the end of `import torch` (entry point group `torch.backends`), and all of
our hosts import torch before anything of their own that we extend. Nothing else happens then: a
finder is put on `sys.meta_path` that waits for a few modules of our hosts, and has each extended
once it is loaded. An exception in here would break `import torch` for the whole environment, so
there is none: what goes wrong becomes one warning. Standard library only, and nothing is imported
before its host is.

mergekit gets our methods as soon as it is loaded. The tables in which PEFT looks up adapter types
and transformers looks up model types become tables that import our packages when one of our types
is asked for: a process that asks for none pays nothing, and is told nothing.

Both packages call `activate` when they are imported, so that they need not import their hosts.
"""

import contextlib
import functools
import importlib
import re
import sys
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_MODEL_TYPES = "transformers.models.auto.configuration_auto"
_ADAPTER_TYPES = "peft.mapping"
# A module of a host: what extends it, and the function there that takes the module.
_EXTENDED_BY = {
    "mergekit.merge_methods.registry": ("mergekit_moe_ext.host", "register_methods"),
    "mergekit.merge": ("mergekit_moe_ext.host", "extend_merge_module"),
    _MODEL_TYPES: (__name__, "_await_model_types"),
    "transformers.models.auto.modeling_auto": (
        "mergekit_moe_ext.modeling.on_demand",
        "extend_models",
    ),
    _ADAPTER_TYPES: (__name__, "_await_adapter_type"),
    "peft": ("peft_routing.registration", "register"),
}
_PACKAGES = ("mergekit_moe_ext", "peft_routing")
# The versions whose insides we know: from the first up to, not including, the second.
KNOWN = {"mergekit": ("0.1.5", "0.2"), "peft": ("0.21.2", "0.22"), "transformers": ("5.21", "6")}
_awaited: set[str] = set()  # modules of hosts that the finder extends when their bodies have run
_loading: list[str] = []  # modules of ours whose bodies are running
_postponed: list[tuple[str, ModuleType]] = []  # modules of hosts that were loaded meanwhile
_warnings_given: set[str] = set()


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
        # Once PEFT is loaded, its other modules hold its tables by names of their own.
        if module is None or name == _ADAPTER_TYPES:
            continue
        if not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _extend(name, module)
        # What the finder awaits is extended at the end of its body.
        elif name not in _awaited and _is_extended_here(name):
            module.__class__ = _StillLoading


def is_known(host: str) -> bool:
    """Whether the installed version of a host is one whose insides we know."""
    from importlib.metadata import version

    first, end = KNOWN[host]
    return _release(first) <= _release(version(host)) < _release(end)


def known_versions(host: str) -> str:
    """The versions of a host whose insides we know, as pip writes it."""
    first, end = KNOWN[host]
    return f">={first},<{end}"


def _release(version: str) -> list[int]:
    """The numbers of a version, without what follows them.

    >>> _release("0.21.2.dev0+cpu")
    [0, 21, 2]
    """
    numbers = re.match(r"\d+(\.\d+)*", version)
    return [] if numbers is None else [int(number) for number in numbers[0].split(".")]


def _check_version(host: str, hint: str = "") -> None:
    """`RuntimeError` for a host that we do not know."""
    if not is_known(host):
        raise RuntimeError(
            f"this version of {host} is not one it knows (it knows {known_versions(host)}){hint}"
        )


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
    """A module of a host while its body still runs, where that body's imports brought torch and us.

    The rest of the body would overwrite what we put there. So we wait for the first use of the
    module after it. The body itself finds its names in the module's dictionary, not here.
    """

    def __getattribute__(self, name: str) -> Any:
        _extend_when_loaded(self)
        return ModuleType.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _extend_when_loaded(self)
        ModuleType.__setattr__(self, name, value)


def _extend_when_loaded(module: ModuleType) -> None:
    if not ModuleType.__getattribute__(module, "__spec__")._initializing:
        object.__setattr__(module, "__class__", ModuleType)
        _extend(module.__name__, module)


def _is_extended_here(name: str) -> bool:
    """Whether a module of a host is to be extended in this process.

    mergekit is in any case, and so are the tables that wait. The rest only matters where a program
    has imported the package that extends it, or a table has.
    """
    package = _EXTENDED_BY[name][0].partition(".")[0]
    return name.startswith("mergekit.") or package in sys.modules


def _extend(name: str, module: ModuleType) -> None:
    if not _is_extended_here(name):
        return
    extension, function = _EXTENDED_BY[name]
    if _loading and extension != __name__:
        _postponed.append((name, module))
        return
    try:
        if name.startswith("mergekit."):
            _check_version("mergekit")
        getattr(importlib.import_module(extension), function)(module)
    except Exception as error:
        _stay_off(error)


def _await_model_types(configurations: Any) -> None:
    """Have transformers' mapping of model types learn ours when they are asked for."""
    mapping = configurations.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _LearningTable):
        mapping._extra_content = _LearningTable(
            mapping._extra_content,
            ("sequence_moe", "wemoe_", "upcycled_moe_"),
            "transformers",
            "mergekit_moe_ext",
            _learn_model_type,
        )


def _learn_model_type(model_type: str) -> None:
    on_demand = importlib.import_module("mergekit_moe_ext.modeling.on_demand")
    on_demand.add_configuration(sys.modules[_MODEL_TYPES], model_type)


def _await_adapter_type(mapping: ModuleType) -> None:
    """Have PEFT's tables of adapter types learn ours when it is asked for.

    No other module of PEFT has a name for one of them yet.
    """
    for name in ("CONFIG", "TUNER", "PREFIX"):
        attribute = f"PEFT_TYPE_TO_{name}_MAPPING"
        table = getattr(mapping, attribute)
        learning = _LearningTable(
            table, ("ROUTED_LORA",), "peft", "peft_routing", _learn_adapter_type
        )
        setattr(mapping, attribute, learning)


def _learn_adapter_type(_peft_type: str) -> None:
    importlib.import_module("peft_routing.registration").register(sys.modules["peft"])


class _LearningTable(dict):
    """A table of a host in which a type of ours is entered when it is asked for.

    `types` are how the names of our types begin, `package` is imported for them, and `learn` enters
    one. Where that fails, the table is as it was, and there is a warning.
    """

    def __init__(
        self,
        entries: dict[Any, Any],
        types: tuple[str, ...],
        host: str,
        package: str,
        learn: Callable[[str], None],
    ) -> None:
        super().__init__(entries)
        self._types = types
        self._host = host
        self._package = package
        self._learn = learn
        self._reason: Exception | None = None

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._has_learnt(key)

    def __missing__(self, key: object) -> Any:
        if self._has_learnt(key):
            return self[key]
        raise KeyError(key) from self._reason

    def get(self, key: object, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def _has_learnt(self, key: object) -> bool:
        if not isinstance(key, str) or not key.startswith(self._types):
            return False
        try:
            if self._package not in sys.modules:
                _check_version(self._host, f"; `import {self._package}` has it tried nonetheless")
            self._learn(key)
        except Exception as error:
            self._reason = error
            _stay_off(error)
        return super().__contains__(key)


def _stay_off(error: Exception) -> None:
    warning = (
        f"mergekit-moe-ext stays off: {type(error).__name__}: {error}. "
        "`mergekit-moe-ext doctor` says more; mergekit, PEFT and transformers are unchanged."
    )
    if warning in _warnings_given:
        return
    _warnings_given.add(warning)
    with contextlib.suppress(Warning):  # where warnings are errors
        warnings.warn(warning, RuntimeWarning, stacklevel=3)
