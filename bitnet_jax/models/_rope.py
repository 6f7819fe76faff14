"""Rotary position embeddings: frequencies of the published kinds, and the rotation.

A head's vector is cut in two halves ``(a, b)``; at position p with frequency f each pair
turns by ``p f``::

    (a, b)  ->  (a cos(p f) - b sin(p f),  b cos(p f) + a sin(p f))

``f_i = theta**(-2 i / head_dim)``. ``linear`` divides every frequency by a factor.
``llama3`` divides those whose wavelength is beyond the trained context, keeps the short
ones, and blends between. ``yarn`` blends by the number of turns within the trained
context, and scales cos and sin by an attention factor. ``factors`` divides each
frequency by its own. Frequencies are float32 from the
start, as the published models computed them.
Left out: ``dynamic`` and ``longrope``, whose frequencies depend on the length of the input.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bitnet_jax import _checks

KINDS = ("default", "linear", "llama3", "yarn", "factors")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys.

    Args:
      theta: the base of the frequencies.
      kind: which frequencies are scaled, and how.
      factor: how many times the context was extended; unused by ``"default"``.
      original_context: the trained context, for ``"llama3"`` and ``"yarn"``.
      low: ``low_freq_factor`` of llama3; ``beta_slow`` of yarn.
      high: ``high_freq_factor`` of llama3; ``beta_fast`` of yarn.
      attention_factor: of yarn; None: ``0.1 log(factor) + 1``.
      truncate: whether yarn rounds its limits to whole frequencies.
      factors: what each frequency is divided by, for ``"factors"``, as GGUF stores llama3's.

    Raises:
      ValueError: an unknown kind, or a number out of range.

    Example:
      >>> import bitnet_jax as bj
      >>> bj.models.Rope(theta=10000.0).frequencies(8).round(4).tolist()
      [1.0, 0.10000000149011612, 0.009999999776482582, 0.0010000000474974513]

    References:
      Su et al., arXiv:2104.09864; Peng et al., arXiv:2309.00071.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn", "factors"] = "default"
    factor: float = 1.0
    original_context: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        who = "Rope"
        _checks.require_one_of(who, "kind", self.kind, KINDS)
        for name in ("theta", "factor", "low", "high"):
            _checks.require_positive(who, name, getattr(self, name))
        if self.attention_factor is not None:
            _checks.require_positive(who, "attention_factor", self.attention_factor)
        if self.kind in ("llama3", "yarn"):
            _checks.require_positive(who, "original_context", self.original_context)
        for factor in self.factors:
            _checks.require_positive(who, "factors", factor)
        if self.kind == "llama3" and self.high <= self.low:
            raise ValueError(
                f"Rope: `high` must be above `low`, got {self.high!r} and {self.low!r}. They are "
                "high_freq_factor and low_freq_factor of the checkpoint."
            )

    def frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """Radians a position, float32, one for each pair of a head.

        Args:
          head_dim: the length of a head, even.

        Returns:
          (head_dim / 2,), the fastest first.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = np.float32(1) / np.float32(self.theta) ** exponents
        if self.kind == "default":
            return plain
        if self.kind == "factors":
            return plain / np.asarray(self.factors, np.float32)
        if self.kind == "linear":
            return plain / np.float32(self.factor)
        return self._llama3(plain) if self.kind == "llama3" else self._yarn(plain, head_dim)

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by: 1, but for yarn."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        turns = self.original_context * plain / np.float32(2 * math.pi)  # within the context
        blend = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return ((1 - blend) * plain / self.factor + blend * plain).astype(np.float32)

    def _yarn(self, plain: np.ndarray, head_dim: int) -> np.ndarray:
        def index_of(turns: float) -> float:
            """The frequency that turns so often within the trained context."""
            wavelength = self.original_context / (turns * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        first, last = index_of(self.high), index_of(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        last = last + 0.001 if first == last else last
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - first) / (last - first)
        slow = np.clip(ramp, 0, 1)
        return (plain / self.factor * slow + plain * (1 - slow)).astype(np.float32)


def rotation(
    rope: Rope, head_dim: int, positions: Int[Array, "b l"], dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "b l 1 half"], Float[Array, "b l 1 half"]]:
    """The cosine and sine of every position and frequency."""
    turns = jnp.asarray(rope.frequencies(head_dim))[None, None, None, :]
    angles = positions.astype(jnp.float32)[:, :, None, None] * turns
    magnitude = np.float32(rope.magnitude)
    return (jnp.cos(angles) * magnitude).astype(dtype), (jnp.sin(angles) * magnitude).astype(dtype)


def rotate(
    x: Float[Array, "b l h d"],
    cosine: Float[Array, "b l 1 half"],
    sine: Float[Array, "b l 1 half"],
) -> Float[Array, "b l h d"]:
    """Turns every head of x."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)
