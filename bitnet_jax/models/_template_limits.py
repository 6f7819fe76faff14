"""What a chat template may take and make, and how it is stopped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NoReturn

STEPS = 100_000

TEXT = 16 << 20  # characters, and items of lists

SIZED = (str, bytes, list, tuple, dict, range)


class TemplateError(ValueError):
    """A chat template that is refused, or that refuses the messages."""


def stop(what: str) -> NoReturn:
    raise TemplateError(
        f"generate: the checkpoint's chat template was stopped: {what}. Pass the text of the "
        "conversation instead of messages."
    )


def bound_product(operator: str, left: Any, right: Any) -> None:
    """Stops what would make a long text, list or number of short ones."""
    sized = max(len(v) if isinstance(v, SIZED) else 0 for v in (left, right))
    numbers = [abs(v) for v in (left, right) if isinstance(v, (int, float))]
    if sized and numbers and sized * max(numbers) > TEXT:
        stop(f"it made more than {TEXT} characters")
    if any(n > 2**64 for n in numbers) or (operator == "**" and max(numbers, default=0) > 1000):
        stop("it counted too far")


def bound_arguments(values: Iterable[Any]) -> None:
    """Stops calls whose result could be far larger than what they are given."""
    size = 1
    for value in values:
        if isinstance(value, int) and abs(value) > STEPS:
            stop("it counted too far")
        size *= max(1, len(value)) if isinstance(value, str) else 1
    if size > TEXT * 1000:
        stop(f"it made more than {TEXT} characters")


def bound_widths(values: Iterable[Any]) -> None:
    """Stops formats that would pad to a width of five digits or more."""
    if any(isinstance(value, str) and re.search(r"[%{][^ ]*\d{5}", value) for value in values):
        stop("it counted too far")
