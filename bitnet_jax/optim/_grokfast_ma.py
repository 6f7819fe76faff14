"""Grokfast with a moving average: the mean of a window of gradients, amplified.

With ``g`` the gradient of a step, ``W`` the window and ``l`` lamb::

    g <- g + l * mean(last W gradients)    "mean"
    g <- g + l * sum(last W gradients)     "sum"

The window is a ring buffer: gradient ``t`` goes to slot ``t mod W``, and a lap is W
steps. Summing the whole ring would cost W reads a step. A running sum costs two reads,
but it never loses a NaN or the rounding error of a spike. So there are two sums::

    total  <- total - old + new   old: what the slot held, of W steps ago
    fresh  <- fresh + new         0 at the start of a lap

and at the start of a lap ``total`` is replaced by ``fresh``, which is then the sum of
exactly the ring. A gradient no longer affects either sum once the lap after its own
has ended, at most 2 W steps later. The error is that of at most 2 W additions, however
long the run is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import core, export, lax
from jaxtyping import Array, Int32, PyTree

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._quantize.pinned import bits_of
from bitnet_jax.optim._gradients import (
    Leaf,
    amplify,
    gradient_leaves,
    require_same_leaves,
    wide_dtype,
)
from bitnet_jax.optim._hyperparameters import (
    NONNEGATIVE,
    ScalarOrSchedule,
    float_dtype,
    require_flag,
    require_integer,
    require_number_or_schedule,
    value_at,
)

Filter = Literal["mean", "sum"]

_logger = logging.getLogger(__name__)


class GrokfastMaState(NamedTuple):
    """The state of :func:`grokfast_ma`.

    Attributes:
      step: int32, steps taken.
      window: the last gradients; each leaf (window_size, *shape). bfloat16 ones
        are kept as their bits, uint16: XLA on CPU would widen the whole ring.
      total: the sum of the window.
      fresh: the sum of this lap's gradients.
    """

    step: Int32[Array, ""]
    window: PyTree
    total: PyTree
    fresh: PyTree


export.register_namedtuple_serialization(
    GrokfastMaState, serialized_name="bitnet_jax.GrokfastMaState"
)


def grokfast_ma_bytes(
    params: PyTree, window_size: int = 100, *, buffer_dtype: jax.typing.DTypeLike | None = None
) -> int:
    """Bytes of the state of :func:`grokfast_ma`, from shapes alone.

    Args:
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      window_size: as for :func:`grokfast_ma`.
      buffer_dtype: as for :func:`grokfast_ma`.

    Returns:
      Bytes over all devices.

    Raises:
      ValueError: a window below 1, a ``buffer_dtype`` that is not floating point.
      TypeError: a leaf without a gradient.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
      >>> f"{bj.optim.grokfast_ma_bytes(params) / 1e9:.2f} GB"
      '6.85 GB'
      >>> f"{bj.optim.grokfast_ma_bytes(params, buffer_dtype=jnp.bfloat16) / 1e9:.2f} GB"
      '3.49 GB'
    """
    grokfast_ma(window_size, buffer_dtype=buffer_dtype)  # raises on bad arguments
    leaves, _ = gradient_leaves("grokfast_ma", "params", params)
    return _state_bytes(leaves, window_size, buffer_dtype)


def grokfast_ma(
    window_size: int = 100,
    lamb: ScalarOrSchedule = 5.0,
    *,
    filter_type: Filter = "mean",
    warmup: bool = True,
    buffer_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Adds the average of the last gradients, times ``lamb``, to the gradient.

    ``g + lamb * mean(last window_size gradients)``. The time of a step does not depend
    on the window. The memory does: the state holds ``window_size + 2`` copies of the
    parameters. :func:`grokfast_ma_bytes` computes their size, and ``init`` logs it. See
    :func:`grokfast_ema` for where to chain it, where it helps and where it hurts.

    Donate the state to the jitted step, so that the window is updated in place.
    ``optax.MultiSteps`` and ``optax.apply_if_finite`` branch around their inner
    transform; there XLA copies the whole window at every step. A NaN gradient stays in
    the sum for at most two windows.

    Args:
      window_size: how many gradients are averaged. It decides shapes, so it must be
        static (``optax.inject_hyperparams``: ``static_args=("window_size",)``).
      lamb: weight of the average, >= 0; a number or a schedule of the step.
      filter_type: ``"mean"``, or ``"sum"``. For a sum, divide ``lamb`` by the window.
      warmup: whether gradients pass unchanged until the window is full. If not, the
        mean is over the gradients seen so far.
      buffer_dtype: of the window; by default each gradient's own. With
        ``jnp.bfloat16`` the gradients in the window are rounded to it; the sums stay in
        float32.

    Returns:
      An ``optax.GradientTransformation``. Its state is sharded as the
      parameters are.

    Raises:
      ValueError: a window below 1, a negative lamb, an unknown filter type. In
        ``update``: updates that differ from the state in paths or shapes; the error
        names them.
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
    require_number_or_schedule(who, "lamb", lamb, NONNEGATIVE, "The paper uses 5.0.")
    _checks.require_one_of(who, "filter_type", filter_type, get_args(Filter))
    require_flag(who, "warmup", warmup)
    buffer_dtype = float_dtype(who, "buffer_dtype", buffer_dtype)

    def init(params: PyTree) -> GrokfastMaState:
        leaves, treedef = gradient_leaves(who, "params", params)
        size = _state_bytes(leaves, window_size, buffer_dtype)  # logged before it is allocated
        _logger.info("grokfast_ma: a window of %d gradients takes %.1f MB", window_size, size / 1e6)
        window = [_ring(x, window_size, buffer_dtype) for x in leaves]
        total, fresh = (
            treedef.unflatten([jnp.zeros_like(x, dtype=wide_dtype(x)) for x in leaves])
            for _ in range(2)
        )
        return GrokfastMaState(jnp.zeros((), jnp.int32), treedef.unflatten(window), total, fresh)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None
    ) -> tuple[PyTree, GrokfastMaState]:
        del params
        grads, treedef = gradient_leaves(who, "updates", updates)
        require_same_leaves(who, updates, state.total)
        held = (jax.tree.leaves(tree) for tree in state[1:])
        held_treedef = jax.tree.structure(state.total)
        slot = state.step % window_size
        stored = jnp.minimum(state.step + 1, window_size)
        on = stored == window_size if warmup and window_size > 1 else True
        lam = value_at(lamb, state.step)
        if filter_type == "mean":
            lam = lam / stored.astype(lam.dtype)

        raised, kept = [], []
        for g, ring, total, fresh in zip(grads, *held, strict=True):
            ring, total, fresh = _push(ring, total, fresh, jnp.asarray(g), slot)
            raised.append(amplify(g, total, lam, on))
            kept.append((ring, total, fresh))
        sums = [held_treedef.unflatten(part) for part in zip(*kept, strict=True)] or state[1:]
        step = jnp.asarray(optax.safe_increment(state.step))
        return treedef.unflatten(raised), GrokfastMaState(step, *sums)

    return optax.GradientTransformation(init, update)


def _push(
    ring: jax.Array, total: jax.Array, fresh: jax.Array, g: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ring with gradient ``g`` written at ``slot``, and the updated sums."""
    new = _encoded(g, ring.dtype)
    old = _decoded(lax.dynamic_index_in_dim(ring, slot, 0, keepdims=False), total.dtype)
    value = _decoded(new, total.dtype)
    total = jnp.where(slot == 0, fresh, total) - old + value
    # Each line overwrites a buffer that the line before it reads. XLA updates in place only
    # if the data dependencies fix that order; else it copies the ring, which is W reads.
    after = _after(total, slot)
    fresh = jnp.where(after == 0, jnp.zeros((), fresh.dtype), fresh) + value
    return lax.dynamic_update_index_in_dim(ring, new, after, 0), total, fresh


