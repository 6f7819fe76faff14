"""``finetune_recipe``: the losses and the schedules of a run from a float network to a ternary one.

A recipe is no trainer. It holds numbers and schedules, adds the losses up, and leaves the loop,
the optimizer and the placing of arrays to whoever trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int, PyTree

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._quantize.arrays import AnyArray
from bitnet_jax.convert._distillation import (
    Where,
    attention_relation,
    cross_entropy,
    hidden_distillation,
    logit_distillation,
)
from bitnet_jax.optim import strength_schedule, two_stage_weight_decay
from bitnet_jax.optim._hyperparameters import (
    NONNEGATIVE,
    POSITIVE,
    require_integer,
    require_number,
)

# States of the student and of the teacher, of one place in the network each.
Pairs = Sequence[tuple[Float[AnyArray, "*b k"], Float[AnyArray, "*b m"]]]

_WARM = 0.05  # of the steps, in which the learning rate rises
_RAMP = 0.4  # of the steps, in which quantisation is phased in: at most _LONGEST_RAMP
_LONGEST_RAMP = 1000


class Losses(NamedTuple):
    """The parts of a recipe's loss, each before its weight; float32 scalars.

    Attributes:
      total: the weighted sum, which is minimised.
      labels: cross-entropy, nats a token.
      logits: ``logit_distillation``.
      hidden: the mean of ``hidden_distillation`` over the pairs; 0 without any.
      relations: the mean of ``attention_relation`` over the pairs; 0 without any.
    """

    total: Float32[Array, ""]
    labels: Float32[Array, ""]
    logits: Float32[Array, ""]
    hidden: Float32[Array, ""]
    relations: Float32[Array, ""]


@dataclasses.dataclass(frozen=True)
class FinetuneRecipe:
    """A run from a float network to a ternary one; from :func:`finetune_recipe`.

    Attributes:
      steps: how many steps the run has.
      learning_rate: a schedule of the step.
      weight_decay: a schedule of the step.
      strength: a schedule of the step, for ``with bj.phase_in(recipe.strength(step)): ...``
        around the student.
      temperature: of the logits.
      labels: the weight of cross-entropy.
      logits: the weight of ``logit_distillation``.
      hidden: the weight of ``hidden_distillation``.
      relations: the weight of ``attention_relation``.
      heads: of the relations.
    """

    steps: int
    learning_rate: optax.Schedule = dataclasses.field(repr=False)
    weight_decay: optax.Schedule = dataclasses.field(repr=False)
    strength: optax.Schedule = dataclasses.field(repr=False)
    temperature: float
    labels: float
    logits: float
    hidden: float
    relations: float
    heads: int

    def loss(
        self,
        student: Float[AnyArray, "*b v"],
        teacher: Float[AnyArray, "*b v"],
        labels: Int[AnyArray, "*b"],
        *,
        hidden: Pairs = (),
        relations: Pairs = (),
        where: Where | None = None,
    ) -> Losses:
        """The loss of a batch, and its parts.

        Args:
          student: logits of the ternary network.
          teacher: logits of the float network, of the same shape.
          labels: (\\*b), integers.
          hidden: pairs (student's, teacher's) of hidden states, as ``bj.convert.capture`` hands
            them out.
          relations: pairs of queries, keys or values, (\\*b, width) with tokens last in ``*b``.
          where: (\\*b), which tokens count, in every part.

        Returns:
          :class:`Losses`; minimise ``total``.

        Raises:
          TypeError: labels that are no integers, or as the losses.
          ValueError: labels of another shape than the tokens; pairs where the recipe's weight
            is 0, or none where it is not; as the losses.
        """
        who = "FinetuneRecipe.loss"
        _require_labels(who, labels, student)
        for name, pairs in (("hidden", hidden), ("relations", relations)):
            _require_pairs(who, name, pairs, getattr(self, name))
        answers = logit_distillation(student, teacher, temperature=self.temperature, where=where)
        known = cross_entropy(who, student, labels, where)
        near = [hidden_distillation(s, t, where=where) for s, t in hidden]
        alike = [attention_relation(s, t, heads=self.heads, where=where) for s, t in relations]
        parts = (known, answers, _mean(near), _mean(alike))
        weights = (self.labels, self.logits, self.hidden, self.relations)
        total = sum((w * p for w, p in zip(weights, parts, strict=True) if w), jnp.float32(0))
        return Losses(total, *parts)

    def optimizer(
        self, *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8
    ) -> optax.GradientTransformation:
        """AdamW with the schedules; leaves of fewer than two axes (norms, biases) do not decay.

        Args:
          b1: decay of Adam's first moment.
          b2: decay of Adam's second moment.
          eps: as for ``optax.adamw``.

        Returns:
          An ``optax.GradientTransformation``.
        """
        return optax.adamw(
            self.learning_rate, b1, b2, eps, weight_decay=self.weight_decay, mask=decayed
        )


def finetune_recipe(
    steps: int,
    learning_rate: float,
    *,
    weight_decay: float = 0.1,
    warmup_steps: int | None = None,
    ramp_steps: int | None = None,
    temperature: float = 5.0,
    labels: float = 1.0,
    logits: float = 0.4,
    hidden: float = 0.0,
    relations: float = 0.0,
    heads: int = 1,
) -> FinetuneRecipe:
    """The losses and schedules of a run from a float network to a ternary one.

    The student starts from the float network's parameters, or from those that ``calibrate`` and
    ``bj.unpack_params`` made, and the float network answers beside it. The loss is

    ``labels CE + logits T**2 KL(teacher || student) + hidden MSE + relations KL(R_t || R_s)``

    The values are those of the literature. In the short runs of ``examples/distill.py`` labels
    alone (``logits=0``) do as well.

    Args:
      steps: how many steps the run has, 2 or more.
      learning_rate: the peak: 1.5 to 3 times that of float training (Ma et al.). It rises for
        ``warmup_steps`` and falls linearly to 0.
      weight_decay: until half of the steps; then it is off (Ma et al.).
      warmup_steps: None: a twentieth of the steps.
      ramp_steps: over which quantisation is phased in, 0 for none. None: 1000 (Mekkouri et
        al.), in a shorter run two fifths of the steps.
      temperature: of the logits (5: Wu et al.).
      labels: the weight of cross-entropy.
      logits: the weight of the teacher's answers. 0.4 with the factor T**2 is Wu et al.'s 10
        without it.
      hidden: the weight of hidden states, relative squared errors.
      relations: the weight of attention relations. That of Wu et al., 1e3 to 1e5, belongs to
        the scaling of their code.
      heads: of the relations; see ``attention_relation``.

    Returns:
      A :class:`FinetuneRecipe`: ``loss``, ``optimizer``, and the schedules themselves.

    Raises:
      ValueError: a number out of range, a warm-up longer than the run, or no loss with a weight.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bitnet_jax as bj
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> teacher = {"w": jax.random.normal(keys[0], (16, 4))}
      >>> x, labels = jax.random.normal(keys[1], (32, 16)), jnp.zeros(32, jnp.int32)
      >>> float_fn = lambda params, x: x @ params["w"]
      >>> student_fn = bj.ternarize(float_fn)
      >>> recipe = bj.convert.finetune_recipe(100, 1e-2)
      >>> tx = recipe.optimizer()
      >>> def loss_fn(params, step):
      ...     with bj.phase_in(recipe.strength(step)):
      ...         logits = student_fn(params, x)
      ...     return recipe.loss(logits, float_fn(teacher, x), labels).total
      >>> grads = jax.grad(loss_fn)(teacher, 0)
      >>> updates, state = tx.update(grads, tx.init(teacher), teacher)

    References:
      Wu et al., BitNet Distillation, arXiv:2510.13998, equation 13 and its weights; Mekkouri et
      al., Fine-tuning LLMs to 1.58 bit (Hugging Face, 2024), for phasing in; Ma et al., BitNet
      b1.58 2B4T, arXiv:2504.12285, for the rates and the decay.
    """
    who = "finetune_recipe"
    require_integer(who, "steps", steps, 2)
    require_number(who, "learning_rate", learning_rate, POSITIVE)
    require_number(who, "temperature", temperature, POSITIVE)
    weights = {"labels": labels, "logits": logits, "hidden": hidden, "relations": relations}
    for name, weight in weights.items():
        require_number(who, name, weight, NONNEGATIVE, "0 leaves the part out.")
    if not any(weights.values()):
        raise ValueError(f"{who}: `labels` and all other weights are 0. Give one a weight.")
    _checks.require_count(who, "heads", heads)
    warm = max(1, round(_WARM * steps)) if warmup_steps is None else warmup_steps
    ramp = min(_LONGEST_RAMP, round(_RAMP * steps)) if ramp_steps is None else ramp_steps
    for name, length in (("warmup_steps", warm), ("ramp_steps", ramp)):
        _require_within(who, name, length, steps)
    return FinetuneRecipe(
        steps,
        _rising_and_falling(learning_rate, warm, steps),
        two_stage_weight_decay(steps, weight_decay),
        strength_schedule(ramp) if ramp else _at_once,
        temperature,
        labels,
        logits,
        hidden,
        relations,
        heads,
    )


def decayed(params: PyTree) -> PyTree:
    """Which leaves decay: those of two axes and more."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def _rising_and_falling(peak: float, warm: int, steps: int) -> optax.Schedule:
    """From 0 to the peak, and linearly back to 0."""
    up, down = (
        optax.linear_schedule(0.0, peak, warm),
        optax.linear_schedule(peak, 0.0, steps - warm),
    )
    return optax.join_schedules([up, down], [warm])


