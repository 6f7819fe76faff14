"""Brings the guides and the notebooks into the site.

They stay under ``examples/guides``, where their code is tested and where links between files of
the repository lead somewhere; here only links that leave the folder are changed.
"""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import _figures
import _notebooks

ROOT = pathlib.Path(__file__).parents[1]
GUIDES = ROOT / "examples" / "guides"
NOTEBOOKS = ROOT / "examples" / "notebooks"


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each guide and each notebook, and the notebooks' pictures."""
    for guide in sorted(GUIDES.glob("*.md")):
        files.append(File.generated(config, f"guides/{guide.name}", content=page(guide)))
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, pictures = _notebooks.page(notebook)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def page(guide: pathlib.Path) -> str:
    """A guide's text as a page: above a table there is its figure, if it has one."""
    text = guide.read_text().replace("](../../docs/", "](../")
    text = text.replace(".ipynb)", ".md)")
    text = re.sub(r"^\|.*\|$", lambda row: unbroken(row[0]), text, flags=re.MULTILINE)
    text = text.replace("<!-- dependencies -->\n", bounds((ROOT / "pyproject.toml").read_text()))
    text = re.sub(r"<!-- table: ([\w.]+) -->\n", lambda mark: _figures.drawn(mark[1]), text)
    return re.sub(r"<!-- .*? -->\n", "", text)


def unbroken(row: str) -> str:
    """A row of a table whose figures keep their units and spreads on one line."""
    row = re.sub(r"(?<=\d) %", "\u00a0%", row)
    return row.replace(" ± ", "\u00a0±\u00a0").replace("> ", ">\u00a0")


def bounds(pyproject: str) -> str:
    """A table of the dependencies, with the comment behind each, which says why it is there."""
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    lines = re.findall(r"""^ *"([^">=]+)>=([^"]+)",?(?: *# *(.*))?$""", listed, re.MULTILINE)
    rows = "".join(f"| {name} | {version} | {why} |\n" for name, version, why in lines)
    return f"| package | from | why not older |\n|---|---|---|\n{rows}"
