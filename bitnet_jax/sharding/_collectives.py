"""The collective operations of a compiled program and their bytes, read from its HLO.

``jax.jit(f).lower(...).compile()`` contains the collectives that XLA's partitioner put
in. This counts them; nothing is run.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax

from bitnet_jax import _checks, _display

_KINDS = (
    "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute"
    "|ragged-all-to-all|reduce-scatter"
)

_LINE = re.compile(rf"= (?P<result>\(*[a-z].*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")

_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*[a-z0-9]*)\[(?P<shape>[\d,]*)\]")

_BITS = re.compile(r"\d+")


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
      kind: as HLO calls it, ``"all-gather"`` for example.
      dtype: as HLO calls it, ``"s32"`` for example.
      shape: of its result on one device.
      nbytes: bytes of that result.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The collectives of a program; ``str`` is a table.

    Attributes:
      rows: in the order of the program. Where the compiler merged several arrays into one
        operation, each array has a row.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> compiled = jax.jit(lambda x: x + 1).lower(jax.numpy.ones(3)).compile()
      >>> print(bj.sharding.collectives(compiled))
      no collectives
    """

    rows: tuple[Collective, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all results, on one device."""
        return sum(row.nbytes for row in self.rows)

    def of(self, kind: str) -> Collectives:
        """The collectives of one kind, ``"all-gather"`` for example."""
        return Collectives(tuple(row for row in self.rows if row.kind == kind))

    def to_dict(self) -> dict[str, Any]:
        """``{"rows": [...], "nbytes": ...}`` as plain Python, each row a dict of its fields."""
        rows = [row._asdict() | {"shape": list(row.shape)} for row in self.rows]
        return {"rows": rows, "nbytes": self.nbytes}

    def __str__(self) -> str:
        """A table, one line for equal collectives, the most bytes first."""
        if not self.rows:
            return "no collectives"
        lines = [
            (row.kind, f"{row.dtype}[{','.join(map(str, row.shape))}]", times, times * row.nbytes)
            for row, times in collections.Counter(self.rows).items()
        ]
        lines.sort(key=lambda line: -line[-1])
        lines.append(("total", "", len(self.rows), self.nbytes))
        cells = [(kind, result, str(times), f"{size:,}") for kind, result, times, size in lines]
        return _display.table(("collective", "result", "times", "bytes"), cells)


def collectives(compiled: jax.stages.Compiled) -> Collectives:
    """The collectives of a compiled program, and the bytes of their results on one device.

    Args:
      compiled: the result of ``jax.jit(f).lower(...).compile()``.

    Returns:
      A :class:`Collectives`. A collective in the body of a loop is counted once.

    Raises:
      TypeError: ``compiled`` is not a compiled program.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
      >>> w = jax.random.normal(jax.random.key(0), (64, 16))
      >>> packed = jax.device_put(bj.pack(w), NamedSharding(mesh, P()))
      >>> compiled = jax.jit(bj.matmul).lower(jax.numpy.ones((2, 64)), packed).compile()
      >>> bj.sharding.collectives(compiled).nbytes
      0
    """
    kinds = (jax.stages.Compiled,)
    _checks.require_instance(
        "collectives", "compiled", compiled, kinds, "Use jax.jit(f).lower(x).compile()."
    )
    return Collectives(tuple(collectives_in(compiled.as_text() or "")))


def collectives_in(hlo: str) -> list[Collective]:
    """The collectives in the text of an HLO program."""
    matches = (_LINE.search(line) for line in hlo.splitlines())
    return [c for match in matches if match is not None for c in _results(match)]


def _results(match: re.Match[str]) -> list[Collective]:
    """The result arrays of one operation."""
    arrays = list(_ARRAY.finditer(match["result"]))
    if match["start"] and match["kind"] != "all-reduce":
        # An asynchronous start returns its operands, its results, and u32 context values.
        arrays = [a for a in arrays if (a["dtype"], a["shape"]) != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    results = []
    for array in arrays:
        shape = tuple(int(n) for n in array["shape"].split(",") if n)
        bits = _BITS.search(array["dtype"])
        width = int(bits[0]) if bits else 8  # "pred" has no digits and takes a byte
        size = -(-math.prod(shape) * width // 8)
        results.append(Collective(match["kind"], array["dtype"], shape, size))
    return results
