"""The next token from logits: greedy, or drawn after the usual filters.

In the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from bitnet_jax import _checks

_LEAST = 1e-30


class Filters(NamedTuple):
    """Which filters run: static, so that those left out cost nothing."""

    drawn: bool = False
    top_k: int | None = None
    top_p: bool = False
    min_p: bool = False
    penalty: bool = False


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the arguments of ``generate``, checked."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        who = "generate"
        if not np.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(
                f"{who}: `temperature` must be a finite number >= 0, got {self.temperature!r}. 0 "
                "takes the most likely token."
            )
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"{who}: `top_k` must be an integer >= 1, got {self.top_k!r}.")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{who}: `{name}` must be above 0 and at most 1, got {value!r}.")
        if self.repetition_penalty is not None:
            _checks.require_positive(who, "repetition_penalty", self.repetition_penalty)
        if not isinstance(self.seed, (int, np.integer)) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"{who}: `seed` must be an integer of 64 bits, got {self.seed!r}.")

    @property
    def filters(self) -> Filters:
        """What of it is static."""
        drawn = self.temperature > 0
        return Filters(
            drawn,
            self.top_k if drawn else None,
            drawn and self.top_p is not None,
            drawn and self.min_p is not None,
            self.repetition_penalty is not None,
        )

    @property
    def values(self) -> dict[str, np.float32]:
        """The numbers, which may change without a new trace."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        given = {n: 1.0 if getattr(self, n) is None else getattr(self, n) for n in names}
        # Below, logits that are divided by them are infinite, and draws are of no number.
        return {n: np.float32(max(value, _LEAST)) for n, value in given.items()}


def choose(
    logits: Float32[Array, "b v"],
    seen: Bool[Array, "b v"] | None,
    key: jax.Array,
    filters: Filters,
    values: dict[str, jax.Array],
) -> Int32[Array, " b"]:
    """The next token of every row; a row's draw depends on its index and on no other row."""
    if filters.penalty and seen is not None:
        penalty = values["repetition_penalty"]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not filters.drawn:
        return largest(logits)
    logits = filtered(logits / values["temperature"], filters, values)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits), dtype=jnp.int32))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def largest(logits: Float32[Array, "b v"]) -> Int32[Array, " b"]:
    """``jnp.argmax``, as a maximum and a minimum: XLA vectorises those on CPUs."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    found = (logits == best) | jnp.isnan(logits)  # a NaN is the largest, as it is for argmax
    count = logits.shape[-1]
    places = jnp.where(found, jnp.arange(count, dtype=jnp.int32), jnp.int32(count))
    return jnp.min(places, axis=-1)


def filtered(
    logits: Float32[Array, "b v"], filters: Filters, values: dict[str, jax.Array]
) -> Float32[Array, "b v"]:
    """The logits, with those that may not be drawn at minus infinity."""
    if filters.top_k is not None:
        best = jax.lax.top_k(logits, min(filters.top_k, logits.shape[-1]))[0]
        logits = jnp.where(logits < best[:, -1:], -jnp.inf, logits)
    if filters.top_p:
        ordered = -jnp.sort(-logits, axis=-1)
        weights = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(weights, axis=-1) - weights  # what likelier tokens have together
        least = jnp.min(jnp.where(before < values["top_p"], ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if filters.min_p:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(values["min_p"])
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
