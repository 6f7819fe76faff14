"""The report of a smoothing: by what each kernel's inputs were divided, or why they were not."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from bitnet_jax import _display


@dataclasses.dataclass(frozen=True)
class SmoothedKernel:
    """What became of one kernel.

    Attributes:
      path: names joined by ``/``.
      shape: of the kernel.
      norm: the paths of the vectors that were divided: a scale, and a bias if there is one. Empty:
        the kernel was left as it was.
      factors: (K,) float64, what they were divided by and the kernel's rows multiplied with, or
        (L, K) of stacked layers; None where it was left.
      spread: how many times the median channel the largest one of the inputs was, by their largest
        absolute values; channels that were always 0 are left out. Of stacked layers, the largest.
        None where it was left.
      smoothed: the same of the inputs now.
      why: why it was left; empty where it was not.
    """

    path: str
    shape: tuple[int, ...]
    norm: tuple[str, ...] = ()
    factors: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    spread: float | None = None
    smoothed: float | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """What became of the kernels of a network; see :func:`smooth`. ``print`` it.

    Attributes:
      rows: one :class:`SmoothedKernel` for each kernel that ``ternary`` quantises.
      alpha: how much of the inputs' ranges the kernels took up.
    """

    rows: tuple[SmoothedKernel, ...]
    alpha: float

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, ready for ``json.dumps``."""

        def row(one: SmoothedKernel) -> dict[str, Any]:
            factors = None if one.factors is None else one.factors.tolist()
            lists = {"shape": list(one.shape), "norm": list(one.norm), "factors": factors}
            return dataclasses.asdict(one) | lists

        return {"rows": list(map(row, self.rows)), "alpha": self.alpha}

    def __str__(self) -> str:
        """A table, one row a kernel."""
        header = ("path", "shape", "norm", "spread", "smoothed", "why not")
        rows = [
            (
                row.path,
                "x".join(map(str, row.shape)),
                ", ".join(row.norm),
                "" if row.spread is None else f"{row.spread:.3g}",
                "" if row.smoothed is None else f"{row.smoothed:.3g}",
                row.why,
            )
            for row in self.rows
        ]
        return _display.table(header, rows)
