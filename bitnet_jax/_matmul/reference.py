"""The readable implementation: unpack every code, multiply, scale.

It reads the storage layout, works on every backend and is what the others are
compared with; a test holds it against float64 NumPy. It keeps one int8 kernel
in memory while it runs.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from bitnet_jax._ops.product import Product
from bitnet_jax._ops.ternary_dot import contract_codes
from bitnet_jax._packed.kernel import Packed, Prepared, Stored
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.int8 import ActivationConfig, quantize_activations_as


def contract(
    x: Float[Array, "*b *m k"],
    packed: Stored,
    activations: ActivationConfig,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "*b *m n"]:
    """Int8 codes of x times the unpacked codes, then the epilogue."""
    x_codes, gamma = quantize_activations_as("matmul", x, activations)
    codes = kernel_axes.to_canonical(packed.int8_codes(), packed.axes)
    scale = packed.canonical_scale()
    return contract_codes(Product(), x_codes, gamma, codes, scale, activations.qmax).astype(dtype)


def unsupported_reason(packed: Packed) -> str | None:
    """Runs every stored kernel."""
    if isinstance(packed, Prepared):
        return "implementation 'reference' reads the stored layout only."
    return None
