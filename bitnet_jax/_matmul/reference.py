"""The readable implementation: unpack every code, multiply, scale.

It reads the storage layout, works on every backend and is what the others are
compared with; a test holds it against float64 NumPy. It keeps one int8 kernel
in memory while it runs.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from bitnet_jax._ops.codes_product import contract_codes
from bitnet_jax._ops.product import Product
from bitnet_jax._packed.kernel import Packed, Stored, block
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._quantize.arrays import Activations, DTypeLike
from bitnet_jax._quantize.config import ActivationConfig
from bitnet_jax._quantize.int8 import plain_activation_codes


def contract(
    x: Activations, packed: Stored, activations: ActivationConfig, dtype: DTypeLike
) -> Float[Array, "..."]:
    """Int8 codes of x times the unpacked codes, then the epilogue."""
    x_codes, gamma = plain_activation_codes(x, activations, (-1,), block(packed))
    # Four times the packed size: the whole kernel as int8, (*b, K, N).
    codes, scale = packed.canonical_codes(), packed.canonical_scale()
    y = contract_codes(Product(), x_codes, gamma, codes, scale, activations.qmax, packed.planes)
    return y.astype(dtype)


def unsupported_reason(packed: Packed, activations: ActivationConfig | None = None) -> str | None:
    """Why this implementation cannot run a kernel: every stored one it can."""
    del activations
    if isinstance(packed, Prepared):
        return "implementation 'reference' reads the stored layout only."
    return None
