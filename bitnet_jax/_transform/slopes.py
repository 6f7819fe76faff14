"""How strongly losses follow each kernel: squared gradients, from one backward pass.

With losses l_t and independent random signs e_t, the gradient of ``sum e_t l_t`` has the expected
square ``sum_t (dl_t/dW)**2``: products of different losses cancel. So one pass gives what as many
passes as there are losses would, and the sum over a kernel's weights averages the noise away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PyTree

from bitnet_jax._checks import describe

# Losses of any shape, from what a function returned, its parameters, its other arguments and its
# keywords. Compared by identity: JAX compiles once for each.
Losses = Callable[[PyTree, PyTree, tuple[Any, ...], dict[str, Any]], Any]


class Slopes(NamedTuple):
    """Squared gradients of one call.

    Attributes:
      squares: a number of a leaf to the sum of its squared gradient, of each slice.
      losses: how many there were.
    """

    squares: dict[int, Float32[Array, "*b"]]
    losses: Float32[Array, ""]


def slopes(
    losses_of: Callable[[dict[int, Any]], Any],
    kernels: dict[int, Any],
    batch_axes: dict[int, int],
    key: jax.Array,
) -> Slopes:
    """The squared gradients of some kernels.

    Args:
      losses_of: a function of the kernels.
      kernels: by their numbers.
      batch_axes: how many leading axes of each carry slices.
      key: of the signs.
    """

    def signed(kernels: dict[int, Any]) -> tuple[jax.Array, int]:
        losses = losses_of(kernels)
        _require_losses(losses)
        signs = jax.random.rademacher(key, losses.shape, jnp.float32)
        return jnp.sum(signs * losses.astype(jnp.float32)), losses.size

    gradients, count = jax.grad(signed, has_aux=True)(kernels)

    def square(i: int) -> jax.Array:
        wide = gradients[i].astype(jnp.float32)
        return jnp.sum(jnp.square(wide), axis=tuple(range(batch_axes[i], wide.ndim)))

    return Slopes({i: square(i) for i in kernels}, jnp.float32(count))


def losses_of_batch(loss: Callable[..., Any], output: PyTree, args: tuple[Any, ...]) -> Any:
    """A user's losses of what a call returned and of its arguments; raises for a batch's mean."""
    losses = loss(output, *args)
    lengths = {n for shape in _shapes(args) for n in shape[:1] if n > 1}
    found = [shape for shape in _shapes(output) if len(shape) > 1 and shape[0] in lengths]
    if getattr(losses, "shape", None) == () and found:
        raise ValueError(
            f"calibrate: `loss` must return one loss for each example or token, got one number of "
            f"an output of shape {found[0]}. In a mean the gradients of different examples cancel. "
            "Leave out .mean(); if this is one example, return loss[None]."
        )
    return losses


def _shapes(tree: PyTree) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]


def _require_losses(losses: object) -> None:
    """Raises unless ``loss`` returned an array of floats with elements."""
    dtype = getattr(losses, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or 0 in losses.shape:  # pyright: ignore[reportAttributeAccessIssue]
        raise TypeError(
            f"calibrate: `loss` must return an array of losses, floats, one for each example or "
            f"token, got {describe(losses)}. Write for example "
            "loss=lambda logits, tokens: cross_entropy(logits[:, :-1], tokens[:, 1:])."
        )
