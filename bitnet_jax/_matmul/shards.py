"""The native product on a mesh: each device multiplies its own shard.

XLA cannot partition a custom call: it would gather every operand first. This tells it
how, once the placement of the operands is known (``custom_partitioning``)::

    rows sharded          each device its rows; nothing travels
    outputs sharded       each device its outputs; nothing travels
    contraction sharded   one max of gamma over the devices, if x is sharded so, and
                          one sum of int32; the epilogue comes after

What does not divide by the devices, or is sharded over axes that the rows take already,
is gathered in its stored form, at two bits a weight. A prepared kernel has no axis to be
sharded along; the rows may be.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bitnet_jax._mesh import AnyMesh, Entry, Spec, names, padded

Shapes = Sequence[jax.ShapeDtypeStruct]  # of the operands, with their shardings


class Body(NamedTuple):
    """A product of x (B, M, K), codes (B, ...) and scale (B, G, 1 or N), and its shards.

    Attributes:
      whole: (x, codes, scale) -> y, where the contraction is whole; with an index of a stack
        behind them where codes are ``"sp"``.
      summed: (x, codes, scale, mesh axes) -> y, where codes are cut over these axes, and
        x is or is not; None: the contraction cannot be cut, ``step`` is 0.
      codes: what the axes of codes after B are: ``"kn"``, ``"qkn"`` with planes, which
        the scale has too, ``"nk"`` for a table, or ``"p"`` for a prepared kernel, and
        ``"sp"``, without B, for a stack of them.
      static: what decides what ``whole`` and ``summed`` compute, told in full by its ``repr``.
      step: the contraction may be cut at multiples of so many bytes; 0: nowhere.
      whole_x: whether each token is whole on every device, to be rotated there.
    """

    whole: Callable[..., jax.Array]
    summed: Callable[..., jax.Array] | None
    codes: str
    static: object
    step: int = 0
    whole_x: bool = False


def partitioned(body: Body) -> Callable[..., jax.Array]:
    """``body.whole`` for operands that may be sharded."""

    @custom_partitioning
    def product(*operands: jax.Array) -> jax.Array:
        return body.whole(*operands)

    def plan(mesh: Mesh, arguments: Shapes) -> tuple[_Cuts, list[NamedSharding], NamedSharding]:
        cuts = _cuts(body, mesh, arguments)
        # Whether x's contraction is sharded as well.
        x_sharded = bool(names(_spec(arguments[0])[2])) and not body.whole_x
        specs, out = _specs(body, cuts, x_sharded, arguments[2].shape[-1] > 1)
        return cuts, [NamedSharding(mesh, s) for s in specs], NamedSharding(mesh, out)

    def partition(
        mesh: Mesh, arguments: Shapes, result: jax.ShapeDtypeStruct
    ) -> tuple[Mesh, Callable[..., jax.Array], NamedSharding, tuple[NamedSharding, ...]]:
        del result
        cuts, places, out = plan(mesh, arguments)

        def shard(*operands: jax.Array) -> jax.Array:
            # Not the caller's mesh: on Explicit axes every operation would be annotated,
            # and nothing reads annotations any more.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                if body.summed is None or not cuts.contraction:
                    return body.whole(*operands)
                return body.summed(*operands, cuts.contraction)

        return mesh, shard, out, tuple(places)

    def infer(mesh: Mesh, arguments: Shapes, result: jax.ShapeDtypeStruct) -> NamedSharding:
        del result
        return plan(mesh, arguments)[2]

    stacked = body.codes == "sp"
    scale = "b q g s" if "q" in body.codes else "b g s"
    codes = "c p" if stacked else " ".join(("b", *body.codes.replace("k", "r")))
    product.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"b m k, {codes}, {scale}{', ' if stacked else ''} -> b m n",
    )
    return _named(product, body)


def _named(product: Callable[..., jax.Array], body: Body) -> Callable[..., jax.Array]:
    """The product in a function whose name tells it from those of other bodies.

    A program's text, by which XLA's persistent cache knows it, holds of a custom partitioning no
    more than the address of an object. Another object may lie there later: two products of equal
    shapes would be one program, and the second would run as the first.
    """

    def call(*operands: jax.Array) -> jax.Array:
        return product(*operands)

    told = repr((body.codes, body.step, body.whole_x, body.static)).encode()
    call.__name__ = call.__qualname__ = f"product_{hashlib.sha256(told).hexdigest()[:16]}"
    return jax.jit(call)


class _Cuts(NamedTuple):
    """The mesh axes that each axis of the product is cut over."""

    batch: tuple[str, ...]
    rows: tuple[str, ...]
    outputs: tuple[str, ...]
    contraction: tuple[str, ...]


def _cuts(body: Body, mesh: AnyMesh, arguments: Shapes) -> _Cuts:
    x, codes = (_spec(argument) for argument in arguments[:2])
    x_shape, codes_shape = (argument.shape for argument in arguments[:2])
    taken: set[str] = set()

    def take(entry: Entry, length: int) -> tuple[str, ...]:
        axes = tuple(a for a in names(entry) if a not in taken)
        if not axes or length % math.prod(mesh.shape[a] for a in axes):
            return ()
        taken.update(axes)
        return axes

    # Who comes first keeps a mesh axis: rows, then outputs, then the contraction.
    batch, rows = take(x[0], x_shape[0]), take(x[1], x_shape[1])
    if "p" in body.codes:
        return _Cuts(batch, rows, (), ())
    n, k = (1 + body.codes.index(axis) for axis in "nk")
    outputs = take(codes[n], codes_shape[n])
    if not body.step:
        return _Cuts(batch, rows, outputs, ())
    # Whole steps only: a shard must begin where a byte, or a tile, begins.
    steps = codes_shape[k] // body.step if codes_shape[k] % body.step == 0 else 1
    return _Cuts(batch, rows, outputs, take(codes[k], steps) or take(x[2], steps))


def _spec(argument: jax.ShapeDtypeStruct) -> Spec:
    """An operand's sharding; whole where XLA gives none (a shard_map over some axes only)."""
    return padded(getattr(argument.sharding, "spec", ()), len(argument.shape))


def _specs(
    body: Body, cuts: _Cuts, x_sharded: bool, channels: bool
) -> tuple[list[PartitionSpec], PartitionSpec]:
    """The shardings of the operands and of the result; an x that is whole stays so."""
    batch, rows, outputs, contraction = (axes or None for axes in cuts)
    of = {"k": contraction, "n": outputs, "p": None, "q": None, "s": None}
    x = PartitionSpec(batch, rows, contraction if x_sharded else None)
    stacked = body.codes == "sp"
    codes = PartitionSpec(*() if stacked else (batch,), *(of[axis] for axis in body.codes))
    planes = (None,) * ("q" in body.codes)
    scale = PartitionSpec(batch, *planes, None, outputs if channels else None)
    index = [PartitionSpec()] if stacked else []
    return [x, codes, scale, *index], PartitionSpec(batch, rows, outputs)
