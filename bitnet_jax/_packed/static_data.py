"""Static data as JSON, of packed kernels for ``jax.export`` and ``flax.serialization``.

An exported function stores the tree of its arguments: for each node a name and its
static data as bytes. The arrays are arguments of the call and are not stored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import serialization
from jax import export

from bitnet_jax._quantize.config import Int8Config, TernaryConfig, stated_fields

_ARRAYS, _STATIC = ("codes", "scale"), "static"

_CONFIGS = {kind.__name__: kind for kind in (TernaryConfig, Int8Config)}


def to_bytes(static: tuple[Any, ...]) -> bytes:
    """Static data, a tuple of numbers, strings, tuples, dtypes and configs, as JSON."""
    return json.dumps(encoded(static), allow_nan=False).encode()


def from_bytes(data: bytes | bytearray) -> tuple[Any, ...]:
    """The static data that :func:`to_bytes` wrote; configs are validated again."""
    return decoded(json.loads(data), _CONFIGS)


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


def encoded(value: Any) -> Any:
    """A value that JSON has; a config or a dtype as an object with its kind as the only key."""
    if isinstance(value, (tuple, list)):
        return [encoded(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {name: encoded(field) for name, field in stated_fields(value).items()}
        return {type(value).__name__: fields}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"dtype": np.dtype(value).name}


def decoded(value: Any, kinds: Mapping[str, type]) -> Any:
    """What :func:`encoded` was given; each config, one of ``kinds``, is validated again."""
    if isinstance(value, list):
        return tuple(decoded(v, kinds) for v in value)
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "dtype":
            return np.dtype(content)
        return kinds[kind](**{name: decoded(v, kinds) for name, v in content.items()})
    return value
