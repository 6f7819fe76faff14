"""The table of a program's leaves: which are quantised, over which axes, and why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bitnet_jax._display import table
from bitnet_jax._quantize.config import KernelConfig
from bitnet_jax._transform.decide import Candidate, Decision
from bitnet_jax._transform.marks import Found
from bitnet_jax._transform.norms import Norms
from bitnet_jax._tree.pack_report import kind


@dataclasses.dataclass(frozen=True)
class Reached:
    """One leaf of two and more axes.

    Attributes:
      path: names joined by ``/``.
      primitive: what multiplies it, or looks it up; ``-``: nothing does.
      shape: of the leaf.
      dtype: of the leaf.
      contracting_axes: of the leaf.
      batch_axes: of the leaf; each slice has a scale of its own.
      share: of the program's multiplications, 0 to 1.
      config: how it is quantised; None: it stays float.
      why: what decided it.
    """

    path: str
    primitive: str
    shape: tuple[int, ...]
    dtype: str
    contracting_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]
    share: float
    config: KernelConfig | None
    why: str


@dataclasses.dataclass(frozen=True)
class ProgramCoverage:
    """What of a program is quantised; ``print`` it or read its rows.

    Attributes:
      rows: one :class:`Reached` for each float leaf of two and more axes.
      flops: of all products of the program, two for each multiplication. A loop of unknown
        length counts once, a conditional as the mean of its branches.
      norms: whose scales :func:`bitnet_jax.convert.smooth` may divide, and why it may not.
    """

    rows: tuple[Reached, ...]
    flops: float
    norms: Norms

    @property
    def ternary(self) -> tuple[str, ...]:
        """The paths that are quantised."""
        return tuple(row.path for row in self.rows if row.config is not None)

    @property
    def left(self) -> tuple[str, ...]:
        """The paths that stay float."""
        return tuple(row.path for row in self.rows if row.config is None)

    @property
    def share(self) -> dict[str, float]:
        """Kind of kernel to its share of the multiplications, 0 to 1."""
        shares: dict[str, float] = {}
        for row in self.rows:
            if row.config is not None:
                shares[kind(row.config)] = shares.get(kind(row.config), 0.0) + row.share
        return shares

    def to_dict(self) -> dict[str, Any]:
        """Path to what the table says of it, as plain Python, and the totals."""
        rows = {}
        for row in self.rows:
            config = None if row.config is None else repr(row.config)
            rows[row.path] = dataclasses.asdict(row) | {"config": config, "kind": kind(row.config)}
            del rows[row.path]["path"]
            for name in ("shape", "contracting_axes", "batch_axes"):
                rows[row.path][name] = list(rows[row.path][name])
        return {"rows": rows, "flops": self.flops, "share": self.share}

    def __str__(self) -> str:
        """A table, one row a leaf, then the total."""
        header = ("path", "product", "shape", "dtype", "over", "share", "kernel", "why")
        rows = [
            (
                row.path,
                row.primitive,
                "x".join(map(str, row.shape)),
                row.dtype,
                _axes_text(row),
                f"{100 * row.share:.1f}%",
                kind(row.config),
                row.why,
            )
            for row in self.rows
        ]
        shares = self.share or {"ternary": 0.0}
        total = ", ".join(f"{100 * share:.0f} % {name}" for name, share in shares.items())
        return f"{table(header, rows)}\n{total} of {_flops_text(self.flops)}"


def _axes_text(row: Reached) -> str:
    batch = f" each {','.join(map(str, row.batch_axes))}" if row.batch_axes else ""
    return (",".join(map(str, row.contracting_axes)) or "-") + batch


def _flops_text(flops: float) -> str:
    units = ["TFLOP", "GFLOP", "MFLOP", "kFLOP", "FLOP"]
    while flops >= 1000 and len(units) > 1:
        flops, _ = flops / 1000, units.pop()
    return f"{flops:.3g} {units[-1]}"


def coverage(
    candidates: Sequence[Candidate | None],
    decisions: Sequence[Decision | None],
    found: Found,
    norms: Norms,
) -> ProgramCoverage:
    """The table of what a survey found and was decided."""
    rows = []
    whole = found.multiplications or 1.0
    for i, (one, decision) in enumerate(zip(candidates, decisions, strict=True)):
        if one is None or decision is None:
            continue
        uses = [use for use in found.uses if use.leaf == i]
        last = uses[0] if uses else None
        rows.append(
            Reached(
                path=one.where,
                primitive=" ".join(dict.fromkeys(use.primitive for use in uses)) or "-",
                shape=tuple(one.leaf.shape),
                dtype=str(one.leaf.dtype),
                contracting_axes=last.contracting if last else (),
                batch_axes=last.batch if last else (),
                share=sum(use.multiplications for use in uses) / whole,
                config=decision.config,
                why=decision.why if decision.refusal is None else str(decision.refusal),
            )
        )
    rows.sort(key=lambda row: row.primitive == "-")  # what reaches no product comes last
    return ProgramCoverage(tuple(rows), 2 * found.multiplications, norms)
