"""Classes of the modules of a ternarised model: the methods of the class they had, transformed."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from flax import nnx

from bitnet_jax._transform.derived_class import metaclass
from bitnet_jax.nnx._call import Place, call


@functools.cache
def derived(kind: type[nnx.Module], place: Place) -> type[nnx.Module]:
    """The class derived from ``kind`` for a module at a place of a ternarised model."""
    methods = {name: _transformed(method) for name, method in _methods(kind).items()}
    body = {
        **methods,
        "_bitnet_place": place,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__annotations__": {},
    }
    pytree = {} if kind._pytree__is_pytree else {"pytree": False}
    made: Any = metaclass(type(kind), derived, "_bitnet_place")
    return made(kind.__name__, (kind,), body, **pytree)


def _methods(kind: type[nnx.Module]) -> dict[str, Any]:
    """``__call__`` and the other public methods of a model's own classes."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base not in nnx.Module.__mro__:
            found = {**vars(base), **found}
    public = {n: v for n, v in found.items() if n == "__call__" or not n.startswith("_")}
    return {name: value for name, value in public.items() if _is_method(value)}


def _is_method(value: object) -> bool:
    """Whether an attribute of a class is a method that returns what it computed."""
    if isinstance(value, (staticmethod, classmethod, type)) or not hasattr(value, "__get__"):
        return False
    function = inspect.unwrap(value) if callable(value) else None
    later = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return callable(value) and not any(is_one(function) for is_one in later)


def _transformed(method: Any) -> Any:
    @functools.wraps(method)
    def run(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, method, args, kwargs)

    return run
