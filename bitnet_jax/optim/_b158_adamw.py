"""The published recipe for training b1.58 networks, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from bitnet_jax.optim._schedules import two_stage_lr, two_stage_weight_decay


def b158_adamw(
    steps: int,
    first: float | Sequence[float] = (1.5e-3, 8e-4),
    second: float | Sequence[float] = (5e-4, 0.0),
    *,
    weight_decay: float = 0.1,
    warmup_steps: int = 375,
    switch: float = 0.5,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    mask: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """AdamW as BitNet b1.58 is trained with it: two stages of learning rate and weight decay.

    ``optax.adamw`` with :func:`two_stage_lr`, :func:`two_stage_weight_decay`, b2 0.95.
    Ternary networks want 1.5 to 3 times the learning rate of a float one.

    Args:
      steps: of the whole run.
      first: learning rates (start, end) of the first stage, or one to hold.
      second: those of the second.
      weight_decay: of the first stage; the second has none.
      warmup_steps: of the learning rate.
      switch: where the second stage starts, as a share of ``steps``.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: as for ``optax.adamw``.
      mask: which leaves decay, as for ``optax.adamw``.
      mu_dtype: of the first moment, as for ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformation``. To phase quantisation in beside it, use
      :func:`strength_schedule`; to filter its gradients, chain
      :func:`grokfast_ema` before it.

    Raises:
      ValueError: as :func:`two_stage_lr` and :func:`two_stage_weight_decay`.

    Example:
      >>> import jax.numpy as jnp, optax, bitnet_jax as bj
      >>> tx = bj.optim.b158_adamw(steps=10_000)
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
        mu_dtype=mu_dtype,
    )
