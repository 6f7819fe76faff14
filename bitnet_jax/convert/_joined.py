"""Slices of a kernel that were converted apart, as one again: its codes, and its row."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from bitnet_jax.convert._calibration import CalibratedKernel
from bitnet_jax.convert._options import Option, mean_error
from bitnet_jax.convert._quantized import Quantized

# The numbers of some slices, and the row of these alone.
PartRow = tuple[Sequence[int], CalibratedKernel]


def joined_codes(parts: Sequence[Quantized]) -> Quantized:
    """Codes and scales of slices, in this order; notes are the rows'."""
    codes, scale = (np.concatenate(of) for of in list(zip(*parts, strict=True))[:2])
    return Quantized(codes, scale, ())


def joined_row(
    shape: tuple[int, ...], parts: Sequence[PartRow], *, losses: bool
) -> CalibratedKernel:
    """The row of a whole kernel.

    Args:
      shape: of the kernel.
      parts: rows of all its slices.
      losses: whether ``change`` is of a loss, and adds up, or an error, and is a mean.
    """
    if len(parts) == 1:
        return parts[0][1]
    rows = [row for _, row in parts]
    counts = [len(numbers) for numbers, _ in parts]
    tokens = [row.tokens for row in rows if row.tokens is not None]

    def mean(errors: Sequence[float]) -> float:
        return mean_error(np.repeat(errors, counts))

    def change(changes: Sequence[float]) -> float:
        return float(np.sum(changes)) if losses else mean(changes)

    options = [
        Option(
            config=each[0].config,
            bytes=sum(option.bytes for option in each),
            error=mean([option.error for option in each]),
            change=change([option.change for option in each]),
        )
        for each in zip(*(row.options for row in rows), strict=True)
    ]
    ordered = sorted(parts, key=lambda part: min(part[0]))
    return CalibratedKernel(
        path=rows[0].path,
        method=rows[0].method,
        shape=shape,
        config=rows[0].config,
        tokens=min(tokens) if tokens else None,
        error=mean([row.error for row in rows]),
        absmean_error=mean([row.absmean_error for row in rows]),
        notes=tuple(_numbered(note, numbers) for numbers, row in ordered for note in row.notes),
        change=change([row.change for row in rows]),
        options=tuple(options),
    )


def _numbered(note: str, numbers: Sequence[int]) -> str:
    """A note on a slice of a part, with the slice's number in the whole kernel."""
    return re.sub(r"^slice (\d+):", lambda found: f"slice {numbers[int(found[1])]}:", note)
