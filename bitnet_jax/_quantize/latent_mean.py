"""Magnitudes of weights with a given mean, by the quantiser's own sum, which rounds.

One unknown at a time, each by bisection over the floats: a magnitude for all nonzero weights
(``base``); for how many of them one float more (``above``); then single weights, each finer
than the one before it. Those of code 0 go from 0 up to the threshold. Where that is not enough
in a narrow dtype, a second round starts with some nonzero weights at the threshold, where
floats lie closer, and lets them go up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from bitnet_jax._quantize import statistics
from bitnet_jax._quantize.config import KernelConfig, TernaryConfig, rule_of
from bitnet_jax._quantize.latent_group import Group, Steps

_SINGLE = 3  # weights of one kind that may have a magnitude of their own


class _Choice(NamedTuple):
    """The magnitudes of one candidate, all per group.

    Attributes:
      base: of the bulk of the weights.
      above: how many of the bulk, in order, have one step more.
      own: of the last weights of the bulk.
      free: of the first weights of code 0.
      alone: how many of the last weights have a magnitude of their own.
    """

    base: Steps
    above: Steps
    own: tuple[Steps, ...]
    free: tuple[Steps, ...]
    alone: Steps


def magnitudes_of_mean(group: Group) -> Int32[Array, "*b g k n"]:
    """Magnitudes whose mean, over all or over the nonzero weights, is the scale.

    Two rounds of the same search, one unknown at a time; the second, for groups that have not
    succeeded, with nonzero weights at magnitudes of their own.
    """
    search = _Search.of(group)
    each = 2 + 2 * _SINGLE

    def open_(state: tuple[jax.Array, _Choice, jax.Array]) -> Bool[Array, ""]:
        number, _, done = state
        return (number < 2 * each) & ~jnp.all(done)

    def stage(
        state: tuple[jax.Array, _Choice, jax.Array],
    ) -> tuple[jax.Array, _Choice, jax.Array]:
        number, choice, done = state
        again = (number == each) & ~done
        fresh = search.start(_SINGLE)
        choice = jax.tree.map(lambda new, old: jnp.where(again, new, old), fresh, choice)
        choice = search.improved(number % each, choice, done)
        return number + 1, choice, search.measure(choice) == group.scale

    state = jnp.int32(0), search.start(0), jnp.zeros(group.scale.shape, bool)
    return search.magnitudes(lax.while_loop(open_, stage, state)[1])


class _Search(NamedTuple):
    """What does not change while the magnitudes of a group are searched for."""

    group: Group
    nonzero: Bool[Array, "*b g k n"]
    bulk: Bool[Array, "*b g k n"]
    rank: Int32[Array, "*b g k n"]
    free_rank: Int32[Array, "*b g k n"]
    whole: Steps
    low: Steps
    most: Steps
    filled: Bool[Array, "*b g 1 m"]

    @classmethod
    def of(cls, group: Group) -> _Search:
        """The search for the magnitudes of a group."""
        nonzero = group.codes != 0
        n, eps = group.number(nonzero), np.float32(group.config.eps)
        filled = n == 0
        # A group of zeros has nothing else to carry a scale above eps.
        bulk = jnp.where(filled, group.scale > eps, nonzero)
        statistic = group.scale
        if _survive(group.config):
            # The threshold is that of the mean of all weights; a little above it is enough.
            share = n.astype(jnp.float32) * np.float32((1 + 2**-18) / group.size)
            statistic = jnp.maximum(group.scale * share, eps)
        low = group.lowest_kept(statistic)
        whole = jnp.maximum(group.number(bulk), 1)
        ranks = group.rank(bulk), group.rank(~nonzero)
        return cls(
            group,
            nonzero,
            bulk,
            *ranks,
            whole,
            jnp.where(filled, 0, low),
            jnp.maximum(low - 1, 0),
            filled,
        )

    def start(self, singles: int) -> _Choice:
        """The first candidate of a round."""
        none = jnp.zeros_like(self.low)
        alone = jnp.clip(self.whole - 1, 0, singles)
        return _Choice(self.low, none, (self.low,) * _SINGLE, (none,) * _SINGLE, alone)

    def magnitudes(self, choice: _Choice) -> Int32[Array, "*b g k n"]:
        """The magnitude of every weight."""
        steps = choice.base + (self.rank < choice.above).astype(jnp.int32)
        steps = jnp.where(self.bulk, steps, 0)
        free = ~self.nonzero & ~self.bulk
        for i in range(_SINGLE):
            last = self.bulk & (self.rank == self.whole - 1 - i) & (i < choice.alone)
            steps = jnp.where(last, choice.own[i], steps)
            steps = jnp.where(free & (self.free_rank == i), choice.free[i], steps)
        return steps

    def measure(self, choice: _Choice) -> Float32[Array, "*b g 1 m"]:
        """The scale of a candidate, by the quantiser's own sum."""
        group = self.group
        shifted = group.wide(self.magnitudes(choice)) * statistics.SHIFT
        if _survive(group.config):
            mean = statistics.mean_of_kept(shifted, self.nonzero, group.across)
        else:
            mean = statistics.mean(shifted, group.across)
        return jnp.maximum(mean * statistics.UNSHIFT, group.config.eps)

    def improved(self, stage: jax.Array, choice: _Choice, done: jax.Array) -> _Choice:
        """A candidate with one unknown, by its number, as large as the scale allows."""
        base_low, base_high = self._base_range(choice)
        ceiling = jnp.where(self.filled, self.most, self.group.largest)
        above = jnp.where(choice.base < ceiling, self.whole - choice.alone, 0)
        own_high = (
            jnp.where(i < choice.alone, self.group.largest, one) for i, one in enumerate(choice.own)
        )
        free_high = jnp.zeros_like(self.most) if _survive(self.group.config) else self.most
        now = jnp.stack([choice.base, choice.above, *choice.own, *choice.free])
        low = jnp.stack([base_low, *now[1:]])[stage]
        high = jnp.stack([base_high, above, *own_high, *(free_high,) * _SINGLE])[stage]

        def with_step(step: Steps) -> _Choice:
            base, above, *singles = now.at[stage].set(step)
            own, free = tuple(singles[:_SINGLE]), tuple(singles[_SINGLE:])
            return _Choice(base, above, own, free, choice.alone)

        low = jnp.where(done, now[stage], low)
        high = jnp.where(done, now[stage], high)
        return with_step(
            _climb(self.group.scale, low, high, lambda step: self.measure(with_step(step)))
        )

    def _base_range(self, choice: _Choice) -> tuple[Steps, Steps]:
        """Between which magnitudes that of the bulk lies: near the exact quotient."""
        group = self.group
        rest = jnp.maximum(self.whole - choice.alone, 1).astype(jnp.float32)
        total = np.float32(group.size)
        if _survive(group.config):
            total = self.whole.astype(jnp.float32)
        spent = group.wide(self.low) * (choice.alone.astype(jnp.float32) / rest)
        guess = group.steps(jnp.maximum(group.scale * (total / rest) - spent, 0.0))
        span = 256 if group.dtype.itemsize == 4 else 8  # the sum rounds once for each level
        low = jnp.where(self.filled, 0, self.low)
        high = jnp.where(self.filled, self.most, group.largest)
        return jnp.clip(guess - span, low, high), jnp.clip(guess + span, low, high)


def _survive(config: KernelConfig) -> bool:
    return isinstance(config, TernaryConfig) and rule_of(config).of_kept


def _climb(
    scale: Float32[Array, "*b g 1 m"],
    low: Steps,
    high: Steps,
    measure: Callable[[Steps], Float32[Array, "*b g 1 m"]],
) -> Steps:
    """The largest step of each group, from low to high, that keeps the scale at most this one.

    Bisection: the measure never falls as steps grow. It ends early at a step that gives the
    scale itself.
    """

    def wide(state: tuple[Steps, Steps]) -> Bool[Array, ""]:
        return jnp.any(state[0] < state[1])

    def halve(state: tuple[Steps, Steps]) -> tuple[Steps, Steps]:
        low, high = state
        middle = low + (high - low + 1) // 2
        found = measure(middle)
        inside = found <= scale
        upper = jnp.where(inside, jnp.where(found == scale, middle, high), middle - 1)
        open_ = low < high
        return jnp.where(open_ & inside, middle, low), jnp.where(open_, upper, high)

    return lax.while_loop(wide, halve, (low, jnp.maximum(low, high)))[0]
