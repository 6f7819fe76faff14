"""Where the arrays of a file go: ``load``'s ``sharding``, checked before data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from bitnet_jax._packed.kernel import is_stored
from bitnet_jax.io._tensors import DTYPES, Part, name_of

Shardings = dict[str, Sharding]


def place(array: np.ndarray, sharding: Sharding | None) -> Any:
    """The array on its devices; a 64-bit one stays with NumPy where JAX would cut it to 32."""
    if not array.flags.aligned:
        array = array.copy()
    if sharding is not None:
        made = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    elif _is_cut(array.dtype):
        return array
    else:
        made = jax.device_put(array)
    return made.block_until_ready()  # what was read may go


def _is_cut(dtype: np.dtype) -> bool:
    return jax.dtypes.canonicalize_dtype(dtype) != dtype


def shardings(
    given: Any, abstract: Any, parts: Mapping[tuple[str | int, ...], Sequence[Part]]
) -> Shardings:
    """The sharding of every array, by the name of its tensor; empty for None.

    Args:
      given: the argument of ``load``.
      abstract: the tree of ``jax.ShapeDtypeStruct`` that the file holds.
      parts: the arrays of each leaf by its path, packed kernels' codes first.
    """
    if given is None:
        return {}
    if callable(given) and not isinstance(given, Sharding):
        given = given(abstract)
    found: Shardings = {}
    _match((), abstract, given, parts, found)
    for part in (part for leaf in parts.values() for part in leaf):
        dtype = DTYPES[part.dtype]
        check_fit("load", part.name, dtype, part.shape, found[part.name], packed=bool(part.end))
    return found


def _match(
    path: tuple[str | int, ...], tree: Any, given: Any, parts: Any, found: Shardings
) -> None:
    """Finds the sharding of every array of a subtree."""
    where = name_of(path) or "the tree"
    if isinstance(tree, Mapping):
        if isinstance(given, Sharding):
            given = dict.fromkeys(tree, given)
        if not isinstance(given, Mapping):
            _refuse(where, given, f"a dict with the keys {sorted(map(str, tree))}")
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
        _refuse(where, given, f"a jax.sharding.Sharding{two}")
    for part, one in zip(parts[path], (given.codes, given.scale), strict=True):
        if not isinstance(one, Sharding):
            _refuse(part.name, one, "a jax.sharding.Sharding")
        found[part.name] = one


def _refuse(where: str, given: Any, wanted: str) -> NoReturn:
    remedy = "See what load takes as `sharding`."
    if isinstance(given, PartitionSpec):
        remedy = "Put a mesh to it: jax.sharding.NamedSharding(mesh, spec)."
    got = f"a {type(given).__name__}, {repr(given)[:200]}"
    raise TypeError(f"load: `sharding` must have {wanted} at {where}, got {got}. {remedy}")


def check_fit(
    who: str,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    sharding: Sharding,
    *,
    packed: bool,
) -> None:
    """Refuses an array that JAX would cut, and a sharding that does not divide it."""
    if _is_cut(dtype):
        raise ValueError(
            f"{who}: `sharding` cannot place {name} of {dtype}, which JAX would cut to 32 bits. "
            "Set jax_enable_x64, or pass no sharding: it stays with NumPy."
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
    """Why a sharding does not fit a shape, if it does not."""
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
        return f"{sharding.spec} has more axes."  # JAX stumbles over it
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        return str(error).strip().splitlines()[0][:300]
    return None
