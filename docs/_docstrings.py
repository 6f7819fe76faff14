"""Docstrings, which are written to be read in a terminal, for the site."""

from __future__ import annotations

import re
from typing import Any

import griffe


def markdown(text: str) -> str:
    """Without reStructuredText's ``::`` and roles; an example as the section that griffe knows."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"::(?=\n\n +)", ":", text)
    return re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", text)


class Docstrings(griffe.Extension):
    """Changes every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Of a module, a class, a function or an attribute."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
