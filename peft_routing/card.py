"""The section of an adapter's README.md that says how to load it, beside what PEFT's card says."""

import re
from collections.abc import Sequence
from pathlib import Path

_HEADING = "## Routed LoRA"


def extend(directory: str, experts: Sequence[str], general: Sequence[str], router: str) -> None:
    """Puts our section into the card that PEFT has written."""
    # PEFT writes one card for all adapters of a model: above an adapter that has a name.
    path = Path(directory) / "README.md"
    if not path.exists():
        path = Path(directory).parent / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if "library_name: peft" not in text:
        return
    text = re.sub(rf"\n*{_HEADING}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    less = f", less the mean of {', '.join(general)}," if general else ""
    lines = [
        _HEADING,
        "",
        f"{len(experts)} LoRA experts ({', '.join(experts)}){less} and the router `{router}` in "
        "one adapter. `pip install mergekit-moe-ext`, and import `peft_routing` before loading; "
        "without it PEFT says `KeyError: 'ROUTED_LORA'`.",
        "",
        "```python",
        "import peft_routing",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "this directory or repository")',
        "```",
        "",
    ]
    path.write_text(text.rstrip() + "\n\n" + "\n".join(lines), encoding="utf-8")
