"""One kernel on its way from float to packed, its slices converted one after another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import linalg

from bitnet_jax._packed.kernel import Stored
from bitnet_jax._quantize.kernel_axes import KernelAxes, to_canonical
from bitnet_jax.convert._calibration import CalibratedKernel
from bitnet_jax.convert._converted import FloatKernel, measured, packed_kernel
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._joined import PartRow, joined_codes, joined_row
from bitnet_jax.convert._quantized import Quantized

_DAMPING = 1.0  # of the mean of H's diagonal: with less, the target fits the calibration text alone


class ConversionState:
    """One kernel on its way: codes and scales of the slices that are converted, and their rows."""

    def __init__(self, kernel: FloatKernel, squares: np.ndarray | None):
        self.kernel, self._squares = kernel, squares
        self._lead = len(kernel.spec.axes.batch)
        self._batch = tuple(kernel.leaf.value.shape[: self._lead])
        self.count = int(np.prod(self._batch))
        self._parts: dict[int, Quantized] = {}
        self._rows: list[PartRow] = []
        self._given: dict[tuple[tuple[int, ...], bytes], Stored] = {}

    def left(self, numbers: Iterable[int | np.integer]) -> list[int]:
        """Those of some slices that are not converted yet."""
        return [n for n in map(int, numbers) if n not in self._parts]

    def convert(
        self,
        numbers: Iterable[int],
        statistics: Statistics | None,
        cross: np.ndarray | None,
    ) -> None:
        """Converts some slices by the sums of their inputs; ``cross``: C of ``_sequential``."""
        numbers = list(numbers)
        shape = self._batch if len(numbers) == self.count else (len(numbers),)
        part = self._part(np.array(numbers).reshape(shape))
        if cross is not None and statistics is not None:
            part = part._replace(target=_target(part, statistics, cross))
        squares = None if self._squares is None else self._squares[numbers]
        made, row = measured(part, statistics, squares)
        self._rows.append((numbers, row))
        for at, number in enumerate(numbers):
            one = slice(at, at + 1)
            self._parts[number] = Quantized(made.codes[one], made.scale[one], ())

    def given(self, slices: np.ndarray) -> Stored:
        """Some slices as a packed kernel, in the shape of their numbers."""
        key = slices.shape, slices.tobytes()
        if key not in self._given:
            self._given = {key: packed_kernel(self._part(slices), self._made(slices))}
        return self._given[key]

    def packed(self) -> Stored:
        """The kernel packed; slices that nothing met are converted without statistics."""
        left = self.left(range(self.count))
        if left:
            wanted = self.kernel.wanted
            assert wanted is not None  # or it was converted first
            empty = wanted.probe().moments.shape[self._lead :]
            zeros = np.zeros(len(left), np.int64), np.zeros((len(left), *empty))
            self.convert(left, Statistics(*zeros), None)
        return packed_kernel(self.kernel, self._made(np.arange(self.count)))

    def row(self, losses: bool) -> CalibratedKernel:
        """Its row of the report."""
        return joined_row(tuple(self.kernel.leaf.value.shape), self._rows, losses=losses)

    def _made(self, slices: np.ndarray) -> Quantized:
        return joined_codes([self._parts[n] for n in slices.reshape(-1).tolist()])

    def _part(self, slices: np.ndarray) -> FloatKernel:
        """Some slices as a kernel of their own."""
        if slices.shape == self._batch and (slices.reshape(-1) == np.arange(self.count)).all():
            return self.kernel
        kernel, w = self.kernel, jnp.asarray(self.kernel.leaf.value)
        axes, more = kernel.spec.axes, slices.ndim - self._lead
        moved = (tuple(a + more for a in part) for part in (axes.contracting, axes.outputs))
        contracting, outputs = moved
        axes = KernelAxes(contracting, tuple(range(slices.ndim)), outputs)
        leaf = kernel.leaf._replace(value=w.reshape(-1, *w.shape[self._lead :])[slices])
        return kernel._replace(leaf=leaf, spec=kernel.spec._replace(axes=axes))


def _target(part: FloatKernel, statistics: Statistics, cross: np.ndarray) -> np.ndarray:
    """W' (B, K, N) float32 of slices that have seen something, and W of the others."""
    assert statistics.moments is not None  # there are cross sums of the same inputs
    w: Any = np.asarray(part.leaf.value).astype(np.float32)
    w = to_canonical(w, part.spec.axes)
    found = np.array(w.reshape(len(cross), *w.shape[-2:]))
    for b, (moment, both) in enumerate(zip(statistics.moments, cross, strict=True)):
        ridge = _DAMPING * moment.diagonal().mean() * np.eye(len(moment))
        if ridge.any():
            wanted = (both + ridge) @ found[b].astype(np.float64)
            found[b] = linalg.solve(moment + ridge, wanted, assume_a="pos")
    return found
