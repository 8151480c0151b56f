"""Tables for a terminal."""

from collections.abc import Sequence


def in_columns(lines: Sequence[Sequence[str]], *, labels: int, least_width: int = 0) -> str:
    """Lines of cells, all of the same number, as a text in which columns stand below each other.

    labels: the number of first columns whose cells stand on the left; numbers stand on the right.
    least_width: the width of a column of numbers whose cells are all shorter.
    """
    columns = []
    for place, column in enumerate(zip(*lines, strict=True)):
        width = max(map(len, column))
        if place < labels:
            columns.append([cell.ljust(width) for cell in column])
        else:
            columns.append([cell.rjust(max(least_width, width)) for cell in column])
    return "\n".join("  ".join(cells) for cells in zip(*columns, strict=True))
