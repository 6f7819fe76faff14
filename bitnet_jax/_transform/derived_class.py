"""Classes that the front ends derive from a model's own, and how they pickle: by their making."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def metaclass(base: type, derive: Callable[[Any, Any], type], mark: str) -> type:
    """The metaclass of classes derived from one of metaclass ``base``.

    Args:
      base: the metaclass of the model's class.
      derive: (the model's class, the mark) -> the derived class.
      mark: the attribute in which a derived class keeps what it was derived with.

    Returns:
      A metaclass whose classes pickle; one that a user derived from them, by its name.
    """

    def reduce_class(kind: type) -> str | tuple[Any, ...]:
        if mark in vars(kind):
            return derive, (kind.__base__, vars(kind)[mark])
        return kind.__qualname__

    made = type(base.__name__, (base,), {})
    copyreg.pickle(made, reduce_class)  # pyright: ignore[reportArgumentType]
    return made
