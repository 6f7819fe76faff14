"""The ``sharding`` argument of ``load``: one sharding per array, checked before data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from bitnet_jax._packed.kernel import is_stored
from bitnet_jax.io._tensors import DTYPES, Part, Path, name_of

Shardings = dict[str, Sharding]

PartsByPath = Mapping[Path, Sequence[Part]]


def place(array: np.ndarray, sharding: Sharding | None) -> jax.Array | np.ndarray:
    """The array on its devices; the NumPy array itself where JAX would make it 32 bits."""
    if not array.flags.aligned:
        array = array.copy()
    if sharding is not None:
        made = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    elif _would_narrow(array.dtype):
        return array
    else:
        made = jax.device_put(array)
    return made.block_until_ready()  # then the memory that was read may be freed


def _would_narrow(dtype: np.dtype) -> bool:
    return jax.dtypes.canonicalize_dtype(dtype) != dtype


def shardings(given: PyTree, abstract: PyTree, parts: PartsByPath) -> Shardings:
    """The sharding of every array, by the name of its tensor; empty for None.

    Args:
      given: the argument of ``load``.
      abstract: the file's tree, of ``jax.ShapeDtypeStruct``.
      parts: the arrays of each leaf by its path; codes come before scales.
    """
    if given is None:
        return {}
    if callable(given) and not isinstance(given, Sharding):
        given = given(abstract)
    found: Shardings = {}
    _match((), abstract, given, parts, found)
    for part in (part for leaf in parts.values() for part in leaf):
        dtype = DTYPES[part.dtype]
        require_fit("load", part.name, dtype, part.shape, found[part.name], packed=bool(part.end))
    return found


def _match(path: Path, tree: PyTree, given: PyTree, parts: PartsByPath, found: Shardings) -> None:
    """Adds the sharding of every array of a subtree to ``found``."""
    where = name_of(path) or "the tree"
    if isinstance(tree, Mapping):
        if isinstance(given, Sharding):
            given = dict.fromkeys(tree, given)
        if not isinstance(given, Mapping):
            _raise_not_a_sharding(where, given, f"a dict with the keys {sorted(map(str, tree))}")
        if set(given) != set(tree):
            lacks = sorted(map(repr, set(tree) - set(given)))
            more = sorted(map(repr, set(given) - set(tree)))
            raise ValueError(
                f"load: `sharding` has another structure than the file at {where}: it lacks "
                f"{lacks} and has {more} besides. Make it from the tree that the file holds: "
                "sharding=lambda tree: jax.tree.map(..., tree)."
            )
        for key in tree:
            _match((*path, key), tree[key], given[key], parts, found)
        return
    if isinstance(given, Sharding):
        found.update({part.name: given for part in parts[path]})
        return
    if not is_stored(tree) or type(given) is not type(tree):
        two = f" or a {type(tree).__name__} of two" if is_stored(tree) else ""
        _raise_not_a_sharding(where, given, f"a jax.sharding.Sharding{two}")
    for part, one in zip(parts[path], (given.codes, given.scale), strict=True):
        if not isinstance(one, Sharding):
            _raise_not_a_sharding(part.name, one, "a jax.sharding.Sharding")
        found[part.name] = one


def _raise_not_a_sharding(where: str, given: object, wanted: str) -> NoReturn:
    """Raises on anything else in the place of a sharding."""
    remedy = "See what load takes as `sharding`."
    if isinstance(given, PartitionSpec):
        remedy = "Make one from the spec: jax.sharding.NamedSharding(mesh, spec)."
    got = f"a {type(given).__name__}, {repr(given)[:200]}"
    raise TypeError(f"load: `sharding` must have {wanted} at {where}, got {got}. {remedy}")


def require_fit(
    who: str,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    sharding: Sharding,
    *,
    packed: bool,
) -> None:
    """Raises if JAX would make an array 32 bits, or if a sharding does not divide it."""
    if _would_narrow(dtype):
        raise ValueError(
            f"{who}: `sharding` cannot place {name} of {dtype}, which JAX would make 32 bits. "
            "Set jax_enable_x64, or pass no sharding to get a NumPy array."
        )
    reason = _misfit(shape, sharding)
    if reason:
        remedy = "Shard axes that the mesh divides, or replicate it (PartitionSpec())."
        if packed:
            remedy += " Codes and scale of a packed kernel may have one sharding each."
        raise ValueError(
            f"{who}: `sharding` does not fit {name} of shape {shape}: {reason} {remedy}"
        )


def _misfit(shape: tuple[int, ...], sharding: Sharding) -> str | None:
    """Why a sharding does not fit a shape; None if it does."""
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
        return f"{sharding.spec} has more axes."  # shard_shape fails on it with an IndexError
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        return str(error).strip().splitlines()[0][:300]
    return None
