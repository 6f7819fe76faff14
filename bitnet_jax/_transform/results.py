"""What a function returns beside arrays: a name, a mode, a static argument as it was given."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Collection
from typing import Any, NoReturn

import jax
import numpy as np
from jaxtyping import PyTree

from bitnet_jax._checks import describe

_PLAIN = (str, bytes, enum.Enum, type, np.dtype)

_NUMBERS = (bool, int, float, complex)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    """A part of a result that is no array: part of its structure while it is traced."""

    value: Any


def kept(result: PyTree, given: Collection[object]) -> PyTree:
    """A result that JAX can trace; refuses what it cannot look into.

    Args:
      result: of the function.
      given: the static arguments, which may come back.
    """
    same = {id(value) for value in given}

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, _PLAIN) or (id(leaf) in same and not isinstance(leaf, _NUMBERS)):
            return _Kept(leaf)
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if not is_array and not isinstance(leaf, _NUMBERS):
            _raise_no_pytree(jax.tree_util.keystr(path), leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(one, result, is_leaf=inspect.isgenerator)


def given_back(result: PyTree) -> PyTree:
    """Undoes :func:`kept`."""

    def one(leaf: Any) -> Any:
        return leaf.value if _is_kept(leaf) else leaf

    return jax.tree.map(one, result, is_leaf=_is_kept)


def _is_kept(leaf: object) -> bool:
    return isinstance(leaf, _Kept)


def _raise_no_pytree(where: str, leaf: object) -> NoReturn:
    """Refuses a result with arrays that a trace would leave behind."""
    at = f" at {where}" if where else ""
    raise TypeError(
        f"ternarize: the function returns {describe(leaf)}{at}, which is no pytree: JAX cannot "
        "trace it. Return arrays in tuples, lists and dicts, or register its class "
        "(jax.tree_util.register_dataclass); of a generator, make the loop around the calls."
    )
