"""The published recipe for training b1.58 networks, in one call."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
from jaxtyping import PyTree

from bitnet_jax.optim._hyperparameters import Scalar, float_dtype
from bitnet_jax.optim._schedules import Stage, two_stage_lr, two_stage_weight_decay


def b158_adamw(
    steps: Scalar,
    first: Stage = (1.5e-3, 8e-4),
    second: Stage = (5e-4, 0.0),
    *,
    weight_decay: Scalar = 0.1,
    warmup_steps: Scalar | None = None,
    switch: Scalar = 0.5,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    mask: PyTree | Callable[[PyTree], PyTree] = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """The published b1.58 optimizer: AdamW with two stages of learning rate and weight decay.

    ``optax.adamw`` with :func:`two_stage_lr`, :func:`two_stage_weight_decay`, b2 0.95.
    Ternary networks need 1.5 to 3 times the learning rate of a float one.

    Args:
      steps: how many steps the whole run has, 2 or more.
      first: learning rates (start, end) of the first stage, or one constant rate.
      second: the same for the second stage.
      weight_decay: of the first stage; the second has none.
      warmup_steps: of the learning rate. By default 375, in a short run less; see
        :func:`two_stage_lr`.
      switch: where the second stage starts, as a share of ``steps``.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: as for ``optax.adamw``.
      mask: which leaves decay, as for ``optax.adamw``.
      mu_dtype: of the first moment, as for ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformation``. To phase quantisation in during the same run,
      use :func:`strength_schedule`; to filter the gradients, chain :func:`grokfast_ema`
      before it. ``optax.inject_hyperparams`` works on it without ``static_args``.

    Raises:
      ValueError: as :func:`two_stage_lr` and :func:`two_stage_weight_decay`.

    Example:
      >>> import jax.numpy as jnp, optax, bitnet_jax as bj
      >>> tx = bj.optim.b158_adamw(100)
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> updates, state = tx.update(params, tx.init(params), params)

    References:
      Ma et al., BitNet b1.58 2B4T technical report (2025), section 3.1.
    """
    return optax.adamw(
        two_stage_lr(steps, first, second, warmup_steps=warmup_steps, switch=switch),
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=two_stage_weight_decay(steps, weight_decay, switch=switch),
        mask=mask,
        mu_dtype=float_dtype("b158_adamw", "mu_dtype", mu_dtype),
    )
