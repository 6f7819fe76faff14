"""A kernel on its way through a program: the leaf as it is stored, and how it is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import jax
from jax.typing import ArrayLike

from bitnet_jax._quantize.strength import Strength
from bitnet_jax._transform.jaxprs import Eqn, Jaxpr
from bitnet_jax._transform.layout import Carried, is_float
from bitnet_jax._transform.probe import plain
from bitnet_jax._transform.view import View


class Tracked(NamedTuple):
    """A kernel on its way.

    Attributes:
      view: how the program sees it.
      value: an array, a probed, a packed or an adapted kernel, with the view's kept axes.
      strength: that its own layer states; None: the one around the call.
    """

    view: View
    value: Carried
    strength: Strength | None = None


# An operand or a result of an equation: an array or a number, or a kernel on its way.
Operand = ArrayLike | Tracked


@runtime_checkable
class Interpreter(Protocol):
    """What the rule of a higher-order primitive needs of the interpreter.

    Attributes:
      jitted: the bodies that were traced before.
      tolls: what probed kernels owe; see ``probe``.
      manual: the mesh axes of the ``shard_map`` around what runs.
    """

    jitted: dict[Any, Any]
    tolls: list[jax.Array]
    manual: tuple[str, ...]

    def body(self, jaxpr: Jaxpr, operands: Sequence[Operand]) -> list[Any]:
        """Runs a jaxpr; results may be kernels still."""
        ...

    def closed(
        self, jaxpr: Jaxpr, operands: Sequence[Operand]
    ) -> tuple[list[Any], list[jax.Array]]:
        """Runs a jaxpr that is traced on its own; returns what it owes besides."""
        ...

    def require_collectable(self, operands: Sequence[Operand], what: str) -> None:
        """Refuses code in which no statistics can be collected of the probed operands."""
        ...

    def alike(self, views: Sequence[View | None]) -> tuple[Any, ...]:
        """A key that is the same for operands that are quantised and seen the same way."""
        ...

    def arrays(self, operands: Sequence[Operand], eqn: Eqn) -> list[ArrayLike]:
        """What the program sees, for an equation that computes with it."""
        ...


def values_of(operands: Sequence[Any]) -> list[Any]:
    """What stands behind operands, as pytrees that JAX's transformations take."""
    # A layer states beside its own product: nothing stands between the two.
    assert not any(isinstance(o, Tracked) and o.strength is not None for o in operands)
    return [o.value if isinstance(o, Tracked) else o for o in operands]


def views_of(operands: Sequence[Any]) -> list[View | None]:
    """How the kernels among operands are seen; None for other operands."""
    return [o.view if isinstance(o, Tracked) else None for o in operands]


def tracked(values: Sequence[Any], views: Sequence[View | None]) -> list[Any]:
    """Undoes :func:`values_of`, with the views that belong to the values."""
    return [v if w is None else Tracked(w, v) for v, w in zip(values, views, strict=True)]


def shown(operand: Operand, where: str, primitive: str) -> ArrayLike:
    """The array that the program sees; refuses a packed kernel, which is none."""
    if not isinstance(operand, Tracked):
        return operand
    value = plain(operand.value)
    if not is_float(value):
        _raise_read_as_float(where, primitive)
    return operand.view.shown(value)


def _raise_read_as_float(path: str, primitive: str) -> NoReturn:
    """Refuses to compute with a packed kernel."""
    raise ValueError(
        f"ternarize: the kernel at {path} is packed, and `{primitive}` computes with it as float. "
        "Leave it in float (select=bj.exclude(...)) when packing, or take that computation, a "
        "penalty on weights for example, out of the function."
    )
