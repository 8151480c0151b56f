"""Routed adapters for PEFT: many LoRA experts on one base model, mixed per input by a router.

PEFT knows the adapter type `ROUTED_LORA` where torch's autoload is on, which is the default.
Importing this package makes it known where that is off. PEFT itself is not imported for it: it is
extended the moment that the program imports it.

What the command `peft-route` does is here as functions: `compose`, `train`, `inspect`, `export`,
`compare`, `distil`, `import_mttl`. `ensemble` runs all experts as one model; `save` is PEFT's
`save_pretrained`, whole or not at all.
"""

import importlib
from typing import TYPE_CHECKING, Any

from _mergekit_moe_ext_autoload import activate
from _mergekit_moe_ext_common.versions import warn_of_newer_hosts

if TYPE_CHECKING:
    from _mergekit_moe_ext_common.errors import UserError
    from _mergekit_moe_ext_common.options import Reading
    from peft_routing.commands import (
        Exported,
        compare,
        compose,
        distil,
        export,
        import_mttl,
        inspect,
        save,
        train,
    )
    from peft_routing.config import RoutedLoraConfig
    from peft_routing.fusion.generation import Ensemble, ensemble
    from peft_routing.fusion.report import Comparison
    from peft_routing.given import given_coefficients
    from peft_routing.inspection import Inspection
    from peft_routing.model import RoutedLoraModel
    from peft_routing.recipes import Distilling, Recipe
    from peft_routing.routers import Router, RouterOptions, RouterSettings
    from peft_routing.types import PeftType

__all__ = [
    "Comparison",
    "Distilling",
    "Ensemble",
    "Exported",
    "Inspection",
    "PeftType",
    "Reading",
    "Recipe",
    "RoutedLoraConfig",
    "RoutedLoraModel",
    "Router",
    "RouterOptions",
    "RouterSettings",
    "UserError",
    "compare",
    "compose",
    "distil",
    "ensemble",
    "export",
    "given_coefficients",
    "import_mttl",
    "inspect",
    "save",
    "train",
]
# Where each public name is, which is imported when the name is asked for.
_MODULES = {
    "Comparison": "peft_routing.fusion.report",
    "Distilling": "peft_routing.recipes",
    "Ensemble": "peft_routing.fusion.generation",
    "Exported": "peft_routing.commands",
    "Inspection": "peft_routing.inspection",
    "PeftType": "peft_routing.types",
    "Reading": "_mergekit_moe_ext_common.options",
    "Recipe": "peft_routing.recipes",
    "RoutedLoraConfig": "peft_routing.config",
    "RoutedLoraModel": "peft_routing.model",
    "Router": "peft_routing.routers",
    "RouterOptions": "peft_routing.routers",
    "RouterSettings": "peft_routing.routers",
    "UserError": "_mergekit_moe_ext_common.errors",
    "compare": "peft_routing.commands",
    "compose": "peft_routing.commands",
    "distil": "peft_routing.commands",
    "ensemble": "peft_routing.fusion.generation",
    "export": "peft_routing.commands",
    "given_coefficients": "peft_routing.given",
    "import_mttl": "peft_routing.commands",
    "inspect": "peft_routing.commands",
    "save": "peft_routing.commands",
    "train": "peft_routing.commands",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


warn_of_newer_hosts()
activate()
