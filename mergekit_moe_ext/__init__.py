"""Merge methods for mergekit that build and merge mixtures of experts.

Where torch's autoload is on, which is the default, nothing has to be imported: mergekit has the
methods, so that `mergekit.merge.run_merge` takes them, and transformers' Auto classes load the
architectures of `modeling/` without `trust_remote_code`. Importing this package does the same where
the autoload is off. Neither host is imported for this: each is extended at the moment when the
program imports it.

>>> import mergekit_moe_ext
>>> from mergekit.merge import run_merge

The subcommands of `mergekit-moe-ext` are functions here: `plan`, `count_usage`, `train`, `adapt`,
`unload`, `add_expert` and `remove_expert`. The papers' measurements of models are in
`mergekit_moe_ext.analysis`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from _mergekit_moe_ext_autoload import activate
from _mergekit_moe_ext_common.versions import warn_of_newer_hosts

if TYPE_CHECKING:
    from _mergekit_moe_ext_common.errors import UserError
    from _mergekit_moe_ext_common.options import Reading, options_of
    from mergekit_moe_ext import analysis
    from mergekit_moe_ext.commands import (
        PlannedMerge,
        adapt,
        add_expert,
        count_usage,
        plan,
        remove_expert,
        train,
        unload,
    )
    from mergekit_moe_ext.mixtures.usage import Usage
    from mergekit_moe_ext.recipes import Adaptation, Recipe
    from mergekit_moe_ext.wemoe.clip_heads import TEMPLATES, write_clip_head

__version__ = "0.1.0"
__all__ = [
    "TEMPLATES",
    "Adaptation",
    "PlannedMerge",
    "Reading",
    "Recipe",
    "Usage",
    "UserError",
    "__version__",
    "adapt",
    "add_expert",
    "analysis",
    "count_usage",
    "options_of",
    "plan",
    "remove_expert",
    "train",
    "unload",
    "write_clip_head",
]
# The module of each public name, which is imported when the name is first used.
_MODULES = {
    "Adaptation": "mergekit_moe_ext.recipes",
    "PlannedMerge": "mergekit_moe_ext.commands",
    "Reading": "_mergekit_moe_ext_common.options",
    "Recipe": "mergekit_moe_ext.recipes",
    "TEMPLATES": "mergekit_moe_ext.wemoe.clip_heads",
    "Usage": "mergekit_moe_ext.mixtures.usage",
    "UserError": "_mergekit_moe_ext_common.errors",
    "adapt": "mergekit_moe_ext.commands",
    "add_expert": "mergekit_moe_ext.commands",
    "count_usage": "mergekit_moe_ext.commands",
    "options_of": "_mergekit_moe_ext_common.options",
    "plan": "mergekit_moe_ext.commands",
    "remove_expert": "mergekit_moe_ext.commands",
    "train": "mergekit_moe_ext.commands",
    "unload": "mergekit_moe_ext.commands",
    "write_clip_head": "mergekit_moe_ext.wemoe.clip_heads",
}


def __getattr__(name: str) -> Any:
    if name == "analysis":
        return importlib.import_module("mergekit_moe_ext.analysis")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


warn_of_newer_hosts()
activate()
