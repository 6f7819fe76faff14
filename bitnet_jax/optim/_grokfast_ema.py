"""Grokfast with an exponential moving average: the slow part of the gradient, amplified.

With ``g`` the gradient of a step, ``a`` alpha and ``l`` lamb::

    e <- g                     at the first step
    e <- a * e + (1 - a) * g   at the others
    g <- g + l * e

A constant gradient is multiplied by ``1 + l``, one that alternates in sign by
about ``1 + l * (1 - a) / (1 + a)``: a low-pass filter in front of the optimizer.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import export
from jaxtyping import Array, Float32, Int32, PyTree

from bitnet_jax import _checks
from bitnet_jax.optim._gradients import (
    amplify,
    gradient_leaves,
    require_same_leaves,
    wide_dtype,
)
from bitnet_jax.optim._hyperparameters import (
    DECAY,
    NONNEGATIVE,
    Scalar,
    ScalarOrSchedule,
    float_dtype,
    require_flag,
    require_integer,
    require_number_or_schedule,
    value_at,
)

Init = Literal["first", "zeros", "debiased"]


class GrokfastEmaState(NamedTuple):
    """The state of :func:`grokfast_ema`.

    Attributes:
      step: int32, steps taken.
      weight: float32, the sum of the weights that the average has given to gradients so
        far: 1 after the first step with ``init="first"``, else ``1 - alpha ** t``.
      average: the moving average, a tree like the gradients.
    """

    step: Int32[Array, ""]
    weight: Float32[Array, ""]
    average: PyTree


export.register_namedtuple_serialization(
    GrokfastEmaState, serialized_name="bitnet_jax.GrokfastEmaState"
)


def grokfast_ema(
    alpha: ScalarOrSchedule = 0.98,
    lamb: ScalarOrSchedule = 2.0,
    *,
    init: Init = "first",
    start_step: Scalar = 0,
    track_while_waiting: bool = True,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Adds an exponential moving average of the gradient, times ``lamb``, to the gradient.

    ``g + lamb * e`` with ``e = alpha * e + (1 - alpha) * g``. Chain it in front of the
    optimizer; coupled weight decay, as in the paper, goes between the two::

        tx = optax.chain(
            bj.optim.grokfast_ema(),
            optax.add_decayed_weights(0.005),
            optax.adam(1e-3),
        )

    On the task of ``examples/grokking.py`` it shortens the plateau before
    generalisation of weakly regularised Adam from 5,240 steps to 1,540. In front of AdamW
    with a tuned decoupled decay, a float network takes longer (1,880 to 2,640 steps) and
    a ternary one is faster (5,060 to 1,520). With loss scaling, unscale first.

    Args:
      alpha: decay of the average, in [0, 1); a number or a schedule of the step.
      lamb: weight of the average, >= 0; a number or a schedule of the step.
      init: the average before the first step. ``"first"``: the first gradient, as in
        the paper's code. ``"zeros"``: 0, so the filter sets in slowly.
        ``"debiased"``: 0, and divided by ``1 - alpha ** t`` as Adam's moments are.
      start_step: the first step that is filtered; earlier gradients pass unchanged.
      track_while_waiting: whether gradients of the steps before ``start_step`` enter
        the average. If not, it starts at ``start_step``.
      accumulator_dtype: of the average. By default each gradient's dtype, at least
        float32: a bfloat16 average would lose small changes.

    Returns:
      An ``optax.GradientTransformation``. Its state costs one copy of the
      parameters, sharded as they are.

    Raises:
      ValueError: a number out of its range, an unknown ``init``. In ``update``:
        updates that differ from the state in paths or shapes; the error names them.
      TypeError: a leaf without a gradient (packed, integer).

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> tx = bj.optim.grokfast_ema(alpha=0.5, lamb=2.0)
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for g in (1.0, 0.0, 0.0):
      ...     updates, state = tx.update({"w": jnp.full(2, g)}, state)
      ...     print(updates["w"].tolist())
      [3.0, 3.0]
      [1.0, 1.0]
      [0.5, 0.5]

    References:
      Lee et al., Grokfast: Accelerated Grokking by Amplifying Slow Gradients
      (2024), arXiv:2405.20233, algorithm 2 and its code, ``gradfilter_ema``.
    """
    who = "grokfast_ema"
    require_number_or_schedule(who, "alpha", alpha, DECAY, "The paper uses 0.98.")
    require_number_or_schedule(who, "lamb", lamb, NONNEGATIVE, "The paper uses 2.0.")
    _checks.require_one_of(who, "init", init, get_args(Init))
    require_integer(who, "start_step", start_step, 0)
    require_flag(who, "track_while_waiting", track_while_waiting)
    accumulator_dtype = float_dtype(who, "accumulator_dtype", accumulator_dtype)
    waits = not isinstance(start_step, int) or start_step > 0

    def init_state(params: PyTree) -> GrokfastEmaState:
        leaves, treedef = gradient_leaves(who, "params", params)
        zeros = [jnp.zeros_like(x, dtype=accumulator_dtype or wide_dtype(x)) for x in leaves]
        step, weight = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return GrokfastEmaState(step, weight, treedef.unflatten(zeros))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None
    ) -> tuple[PyTree, GrokfastEmaState]:
        del params
        grads, treedef = gradient_leaves(who, "updates", updates)
        require_same_leaves(who, updates, state.average)
        held, held_treedef = jax.tree.flatten(state.average)
        on = state.step >= start_step if waits else True
        tracks = True if track_while_waiting else on
        decay, lam = value_at(alpha, state.step), value_at(lamb, state.step)
        if init == "first":
            decay = jnp.where(state.weight == 0, jnp.float32(0), decay)
        weight = decay * state.weight + (1 - decay)
        weight = weight if tracks is True else jnp.where(tracks, weight, state.weight)

        # 1 where there is nothing to divide by yet, and nothing to divide.
        debias = jnp.where(weight > 0, weight, jnp.float32(1))

        raised, kept = [], []
        for g, e in zip(grads, held, strict=True):
            wide = wide_dtype(g)
            a, old = decay.astype(wide), e.astype(wide)
            new = a * old + (1 - a) * jnp.asarray(g).astype(wide)
            new = new if tracks is True else jnp.where(tracks, new, old)
            average = new / debias.astype(wide) if init == "debiased" else new
            raised.append(amplify(g, average, lam, on))
            kept.append(new.astype(e.dtype))
        step = jnp.asarray(optax.safe_increment(state.step))
        average = held_treedef.unflatten(kept)
        return treedef.unflatten(raised), GrokfastEmaState(step, weight, average)

    return optax.GradientTransformation(init_state, update)
