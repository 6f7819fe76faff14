"""Executes the notebooks of this folder, each in a new kernel and an empty folder.

    pip install -e ".[notebooks]"
    python examples/notebooks/execute.py            keeps their outputs in the files
    python examples/notebooks/execute.py --check    writes nothing; this is what .ci/run does

Outputs are committed, so that they can be read where nothing runs. What is fit for that has no
errors, warnings, paths or large pictures; :func:`faults` names what is not. With ``--check``, each
cell must show what it shows in the file: text, a picture or nothing. Numbers may differ, because
processors round sums of floats differently.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

FOLDER = pathlib.Path(__file__).parent
LARGEST = 60_000  # characters of one output; a picture is in base64
MACHINE = re.compile(
    r"/(?:home|root|tmp|Users|usr|opt|private|var)/|\b[A-Z]:\\|\b0x[0-9a-f]{6,}|\x1b"
)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def text_of(value: str | list[str]) -> str:
    """A text of a notebook, which may be a list of lines."""
    return "".join(value)


def code_cells(notebook: Any) -> list[Any]:
    """The cells that are executed."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def digest(notebook: Any) -> str:
    """Of the code that the outputs came from."""
    code = "\0".join(text_of(cell["source"]) for cell in code_cells(notebook))
    return hashlib.sha256(code.encode()).hexdigest()


def shown(cell: Any) -> list[str]:
    """What kinds of things a cell shows: "stdout", "image/png" and others."""
    kinds = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            kinds.append(output["name"])
        elif output["output_type"] == "error":
            kinds.append("error")
        else:
            kinds.append("image/png" if "image/png" in output["data"] else "text/plain")
    return kinds


def faults(notebook: Any) -> Iterator[str]:
    """What is not fit to be committed."""
    for number, cell in enumerate(code_cells(notebook), 1):
        if cell["execution_count"] != number:
            yield f"cell {number} was executed as {cell['execution_count']}: run all, in order"
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                yield f"cell {number} has an error, a warning or something else on stderr"
            if "image/png" in output.get("data", {}) and not cell["metadata"].get("alt"):
                yield f"cell {number} has a picture, and no text `alt` in its metadata"
            for kind, value in (output.get("data") or {"text": output.get("text", "")}).items():
                value = text_of(value)
                if len(value) > LARGEST:
                    yield f"cell {number} shows {len(value):,} characters of {kind}"
                if kind != "image/png" and (found := MACHINE.search(value)):
                    yield f"cell {number} shows {found[0]!r}, which is of one machine"
    if notebook["metadata"].get("executed") != digest(notebook):
        yield "its outputs are of other code: run examples/notebooks/execute.py"


def executed(path: pathlib.Path) -> dict[str, Any]:
    """The notebook with new outputs; raises nbclient's CellExecutionError where a cell does."""
    import nbclient
    import nbformat
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)
    # A kernel that listens to the network warns of that; Windows has no other. The sockets of
    # one that does not are files in the folder, which is why this process is there too.
    config = (
        Config() if sys.platform == "win32" else Config({"KernelManager": {"transport": "ipc"}})
    )
    times = {"timeout": 600, "startup_timeout": 180}  # seconds of a cell, and of a new kernel
    options = {"kernel_name": "python3", "config": config, **times}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        nbclient.NotebookClient(notebook, **options).execute()
    return tidied(json.loads(nbformat.writes(notebook)))


def joined(outputs: list[Any]) -> list[Any]:
    """Outputs in which what a cell printed is in one piece, however it came."""
    whole: list[Any] = []
    for output in outputs:
        if whole and "name" in output and whole[-1].get("name") == output["name"]:
            whole[-1]["text"] += output["text"]
        else:
            whole.append(output)
    return whole


def tidied(notebook: dict[str, Any]) -> dict[str, Any]:
    """Without times, versions and names of objects; pictures get the alternative text of a cell."""
    notebook = copy.deepcopy(notebook)
    notebook["metadata"] = METADATA | {"executed": digest(notebook)}
    for cell in code_cells(notebook):
        cell["metadata"].pop("execution", None)
        cell["outputs"] = joined(cell["outputs"])
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                output["data"].pop("text/plain", None)
                output["metadata"] = {"image/png": {"alt": cell["metadata"].get("alt", "")}}
    return notebook


def main(arguments: list[str] | None = None) -> int:
    """Executes the notebooks and says how long each took; 1 where one is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("notebooks", nargs="*", type=pathlib.Path, help="default: all of them")
    options = parser.parse_args(arguments)
    status = 0
    for path in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        begin = time.perf_counter()
        new, old = executed(path), json.loads(path.read_text())
        found = list(faults(new))
        if options.check:
            pairs = zip(code_cells(new), code_cells(old), strict=True)
            found += [
                f"cell {number} shows {shown(cell)}, and in the file {shown(kept)}"
                for number, (cell, kept) in enumerate(pairs, 1)
                if shown(cell) != shown(kept)
            ]
        print(f"{path.name}: {time.perf_counter() - begin:.0f} s", *found, sep="\n  ", flush=True)
        if found:
            status = 1
        elif not options.check:
            path.write_text(json.dumps(new, indent=1, ensure_ascii=False) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
