"""What each name of ``TernaryConfig.scale`` means: the one table that all quantisers read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float32

from bitnet_jax._quantize import statistics

# (magnitudes (*b, G, K/G, N), whether over all outputs) -> (*b, G, 1, 1 or N).
Statistic = Callable[[Float32[Array, "*b g k n"], bool], Float32[Array, "*b g 1 m"]]


class ScaleRule(NamedTuple):
    """How magnitudes make a scale.

    Attributes:
      statistic: of all of a group, in which the threshold counts.
      of_kept: whether the scale is the mean of the weights that are kept; else the statistic.
      native: whether the library of native code computes it.
    """

    statistic: Statistic
    of_kept: bool
    native: bool


SCALE_RULES = {
    "absmean": ScaleRule(statistics.mean, of_kept=False, native=True),
    "absmedian": ScaleRule(statistics.median, of_kept=False, native=False),
    "survivors": ScaleRule(statistics.mean, of_kept=True, native=True),
}


def scale_rule(name: str) -> ScaleRule:
    """The rule of a name; raises for one that the table has not."""
    if name not in SCALE_RULES:
        raise ValueError(
            f"TernaryConfig: no rule for the scale {name!r}; there are {', '.join(SCALE_RULES)}. "
            "A new one is an entry of SCALE_RULES."
        )
    return SCALE_RULES[name]
