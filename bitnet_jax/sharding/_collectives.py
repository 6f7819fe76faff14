"""What a compiled program sends between devices, read from its HLO.

``jax.jit(f).lower(...).compile()`` has the partitioner's answer in it; this counts it.
Nothing is run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax

from bitnet_jax import _checks

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
class Traffic:
    """The collectives of a program; printed, a table.

    Attributes:
      collectives: in the order of the program; what the compiler merged into one
        operation has a row for each array.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> compiled = jax.jit(lambda x: x + 1).lower(jax.numpy.ones(3)).compile()
      >>> print(bj.sharding.traffic(compiled))
      no collectives
    """

    collectives: tuple[Collective, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all results, on one device."""
        return sum(c.nbytes for c in self.collectives)

    def of(self, kind: str) -> Traffic:
        """The collectives of one kind."""
        return Traffic(tuple(c for c in self.collectives if c.kind == kind))

    def __str__(self) -> str:
        if not self.collectives:
            return "no collectives"
        counts: dict[tuple[str, str, tuple[int, ...]], int] = {}
        for c in self.collectives:
            key = c.kind, c.dtype, c.shape
            counts[key] = counts.get(key, 0) + 1
        sizes = {(c.kind, c.dtype, c.shape): c.nbytes for c in self.collectives}
        rows = [
            (kind, f"{dtype}[{','.join(map(str, shape))}]", n, n * sizes[kind, dtype, shape])
            for (kind, dtype, shape), n in counts.items()
        ]
        rows.sort(key=lambda row: -row[3])
        lines = [f"{'collective':<20}{'result':<24}{'times':>6}{'bytes':>14}"]
        lines += [f"{kind:<20}{what:<24}{n:>6}{size:>14,}" for kind, what, n, size in rows]
        return "\n".join([*lines, f"{'total':<50}{self.nbytes:>14,}"])


def traffic(compiled: jax.stages.Compiled) -> Traffic:
    """The collectives of a compiled program, and the bytes of their results on one device.

    Args:
      compiled: of ``jax.jit(f).lower(...).compile()``.

    Returns:
      A :class:`Traffic`. A collective in a loop's body is counted once.

    Raises:
      TypeError: anything else than a compiled program.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
      >>> w = jax.random.normal(jax.random.key(0), (64, 16))
      >>> packed = jax.device_put(bj.pack(w), NamedSharding(mesh, P()))
      >>> compiled = jax.jit(bj.matmul).lower(jax.numpy.ones((2, 64)), packed).compile()
      >>> bj.sharding.traffic(compiled).nbytes
      0
    """
    kinds = (jax.stages.Compiled,)
    _checks.require_instance(
        "traffic", "compiled", compiled, kinds, "Use jax.jit(f).lower(x).compile()."
    )
    return Traffic(tuple(collectives_in(compiled.as_text() or "")))


def collectives_in(hlo: str) -> list[Collective]:
    """The collectives of a program's text."""
    matches = (_LINE.search(line) for line in hlo.splitlines())
    return [c for match in matches if match is not None for c in _results(match)]


def _results(match: re.Match[str]) -> list[Collective]:
    """The arrays of one operation: of those of an asynchronous start, the later half."""
    arrays: list[Any] = list(_ARRAY.finditer(match["result"]))
    if match["start"] and match["kind"] != "all-reduce":
        arrays = [a for a in arrays if (a["dtype"], a["shape"]) != ("u32", "")]  # its contexts
        arrays = arrays[len(arrays) // 2 :]
    results = []
    for array in arrays:
        shape = tuple(int(n) for n in array["shape"].split(",") if n)
        bits = _BITS.search(array["dtype"])
        width = int(bits[0]) if bits else 8  # pred
        size = -(-math.prod(shape) * width // 8)
        results.append(Collective(match["kind"], array["dtype"], shape, size))
    return results
