"""Names for the arrays of this package, for annotations.

``"..."`` is any shape. A canonical array has its axes in a fixed order::

    *b     batch axes of a kernel (stacked layers, experts), one slice for each index
    k      the contraction, flattened
    n      the outputs, flattened
    g      groups along the contraction, 1 without groups
    m      scales across the outputs: 1, or n
    *bp    *b, and behind them the planes of a config that has any: of codes and scale alone

Activations are ``"*rows k"``: their rows start with the kernel's batch axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, UInt8

# What a user may pass where an array is asked for. A type checker is told of jax.Array
# alone: that is what every operation on either returns.
if TYPE_CHECKING:
    AnyArray = Array
else:
    AnyArray = Array | np.ndarray

# A parameter, activations, a gradient: float32, bfloat16 or float16, of any rank.
Kernel = Float[AnyArray, "..."]
Activations = Float[AnyArray, "..."]
Gradient = Float[AnyArray, "..."]

# Of a kernel's rank. Codes are -1, 0, +1, or int8 in [-127, 127].
Codes = Int8[Array, "..."]
Scale = Float32[Array, "..."]
PackedCodes = UInt8[Array, "..."]

# The same in canonical order, which all maths runs on.
CanonicalKernel = Float[AnyArray, "*b k n"]
CanonicalCodes = Int8[Array, "*b k n"]
CanonicalScale = Float32[Array, "*b g m"]

# The same of a kernel that may have planes, as they are one more axis of both.
PlaneCodes = Int8[Array, "*bp k n"]
PlaneScale = Float32[Array, "*bp g m"]

DTypeLike = jax.typing.DTypeLike
