"""The report of a calibration: what became of each kernel, by which method, at what loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from bitnet_jax import _display
from bitnet_jax._quantize.config import KernelConfig
from bitnet_jax._tree.pack_report import kind
from bitnet_jax.convert._options import Option


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
      change: what this kernel alone is predicted to add to the mean of ``loss``, to second order
        in its error; without a ``loss``, ``error``. For the order of kernels more than for
        their size: where a network is sure of all its answers, gradients hide what large
        errors do.
      options: what else it could have been, its own config first and float last; empty without
        ``candidates``.
    """

    path: str
    method: str
    shape: tuple[int, ...]
    config: KernelConfig
    tokens: int | None
    error: float
    absmean_error: float
    notes: tuple[str, ...]
    change: float = math.nan
    options: tuple[Option, ...] = ()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What became of the kernels of a network; see :func:`calibrate`. ``print`` it.

    Attributes:
      rows: one :class:`CalibratedKernel` for each packed kernel.
      unreached: the paths of float arrays of two axes and more that the first batch does not
        reach, and that were left as they were.
      predicts: what ``change`` is: ``"loss"``, or the relative ``"error"`` where no ``loss`` was
        given, which says little of how much a kernel matters.
    """

    rows: tuple[CalibratedKernel, ...]
    unreached: tuple[str, ...] = ()
    predicts: Literal["loss", "error"] = "error"

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, ready for ``json.dumps``; NaN and Inf are None."""

        def row(one: CalibratedKernel) -> dict[str, Any]:
            options = [_display.plain(option.to_dict()) for option in one.options]
            lists = {"shape": list(one.shape), "notes": list(one.notes), "options": options}
            named = {"config": repr(one.config), "kind": kind(one.config)}
            return _display.plain(dataclasses.asdict(one) | lists | named)

        rows, unreached = list(map(row, self.rows)), list(self.unreached)
        return {"rows": rows, "unreached": unreached, "predicts": self.predicts}

    def __str__(self) -> str:
        """A table, one row a kernel, then what was not reached."""
        losses = self.predicts == "loss"
        header = ("path", "method", "shape", "tokens", "error", "absmean")
        header = (*header, "change", "notes") if losses else (*header, "notes")
        text = _display.table(header, [_cells(row, losses) for row in self.rows])
        if self.unreached:
            text += f"\nleft in float, the first batch does not reach: {', '.join(self.unreached)}"
        return text


def _cells(row: CalibratedKernel, losses: bool) -> tuple[str, ...]:
    ternary = row.method != "int8"
    return (
        row.path,
        row.method,
        "x".join(map(str, row.shape)),
        "" if row.tokens is None else str(row.tokens),
        _error_text(row.error),
        _error_text(row.absmean_error) if ternary else "",
        *([_error_text(row.change)] if losses else []),
        "; ".join(row.notes),
    )


def _error_text(error: float) -> str:
    return "nan" if math.isnan(error) else f"{error:.3g}"
