"""What the adapter's README.md says beyond PEFT's card: that loading it takes one more import."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_routing.config import RoutedLoraConfig

_HEADING = "## Routed LoRA"


def extend(directory: str, config: "RoutedLoraConfig") -> None:
    """Add our section to the card that PEFT has written, once."""
    path = Path(directory) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text or _HEADING in text:
        return
    lines = [
        _HEADING,
        "",
        f"{len(config.experts)} LoRA experts ({', '.join(config.names)}) and the router `{config.router}` in one "
        "adapter. `pip install mergekit-moe-ext`, and import `peft_routing` before loading; without it PEFT says "
        "`KeyError: 'ROUTED_LORA'`.",
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
