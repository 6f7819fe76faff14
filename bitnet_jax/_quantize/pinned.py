"""Float values whose rounding no compiler may change.

XLA keeps a float operation as it was written only while it sees no reason to change
it, and it sees other reasons in other programs:

- a product and the add after it become one FMA, which rounds once instead of twice
  (under jit, not in eager mode);
- constants are put together: ``(a * c1) * c2`` becomes ``a * (c1 * c2)``;
- the rounding of a bfloat16 or float16 sum is dropped where a conversion to float32
  follows.

``optimization_barrier``, bitcasts to and fro and ``reduce_precision`` do not stop all
of them on every version. An integer operation between two float ones does: it can
neither be fused with them nor be reordered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Integer

from bitnet_jax._quantize.arrays import AnyArray, DTypeLike


def bits_of(x: Float[AnyArray, "..."], integer: DTypeLike) -> Integer[Array, "..."]:
    """The bits of floats, as integers of the same width.

    XLA evaluates a call whose arguments it knows while it compiles. There a transposed
    array is a view, and ``bitcast_convert`` reads its memory as if it were none: the
    weights of a known ``kernel.T`` came out in another order. A reshape puts them in
    order, and one that adds an axis of one costs nothing.
    """
    axis = (jnp.ndim(x),)
    bits = lax.bitcast_convert_type(lax.expand_dims(x, axis), integer)
    return lax.squeeze(bits, axis)


@jax.custom_jvp
@jax.jit
def pinned(x: Float[AnyArray, "..."]) -> Float[Array, "..."]:
    """x, to the bit, as a result of integer arithmetic; its gradient passes through.

    One NaN in all floats becomes another NaN; every other value stays as it is. A
    compiler cannot prove that x is never that NaN, and where it knows x it has computed
    it as written.
    """
    kind = jnp.finfo(x.dtype)
    integer = jnp.dtype(f"uint{kind.bits}")
    # A quiet NaN with an even payload: or-ing 1 into an odd one would change nothing, provably.
    rare = ((1 << kind.nexp) - 1 << kind.nmant) | (3 << kind.nmant - 2)
    bits = bits_of(x, integer)
    bits = bits | (bits == integer.type(rare)).astype(integer)
    return lax.bitcast_convert_type(bits, x.dtype)


@pinned.defjvp
def _pinned_jvp(
    primals: tuple[Float[AnyArray, "..."]], tangents: tuple[Float[Array, "..."]]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    return pinned(*primals), tangents[0]


def widened(x: Float[AnyArray, "..."]) -> Float32[Array, "..."]:
    """x in float32, from the bits that it has in its own dtype."""
    if x.dtype == jnp.bfloat16:
        # bfloat16 is the upper half of float32: a shift says so without a conversion.
        bits = bits_of(x, jnp.uint16).astype(jnp.uint32)
        return lax.bitcast_convert_type(bits << 16, jnp.float32)
    if x.dtype == jnp.float32:
        return jnp.asarray(x)
    return pinned(x).astype(jnp.float32)
