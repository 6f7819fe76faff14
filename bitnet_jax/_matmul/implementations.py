"""The table of implementations. One is one module and one row.

``unsupported_reason`` says why a row cannot run a kernel. ``implementation=None`` takes
the first row that can; a name runs that row, or raises ``NotImplementedError`` with its
reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import jax

from bitnet_jax._matmul import cpu, panels, reference, xla
from bitnet_jax._packed.kernel import Packed
from bitnet_jax._packed.prepared import Prepared, PreparedInt8
from bitnet_jax._quantize.config import ActivationConfig

Name = Literal["cpu", "xla", "reference"]


class Implementation(NamedTuple):
    """One way to compute the product.

    Attributes:
      contract: (x, packed, activations, dtype) -> the product, from float to float.
      unsupported_reason: (packed, activations or None) -> the reason why not, or None.
      prepare: stored -> the layout it runs best from; None: the stored one.
      layout: prepared -> the shape that its codes have.
      codes_of: prepared -> canonical int8 codes, for the gradient.
      rows_of: (prepared, index) -> int8 codes of rows of an embedding.
      preferred: (packed, preparing) -> whether ``implementation=None`` may select it.
      anywhere: ``contract`` for programs that may be lowered for any platform; None: the same.
    """

    contract: Callable[..., jax.Array]
    unsupported_reason: Callable[..., str | None]
    prepare: Callable[..., Prepared] | None = None
    layout: Callable[[Prepared], tuple[int, ...]] | None = None
    codes_of: Callable[[Prepared], jax.Array] | None = None
    rows_of: Callable[[PreparedInt8, jax.Array], jax.Array] | None = None
    preferred: Callable[[Packed, bool], bool] = lambda *_: True
    anywhere: Callable[..., jax.Array] | None = None


IMPLEMENTATIONS: dict[Name, Implementation] = {
    "cpu": Implementation(
        cpu.contract,
        cpu.unsupported_reason,
        cpu.prepare,
        cpu.layout,
        cpu.codes_of,
        panels.rows_of,
        cpu.preferred,
        functools.partial(cpu.contract, anywhere=True),
    ),
    "xla": Implementation(
        xla.contract,
        xla.unsupported_reason,
        xla.prepare,
        xla.layout,
        xla.codes_of,
        preferred=xla.preferred,
    ),
    "reference": Implementation(reference.contract, reference.unsupported_reason),
}


def choose(
    packed: Packed,
    implementation: Name | None = None,
    *,
    activations: ActivationConfig | None = None,
    preparing: bool = False,
) -> Name:
    """A prepared kernel's own implementation, or the one asked for, or the first that can."""
    if isinstance(packed, Prepared):
        return cast(Name, packed.implementation)
    if implementation is not None:
        return implementation
    rows = IMPLEMENTATIONS.items()
    return next(
        name
        for name, row in rows
        if row.unsupported_reason(packed, activations) is None and row.preferred(packed, preparing)
    )
