"""Grokfast with a moving average: the mean of a window of gradients, amplified.

With ``g`` the gradient of a step, ``W`` the window and ``l`` lamb::

    g <- g + l * mean(last W gradients)    "mean"
    g <- g + l * sum(last W gradients)     "sum"

The window is a ring: gradient ``t`` goes to slot ``t mod W``, and a lap is W
steps. Averaging the ring anew would cost W reads a step. A running sum costs two,
but keeps for ever the rounding that a spike left in it, and a NaN. So there are
two sums::

    total  <- total - old + new   old: what the slot held, of W steps ago
    fresh  <- fresh + new         0 at the start of a lap

and at the start of a lap ``total`` is replaced by ``fresh``, which is then the sum of
exactly the ring. What a gradient did to either is gone when the lap after its own
ends, at most 2 W steps later; the error is that of at most 2 W additions, whatever
the length of the run.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import core, lax

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax.optim import _gradients
from bitnet_jax.optim._gradients import require_flag, require_float_dtype, require_hyperparameter

FILTERS = ("mean", "sum")

_logger = logging.getLogger(__name__)


class GrokfastMaState(NamedTuple):
    """The state of :func:`grokfast_ma`.

    Attributes:
      step: int32, steps taken.
      window: the last gradients; each leaf (window_size, *shape). bfloat16 ones
        are kept as their bits, uint16: XLA on CPU widens a bfloat16 ring as a whole.
      total: their sum.
      fresh: the sum of those of this lap.
    """

    step: jax.Array
    window: Any
    total: Any
    fresh: Any


def grokfast_ma_bytes(params: Any, window_size: int = 100, *, buffer_dtype: Any = None) -> int:
    """Bytes that the state of :func:`grokfast_ma` takes; nothing is allocated.

    Args:
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      window_size: as for :func:`grokfast_ma`.
      buffer_dtype: as for :func:`grokfast_ma`.

    Returns:
      Bytes over all devices.

    Raises:
      ValueError: a window below 1, a ``buffer_dtype`` without fractions.
      TypeError: a leaf without a gradient.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
      >>> f"{bj.optim.grokfast_ma_bytes(params) / 1e9:.2f} GB"
      '6.85 GB'
      >>> f"{bj.optim.grokfast_ma_bytes(params, buffer_dtype=jnp.bfloat16) / 1e9:.2f} GB"
      '3.49 GB'
    """
    grokfast_ma(window_size, buffer_dtype=buffer_dtype)  # refuses what it refuses
    leaves, _ = _gradients.gradients("grokfast_ma", "params", params)
    return _state_bytes(leaves, window_size, buffer_dtype)


def grokfast_ma(
    window_size: int = 100,
    lamb: _gradients.ScalarOrSchedule = 5.0,
    *,
    filter_type: str = "mean",
    warmup: bool = True,
    buffer_dtype: Any = None,
) -> optax.GradientTransformation:
    """Amplifies the slow part of the gradient, the average of a window of it.

    ``g + lamb * mean(last window_size gradients)``. A step costs the same whatever
    the window; the memory does not: ``window_size + 2`` copies of the parameters,
    which :func:`grokfast_ma_bytes` tells beforehand and ``init`` logs. See
    :func:`grokfast_ema` for where it belongs, where it helps and where it hurts.

    The window stays in place where its buffers are donated to the jitted step.
    ``optax.MultiSteps`` and ``optax.apply_if_finite`` branch around their inner
    transform, and XLA copies the whole window at every step there. A NaN gradient is in
    the sum for two windows at most.

    Args:
      window_size: how many gradients are averaged; decides shapes, so it is
        static (``optax.inject_hyperparams``: ``static_args=("window_size",)``).
      lamb: weight of the average, >= 0; a number or a schedule of the step.
      filter_type: ``"mean"``, or ``"sum"``, for which ``lamb`` should be
        smaller by a factor of the window.
      warmup: whether gradients pass unchanged until the window is full.
        Without it the mean is over those that are there.
      buffer_dtype: of the window; by default each gradient's own. With
        ``jnp.bfloat16`` the average is of gradients rounded to it, and the sums
        stay in float32.

    Returns:
      An ``optax.GradientTransformation``. Its state is sharded as the
      parameters are.

    Raises:
      ValueError: a window below 1, a negative lamb, an unknown filter type. In
        ``update``: updates of another tree than the state's, the paths named.
      TypeError: a leaf without a gradient (packed, integer), a traced window.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> tx = bj.optim.grokfast_ma(window_size=2, lamb=1.0)
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for g in (1.0, 2.0, 4.0):
      ...     updates, state = tx.update({"w": jnp.full(2, g)}, state)
      ...     print(updates["w"].tolist())
      [1.0, 1.0]
      [3.5, 3.5]
      [7.0, 7.0]

    References:
      Lee et al., Grokfast: Accelerated Grokking by Amplifying Slow Gradients
      (2024), arXiv:2405.20233, algorithm 1 and its code, ``gradfilter_ma``.
    """
    who = "grokfast_ma"
    _require_window_size(who, window_size)
    require_hyperparameter(who, "lamb", lamb, "The paper uses 5.0.")
    _checks.require_one_of(who, "filter_type", filter_type, FILTERS)
    require_flag(who, "warmup", warmup)
    require_float_dtype(who, "buffer_dtype", buffer_dtype)

    def init(params: Any) -> GrokfastMaState:
        leaves, treedef = _gradients.gradients(who, "params", params)
        size = _state_bytes(leaves, window_size, buffer_dtype)  # before any of it is allocated
        _logger.info("grokfast_ma: a window of %d gradients takes %.1f MB", window_size, size / 1e6)
        window = [_ring(x, window_size, buffer_dtype) for x in leaves]
        total, fresh = (
            treedef.unflatten([jnp.zeros_like(x, dtype=_gradients.width(x)) for x in leaves])
            for _ in range(2)
        )
        return GrokfastMaState(jnp.zeros((), jnp.int32), treedef.unflatten(window), total, fresh)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        grads, treedef = _gradients.gradients(who, "updates", updates)
        _gradients.check_same(who, updates, state.total)
        held = (jax.tree.leaves(tree) for tree in state[1:])
        held_treedef = jax.tree.structure(state.total)
        slot = state.step % window_size
        stored = jnp.minimum(state.step + 1, window_size)
        on = stored == window_size if warmup and window_size > 1 else True
        lam = _gradients.at(lamb, state.step)
        if filter_type == "mean":
            lam = lam / stored.astype(lam.dtype)

        raised, kept = [], []
        for g, ring, total, fresh in zip(grads, *held, strict=True):
            ring, total, fresh = _push(ring, total, fresh, jnp.asarray(g), slot)
            raised.append(_gradients.amplify(g, total, lam, on))
            kept.append((ring, total, fresh))
        sums = [held_treedef.unflatten(part) for part in zip(*kept, strict=True)] or state[1:]
        step = jnp.asarray(optax.safe_increment(state.step))
        return treedef.unflatten(raised), GrokfastMaState(step, *sums)

    return optax.GradientTransformation(init, update)


def _push(
    ring: jax.Array, total: jax.Array, fresh: jax.Array, g: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ring with a gradient at ``slot``, and the two sums."""
    new = _encoded(g, ring.dtype)
    old = _decoded(lax.dynamic_index_in_dim(ring, slot, 0, keepdims=False), total.dtype)
    value = _decoded(new, total.dtype)
    total = jnp.where(slot == 0, fresh, total) - old + value
    # Each of these overwrites what the line before reads: their order is XLA's only
    # if they depend on it, and where it is not, XLA copies. A copy of a ring is W reads.
    after = _after(total, slot)
    fresh = jnp.where(after == 0, jnp.zeros((), fresh.dtype), fresh) + value
    return lax.dynamic_update_index_in_dim(ring, new, after, 0), total, fresh


