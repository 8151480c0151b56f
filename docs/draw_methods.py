"""Draws the schematics of `which_method.md`, one SVG per method, into `docs/methods/`.

    python docs/draw_methods.py

All have one language: a model is a block of attention above a block of FFN, in the colour of the
source that it comes from; grey is the base, stripes are what was merged, and a diamond is a router.
What you have stands left of the arrow, and what you get right of it. A file looks right on a light
and on a dark page.
"""

from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent / "methods"
WIDTH, HEIGHT = 680, 190
BAR, GAP = 64, 8  # the width of a block, and what is between two
ATTENTION, FFN = 30, 40  # their heights
TOP = 52  # of a model's attention
BOTTOM = TOP + ATTENTION + GAP  # of its FFN
SOURCES = ("base", "a", "b", "c")

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2937; text-anchor: middle; }
.note, .name { fill: var(--ink); }
.note { font-size: 11px; }
.line { stroke: var(--ink); stroke-width: 1.5; fill: none; }
.head { fill: var(--ink); }
.base { fill: #c3cad5; } .a { fill: #9cbcf2; } .b { fill: #f6c08a; } .c { fill: #a0d8b3; }
.merged { fill: url(#stripes); }
.merged + text { stroke: #fffc; stroke-width: 3; paint-order: stroke; }
.resting { opacity: 0.3; }
.unused { fill: none; stroke: var(--ink); stroke-dasharray: 3 3; }
.router { fill: #8b5cf6; }
svg { --ink: #1f2937; }
@media (prefers-color-scheme: dark) { svg { --ink: #e5e7eb; } }
"""
STRIPES = """<pattern id="stripes" width="24" height="24" patternUnits="userSpaceOnUse"
  patternTransform="rotate(45)"><rect width="8" height="24" class="base"/>
  <rect x="8" width="8" height="24" class="a"/><rect x="16" width="8" height="24" class="b"/>
</pattern>"""


# Parts


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def block(x: float, y: float, width: float, height: float, kind: str, words: str = "") -> str:
    """A rounded rectangle in the colour `kind`, with words in its middle."""
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" class="{kind}"/>'
    return shape + text(x + width / 2, y + height / 2 + 4, words)


def model(x: float, kind: str, name: str, width: float = BAR) -> str:
    """A dense model: attention above an FFN."""
    return (
        text(x + width / 2, TOP - 12, name, "name")
        + block(x, TOP, width, ATTENTION, kind, "attn")
        + block(x, BOTTOM, width, FFN, kind, "FFN")
    )


def router(x: float, y: float) -> str:
    """A diamond around a point."""
    return f'<path d="M{x} {y - 8}l8 8l-8 8l-8 -8z" class="router"/>'


def arrow(x: float, y: float, length: float = 44) -> str:
    """An arrow to the right."""
    end = x + length
    return (
        f'<path d="M{x} {y}H{end - 8}" class="line"/><path d="M{end} {y}l-9 -5v10z" class="head"/>'
    )


def mixture(
    x: float,
    experts: list[tuple[str, str]],
    *,
    attention: str = "merged",
    name: str = "",
    width: float = BAR,
) -> str:
    """Attention above a router and the FFNs of its experts, each a colour and its words."""
    whole = len(experts) * (width + GAP) - GAP
    parts = [
        text(x + whole / 2, TOP - 12, name, "name"),
        block(x, TOP, whole, ATTENTION, attention, "attn"),
        router(x + whole / 2, BOTTOM + 6),
    ]
    for index, (kind, words) in enumerate(experts):
        parts.append(block(x + index * (width + GAP), BOTTOM + 20, width, FFN, kind, words))
    return "".join(parts)


def sources(number: int = 3) -> str:
    """The base and its fine-tunes, from the left."""
    names = ("base", "math", "code", "law")
    parts = [
        model(20 + index * (BAR + GAP), SOURCES[index], names[index]) for index in range(number)
    ]
    return "".join(parts)


def loras(x: float, kinds: tuple[str, ...] = ("a", "b", "c")) -> str:
    """Narrow blocks: LoRA adapters."""
    parts = [text(x + 30, TOP - 12, "adapters", "name")]
    for index, kind in enumerate(kinds):
        parts.append(block(x + index * 22, TOP, 16, ATTENTION + GAP + FFN, kind))
    return "".join(parts)


def note(words: str, x: float = 490) -> str:
    """What to say of the result, below it."""
    return text(x, HEIGHT - 12, words, "note")


# The methods


def moe() -> str:
    experts = [("base", "FFN"), ("a", "FFN"), ("b", "FFN")]
    return (
        sources()
        + arrow(262, 100)
        + mixture(370, experts, name="mixture")
        + note("a router per layer chooses experts for each token", 476)
    )


def growing() -> str:
    old = [("base", "FFN"), ("a", "FFN")]
    return (
        mixture(20, old, attention="base", name="mixture")
        + model(186, "b", "medicine")
        + arrow(272, 100)
        + mixture(370, [*old, ("b", "FFN")], attention="base", name="mixture")
        + note("all else stays bit for bit", 476)
    )


def moe_lora() -> str:
    experts = [("a", "FFN + LoRA"), ("b", "FFN + LoRA"), ("c", "FFN + LoRA")]
    return (
        model(50, "base", "base")
        + loras(146)
        + arrow(262, 100)
        + mixture(350, experts, attention="base", name="mixture", width=84)
        + note("an adapter merged into each expert", 484)
    )


def caem() -> str:
    parts = []
    for index, (kind, name, used) in enumerate((("a", "news", 1), ("b", "xsum", 3))):
        experts = [(kind, "")] * used + [("unused", "")] * (4 - used)
        parts.append(
            mixture(16 + index * 128, experts, attention=kind, name=f"mixture {name}", width=21)
        )
    parts.append(arrow(272, 100))
    result = [("a", "FFN"), ("b", "FFN"), ("b", "FFN"), ("b", "FFN")]
    parts.append(mixture(350, result, name="mixture"))
    parts.append(note("the wider a model spreads its choices, the more experts it gives", 490))
    return "".join(parts)


def seq_moe() -> str:
    parts = [sources(), arrow(262, 100), router(360, 106), text(360, 84, "text", "note")]
    for index, name in enumerate(("base", "math", "code")):
        drawn = model(420 + index * (BAR + GAP), SOURCES[index], name)
        parts.append(drawn if name == "math" else f'<g class="resting">{drawn}</g>')
    parts.append('<path d="M372 106H410" class="line"/>')
    parts.append(note("each text is sent to the whole models that know its kind", 490))
    return "".join(parts)


def hetero_moe() -> str:
    parts = [
        model(20, "base", "Llama", 76),
        model(108, "a", "GPT-2", 50),
        model(170, "b", "Qwen", 64),
        arrow(262, 100),
        router(344, 106),
    ]
    x = 400.0
    for kind, width in (("base", 76), ("a", 50), ("b", 64)):
        parts.append(block(x, 24, width, 18, "router"))
        parts.append(block(x, TOP, width, ATTENTION, kind, "attn"))
        parts.append(block(x, BOTTOM, width, FFN, kind, "FFN"))
        parts.append(block(x, BOTTOM + FFN + 10, width, 18, "router"))
        x += width + 14
    parts.append('<path d="M354 106H390" class="line"/>')
    parts.append(note("projectors (violet) join widths; they and the router are trained", 500))
    return "".join(parts)


def weight_ensembling() -> str:
    return (
        sources()
        + arrow(262, 100)
        + text(476, TOP - 12, "the base's architecture", "name")
        + block(390, TOP, 172, ATTENTION, "merged", "attn")
        + block(390, BOTTOM, BAR, FFN, "base", "FFN")
        + text(468, BOTTOM + 25, "+", "name")
        + block(482, BOTTOM, 36, FFN, "a", "w₁τ₁")
        + block(526, BOTTOM, 36, FFN, "b", "w₂τ₂")
        + router(522, BOTTOM + FFN + 14)
        + note("a router weighs what each fine-tune changed, for each input", 476)
    )


def adamerging() -> str:
    return (
        sources()
        + arrow(262, 100)
        + text(476, TOP - 12, "dense model", "name")
        + block(390, TOP, 172, ATTENTION, "merged", "base + c₁τ₁ + c₂τ₂")
        + block(390, BOTTOM, 172, FFN, "merged", "base + c₃τ₁ + c₄τ₂")
        + note("constants per tensor, learned from inputs without labels", 476)
    )


def tensor_methods() -> str:
    return (
        sources()
        + arrow(262, 100)
        + text(476, TOP - 12, "dense model", "name")
        + block(444, TOP, BAR, ATTENTION, "merged", "attn")
        + block(444, BOTTOM, BAR, FFN, "merged", "FFN")
        + note("task vectors are trimmed or dropped at random, then added", 476)
    )


def routed_lora() -> str:
    return (
        model(50, "base", "base")
        + loras(146)
        + arrow(262, 100)
        + model(390, "base", "base", 86)
        + text(486, 106, "+", "name")
        + loras(506)
        + router(536, BOTTOM + FFN + 14)
        + note("one adapter; a router mixes its experts, per token or per text", 490)
    )


METHODS: dict[str, tuple[str, Callable[[], str]]] = {
    "moe": ("Dense models become a mixture of experts", moe),
    "growing": ("A mixture gets a further expert", growing),
    "moe_lora": ("LoRA adapters become the experts of a mixture", moe_lora),
    "caem": ("Mixtures become one, by the entropy of their usage", caem),
    "seq_moe": ("Whole models as experts, chosen per text", seq_moe),
    "hetero_moe": ("Models of different architectures behind projectors", hetero_moe),
    "wemoe": ("Task vectors weighed by a router", weight_ensembling),
    "adamerging": ("Task vectors weighed by learned constants", adamerging),
    "tensor_methods": ("Fine-tunes merged into a dense model", tensor_methods),
    "routed_lora": ("LoRA adapters and a router as one adapter", routed_lora),
}


def svg(title: str, draw: Callable[[], str]) -> str:
    """A whole file, with the title for those who do not see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{title}</title><style>{STYLE}</style><defs>{STRIPES}</defs>{draw()}</svg>\n"
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (title, draw) in METHODS.items():
        (FOLDER / f"{name}.svg").write_text(svg(title, draw))


if __name__ == "__main__":
    main()
