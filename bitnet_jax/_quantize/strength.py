"""The ambient strength of quantisation, for models whose calls cannot be edited.

A layer takes ``strength=``; a model made of layers rarely passes it down.
:func:`phase_in` sets it for every layer that is called inside it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Hashable, Iterator

import jax
import numpy as np
from jax import core
from jaxtyping import Array, Float

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._context import Ambient

Strength = float | int | np.number | Float[Array | np.ndarray, ""]

_entered: contextvars.ContextVar[list[Strength] | None] = contextvars.ContextVar(
    "entered", default=None
)

_ambient: Ambient[Strength] = Ambient("strength", 1.0, key=1.0)


@contextlib.contextmanager
def phase_in(strength: Strength) -> Iterator[None]:
    """Sets the strength of every ternary layer that is called inside the ``with``.

    One line in a loss phases quantisation in, for linen and nnx alike::

        def loss(params, batch, step):
            with bj.phase_in(optax.linear_schedule(0.0, 1.0, 1000)(step)):
                logits = model.apply({"params": params}, batch)

    A traced strength changes without retracing. At 1 the forward pass is the
    int8 path, to the bit; a static 1.0 compiles nothing else. A layer's own
    ``strength=`` overrides it. Packed kernels are always at 1.

    Args:
      strength: 0 (float) to 1 (ternary): a Python float, or a float32 scalar,
        traced or not. Outside the function that ``jax.jit`` compiles, it is
        static, and each new value compiles once.

    Returns:
      A context manager.

    Raises:
      ValueError: a static strength outside [0, 1], or an array that is not a scalar.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> layer = bj.linen.BitDense(16)
      >>> x = jax.random.normal(jax.random.key(0), (8, 64))
      >>> params = layer.init(jax.random.key(1), x)
      >>> @jax.jit
      ... def forward(strength):
      ...     with bj.phase_in(strength):
      ...         return layer.apply(params, x)
      >>> bool((forward(1.0) == layer.apply(params, x)).all())
      True
      >>> bool((forward(0.5) == layer.apply(params, x)).all())
      False
    """
    _require_scalar(strength)
    if isinstance(strength, core.Tracer):
        key: Hashable = object()  # another trace, another tracer
    else:
        # Concrete: a constant of the trace, so it is compared by value and checked.
        if isinstance(strength, (jax.Array, np.ndarray, np.generic)):
            strength = float(strength)
        _checks.require_static_strength("phase_in", strength)
        key = strength
    inside = _entered.get()
    if inside is not None:
        inside.append(strength)
    with _ambient.set(strength, key):
        yield


@contextlib.contextmanager
def phased() -> Iterator[list[Strength]]:
    """Notes the strengths that the code inside sets with :func:`phase_in`."""
    found: list[Strength] = []
    token = _entered.set(found)
    try:
        yield found
    finally:
        _entered.reset(token)


def ambient(strength: Strength | None) -> Strength:
    """A layer's strength: its own, or that of the :func:`phase_in` around it, or 1."""
    # None is "not given"; a layer's own 0.0 counts.
    return _ambient.get() if strength is None else strength


def _require_scalar(value: object) -> None:
    """Raises unless it is a number or an array of one."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok and (getattr(value, "shape", None) != () or not hasattr(value, "dtype")):
        raise ValueError(
            f"phase_in: `strength` must be a number or a scalar array, got {describe(value)}. Pass "
            "one value, for example schedule(step)."
        )
