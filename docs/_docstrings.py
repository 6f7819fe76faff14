"""Docstrings, which are written to be read in a terminal, for the site."""

from __future__ import annotations

import re
from typing import Any

import griffe


def markdown(text: str) -> str:
    """Without reStructuredText's ``::`` and roles; an example as the section that griffe knows.

    A power in prose, such as 2**24, is no beginning of bold text.
    """
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"::(?=\n\n +)", ":", text)
    text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", text)
    prose, *example = re.split(r"(?=^ *Examples:$)", text, maxsplit=1, flags=re.MULTILINE)
    parts = re.split(r"(``.+?``|`[^`]+`)", prose, flags=re.DOTALL)
    parts[::2] = [re.sub(r"(?<=\w)\*\*(?=-?\w)", r"\*\*", part) for part in parts[::2]]
    return _example_first("".join([*parts, *example]))


def _example_first(text: str) -> str:
    """The example before the parameters: code breaks what may be two screens of text."""
    found = re.search(r"^Examples:\n(?:(?: .*)?(?:\n|$))+", text, flags=re.MULTILINE)
    if found is None:
        return text
    rest = text[: found.start()] + text[found.end() :]
    section = re.search(r"^(?:Args|Attributes|Returns|Yields|Raises):$", rest, flags=re.MULTILINE)
    at = section.start() if section else found.start()
    return f"{rest[:at]}{found[0].rstrip()}\n\n{rest[at:]}".rstrip()


class Docstrings(griffe.Extension):
    """Changes every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Of a module, a class, a function or an attribute."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
