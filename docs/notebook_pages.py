"""Pages of the site made of notebooks: their texts, their code, and the outputs that are kept in
them.

Nothing is executed here, and a page needs no network.
"""

import json
from html import escape
from pathlib import Path
from typing import Any


def page(path: Path) -> str:
    """The notebook as Markdown, below a link to the file itself."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        parts += [shown(output) for output in cell["outputs"]]
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n[Download this notebook]({path.name}){{ download }}\n{rest}\n"


def shown(output: dict[str, Any]) -> str:
    """An output of a cell as Markdown: what was printed, a figure, or HTML.

    `ValueError` for an error, and for any other output.
    """
    if output["output_type"] == "stream" and output["name"] == "stdout":
        return f'<pre class="output">{escape("".join(output["text"]).rstrip(), quote=False)}</pre>'
    data = output.get("data", {})
    if "text/html" in data:
        # Markdown would end a block of HTML at an empty line.
        lines = "".join(data["text/html"]).splitlines()
        return f'<div class="output">{"&#10;".join(lines)}</div>'
    if "image/png" in data:
        image = "".join(data["image/png"]).replace("\n", "")
        return f'<div class="output"><img alt="" src="data:image/png;base64,{image}"></div>'
    raise ValueError(f"an output that no page can show: {output}")
