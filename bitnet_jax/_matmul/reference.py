"""The readable implementation: unpack every code, multiply, scale.

It reads the storage layout, works on every backend and is what the others are
compared with; a test holds it against float64 NumPy. It keeps one int8 kernel
in memory while it runs.
"""

from __future__ import annotations

from jaxtyping import Array, Float32, Int8

from bitnet_jax import _axes
from bitnet_jax._contract import contract_codes
from bitnet_jax._dot import Product
from bitnet_jax._packed import Packed, PreparedTernary, Stored


def contract(
    x: Int8[Array, "*b *m k"],
    gamma: Float32[Array, "*b *m 1"],
    packed: Stored,
    qmax: int,
) -> Float32[Array, "*b *m n"]:
    """Int8 codes of x times the unpacked codes, then the epilogue."""
    codes = _axes.canonical(packed.int8_codes(), packed.axes)
    return contract_codes(Product(), x, gamma, codes, packed.canonical_scale(), qmax)


def cannot(packed: Packed) -> str | None:
    """Runs every stored kernel."""
    if isinstance(packed, PreparedTernary):
        return "implementation 'reference' reads the stored layout only."
    return None
