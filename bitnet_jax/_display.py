"""Text tables, sizes and blank figures for the reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no NaN and no Inf: None instead."""
    lost = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return {k: None if k in lost else v for k, v in row.items()}


def right(head: str, cells: Iterable[str]) -> list[str]:
    """Cells of one width: a column with signs is aligned to the right too."""
    column = [head, *cells]
    width = max(map(len, column))
    return [cell.rjust(width) for cell in column]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first and the last column to the left if they hold words."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    left = [not any(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    left[0] = True

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(cells, widths, left, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, [header, *rows]))


def size_text(n: int) -> str:
    """Bytes in units that are read at a glance."""
    if n < 1000:
        return f"{n} B"
    value, units = n / 1000, ["kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}"


def blank_figure(who: str, size: tuple[float, float]) -> Any:
    """An empty matplotlib figure of so many inches; matplotlib is an extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{who}: matplotlib is missing. Install it with: pip install 'bitnet_jax[plot]'."
        ) from error
    return Figure(figsize=size, layout="constrained")
