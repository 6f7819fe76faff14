"""The Hadamard rotation of a contraction: ``y = (x R) Q(R^T W)``.

R is orthonormal, so without rounding the product is ``x W``. What it changes is what gets
rounded: every rotated feature is a sum of all features of its block with signs, so a few large
ones no longer set the scale of all others [1, section 3]. R is block-diagonal along the last
contracting axis, with blocks of the largest power of two that divides its length, each::

    H_1 = [1],   H_2n = [[H_n, H_n], [H_n, -H_n]],   R = H_b / sqrt(b)

H is symmetric, so R is its own inverse: the same function rotates x, W, what is dequantised
and gradients. It takes log2(b) stages of sums and differences, ``x[i] + x[i + h]`` and
``x[i] - x[i + h]`` with h = 1, 2, 4, ..., and one product with float32(1 / sqrt(b)) at the end.
All of it is float32; x and the result are pinned, and between them nothing can be put together
differently, so the bits are the same everywhere. Sums that leave float32 become Inf or NaN:
weights and activations are to stay below 3e38 / b.

The last contracting axis, and not all of them: there four codes lie in a byte, heads are whole
on each device of a mesh, and the window of a convolution is not mixed with its channels.

References:
  [1] Ashkboos et al., QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from bitnet_jax._quantize.arrays import AnyArray, CanonicalKernel
from bitnet_jax._quantize.config import KernelConfig
from bitnet_jax._quantize.pinned import pinned, widened

SMALLEST_BLOCK = 4  # below it a rotation mixes too few features to level anything


def block_of(config: KernelConfig, contraction: Sequence[int]) -> int:
    """How many features are rotated together; 1: none."""
    return 1 if config.rotation is None else largest_block(contraction[-1])


def factor_of(block: int) -> np.float32:
    """What makes the sums of a block orthonormal."""
    return np.float32(block**-0.5)


def largest_block(length: int) -> int:
    """The largest power of two that divides a length."""
    return length & -length


def has_blocks(config: KernelConfig, contraction: Sequence[int]) -> bool:
    """Whether there are features to rotate together, if a config says so."""
    return config.rotation is None or block_of(config, contraction) >= SMALLEST_BLOCK


def require_rotation(who: str, config: KernelConfig, contraction: Sequence[int]) -> None:
    """Raises where a contraction has no blocks to rotate."""
    if not has_blocks(config, contraction):
        block = block_of(config, contraction)
        raise ValueError(
            f"{who}: `rotation`={config.rotation!r} rotates blocks of a power of two, at least "
            f"{SMALLEST_BLOCK}, and the last contracting axis of {tuple(contraction)} has blocks "
            f"of {block}. Pass a config without a rotation for this kernel, or make the axis a "
            f"multiple of {SMALLEST_BLOCK}."
        )


def require_rotated_channels(who: str, config: KernelConfig, channels_last: bool) -> None:
    """Raises where a convolution's last contracting axis is not that of its channels."""
    if config.rotation is not None and not channels_last:
        raise ValueError(
            f"{who}: `rotation`={config.rotation!r} rotates the last contracting axis of a kernel, "
            "and that of this convolution is an axis of its window. Store the kernel channels "
            "last, (*window, in, out), or pass a config without a rotation for it."
        )


def rotated(x: Float[AnyArray, "..."], block: int, axis: int = -1) -> Float[AnyArray, "..."]:
    """``x R`` along an axis, float32; x itself where the block is 1."""
    return x if block == 1 else _rotated(x, block, axis % x.ndim - x.ndim)


def rotated_kernel(w: CanonicalKernel, block: int) -> CanonicalKernel:
    """``R^T W`` of a canonical kernel."""
    return rotated(w, block, -2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for all layers of a shape
def _rotated(x: Float[AnyArray, "..."], block: int, axis: int) -> Float32[Array, "..."]:
    # Pinned: a product before the first sum would be contracted into it, the factor at the end
    # be put together with the next one.
    return pinned(_transformed(pinned(widened(x)), block, axis))


@_rotated.defjvp
def _rotated_jvp(
    block: int,
    axis: int,
    primals: tuple[Float[AnyArray, "..."]],
    tangents: tuple[Float[Array, "..."]],
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    (x,), (tangent,) = primals, tangents
    return _rotated(x, block, axis), _transformed(tangent.astype(jnp.float32), block, axis)


def transform64(x: np.ndarray, block: int, axis: int) -> None:
    """Writes ``x R`` along a negative axis in the place of x, float64 in C order, on the host."""
    *lead, length = x.shape[: x.ndim + axis + 1]
    half = 1
    while half < block:
        pairs = x.reshape(*lead, length // (2 * half), 2, -1)
        low, high = pairs[..., 0, :].copy(), pairs[..., 1, :]
        pairs[..., 0, :] += high
        np.subtract(low, high, out=high)
        half *= 2
    x *= block**-0.5


def _transformed(x: Float32[Array, "..."], block: int, axis: int) -> Float32[Array, "..."]:
    """The Walsh-Hadamard transform of each block along a negative axis."""
    shape = x.shape
    lead, length, rest = shape[:axis], shape[axis], shape[x.ndim + axis + 1 :]
    half = 1
    while half < block:
        # Two stages at once where there are two left: the array is written half as often.
        count = min(4, block // half)
        runs = x.reshape(*lead, length // (count * half), count, half, *rest)
        parts = [lax.index_in_dim(runs, i, axis - 1, keepdims=False) for i in range(count)]
        for bit in (1, 2)[: count // 2]:
            parts = [
                parts[i ^ bit] - parts[i] if i & bit else parts[i] + parts[i ^ bit]
                for i in range(count)
            ]
        x = jnp.stack(parts, axis - 1)
        half *= count
    return x.reshape(shape) * factor_of(block)
