"""What a survey knows of the arrays of a program, and what it finds out about its leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from bitnet_jax._layers.forward import LayerConfig
from bitnet_jax._transform.jaxprs import Eqn, Jaxpr
from bitnet_jax._transform.view import View


class Changed(NamedTuple):
    """Something computed from a leaf.

    Attributes:
      primitive: what computed it.
      size: how many numbers it is now.
    """

    primitive: str
    size: int


class Channels(NamedTuple):
    """A vector among the parameters that an array is proportional to; see ``channels``.

    Attributes:
      vector: the leaf.
      axis: of the array, along which the vector lies.
      lost: whether it has ended: the array is computed from one that was proportional.
    """

    vector: int
    axis: int
    lost: bool = False


@dataclasses.dataclass(frozen=True)
class Mark:
    """What is known of one array of the program.

    Attributes:
      view: the leaf that it is.
      changed: the leaves that it was computed from, and may stand for.
      live: whether it depends on anything but parameters and constants.
      channels: what scales it channel by channel, in a walk that asks for it.
    """

    view: View | None = None
    changed: dict[int, Changed] = dataclasses.field(default_factory=dict)
    live: bool = True
    channels: Channels | None = None

    @property
    def leaves(self) -> set[int]:
        """The leaves that it is, or was computed from."""
        return {*self.changed} | (set() if self.view is None else {self.view.leaf})


LIVE, KNOWN = Mark(), Mark(live=False)


class Use(NamedTuple):
    """One product, or one look-up, that a leaf reaches.

    Attributes:
      leaf: which.
      primitive: its name.
      contracting: the leaf's axes.
      batch: the leaf's axes, those included off which slices were taken.
      problem: why there is no ternary form of it; None: there is.
      partner: the other operand, where that is a leaf too.
      beside: whether that other operand is spread over a batch, as an input is.
      multiplications: as often as it is run.
      stated: the config of the layer that multiplies it; None: it is one of no layer of ours.
      channels_last: whether the leaf's last contracting axis meets the features of the input;
        of a convolution it may be an axis of space.
      times: how often it is run.
      taken: the leaf's axes off which slices were taken.
    """

    leaf: int
    primitive: str
    contracting: tuple[int, ...]
    batch: tuple[int, ...]
    problem: str | None
    partner: int | None
    beside: bool
    multiplications: float
    stated: LayerConfig | None = None
    channels_last: bool = True
    times: float = 1.0
    taken: tuple[int, ...] = ()


@dataclasses.dataclass
class Found:
    """What a program does with its leaves.

    Attributes:
      uses: products and look-ups.
      changed: leaf to the primitive that changes it before it is multiplied.
      read: leaf to the other primitives that compute with it.
      custom: leaf to the primitive around its product whose own derivative is not used.
      not_rows: the tables in which no packed rows can be looked up.
      missing: leaf to a higher-order primitive that has no rule, and where it is.
      multiplications: of the whole program. A loop of unknown length counts once, and a
        conditional as the mean of its branches.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    changed: dict[int, str] = dataclasses.field(default_factory=dict)
    read: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    custom: dict[int, str] = dataclasses.field(default_factory=dict)
    not_rows: set[int] = dataclasses.field(default_factory=set)
    missing: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)
    multiplications: float = 0.0


@runtime_checkable
class Walker(Protocol):
    """What the rule of a higher-order primitive needs of a survey."""

    def walk(self, jaxpr: Jaxpr, marks: Sequence[Mark], times: float) -> list[Mark]:
        """The marks of a jaxpr's results, from those of its operands."""
        ...

    def sources(self, eqn: Eqn, mark: Mark) -> dict[int, Changed]:
        """The leaves that an operand stands for, once an equation has computed with it."""
        ...
