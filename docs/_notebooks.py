"""A notebook as a page: its text, its code, and below each cell what the cell showed."""

from __future__ import annotations

import base64
import json
import pathlib
from typing import Any


def text_of(value: str | list[str]) -> str:
    """A text of a notebook, which may be a list of lines."""
    return "".join(value)


def fenced(text: str, language: str) -> str:
    """A block of code or of what it printed."""
    return f"```{language}\n{text.rstrip()}\n```"


def page(notebook: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """The page in Markdown, and its pictures by their names."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        source = text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(fenced(source, "python"))
        for output in cell["outputs"]:
            data: dict[str, Any] = output.get("data", {})
            if "image/png" in data:
                name = f"{notebook.stem}-{cell['id']}.png"
                pictures[name] = base64.b64decode(text_of(data["image/png"]))
                parts.append(f"![{output['metadata']['image/png']['alt']}]({name})")
            else:
                parts.append(
                    fenced(text_of(data.get("text/plain", output.get("text", ""))), "text")
                )
    return "\n\n".join(parts) + "\n", pictures
