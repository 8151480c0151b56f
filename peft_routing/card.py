"""The section of an adapter's README.md that says how to load it, before what PEFT's card says."""

import sys
from collections.abc import Sequence
from pathlib import Path

from _mergekit_moe_ext_common.cards import (
    in_markdown,
    is_of_peft,
    section_before_title,
    without_local_models,
)
from peft_routing.routers.base import Router, is_of_package

_HEADING = "## Routed LoRA"


def extend(
    directory: str, experts: Sequence[str], general: Sequence[str], router: type[Router]
) -> None:
    """Puts our section into the card that PEFT has written.

    PEFT names the base model by its path; a path of this machine is taken out.
    """
    # PEFT writes one card for all adapters of a model: above an adapter that has a name.
    path = Path(directory) / "README.md"
    if not path.exists():
        path = Path(directory).parent / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not is_of_peft(text):
        return
    less = f", less the mean of {', '.join(map(in_markdown, general))}," if general else ""
    names = ", ".join(map(in_markdown, experts))
    how = "it loads as every adapter does"
    imports = ["from peft import PeftModel"]
    if not is_of_package(router):
        module = _module_of(router)
        how = (
            f"and once the file that defines the router is imported ({in_markdown(module)}), it "
            "loads as every adapter does"
        )
        imports.append(f"import {module}  # the router {router.name!r}")
    lines = [
        f"{len(experts)} LoRA experts ({names}){less} and the router {in_markdown(router.name)} in "
        f"one adapter. After `pip install mergekit-moe-ext` {how}; without that package PEFT says "
        "`KeyError: 'ROUTED_LORA'`.",
        "",
        "```python",
        *imports,
        "",
        'model = PeftModel.from_pretrained(base_model, "this directory or repository")',
        "```",
    ]
    text = section_before_title(without_local_models(text), _HEADING, lines)
    path.write_text(text, encoding="utf-8")


def _module_of(router: type[Router]) -> str:
    """The module that a program imports for a router: of one that was defined in a script, or in a
    notebook, the name of its file, where it has one.
    """
    if router.__module__ != "__main__":
        return router.__module__
    file = getattr(sys.modules["__main__"], "__file__", None)
    stem = Path(file).stem if file else ""
    return stem if stem.isidentifier() else "my_router"
