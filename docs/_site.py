"""Brings the guides, and the picture that one of them shows, into the site.

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

ROOT = pathlib.Path(__file__).parents[1]
GUIDES = ROOT / "examples" / "guides"
COSTS = "<!-- table: costs -->\n"
PICTURES = {"../../tests/benchmarks/roofline.png": "pictures/roofline.png"}


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each guide, and the pictures."""
    for guide in sorted(GUIDES.glob("*.md")):
        files.append(File.generated(config, f"guides/{guide.name}", content=page(guide)))
    for source, name in PICTURES.items():
        picture = File.generated(config, name, abs_src_path=str((GUIDES / source).resolve()))
        files.append(picture)
    return files


def page(guide: pathlib.Path) -> str:
    """A guide's text as a page: pictures lie elsewhere; a mark of a table is a figure, or goes."""
    text = guide.read_text().replace(COSTS, f"{_figures.costs()}\n")
    for source, name in PICTURES.items():
        text = text.replace(f"]({source})", f"](../{name})")
    return re.sub(r"<!-- .*? -->\n", "", text)
