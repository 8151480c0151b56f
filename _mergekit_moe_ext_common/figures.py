"""Figures. matplotlib is wanted only when one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import check_new_file


def pyplot() -> Any:
    """matplotlib without a display. `UserError` where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'mergekit-moe-ext[plots]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def check_new_figure(path: Path) -> None:
    """`UserError`, before any work, if the figure could not be written there."""
    check_new_file(path)
    formats = pyplot().figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise UserError(f"{path}: figures are written as {', '.join(formats)}")


def heat_map(axes: Any, shares: Sequence[Sequence[float]], highest: float) -> Any:
    """Draws `shares` on the axes, a row per layer and a column per expert, from 0 to `highest`."""
    image = axes.imshow(
        shares, cmap="Blues", vmin=0, vmax=highest, aspect="auto", interpolation="nearest"
    )
    rows = len(shares)
    columns = len(shares[0])
    axes.set_xticks(range(columns) if columns <= 16 else range(0, columns, columns // 8))
    axes.set_yticks(range(0, rows, max(1, rows // 8)))
    axes.tick_params(labelsize=8)
    return image
