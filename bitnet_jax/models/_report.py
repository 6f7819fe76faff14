"""What loading a checkpoint decided, kernel by kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

from bitnet_jax._display import size_text, table


@dataclasses.dataclass(frozen=True)
class LoadedKernel:
    """One kernel of a loaded model.

    Attributes:
      path: of the module that holds it, names joined by ``/``.
      source: the tensor's name in the checkpoint.
      shape: (in, out), or (vocabulary, features).
      kind: how it is held: ``"ternary"``, ``"int8"`` or ``"float"``.
      nbytes: of codes and scale, or of the floats.
      why: what decided it, and what is odd about it.
    """

    path: str
    source: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    why: str


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a checkpoint became; ``print`` it or read its rows.

    Attributes:
      rows: one :class:`LoadedKernel` for each kernel, embedding and head.
    """

    rows: tuple[LoadedKernel, ...]

    def to_dict(self) -> dict[str, Any]:
        """Every row as plain Python, ready for ``json.dumps``."""
        return {"rows": [dataclasses.asdict(row) | {"shape": [*row.shape]} for row in self.rows]}

    def __str__(self) -> str:
        header = ("path", "shape", "kernel", "bytes", "why")
        rows = [
            (r.path, "x".join(map(str, r.shape)), r.kind, size_text(r.nbytes), r.why)
            for r in self.rows
        ]
        return table(header, rows)
