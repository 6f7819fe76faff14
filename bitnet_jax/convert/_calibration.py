"""The report of a calibration: what became of each kernel, by which method, at what loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bitnet_jax import _display
from bitnet_jax._quantize.config import KernelConfig
from bitnet_jax._tree.pack_report import kind


@dataclasses.dataclass(frozen=True)
class CalibratedKernel:
    """What became of one kernel.

    Attributes:
      path: names joined by ``/``.
      method: the name of its method, ``"custom"`` of one of the caller's; ``"int8"``: its own
        quantiser, without a method.
      shape: of the float kernel.
      config: the quantiser.
      tokens: how many inputs that are not all 0 it met in all batches; of a stack of slices, the
        one that met the fewest. None: its method needs none, and they were not counted.
      error: the loss of what the products give, ``sum((x @ (w - w_hat))**2)``, over
        ``sum((x @ w)**2)``, from what the method knows of x: all second moments, their
        diagonal, or nothing (x of the identity). The mean over slices.
      absmean_error: the same of ``bj.quantize``'s codes and scale; of an int8 kernel, ``error``.
      notes: what was handled.
    """

    path: str
    method: str
    shape: tuple[int, ...]
    config: KernelConfig
    tokens: int | None
    error: float
    absmean_error: float
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What became of the kernels of a network; see :func:`calibrate`. ``print`` it.

    Attributes:
      rows: one :class:`CalibratedKernel` for each packed kernel.
      unreached: the paths of float arrays of two axes and more that the first batch does not
        reach, and that were left as they were.
    """

    rows: tuple[CalibratedKernel, ...]
    unreached: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, ready for ``json.dumps``; NaN and Inf are None."""

        def row(one: CalibratedKernel) -> dict[str, Any]:
            lists = {"shape": list(one.shape), "notes": list(one.notes)}
            named = {"config": repr(one.config), "kind": kind(one.config)}
            return _display.plain(dataclasses.asdict(one) | lists | named)

        return {"rows": list(map(row, self.rows)), "unreached": list(self.unreached)}

    def __str__(self) -> str:
        """A table, one row a kernel, then what was not reached."""
        header = ("path", "method", "shape", "tokens", "error", "absmean", "notes")
        text = _display.table(header, [_cells(row) for row in self.rows])
        if self.unreached:
            text += f"\nleft in float, the first batch does not reach: {', '.join(self.unreached)}"
        return text


def _cells(row: CalibratedKernel) -> tuple[str, ...]:
    ternary = row.method != "int8"
    return (
        row.path,
        row.method,
        "x".join(map(str, row.shape)),
        "" if row.tokens is None else str(row.tokens),
        _error_text(row.error),
        _error_text(row.absmean_error) if ternary else "",
        "; ".join(row.notes),
    )


def _error_text(error: float) -> str:
    return "nan" if math.isnan(error) else f"{error:.3g}"