def _after(total: jax.Array, slot: jax.Array) -> jax.Array:
    """``slot``, with a data dependency on ``total``."""
    # An axis that is sharded explicitly cannot be sliced to one value on jax 0.10.2.
    if total.size == 0 or any(jax.typeof(total).sharding.spec):
        return slot
    one = total.reshape(-1)[0].real
    nothing = jnp.where(jnp.isfinite(one), one, 0) * 0  # 0, of either sign: XLA may not fold it
    return slot + nothing.astype(slot.dtype)


def _encoded(g: jax.Array, stored: np.dtype) -> jax.Array:
    """A gradient in the dtype of the ring; uint16 holds the bits of a bfloat16."""
    if stored != jnp.uint16:
        return g.astype(stored)
    if g.dtype == jnp.bfloat16:
        return bits_of(g, jnp.uint16)
    # Round float32 to bfloat16 by hand, to nearest even: add half of the dropped 16 bits,
    # less one where the kept last bit is even. XLA on CPU calls a function for each value.
    bits = bits_of(g.astype(jnp.float32), jnp.uint32)
    even = (bits >> jnp.uint32(16)) & jnp.uint32(1)
    rounded = (bits + jnp.uint32(0x7FFF) + even) >> jnp.uint32(16)
    quiet = jnp.uint32(0x7FC0)
    return jnp.where(jnp.isnan(g), quiet, rounded).astype(jnp.uint16)


def _decoded(stored: jax.Array, dtype: np.dtype) -> jax.Array:
    """The gradient that :func:`_encoded` stored."""
    if stored.dtype != jnp.uint16:
        return stored.astype(dtype)
    # A bfloat16 is the upper half of a float32.
    bits = stored.astype(jnp.uint32) << jnp.uint32(16)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def _stored_dtype(leaf: Leaf, buffer_dtype: jax.typing.DTypeLike | None) -> np.dtype:
    dtype = jnp.dtype(buffer_dtype or jnp.result_type(leaf))
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype


def _ring(leaf: Leaf, window_size: int, buffer_dtype: jax.typing.DTypeLike | None) -> jax.Array:
    # zeros_like and broadcast keep the leaf's sharding, eager and traced.
    zeros = jnp.zeros_like(leaf, dtype=_stored_dtype(leaf, buffer_dtype))
    return lax.broadcast(zeros, (window_size,))


def _state_bytes(
    leaves: Sequence[Leaf], window_size: int, buffer_dtype: jax.typing.DTypeLike | None
) -> int:
    """Bytes of the step, and of the ring and the two sums of each leaf."""
    size = jnp.dtype(jnp.int32).itemsize
    for leaf in leaves:
        wide = wide_dtype(leaf).itemsize
        slot = _stored_dtype(leaf, buffer_dtype).itemsize
        size += math.prod(jnp.shape(leaf)) * (window_size * slot + 2 * wide)
    return size


def _require_window_size(who: str, value: object) -> None:
    """Raises unless a window is an integer >= 1 that is known while tracing."""
    if isinstance(value, core.Tracer) or hasattr(value, "dtype"):
        raise TypeError(
            f"{who}: `window_size` decides shapes and must be a Python int, got "
            f"{describe(value)}. With optax.inject_hyperparams, name it in "
            "static_args=('window_size',)."
        )
    require_integer(who, "window_size", value, 1)