def _at_once(step: jax.typing.ArrayLike) -> jax.Array:
    """Full strength from the first step."""
    return jnp.ones(jnp.shape(step), jnp.float32)


def _mean(losses: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack(losses).mean() if losses else jnp.float32(0)


def _require_within(who: str, name: str, length: object, steps: int) -> None:
    """Raises unless a number of steps is shorter than the run."""
    require_integer(who, name, length, 0)
    if isinstance(length, int) and length >= steps:
        raise ValueError(
            f"{who}: `{name}` must be less than `steps`, {steps}, got {length}. Shorten it, or "
            "leave it out."
        )


def _require_labels(who: str, labels: object, student: object) -> None:
    """Raises unless labels are an integer for each token."""
    dtype, shape = getattr(labels, "dtype", None), getattr(labels, "shape", None)
    if dtype is None or shape is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{who}: `labels` must be an array of integers, got {describe(labels)}.")
    wanted = tuple(getattr(student, "shape", ()))[:-1]
    if tuple(shape) != wanted:
        raise ValueError(
            f"{who}: `labels` must have the shape of the student's tokens, {wanted}, got "
            f"{tuple(shape)}."
        )


def _require_pairs(who: str, name: str, pairs: Pairs, weight: float) -> None:
    """Raises unless states are given exactly where they have a weight."""
    if isinstance(pairs, (str, bytes, dict)) or not all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs
    ):
        raise TypeError(
            f"{who}: `{name}` must be a sequence of pairs (student's, teacher's), got "
            f"{describe(pairs)}."
        )
    if bool(len(pairs)) != bool(weight):
        remedy = f"Pass {name}=[(student, teacher), ...]" if weight else "Leave them out"
        raise ValueError(
            f"{who}: the recipe's weight of `{name}` is {weight:g}, and {len(pairs)} pairs were "
            f"passed. {remedy}, or make the recipe with another {name}=."
        )
