"""A page that shows which expert each token of a text is routed to. It needs no network.

What it shows is collected while the texts run. Only the first tokens of each source are kept, so
that a page stays small; its heat maps are of all texts.
"""

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import check_new_file, new_file

SHOWN = 10_000  # tokens of each source
ALL_LAYERS = "all layers"  # the mean of them
_MOST_EXPERTS = 2**16  # their numbers take two bytes


@dataclass(frozen=True)
class _Text:
    """One text, or the beginning of one: its tokens, and each layer's first expert for each."""

    task: str
    stack: str
    tokens: list[str]
    layers: list[str]
    experts: Tensor  # (layers, tokens), the number of the expert with the highest coefficient
    coefficients: Tensor  # (layers, tokens), that coefficient


@dataclass
class ShownTexts:
    """The texts of a page. `stack` tells the inputs of an encoder-decoder from its targets."""

    tokenizer: Any
    texts: list[_Text] = field(default_factory=list)
    _shown: Counter[tuple[str, str]] = field(default_factory=Counter)  # tokens by task and stack

    def has_room(self, task: str) -> bool:
        """Whether tokens of a source may still be added, inputs or targets."""
        numbers = [number for (name, _stack), number in self._shown.items() if name == task]
        return min(numbers, default=0) < SHOWN

    def add(
        self, task: str, stack: str, ids: Tensor, real: Tensor, layers: Mapping[str, Tensor]
    ) -> None:
        """Add the rows of a batch: ids and real (batch, length), and the coefficients
        (batch, length, experts) of each layer.
        """
        for row in range(len(ids)):
            room = SHOWN - self._shown[task, stack]
            places = real[row].nonzero().flatten()[:room]
            if not len(places):
                continue
            self._shown[task, stack] += len(places)
            total: Tensor | float = 0.0
            experts = []
            coefficients = []
            for of_layer in layers.values():
                of_tokens = of_layer[row, places.to(of_layer.device)].float().cpu()
                total = total + of_tokens
                highest = of_tokens.max(dim=-1)
                experts.append(highest.indices)
                coefficients.append(highest.values)
            mean = (torch.as_tensor(total) / len(layers)).max(dim=-1)
            self.texts.append(
                _Text(
                    task,
                    stack,
                    pieces(self.tokenizer, ids[row, places.to(ids.device)].tolist()),
                    [ALL_LAYERS, *layers],
                    torch.stack([mean.indices, *experts]),
                    torch.stack([mean.values, *coefficients]),
                )
            )


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, whose join is that of all. Of several tokens that make one character
    the last has it, and the others are empty.
    """
    texts = []
    start = 0  # of the window that is decoded, so that a space before a token is kept
    end = 0  # of what has been shown
    for index in range(len(ids)):
        shown = _decoded(tokenizer, ids[start:end])
        longer = _decoded(tokenizer, ids[start : index + 1])
        if len(longer) <= len(shown) or longer.endswith("\ufffd"):
            texts.append("")
            continue
        texts.append(longer[len(shown) :])
        start = end
        end = index + 1
    return texts


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_new_page(path: Path) -> None:
    """`UserError`, before any work, if the page could not be written there."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: a page is written as *.html")
    check_new_file(path)


def write_page(
    path: Path,
    title: str,
    experts: Sequence[str],
    shown: ShownTexts,
    shares: Mapping[str, Mapping[str, Sequence[float]]],
    measure: str,
) -> None:
    """Write the page, whole or not at all.

    shares: per task and layer a number per expert, of all texts, for the heat maps.
    measure: what these numbers are.

    `UserError` where the file cannot be written, and for more experts than a page can number.
    """
    if len(experts) > _MOST_EXPERTS:
        raise UserError(f"a page shows up to {_MOST_EXPERTS} experts; there are {len(experts)}")
    texts = []
    for text in shown.texts:
        # Coefficients may be of any size: a shade is a share of the highest one of the text.
        highest = max(text.coefficients.max().item(), torch.finfo(torch.float32).tiny)
        scaled = (text.coefficients / highest).clamp(min=0).mul(255).round()
        texts.append(
            {
                "task": text.task,
                "stack": text.stack,
                "tokens": text.tokens,
                "layers": text.layers,
                "experts": _base64(text.experts.to(torch.uint16)),
                "shades": _base64(scaled.to(torch.uint8)),
                "highest": highest,
            }
        )
    content = {
        "title": title,
        "experts": list(experts),
        "texts": texts,
        "shares": shares,
        "measure": measure,
        "shown": SHOWN,
    }
    # A text may hold `</script>`, which would end the data.
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    template = resources.files("_mergekit_moe_ext_common").joinpath("token_page.html").read_text()
    with new_file(path) as partial:
        partial.write_text(template.replace("__DATA__", data), encoding="utf-8")


def _base64(numbers: Tensor) -> str:
    """The bytes of a tensor, little-endian as every browser reads them."""
    return base64.b64encode(numbers.contiguous().numpy().tobytes()).decode("ascii")
