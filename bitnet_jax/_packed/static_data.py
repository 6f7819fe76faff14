"""Static data of packed kernels as JSON, so that ``jax.export`` can serialise them as arguments.

An exported function stores the tree of its arguments: for each node a name and its
static data as bytes. The arrays are arguments of the call and are not stored.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from jax import export

from bitnet_jax._quantize.config import Int8Config, TernaryConfig

_CONFIGS = {kind.__name__: kind for kind in (TernaryConfig, Int8Config)}


def to_bytes(static: tuple[Any, ...]) -> bytes:
    """Static data, a tuple of numbers, strings, tuples, dtypes and configs, as JSON."""
    return json.dumps(_encoded(static), allow_nan=False).encode()


def from_bytes(data: bytes | bytearray) -> tuple[Any, ...]:
    """The static data that :func:`to_bytes` wrote; configs are validated again."""
    return _decoded(json.loads(data))


def register_export(cls: type) -> None:
    """Lets ``jax.export`` serialise a pytree node whose static data is such a tuple."""
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"bitnet_jax.{cls.__name__}",
        serialize_auxdata=to_bytes,
        deserialize_auxdata=from_bytes,
    )


def _encoded(value: Any) -> Any:
    """A value that JSON has; anything else as an object with its kind as the only key."""
    if isinstance(value, tuple):
        return [_encoded(v) for v in value]
    if isinstance(value, tuple(_CONFIGS.values())):
        return {type(value).__name__: dataclasses.asdict(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"dtype": np.dtype(value).name}


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(v) for v in value)
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return np.dtype(content) if kind == "dtype" else _CONFIGS[kind](**content)
    return value
