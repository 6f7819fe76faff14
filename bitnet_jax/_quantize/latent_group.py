"""The weights that share a scale, and their magnitudes counted in floats."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32

from bitnet_jax._quantize.config import KernelConfig
from bitnet_jax._quantize.pinned import bits_of, widened
from bitnet_jax._quantize.ternary import over_statistic

# A magnitude for each group: how many floats lie below it.
Steps = Int32[Array, "*b g 1 m"]


class Group(NamedTuple):
    """The codes of each group, (*b, g, k, n), and its scale, (*b, g, 1, m).

    A magnitude is counted in floats of ``dtype`` above 0: its bits, which are in order.
    """

    codes: Int8[Array, "*b g k n"]
    scale: Float32[Array, "*b g 1 m"]
    config: KernelConfig
    dtype: np.dtype

    @property
    def across(self) -> bool:
        return self.scale.shape[-1] < self.codes.shape[-1] or self.config.granularity == "tensor"

    @property
    def size(self) -> int:
        """How many weights share a scale."""
        return self.codes.shape[-2] * (self.codes.shape[-1] if self.across else 1)

    @property
    def largest(self) -> int:
        """The count of the largest finite float."""
        return int(np.asarray(jnp.finfo(self.dtype).max, self.dtype).view(self._unsigned))

    @property
    def _unsigned(self) -> np.dtype:
        return np.dtype(f"uint{8 * self.dtype.itemsize}")

    def floats(self, steps: Int32[Array, "..."]) -> Float[Array, "..."]:
        """Magnitudes of the kernel's dtype from their counts."""
        bits = jnp.clip(steps, 0, self.largest).astype(self._unsigned)
        return lax.bitcast_convert_type(bits, self.dtype)

    def wide(self, steps: Int32[Array, "..."]) -> Float32[Array, "..."]:
        """Magnitudes in float32."""
        return widened(self.floats(steps))

    def steps(self, value: Float32[Array, "..."]) -> Int32[Array, "..."]:
        """The count of the largest magnitude that is at most a value."""
        value = jnp.minimum(value, np.float32(jnp.finfo(self.dtype).max))
        near = bits_of(value.astype(self.dtype), self._unsigned).astype(jnp.int32)
        return near - (self.wide(near) > value).astype(jnp.int32)

    def number(self, mark: Bool[Array, "*b g k n"]) -> Int32[Array, "*b g 1 m"]:
        """How many weights of each group are marked."""
        axes = (-2, -1) if self.across else -2
        return mark.sum(axis=axes, keepdims=True, dtype=jnp.int32)

    def rank(self, mark: Bool[Array, "*b g k n"]) -> Int32[Array, "*b g k n"]:
        """The number of each marked weight among those of its group, from 0."""
        each = mark.astype(jnp.int32)
        if self.across:
            flat = each.reshape(*each.shape[:-2], -1)
            return (jnp.cumsum(flat, axis=-1) - flat).reshape(each.shape)
        return jnp.cumsum(each, axis=-2) - each

    def kept(self, statistic: Float32[Array, "*b g 1 m"], steps: Steps) -> Bool[Array, "..."]:
        """Whether a magnitude is above the threshold of a statistic."""
        r = over_statistic(self.wide(steps), statistic)
        return r > np.float32(self.config.threshold)  # pyright: ignore[reportAttributeAccessIssue]

    def lowest_kept(self, statistic: Float32[Array, "*b g 1 m"]) -> Steps:
        """The smallest magnitude above the threshold of a statistic."""
        threshold = np.float32(self.config.threshold)  # pyright: ignore[reportAttributeAccessIssue]
        near = jnp.maximum(self.steps(statistic * threshold) - 3, 0)
        for _ in range(8):  # the ratio rounds twice, so the edge is a few floats off
            near = near + (~self.kept(statistic, near)).astype(jnp.int32)
        return near
