"""Quotients and square roots that are rounded correctly on every backend.

IEEE 754 asks for the float nearest to the true quotient, and CPUs give it. GPUs and TPUs
divide by an approximate reciprocal, one or two units in the last place (ulp) off, and one
last bit of a scale changes every output of a layer. Here the backend's result is a guess:
its distance from the true one is measured in integers, and the nearest float is taken. A program
that is lowered for CPUs divides as it is.

With significands ``A`` and ``B`` of 24 bits, the quotient's significand is the integer
nearest to ``A 2**s / B``. The remainder ``R = A 2**s - Q B`` of a guess ``Q`` that is at
most a few ulp off is below 2**28, so int32 arithmetic, which is exact modulo 2**32, gives
it though both products need 48 bits. ``Q`` is nearest where ``2 |R| < B``; a tie cannot
happen. A root is alike, with ``R = M - Q**2``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, Num

from bitnet_jax._quantize.pinned import bits_of, pinned

_ONE = 1 << 23  # the significand of 1.0: 24 bits, the first of them set
_STEPS = 3  # of a guess that is 2 ulp off, one of them beyond a power of two


@jax.jit
def quotient(a: Num[Array, "..."] | float, b: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """``a / b``, the nearest float32; for b > 0.

    A quotient that is zero, subnormal or not finite is the backend's own.
    """
    a, b = jnp.broadcast_arrays(jnp.asarray(a, jnp.float32), b)
    return by_platform(_divided, _quotient, a, b)


def _divided(a: Float32[Array, "..."], b: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """``a / b``, also where b is known: XLA would multiply by its rounded reciprocal."""
    return lax.div(a, lax.optimization_barrier(b))


def by_platform(
    exact: Callable[..., jax.Array], corrected: Callable[..., jax.Array], *operands: jax.Array
) -> jax.Array:
    """``exact`` where the processor rounds correctly, else ``corrected``."""
    return lax.platform_dependent(*operands, cpu=exact, default=corrected)


def _quotient(a: Float32[Array, "..."], b: Float32[Array, "..."]) -> Float32[Array, "..."]:
    (top, at), (bottom, of) = _significand(a), _significand(b)
    # The quotient lies in [1, 2) once the smaller significand on top is doubled.
    short = (top < bottom).astype(jnp.int32)
    guess = _integer(lax.div(_in_binade(top, 127 + short), _in_binade(bottom, 127)))
    remainder = (top << (23 + short)) - guess * bottom  # modulo 2**32
    exact = guess + sum(
        (2 * remainder > odd * bottom).astype(jnp.int32)
        - (2 * remainder < -odd * bottom).astype(jnp.int32)
        for odd in range(1, 2 * _STEPS, 2)
    )
    exponent = at - of - short + 127
    normal = _is_normal(a) & _is_normal(b) & (exponent > 0) & (exponent < 255)
    nearest = lax.bitcast_convert_type((exponent << 23) + (exact - _ONE), jnp.float32)
    return jnp.where(normal, jnp.where(a < 0, -nearest, nearest), lax.div(a, b))


@jax.jit
def root(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """``sqrt(x)``, the nearest float32; the backend's own where x is 0, subnormal, not finite."""
    # Pinned, or a compiler makes an approximate rsqrt of it where a quotient follows.
    return by_platform(lambda x: pinned(lax.sqrt(x)), _root, x)


def _root(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    significand, exponent = _significand(x)
    odd = exponent & 1  # x is significand * 2**odd, in [1, 4), times a power of four
    guess = _integer(lax.sqrt(_in_binade(significand, 127 + odd)))
    squared = significand << (23 + odd)  # modulo 2**32
    for _ in range(_STEPS):
        remainder = squared - guess * guess
        # (Q + 1/2)**2 is Q**2 + Q + 1/4, and so for Q - 1/2; in integers nothing lies between.
        up, down = remainder > guess, remainder <= -guess
        guess = guess + up.astype(jnp.int32) - down.astype(jnp.int32)
    half = (exponent - odd >> 1) + 127
    nearest = lax.bitcast_convert_type((half << 23) + (guess - _ONE), jnp.float32)
    return jnp.where(_is_normal(x) & (x > 0), nearest, lax.sqrt(x))


def _significand(x: Float32[Array, "..."]) -> tuple[Int32[Array, "..."], Int32[Array, "..."]]:
    """The 24 bits of a float's significand, and its exponent."""
    bits = bits_of(x, jnp.int32)
    return (bits & (_ONE - 1)) | _ONE, (bits >> 23 & 255) - 127


def _in_binade(significand: Int32[Array, "..."], biased: Int32[Array, "..."] | int) -> jax.Array:
    """The float of a significand with this biased exponent."""
    return lax.bitcast_convert_type((significand - _ONE) + (biased << 23), jnp.float32)


def _integer(guess: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """A float near [1, 2) as a significand."""
    return (guess * np.float32(_ONE)).astype(jnp.int32)


def _is_normal(x: Float32[Array, "..."]) -> jax.Array:
    biased = bits_of(x, jnp.int32) >> 23 & 255
    return (biased > 0) & (biased < 255)
