"""Where one kernel meets one input: the equation, and how the kernel is quantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import PyTree

from bitnet_jax._layers.dimensions import Call
from bitnet_jax._layers.forward import Fields, LayerConfig, run_layer
from bitnet_jax._quantize.strength import Strength
from bitnet_jax._transform.jaxprs import Eqn, dtype_of
from bitnet_jax._transform.layout import Value
from bitnet_jax._transform.view import View


class Chosen(NamedTuple):
    """A leaf that is quantised.

    Attributes:
      where: its names joined by ``/``.
      config: how it is quantised.
      box: the box that it came in, which may say how it lies on a mesh.
    """

    where: str
    config: LayerConfig
    box: PyTree = None


class Site(NamedTuple):
    """Where a kernel meets its input.

    Attributes:
      eqn: the equation.
      chosen: the kernel.
      strength: that its own layer states; None: the one around the call.
    """

    eqn: Eqn
    chosen: Chosen
    strength: Strength | None = None

    def meet(self, call: Call, x: jax.Array, value: Value) -> jax.Array:
        """The product of the layers of this package, from a float kernel or a packed one."""
        box = self.chosen.box
        fields = Fields(dtype_of(self.eqn.outvars[0]), self.eqn.params["precision"], box)
        where, config = self.chosen.where, self.chosen.config
        return run_layer(
            "ternarize", where, config, call, x, value, None, strength=self.strength, fields=fields
        )


@runtime_checkable
class Plan(Protocol):
    """How an equation meets its kernel.

    Attributes:
      contracting: the leaf's axes that meet the input.
      batch: the leaf's axes that carry slices in this equation.
    """

    @property
    def contracting(self) -> tuple[int, ...]: ...

    @property
    def batch(self) -> tuple[int, ...]: ...

    def run(self, site: Site, x: jax.Array, value: Value) -> jax.Array:
        """The result of the equation, from a quantised kernel."""
        ...


def not_whole(view: View, contracting: Sequence[int], batch: Sequence[int]) -> str | None:
    """Why the scale of a kernel would not be that of the leaf; None: it is."""
    cut = sorted(view.cut - {*batch, *view.taken})
    if cut:
        return f"only a part of its axis {cut[0]} is taken"
    if not contracting:
        return "no axis of it is contracted"
    if len(view.kept) == len(contracting) + len(batch):
        return "it is a vector: no axis of it is an output"
    return None
