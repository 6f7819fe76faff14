"""Static data of packed kernels as JSON, for ``jax.export`` and ``flax.serialization``.

An exported function stores the tree of its arguments: for each node a name and its
static data as bytes. The arrays are arguments of the call and are not stored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import serialization
from jax import export

from bitnet_jax._quantize.config import Int8Config, TernaryConfig

_ARRAYS, _STATIC = ("codes", "scale"), "static"

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


def register_state_dict(cls: type, static_of: Callable[[Any], tuple[Any, ...]]) -> None:
    """Lets ``flax.serialization`` store a packed kernel: codes, scale and its static data.

    ``from_state_dict`` restores codes and scale into a kernel of the same static data alone:
    into another they would be other weights.
    """

    def to_state(node: Any) -> dict[str, Any]:
        parts = {name: serialization.to_state_dict(getattr(node, name)) for name in _ARRAYS}
        return {**parts, _STATIC: to_bytes(static_of(node)).decode()}

    def from_state(node: Any, state: dict[str, Any]) -> Any:
        where = f"from_state_dict: the {cls.__name__}"
        if set(state) != {*_ARRAYS, _STATIC}:
            raise ValueError(
                f"{where} was saved as a node with {sorted(map(str, state))}. Restore it into what "
                "was saved, float params or packed ones."
            )
        if from_bytes(state[_STATIC].encode()) != static_of(node):
            raise ValueError(
                f"{where} was saved as {state[_STATIC]}, and the target is "
                f"{to_bytes(static_of(node)).decode()}. Restore it into a tree packed alike."
            )
        parts = (serialization.from_state_dict(getattr(node, n), state[n]) for n in _ARRAYS)
        restored = cls(*parts, *static_of(node))
        fault = restored.fault()
        if fault is not None:
            raise ValueError(f"{where} {fault}. Restore what flax.serialization saved.")
        return restored

    serialization.register_serialization_state(cls, to_state, from_state)


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
