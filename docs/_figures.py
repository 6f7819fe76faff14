"""Figures of the site, drawn from the records as HTML: they take the page's colours and width."""

from __future__ import annotations

import html
import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Any

RESULTS = pathlib.Path(__file__).parents[1] / "examples" / "results.py"
LARGEST = 2.0  # the ratio at the right end


def costs() -> str:
    """The table of costs as bars, with a line at 1 and a mark where each was to be."""
    table = _results().costs("")
    newest = table.header[2]
    rows = "".join(_rows(table.rows))
    says = f"Costs as ratios to what they stand beside, {newest}; the table has the same figures"
    return (
        f'<figure class="bars" role="img" aria-label="{html.escape(says)}">\n{rows}'
        f"<figcaption>Ratios, {newest}: left of the line is faster or smaller. The small mark is "
        "what was aimed at.</figcaption>\n</figure>\n"
    )


def _rows(rows: Any) -> Iterator[str]:
    for beside, what, ratio, *_, goal in rows:
        if beside:
            yield f'<p class="beside">beside {_text(beside)}</p>\n'
        if not ratio:
            continue
        mark = f'<i style="left:{_place(goal)}%"></i>' if goal else ""
        slower = ' class="more"' if float(ratio) > 1 else ""
        yield (
            f'<div><span class="what">{_text(what)}</span>'
            f'<span class="track"><b{slower} style="width:{_place(ratio)}%"></b>{mark}</span>'
            f'<span class="value">{html.escape(ratio)}</span></div>\n'
        )


def _text(cell: str) -> str:
    """A cell's Markdown, in which only code is marked."""
    parts = html.escape(cell).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _place(ratio: str) -> float:
    """Percent of the width at which a ratio lies."""
    return round(100 * min(float(ratio) / LARGEST, 1.0), 1)


def _results() -> Any:
    spec = importlib.util.spec_from_file_location("results", RESULTS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
