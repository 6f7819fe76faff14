"""What a cache of keys and values may be: refusals that its makers share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def require_cache_dtype(who: str, name: str, dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype of a cache; refuses integers but int8, which cut floats off, and float8."""
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    floats = kind is not None and jnp.issubdtype(kind, jnp.floating) and kind.itemsize > 1
    if kind is None or not (floats or kind == jnp.int8):
        raise ValueError(
            f"{who}: `{name}` must be float32, bfloat16, float16 or int8, got {dtype!r}. int8 is "
            "the smallest."
        )
    return kind
