"""A setting that holds inside a ``with``, in one thread, and that JAX's caches know of."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

import jax

T = TypeVar("T")


class Ambient(Generic[T]):
    """A context variable that is part of the key of JAX's caches.

    A function that was traced under one value is not run from the cache under another.

    Args:
      name: of the variable.
      default: its value outside every ``with``.
      key: of the default.
    """

    def __init__(self, name: str, default: T, key: Hashable = None) -> None:
        self._value: contextvars.ContextVar[T] = contextvars.ContextVar(name, default=default)
        self._cache_key = jax.make_user_context(key)

    def get(self) -> T:
        """The value here."""
        return self._value.get()

    @contextlib.contextmanager
    def set(self, value: T, key: Hashable) -> Iterator[None]:
        """Holds a value inside the ``with``.

        Args:
          value: the value.
          key: what JAX's caches compare; equal keys share traces.
        """
        token = self._value.set(value)
        try:
            with self._cache_key(key):
                yield
        finally:
            self._value.reset(token)
