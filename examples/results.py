"""Tables of results: written by examples and benchmarks as JSON, shown by README and guides.

    python examples/results.py    rewrites the tables in the pages

An example called with ``--json examples/results/NAME.json`` keeps its tables there, with the
processor, the versions, the date and the command. A page shows one between two marks,
``<!-- table: NAME -->`` and ``<!-- end -->``. A file keeps one run for each version of jax.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

RECORDS = pathlib.Path(__file__).parent / "results"
ROOT = RECORDS.parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md")))
MARK = re.compile(r"(<!-- table: ([\w.]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


class Table(NamedTuple):
    """What a run prints: a title, names of columns, and rows of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        from tabulate import tabulate

        columns = zip(*self.rows, strict=True)
        figures = [all(not cell or cell[0] in "<>-+0123456789" for cell in c) for c in columns]
        align = ["right" if each else "left" for each in figures]
        return tabulate(self.rows, self.header, disable_numparse=True, colalign=align)

    def markdown(self) -> str:
        """The same for a page."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def save(path: str | os.PathLike[str] | None, *tables: Table) -> None:
    """Adds a run to a record, in place of an older one with the same jax; no path, no record."""
    if path is None:
        return
    command = shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    run = {
        "command": re.sub(r" --(json|out) \S+", "", command),
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "tables": [table._asdict() for table in tables],
    }
    file = pathlib.Path(path)
    runs = json.loads(file.read_text()) if file.exists() else []
    runs = [run, *(old for old in runs if old["jax"] != run["jax"])]
    file.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n")


def processor() -> str:
    """The processor's own name, where the system tells it, and how many cores may be used."""
    name = platform.processor() or platform.machine()
    if (info := pathlib.Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*: (.*)", info.read_text())
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} cores"


# What the pages show.


def runs(name: str) -> list[dict[str, Any]]:
    """The runs of a record, newest jax first."""
    return json.loads((RECORDS / f"{name}.json").read_text())


def cell(run: dict[str, Any], title: str, row: str, column: str) -> str:
    """One cell, by the start of a table's title, the row's first cell and the column's name."""
    for table in run["tables"]:
        for cells in table["rows"]:
            if table["title"].startswith(title) and cells[0] == row:
                return cells[table["header"].index(column)]
    return ""


def costs(part: str) -> Table:
    """Ratios of benchmarks, as ``costs.json`` lists them: all, one record's, or a short form."""
    listed, short = json.loads((RECORDS / "costs.json").read_text()), part == "short"
    listed = [line for line in listed if part in ("", line["record"]) or (short and line["short"])]
    versions = sorted({run["jax"] for line in listed for run in runs(line["record"])}, reverse=True)
    versions = versions[:1] if short else versions
    rows, before = [], ""
    for line in listed:
        by_version = {run["jax"]: run for run in runs(line["record"])}
        where = (line["table"], line["row"], "ratio")
        cells = [cell(by_version[v], *where) if v in by_version else "" for v in versions]
        against = line["against"] if line["against"] != before else ""
        before = line["against"]
        rows.append([against, line["what"], *cells, *([] if short else [line["goal"]])])
    names = ["ratio"] if short else [*(f"jax {v}" for v in versions), "aimed at"]
    return Table("Costs", ["beside", "what", *names], rows)


def provenance() -> Table:
    """Where, when and with what every record was taken: a row for each of its commands."""
    keys = ("processor", "python", "jax", "date")
    names = sorted(path.stem for path in RECORDS.glob("*.json") if path.stem != "costs")
    rows = []
    for name in names:
        for command in dict.fromkeys(run["command"] for run in runs(name)):
            same = [run for run in runs(name) if run["command"] == command]
            cells = [", ".join(dict.fromkeys(run[key] for run in same)) for key in keys]
            rows.append([f"`{command}`", *cells])
    return Table("Taken", ("command", *keys), rows)


def table(name: str) -> Table:
    """By the name in a mark: a record's first table, or ``RECORD.Word``, by its title's start."""
    record, _, part = name.partition(".")
    if record == "costs":
        return costs(part)
    if record == "provenance":
        return provenance()
    tables = [Table(**kept) for kept in runs(record)[0]["tables"]]
    return next(t for t in tables if t.title.startswith(part))


def rendered(page: str) -> str:
    """A page with its tables as the records have them."""
    return MARK.sub(lambda found: f"{found[1]}{table(found[2]).markdown()}{found[3]}", page)


def main() -> None:
    """Renders every page."""
    for page in PAGES:
        if rendered(page.read_text()) != page.read_text():
            page.write_text(rendered(page.read_text()))
            print(f"rewrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
