"""Figures. matplotlib is wanted only when one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _mergekit_moe_ext_common.errors import UserError


def pyplot() -> Any:
    """matplotlib without a display. `UserError` where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'mergekit-moe-ext[plots]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def check_new_file(path: Path) -> None:
    """`UserError` if the file exists or cannot be written."""
    if path.exists():
        raise UserError(f"{path} exists and is not overwritten; remove it or name another")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}")


def check_new_figure(path: Path) -> None:
    """Before any work: it may be written, in a format that matplotlib knows, and matplotlib is
    there.
    """
    check_new_file(path)
    formats = pyplot().figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise UserError(f"{path}: figures are written as {', '.join(formats)}")


def heat_map(axes: Any, shares: Sequence[Sequence[float]], highest: float) -> Any:
    """A row per layer, a column per expert."""
    image = axes.imshow(
        shares, cmap="Blues", vmin=0, vmax=highest, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks(
        range(len(shares[0]))
        if len(shares[0]) <= 16
        else range(0, len(shares[0]), len(shares[0]) // 8)
    )
    axes.set_yticks(range(0, len(shares), max(1, len(shares) // 8)))
    axes.tick_params(labelsize=8)
    return image
