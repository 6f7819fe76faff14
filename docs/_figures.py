"""Figures of the site, drawn from the records as HTML: they take the page's colours and width."""

from __future__ import annotations

import functools
import html
import importlib.util
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

RESULTS = pathlib.Path(__file__).parents[1] / "examples" / "results.py"


class Bar(NamedTuple):
    """A line of a figure; an empty mark is not drawn, other bars have the other colour."""

    beside: str  # a heading over it, where it differs from the last one's
    what: str
    value: str
    mark: str = ""
    other: bool = False


def drawn(name: str) -> str:
    """The figure that stands above a table, by the table's name; empty where there is none."""
    return FIGURES[name]() if name in FIGURES else ""


def costs() -> str:
    """The table of costs, with a line at 1 and a mark where each was to be."""
    table = _results().table("costs")
    beside, bars = "", []
    for against, what, ratio, *_, goal in table.rows:
        beside = f"beside {against}" if against else beside
        if ratio:
            bars.append(Bar(beside, what, ratio, goal, float(ratio) > 1))
    says = (
        f"Ratios, {table.header[2]}: left of the line is faster or smaller. The small mark is what "
        "was aimed at."
    )
    return _figure(bars, 2.0, says, "bars ratios")


def losses() -> str:
    """Held-out loss of the language model by each way to a ternary one."""
    rows = _results().table("finetune").rows
    bars = [
        Bar("language model on bytes", row[0], row[5].split()[0], rows[0][5].split()[0], i > 0)
        for i, row in enumerate(rows)
    ]
    says = "Held-out loss in nats, less is better. The small mark is float32."
    return _figure(bars, 3.0, says)


def tokens() -> str:
    """Tokens a second, ours and llama.cpp's, under the roof."""
    table = _results().table("decode.Generating")
    best, roof, theirs = map(table.header.index, ("a second, best", "roof", "llama.cpp TQ2_0"))
    bars = []
    for row in table.rows:
        if row[0].startswith("decode"):
            bars.append(Bar(row[0], "bitnet_jax", row[best], row[roof]))
            bars.append(Bar(row[0], "llama.cpp TQ2_0", row[theirs], row[roof], True))
    says = "Tokens a second, more is better. The small mark is the roof: what the machine reads."
    return _figure(bars, 60.0, says)


def conversion() -> str:
    """Held-out loss of SmolLM2-135M after each method."""
    rows = _results().table("convert_lm.Packed").rows
    planes = "two planes, "
    bars = [
        Bar(
            "two planes, four bits" if row[0].startswith(planes) else "one plane, two bits",
            row[0].removeprefix(planes),
            row[2],
            rows[0][2],
        )
        for row in rows[1:]
    ]
    says = "Loss on the held-out manual in nats, less is better. The small mark is float32."
    return _figure(bars, 20.0, says)


def steps() -> str:
    """Steps to 95 % of the held-out half by each optimizer."""
    table = _results().table("grokking")
    bars = [
        Bar(row[0], kind, value, other=kind == "ternary")
        for row in table.rows
        for kind, value in zip(table.header[1:], row[1:], strict=True)
    ]
    says = "Steps until 95 % of the held-out half are right, fewer is better; 10,000 were allowed."
    return _figure(bars, 1e4, says)


FIGURES = {
    "costs": costs,
    "finetune": losses,
    "decode.Generating": tokens,
    "convert_lm.Packed": conversion,
    "grokking": steps,
}


def _figure(bars: Iterable[Bar], largest: float, says: str, kind: str = "bars") -> str:
    """Bars up to the value at the right end; the table below it holds the figures as text."""
    label = html.escape(f"{says} The table has the same figures.")
    return (
        f'<figure class="{kind}" role="img" aria-label="{label}">\n{"".join(_lines(bars, largest))}'
        f"<figcaption>{html.escape(says)}</figcaption>\n</figure>\n\n"
    )


def _lines(bars: Iterable[Bar], largest: float) -> Iterator[str]:
    beside = ""
    for bar in bars:
        if bar.beside != beside:
            beside = bar.beside
            yield f'<p class="beside">{_text(beside)}</p>\n'
        mark = f'<i style="left:{_place(bar.mark, largest)}%"></i>' if bar.mark else ""
        yield (
            f'<div><span class="what">{_text(bar.what)}</span><span class="track">'
            f'<b{" class=other" if bar.other else ""} style="width:{_place(bar.value, largest)}%">'
            f'</b>{mark}</span><span class="value">{html.escape(bar.value)}</span></div>\n'
        )


def _text(cell: str) -> str:
    """A cell's Markdown, in which only code is marked."""
    parts = html.escape(cell).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _place(value: str, largest: float) -> float:
    """Percent of the width at which a value lies; ``> 10,000`` is drawn as 10,000."""
    return round(100 * min(float(value.lstrip("> ").replace(",", "")) / largest, 1.0), 1)


@functools.cache
def _results() -> Any:
    spec = importlib.util.spec_from_file_location("results", RESULTS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
