"""Whether codes and scale of a packed node are still what this library put there.

A packed kernel is a pytree node, so ``jax.tree.map`` reaches its arrays: a policy of mixed
precision casts the scale, an average of checkpoints makes floats of the codes, and the sum of
two trees adds bytes. So each use of a node looks at its dtypes and shapes first, which costs
microseconds and works on tracers. Where the codes have values on a CPU, their bytes are read
too, once for each array.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from bitnet_jax import _checks
from bitnet_jax._packed import trits
from bitnet_jax._packed.slice_of import SliceOf, stack_of

REMEDY = (
    "Make packed kernels with bj.pack, and change no array in them: a cast, an average or an "
    "update of a whole tree belongs on the float leaves, bj.partition(params)[0]."
)

BITS = "{} bytes with a code of 3, or padding that is not zero"

INT8 = "{} codes of -128; they are -127 to 127"


@runtime_checkable
class Node(Protocol):
    """A packed kernel, stored or prepared, or one with an adapter."""

    def fault(self) -> str | None:
        """What is wrong with the dtypes or the shapes of its arrays; None if nothing."""
        ...

    def value_fault(self) -> str | None:
        """What is wrong with its codes, where their values can be read; None if nothing."""
        ...


def require_intact(who: str, name: str, node: Node) -> None:
    """Raises unless a node's arrays have their dtypes and shapes, and codes that can be."""
    fault = node.fault() or node.value_fault()
    if fault is not None:
        raise ValueError(f"{who}: {name} {fault}. {REMEDY}")


def require_arrays(who: str, name: str, node: Any) -> None:
    """Raises on a node of ``jax.ShapeDtypeStruct``, where values are read; else as above."""
    _checks.require_values(who, name, getattr(node, "base", node).codes)
    require_intact(who, name, node)


def codes_fault(codes: Any, dtype: str, shape: Sequence[int], whole: Sequence[int]) -> str | None:
    """What is wrong with the dtype or the shape of codes, for a kernel of a shape."""
    if not (hasattr(codes, "dtype") and hasattr(codes, "shape")):
        return f"has codes that are {_checks.describe(codes)}, not an array"
    if isinstance(codes, SliceOf) and codes.at.shape:
        return (
            f"has indices of shape {tuple(codes.at.shape)} for the layer that it is: kernels of "
            "stack[i] were stacked, by a scan, a vmap or a tree.map. Where a layer leaves its "
            "function, index the arrays: jax.tree.map(lambda a: a[i], stack)"
        )
    if (codes.dtype.name, tuple(codes.shape)) != (dtype, tuple(shape)):
        return (
            f"has codes that are {codes.dtype} of shape {tuple(codes.shape)}; shape "
            f"{tuple(whole)} needs {dtype} of shape {tuple(shape)}"
        )
    return None


def scale_fault(dtype: str, scale: Sequence[int], whole: Sequence[int], batch: int) -> str | None:
    """What is wrong with the dtype or the shape of a scale, for a kernel of a shape."""
    scale, whole = tuple(scale), tuple(whole)
    fits = len(scale) == len(whole) and scale[:batch] == whole[:batch] and min(scale) > 0
    if not fits or any(n % s for n, s in zip(whole, scale, strict=True)):
        return f"has a scale of shape {scale}, which does not tile shape {whole}"
    return None if dtype == "float32" else f"has a {dtype} scale; it must be float32"


def planes_fault(scale: Sequence[int], planes: int) -> str:
    """What is wrong with a scale that is not one of each plane."""
    return f"has a scale of shape {tuple(scale)}; each of its {planes} planes needs its own"


def scale_array_fault(scale: Any, whole: Sequence[int], batch: int) -> str | None:
    """:func:`scale_fault` of what stands in the place of a scale."""
    if not (hasattr(scale, "dtype") and hasattr(scale, "shape")):
        return f"has a scale that is {_checks.describe(scale)}, not an array"
    return scale_fault(scale.dtype.name, scale.shape, whole, batch)


def count_invalid(codes: Any, axis: int, length: int) -> int:
    """How many bytes of packed codes hold a 3, or padding that is not 0; 0 where not readable."""
    codes = stack_of(codes)  # of a slice in its place, all that lies beside it too
    host = _unseen(codes)
    if host is None:
        return 0
    flat = np.ascontiguousarray(host).reshape(-1)
    return _seen(codes, trits.count_invalid(flat, 0, host.shape, axis % host.ndim, length))


def count_lowest(codes: Any) -> int:
    """How many int8 codes are -128; 0 where they are not readable."""
    host = _unseen(codes)
    return 0 if host is None else _seen(codes, int(np.count_nonzero(host == -128)))


# Arrays whose codes were read and found good; an array of JAX never changes.
_good: dict[int, weakref.ref[jax.Array]] = {}


def _unseen(codes: Any) -> np.ndarray | None:
    """Codes in this process's memory that were not read before; None for all others."""
    if isinstance(codes, np.ndarray):
        return codes
    if isinstance(codes, core.Tracer) or not isinstance(codes, jax.Array):
        return None
    known = _good.get(id(codes))
    if known is not None and known() is codes:
        return None
    here = codes.is_fully_addressable and all(d.platform == "cpu" for d in codes.devices())
    return np.asarray(codes) if here and not codes.is_deleted() else None


def _seen(codes: Any, wrong: int) -> int:
    """Remembers an array without a wrong code; ``wrong`` itself."""
    if not wrong and isinstance(codes, jax.Array):
        key = id(codes)
        _good[key] = weakref.ref(codes, lambda _: _good.pop(key, None))
    return wrong


def float_fault(name: str, array: Any, shape: Sequence[int]) -> str | None:
    """What is wrong with a float factor of an adapter."""
    dtype, got = getattr(array, "dtype", None), getattr(array, "shape", None)
    if dtype is None or got is None or not jnp.issubdtype(dtype, jnp.floating):
        return f"has an adapter whose {name} is {_checks.describe(array)}, not a float array"
    if tuple(got) != tuple(shape):
        return f"has an adapter whose {name} has shape {tuple(got)}; it must be {tuple(shape)}"
    return None
