"""A kernel on its way through a program: the leaf as it is stored, and how it is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax

from bitnet_jax._transform.kinds import Value
from bitnet_jax._transform.layout import is_float
from bitnet_jax._transform.view import View


class Tracked(NamedTuple):
    """A kernel on its way.

    Attributes:
      view: how the program sees it.
      value: an array, a packed kernel or an adapted one, with the view's kept axes.
    """

    view: View
    value: Value


def values_of(operands: Sequence[Any]) -> list[Any]:
    """What stands behind operands, as pytrees that JAX's transformations take."""
    return [o.value if isinstance(o, Tracked) else o for o in operands]


def views_of(operands: Sequence[Any]) -> list[View | None]:
    """How the kernels among operands are seen; None for other operands."""
    return [o.view if isinstance(o, Tracked) else None for o in operands]


def tracked(values: Sequence[Any], views: Sequence[View | None]) -> list[Any]:
    """Undoes :func:`values_of`, with the views that belong to the values."""
    return [v if w is None else Tracked(w, v) for v, w in zip(values, views, strict=True)]


def shown(operand: Any, where: str, primitive: str) -> jax.Array:
    """The array that the program sees; refuses a packed kernel, which is none."""
    if not isinstance(operand, Tracked):
        return operand
    if not is_float(operand.value):
        _raise_read_as_float(where, primitive)
    return operand.view.shown(operand.value)


def _raise_read_as_float(path: str, primitive: str) -> NoReturn:
    """Refuses to compute with a packed kernel."""
    raise ValueError(
        f"ternarize: the kernel at {path} is packed, and `{primitive}` computes with it as float. "
        "Leave it in float (select=bj.exclude(...)) when packing, or take that computation, a "
        "penalty on weights for example, out of the function."
    )
