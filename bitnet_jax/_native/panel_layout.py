"""Sizes of the layout of a prepared kernel, as ``layout.h`` draws it."""

from __future__ import annotations

import math
from typing import NamedTuple

# Outputs of a panel, bytes and rows, panels side by side.
OUTPUTS, ROW, BLOCK, BESIDE = 16, 64, 16, 4


class Layout(NamedTuple):
    """What the panels of one kernel hold.

    Attributes:
      outputs: of the kernel.
      depth: the contraction of a group.
      groups: each is laid out on its own.
      int8: eight bits a weight, not two.
    """

    outputs: int
    depth: int
    groups: int
    int8: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a group: panels, byte rows, bytes of a row."""
        rows = -(-self.depth // (4 if self.int8 else 16))
        return -(-self.outputs // OUTPUTS), rows, ROW

    @property
    def nbytes(self) -> int:
        """Of the kernel, padding included."""
        return self.groups * math.prod(self.shape)
