"""Kernels converted in the order of the program, each for what those before it have become.

Two runs of every batch go side by side: one of the float network, and one in which each kernel is
packed as soon as it is converted (``_transform/walk.py``). At a kernel W they bring x and y. The
float network's product is what the kernel is to give, from what it will meet: of all V

    |y V - x W|**2 + damping |V - W|**2  =  tr((V - W')^T (H + damping) (V - W')) + a constant
    W' = (H + damping)^-1 (C + damping) W,      H = sum y y^T,      C = sum y x^T

So the method converts W' in the place of W, by the statistics of y. The order is that of Frantar
et al. [1], who take W; the target is that of [2] and [3].

A kernel that the program meets more than once (a shared layer, a recurrence) cannot wait for all of
its inputs: it is converted first, from what it meets in the float network.

References:
  [1] Frantar et al., GPTQ, arXiv:2210.17323.
  [2] Li et al., GPTAQ, arXiv:2504.02692.
  [3] Zhang et al., Qronos, arXiv:2505.11695.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from bitnet_jax._packed.kernel import Stored
from bitnet_jax._quantize.kernel_axes import KernelAxes, to_canonical
from bitnet_jax._transform.interpret import raise_not_collectable
from bitnet_jax._transform.loops import WHILE
from bitnet_jax._transform.probe import paired
from bitnet_jax._transform.slopes import Losses
from bitnet_jax._transform.walk import Met, Steps
from bitnet_jax._tree.select import Path
from bitnet_jax.convert._batches import fitting
from bitnet_jax.convert._calibration import CalibratedKernel
from bitnet_jax.convert._collect import (
    collected,
    raise_no_tokens,
    require_finite,
    squared_gradients,
)
from bitnet_jax.convert._converted import FloatKernel, measured, packed_kernel
from bitnet_jax.convert._front_ends import Args, FrontEnd
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._joined import PartRow, joined_codes, joined_row
from bitnet_jax.convert._quantized import Quantized

_DAMPING = 0.01  # of the mean of H's diagonal, as gptq has it


def in_sequence(
    net: FrontEnd,
    kernels: Sequence[FloatKernel],
    batches: Sequence[Args],
    losses: Losses | None,
    progress: Callable[[float], None],
) -> tuple[dict[Path, Stored], list[CalibratedKernel]]:
    """All kernels packed, and their rows of the report."""
    slopes = squared_gradients(net, kernels, batches, losses)
    states = {k.leaf.path: _State(k, slopes.get(k.leaf.path)) for k in kernels}
    runs = [_Run(net, number, args) for number, args in enumerate(batches)]
    several = {path for run in runs for path in run.several}
    early = [k for k in kernels if k.wanted is None or k.leaf.path in several]
    found, _ = collected(net, early, batches, None, None, lambda _: None)
    for kernel in early:
        state = states[kernel.leaf.path]
        state.convert(range(state.count), found.get(kernel.leaf.path), None)
    queue = _Queue(states, several, progress)
    queue.serve(runs)
    done = {path: state.packed() for path, state in states.items()}
    return done, [state.row(losses is not None) for state in states.values()]


class _State:
    """One kernel on its way: codes and scales of the slices that are converted, and their rows."""

    def __init__(self, kernel: FloatKernel, squares: np.ndarray | None):
        self.kernel, self._squares = kernel, squares
        self._lead = len(kernel.spec.axes.batch)
        self._batch = tuple(kernel.leaf.value.shape[: self._lead])
        self.count = int(np.prod(self._batch))
        self._parts: dict[int, Quantized] = {}
        self._rows: list[PartRow] = []
        self._given: dict[tuple[tuple[int, ...], bytes], Stored] = {}

    def left(self, numbers: Iterable[int]) -> list[int]:
        """Those of some slices that are not converted yet."""
        return [n for n in map(int, numbers) if n not in self._parts]

    def convert(
        self, numbers: Iterable[int], statistics: Statistics | None, cross: np.ndarray | None
    ) -> None:
        """Converts some slices by the statistics of their inputs; ``cross``: C, see above."""
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
    w = to_canonical(np.asarray(part.leaf.value).astype(np.float32), part.spec.axes)
    found = np.array(w.reshape(len(cross), *w.shape[-2:]))
    for b, (moment, both) in enumerate(zip(statistics.moments, cross, strict=True)):
        ridge = _DAMPING * moment.diagonal().mean() * np.eye(len(moment))
        if ridge.any():
            wanted = (both + ridge) @ found[b].astype(np.float64)
            found[b] = linalg.solve(moment + ridge, wanted, assume_a="pos")
    return found


class _Run:
    """One batch on its way through the float network and through the converted one."""

    def __init__(self, net: FrontEnd, number: int, args: Args):
        with fitting(number):
            walk = net.walk(args)
        self.number, self.several = number, walk.several
        self._own, self._float = walk.steps(packed=True), walk.steps(packed=False)
        self._passed: dict[tuple[Path, bytes], Callable[[], jax.Array] | None] = {}
        self.met: Met | None = None

    def advance(self, given: Stored | None) -> None:
        """To the next meeting of the converted network, which is sent what the kernel is here."""
        with fitting(self.number):
            self.met = _next(self._own, given, begun=self.met is not None)

    def float_rows(self) -> jax.Array:
        """What the float network brings to this meeting; y where it does not come by."""
        assert self.met is not None  # it is asked at a meeting
        key = _key(self.met)
        while key not in self._passed:
            with fitting(self.number):
                other = _next(self._float, None, begun=True)
            if other is None:
                break
            if other.path not in self.several:
                self._passed[_key(other)] = other.rows
        y, rows = self.own_rows(), self._passed.pop(key, None)
        x = y if rows is None else rows()
        return y if x.shape != y.shape else x

    def own_rows(self) -> jax.Array:
        """What the converted network brings to this meeting."""
        assert self.met is not None  # it is asked at a meeting
        assert self.met.rows is not None  # it would not be waited for
        return self.met.rows()

    def close(self) -> None:
        """Lets go of what it holds."""
        self._own.close()
        self._float.close()
        self._passed, self.met = {}, None


def _next(steps: Steps, given: Stored | None, *, begun: bool) -> Met | None:
    """The next meeting; None: there is none."""
    try:
        return steps.send(given) if begun else next(steps)
    except StopIteration:
        return None


def _key(met: Met) -> tuple[Path, bytes]:
    return met.path, met.slices.tobytes()


class _Sums(NamedTuple):
    """Over the batches that met a kernel: as of ``Statistics``, and C of each slice."""

    tokens: np.ndarray
    moments: np.ndarray
    cross: np.ndarray | None


# What the converted network brings to a kernel, and the float one.
_Pair = tuple[jax.Array, jax.Array | None]


class _Queue:
    """Serves the meetings of all batches: one kernel after another is converted."""

    def __init__(
        self,
        states: dict[Path, _State],
        several: Iterable[Path],
        progress: Callable[[float], None],
    ):
        self._states, self._several, self._progress = states, several, progress
        self._total = sum(state.count for state in states.values())
        self._met = False
        self._known: tuple[dict[str, bool], list[_Pair], _Sums] | None = None

    def serve(self, runs: Sequence[_Run]) -> None:
        """Runs all batches until every kernel is converted, or none meets another."""
        for run in runs:
            self._proceed(run, None)
        while any(run.met is not None for run in runs):
            # Batches that take other branches wait for those that are behind.
            met = min((run.met for run in runs if run.met is not None), key=lambda met: met.place)
            here = [run for run in runs if run.met is not None and _key(run.met) == _key(met)]
            self._convert(here)
            done = self._total - sum(self._left())
            self._progress(done / self._total)
            if done == self._total:
                break
            for run in here:
                assert run.met is not None
                self._proceed(run, self._states[run.met.path].given(run.met.slices))
        for run in runs:
            run.close()
        waited = any(state.kernel.wanted is not None for state in self._states.values())
        if waited and not self._met and sum(self._left()):
            raise_no_tokens()

    def _left(self) -> list[int]:
        return [len(state.left(range(state.count))) for state in self._states.values()]

    def _proceed(self, run: _Run, given: Stored | None) -> None:
        """A run to the next meeting with a slice that is not converted yet."""
        run.advance(given)
        while run.met is not None and not self._waits(run.met):
            met = run.met
            state = self._states.get(met.path)
            numbers = met.slices.reshape(-1)
            known = state is not None and not state.left(numbers)
            run.advance(state.given(met.slices) if state is not None and known else None)

    def _waits(self, met: Met) -> bool:
        state = self._states.get(met.path)
        if state is None or not state.left(met.slices.flat):
            return False
        if met.rows is None:
            raise_not_collectable(state.kernel.leaf.where, WHILE)
        return True

    def _convert(self, runs: Sequence[_Run]) -> None:
        """Converts what some runs have met, by what all of them bring."""
        met = runs[0].met
        assert met is not None
        state = self._states[met.path]
        numbers = [int(n) for n in met.slices.reshape(-1)]
        sums = self._sums(runs, state.kernel, met)
        self._met |= bool(sums.tokens.any())
        left = state.left(numbers)
        places = [numbers.index(n) for n in left]
        statistics = Statistics(sums.tokens[places].astype(np.int64), sums.moments[places])
        cross = None if sums.cross is None else sums.cross[places]
        state.convert(left, statistics, cross)

    def _sums(self, runs: Sequence[_Run], kernel: FloatKernel, met: Met) -> _Sums:
        """The sums of all runs, float64; those of the kernel before where inputs are the same."""
        wanted = kernel.wanted
        assert wanted is not None
        matched = kernel.method is not None and kernel.method.needs != "nothing"
        how = {"matrix": wanted.matrix or matched, "equal": kernel.equal}
        rows = [(run.own_rows(), run.float_rows() if matched else None) for run in runs]
        if self._known is not None and self._known[0] == how and _alike(rows, self._known[1]):
            return self._known[2]
        total: list[np.ndarray] | None = None
        for run, pair in zip(runs, rows, strict=True):
            found = jax.device_get(paired(*pair, **how))
            require_finite(met.path, found.moments, run.number)
            parts = [_of_slices(part, met) for part in found if part is not None]
            if total is None:
                total = parts
            else:
                for whole, part in zip(total, parts, strict=True):
                    whole += part
        assert total is not None  # there are runs
        tokens, moments, *cross = total
        sums = _Sums(tokens, moments, cross[0] if cross else None)
        self._known = how, rows, sums
        return sums


def _alike(rows: Sequence[_Pair], others: Sequence[_Pair]) -> bool:
    """Whether kernels met the same, as those of queries, keys and values do."""
    each = [list(jax.tree.leaves(pairs)) for pairs in (rows, others)]
    if [a.shape for a in each[0]] != [a.shape for a in each[1]]:
        return False
    return all(bool(jnp.array_equal(a, b)) for a, b in zip(*each, strict=True))


def _of_slices(part: np.ndarray, met: Met) -> np.ndarray:
    """Sums (B, ...) float64 of each slice; slices that share their rows have the same."""
    shared = met.slices.ndim - len(met.alone)
    each = part.shape[shared:]
    spread = np.expand_dims(np.asarray(part, np.float64), met.alone)
    return np.broadcast_to(spread, (*met.slices.shape, *each)).reshape(-1, *each).copy()
