"""Which axes of a product's operands ``jax.vmap`` made.

Each slice of a mapped kernel has a scale of its own. Where the input is mapped along with it,
the product says so: the axis is a batch axis. Where the input is not (an ensemble that sees the
same x), JAX's rule makes the axis an output of the kernel, and nothing in the product tells it
from the heads of an attention kernel. So while a program is read, the rule
of a product leaves its mapped axes in the name scope, where :func:`mapped_axes` reads them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import primitives
from jax.interpreters import batching

from bitnet_jax._layers.stated import reading

# Where each operand is mapped; None: it is not.
Axes = Sequence[int | None]

_NOTE = re.compile(r"bitnet_mapped\((-|\d+),(-|\d+)\)")


def mapped_axes(scope: str, ranks: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of both operands of a product that were mapped without the other one.

    Args:
      scope: the names around the product.
      ranks: of the two operands.
    """
    rest = [list(range(rank)) for rank in ranks]
    alone: tuple[list[int], list[int]] = ([], [])
    # The innermost map is the first note; its axes are counted without those of the outer ones.
    for note in reversed(_NOTE.findall(scope)):
        axes = [None if a == "-" else int(a) for a in note]
        found = [None if a is None else own.pop(a) for own, a in zip(rest, axes, strict=True)]
        for side, (axis, other) in enumerate((found, found[::-1])):
            if axis is not None and other is None:
                alone[side].append(axis)
    return tuple(alone[0]), tuple(alone[1])


def counted(scope: str) -> int:
    """How many maps went over the second operand of a product alone."""
    return sum(left == "-" for left, _ in _NOTE.findall(scope))


def _noting_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(rule)
    def noting(axis_data: object, operands: Sequence[Any], axes: Axes, **params: object) -> Any:
        if not reading.get() or all(a is None for a in axes):
            return rule(axis_data, operands, axes, **params)
        left, right = ("-" if a is None else str(a) for a in axes)
        with jax.named_scope(f"bitnet_mapped({left},{right})"):
            return rule(axis_data, operands, axes, **params)

    return noting


for _primitive in (primitives.dot_general_p, primitives.conv_general_dilated_p):
    _rules = batching.fancy_primitive_batchers
    _rules[_primitive] = _noting_rule(_rules[_primitive])
