"""The section of an adapter's README.md that says how to load it, beside what PEFT's card says."""

from collections.abc import Sequence
from pathlib import Path

from _mergekit_moe_ext_common.cards import in_markdown, renew_section, without_local_models

_HEADING = "## Routed LoRA"


def extend(directory: str, experts: Sequence[str], general: Sequence[str], router: str) -> None:
    """Puts our section into the card that PEFT has written.

    PEFT names the base model by its path; a path of this machine is taken out.
    """
    # PEFT writes one card for all adapters of a model: above an adapter that has a name.
    path = Path(directory) / "README.md"
    if not path.exists():
        path = Path(directory).parent / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if "library_name: peft" not in text:
        return
    less = f", less the mean of {', '.join(map(in_markdown, general))}," if general else ""
    names = ", ".join(map(in_markdown, experts))
    lines = [
        f"{len(experts)} LoRA experts ({names}){less} and the router {in_markdown(router)} in "
        "one adapter. After `pip install mergekit-moe-ext` it loads as every adapter does; without "
        "that package PEFT says `KeyError: 'ROUTED_LORA'`.",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "this directory or repository")',
        "```",
    ]
    text = renew_section(without_local_models(text), _HEADING, lines)
    path.write_text(text, encoding="utf-8")