def _after(total: jax.Array, slot: jax.Array) -> jax.Array:
    """``slot``, in a way that cannot be computed before ``total``."""
    # An axis that is sharded explicitly cannot be sliced to one value on jax 0.10.2.
    if total.size == 0 or any(jax.typeof(total).sharding.spec):
        return slot
    nothing = total.reshape(-1)[0].real * 0  # 0 or NaN: XLA may not fold it
    return slot + jnp.where(jnp.isnan(nothing), 0, nothing).astype(slot.dtype)


def _encoded(g: jax.Array, stored: Any) -> jax.Array:
    """A gradient as the ring keeps it: in its dtype, or bfloat16 as bits."""
    if stored != jnp.uint16:
        return g.astype(stored)
    if g.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(g, jnp.uint16)
    # Round to nearest even by hand: XLA on CPU calls a function for each value.
    bits = lax.bitcast_convert_type(g.astype(jnp.float32), jnp.uint32)
    even = (bits >> jnp.uint32(16)) & jnp.uint32(1)
    rounded = (bits + jnp.uint32(0x7FFF) + even) >> jnp.uint32(16)
    quiet = jnp.uint32(0x7FC0)
    return jnp.where(jnp.isnan(g), quiet, rounded).astype(jnp.uint16)


def _decoded(stored: jax.Array, dtype: Any) -> jax.Array:
    """What :func:`_encoded` keeps, as a number."""
    if stored.dtype != jnp.uint16:
        return stored.astype(dtype)
    bits = stored.astype(jnp.uint32) << jnp.uint32(16)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def _stored_dtype(leaf: Any, buffer_dtype: Any) -> Any:
    dtype = jnp.dtype(buffer_dtype or jnp.result_type(leaf))
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype


def _ring(leaf: Any, window_size: int, buffer_dtype: Any) -> jax.Array:
    # Broadcasting carries the leaf's sharding, eager and traced.
    zeros = jnp.zeros_like(leaf, dtype=_stored_dtype(leaf, buffer_dtype))
    return lax.broadcast(zeros, (window_size,))


def _state_bytes(leaves: list[Any], window_size: int, buffer_dtype: Any) -> int:
    """Bytes of the step, and of the ring and the two sums of each leaf."""
    size = jnp.dtype(jnp.int32).itemsize
    for leaf in leaves:
        wide = _gradients.width(leaf).itemsize
        slot = _stored_dtype(leaf, buffer_dtype).itemsize
        size += math.prod(jnp.shape(leaf)) * (window_size * slot + 2 * wide)
    return size


def _require_window_size(who: str, value: Any) -> None:
    """Refuses a length of a window that is none, or that is only known at run time."""
    if isinstance(value, core.Tracer) or hasattr(value, "dtype"):
        raise TypeError(
            f"{who}: `window_size` decides shapes and must be a Python int, got "
            f"{describe(value)}. With optax.inject_hyperparams, name it in "
            "static_args=('window_size',)."
        )
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{who}: `window_size` must be an integer >= 1, got {value!r}.")
