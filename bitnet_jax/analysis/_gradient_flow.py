"""Which leaves gradients reach, and how large they are."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._display import plain, table
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._tree.leaves import flatten

GradientState = Literal["ok", "missing", "dead", "nan", "exploding"]


@dataclasses.dataclass(frozen=True)
class LeafGradient:
    """The gradient of one leaf.

    Attributes:
      path: names joined by ``/``.
      norm: Euclidean norm, computed in float32; NaN where there is none.
      largest: the largest magnitude.
      state: ``"ok"``, ``"missing"``, ``"dead"``, ``"nan"`` or ``"exploding"``.
    """

    path: str
    norm: float
    largest: float
    state: GradientState


@dataclasses.dataclass(frozen=True)
class GradientFlow:
    """Which leaves gradients reach; see :func:`gradient_flow`.

    Attributes:
      rows: one :class:`LeafGradient` for each leaf.
    """

    rows: tuple[LeafGradient, ...]

    @property
    def ok(self) -> bool:
        """Whether every leaf has a finite gradient that is neither dead nor exploding."""
        return all(leaf.state == "ok" for leaf in self.rows)

    def paths(self, state: GradientState) -> tuple[str, ...]:
        """The paths of the leaves in a state."""
        _checks.require_one_of("GradientFlow.paths", "state", state, get_args(GradientState))
        return tuple(leaf.path for leaf in self.rows if leaf.state == state)

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, ready for ``json.dumps``; NaN and Inf are None."""
        return {"rows": [plain(dataclasses.asdict(row)) for row in self.rows], "ok": self.ok}

    def __str__(self) -> str:
        """A table, one row a leaf."""
        rows = [(g.path, f"{g.norm:.3g}", f"{g.largest:.3g}", g.state) for g in self.rows]
        return table(("path", "norm", "largest", "state"), rows)


def gradient_flow(grads: PyTree, *, exploding: float | int = 1e3) -> GradientFlow:
    """Names the leaves that gradients do not reach, or reach badly.

    Args:
      grads: a tree of gradients, as ``jax.grad`` returns it. None stands for a
        leaf without one.
      exploding: the norm above which a leaf counts as exploding.

    Returns:
      A :class:`GradientFlow`: for each leaf its norm, its largest magnitude,
      and a state: ``"missing"`` (None, or no gradient: integers, packed kernels),
      ``"dead"`` (all zeros), ``"nan"`` (NaN or Inf), ``"exploding"``, ``"ok"``.

    Raises:
      ValueError: an empty tree, or ``exploding`` not above zero.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> flow = bj.analysis.gradient_flow({"a": jnp.ones(4), "b": jnp.zeros(2), "c": None})
      >>> flow.ok, flow.paths("dead"), flow.paths("missing")
      (False, ('b',), ('c',))
      >>> print(flow)
      path  norm  largest  state
      a        2        1  ok
      b        0        0  dead
      c      nan      nan  missing
    """
    _checks.require_positive("gradient_flow", "exploding", exploding)
    leaves = flatten("gradient_flow", "grads", grads, is_leaf=lambda x: x is None)[0]
    for leaf in leaves:
        _checks.require_values("gradient_flow", leaf.where, leaf.value)
    return GradientFlow(tuple(_leaf_gradient(leaf.where, leaf.value, exploding) for leaf in leaves))


def _leaf_gradient(path: str, g: PyTree, exploding: float | int) -> LeafGradient:
    if g is None or is_packed(g) or g.dtype == jax.dtypes.float0:
        return LeafGradient(path, math.nan, math.nan, "missing")
    parts = (jnp.real(g), jnp.imag(g)) if jnp.iscomplexobj(g) else (g,)
    wide = jnp.stack([jnp.asarray(part, jnp.float32) for part in parts])
    largest = float(jnp.max(jnp.abs(wide), initial=0.0))
    if not math.isfinite(largest):
        return LeafGradient(path, math.nan, largest, "nan")
    if largest == 0.0:
        return LeafGradient(path, 0.0, 0.0, "dead")
    # A power of two keeps the squares of huge and tiny gradients finite.
    unit = 2.0 ** -min(max(math.frexp(largest)[1], -100), 100)
    norm = float(jnp.linalg.norm((wide * unit).reshape(-1))) / unit
    return LeafGradient(path, norm, largest, "exploding" if norm > exploding else "ok")
