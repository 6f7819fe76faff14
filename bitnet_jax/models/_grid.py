"""Float kernels that lie on a ternary grid, found and packed exactly.

Some checkpoints publish ternary weights as floats, ``trit * scale`` with one scale for a
tensor, an output, or a group along the contraction, and declare it nowhere. A grid is
accepted only where the packed kernel unpacks to the very floats that were given.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from bitnet_jax._packed.stored import PackedTernary
from bitnet_jax._quantize.ternary import TernaryConfig
from bitnet_jax.models import _codes

# From the coarsest: the first that fits is taken.
GRIDS: tuple[Any, ...] = ("tensor", "channel", 256, 128, 64, 32)

_PROBED = 8  # rows that are looked at before the whole kernel is


def config_of(granularity: Any) -> TernaryConfig:
    """The quantiser that gives back the codes and scales of a grid."""
    return TernaryConfig(scale="survivors", threshold=0.5, granularity=granularity)


def find(w: np.ndarray) -> PackedTernary | None:
    """A stored kernel (out, in) on its coarsest grid, packed as (in, out); None if there is none.

    The packed kernel keeps w's dtype. Its scale is the one magnitude of each group, which the
    mean of the survivors may miss by its last bit.
    """
    for granularity in GRIDS:
        if _scale(w[:_PROBED], granularity) is not None:
            scale = _scale(w, granularity)
            if scale is not None:
                return _packed(w, scale, granularity)
    return None


def _scale(w: np.ndarray, granularity: Any) -> np.ndarray | None:
    """The magnitude that each (out, group) has beside zero; None where one has two."""
    length = {"tensor": w.size, "channel": w.shape[1]}.get(granularity, granularity)
    if granularity not in ("tensor", "channel") and w.shape[1] % length:
        return None
    groups = np.abs(w.astype(np.float32)).reshape(-1, length)
    largest = groups.max(axis=1, keepdims=True)
    if not ((groups == 0) | (groups == largest)).all():
        return None
    return largest.reshape(1 if granularity == "tensor" else len(w), -1)


def _packed(w: np.ndarray, scale: np.ndarray, granularity: Any) -> PackedTernary | None:
    config = config_of(granularity)
    scale = np.where(scale == 0, np.float32(config.eps), scale)  # of a group of zeros
    packed = PackedTernary(
        jnp.asarray(_codes.pack_rows(np.sign(w).astype(np.int8))),
        jnp.asarray(np.ascontiguousarray(scale.T)),
        length=w.shape[1],
        config=config,
        dtype=w.dtype,
    )
    exact = bool((np.asarray(packed.dequantize()) == w.T).all())
    return packed if exact else None
