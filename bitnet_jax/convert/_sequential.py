"""Kernels converted in the order of the program, each for what those before it have become.

Two runs of every batch go side by side: one of the float network, and one in which each kernel is
packed as soon as it is converted (``_transform/walk.py``). At a kernel W they bring x and y. The
float network's product is what the kernel is to give, from what it will meet: of all V

    |y V - x W|**2 + damping |V - W|**2  =  tr((V - W')^T (H + damping) (V - W')) + a constant
    W' = (H + damping)^-1 (C + damping) W,      H = sum y y^T,      C = sum y x^T

So the method converts W' in the place of W, by the statistics of y. The order is that of Frantar
et al. [1], who take W; the target is that of [2] and [3].

The damping, the mean of H's diagonal, is that of a ridge regression: with less, the target follows
what the calibration inputs have in common, and other inputs lose by it. In the first four layers of
SmolLM2-135M, two planes by ``"planes"``, 4,096 calibration tokens that count the same, the squared
error of what comes out, over its square, on text of the same kind and of another one:

    without this  2.9 %  2.9 %
    damping .01   2.0 %  3.9 %      .1   1.6 %  2.7 %      1   1.6 %  2.4 %

A kernel that the program meets more than once (a shared layer, a recurrence) cannot wait for all of
its inputs: it is converted first, from what it meets in the float network.

References:
  [1] Frantar et al., GPTQ, arXiv:2210.17323.
  [2] Li et al., GPTAQ, arXiv:2504.02692.
  [3] Zhang et al., Qronos, arXiv:2505.11695.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax._packed.kernel import Stored
from bitnet_jax._transform.interpret import raise_not_collectable
from bitnet_jax._transform.loops import WHILE
from bitnet_jax._transform.probe import paired
from bitnet_jax._transform.slopes import Losses
from bitnet_jax._transform.walk import Met, Steps
from bitnet_jax._tree.select import Path
from bitnet_jax.convert._batches import fitting
from bitnet_jax.convert._calibration import CalibratedKernel
from bitnet_jax.convert._chosen_methods import WHO
from bitnet_jax.convert._collect import (
    collected,
    raise_no_tokens,
    require_finite,
    squared_gradients,
)
from bitnet_jax.convert._conversion_state import ConversionState
from bitnet_jax.convert._converted import FloatKernel
from bitnet_jax.convert._front_ends import Args, FrontEnd
from bitnet_jax.convert._input_statistics import Statistics


def in_sequence(
    net: FrontEnd,
    kernels: Sequence[FloatKernel],
    batches: Sequence[Args],
    losses: Losses | None,
    progress: Callable[[float], None],
) -> tuple[dict[Path, Stored], list[CalibratedKernel]]:
    """All kernels packed, and their rows of the report."""
    slopes = squared_gradients(net, kernels, batches, losses)
    # Once: each run would have a copy of its own.
    net.params = jax.tree.map(_array, net.params)
    states = {k.leaf.path: ConversionState(k, slopes.get(k.leaf.path)) for k in kernels}
    runs = [_Run(net, number, args) for number, args in enumerate(batches)]
    several = {path for run in runs for path in run.several}
    early = [k for k in kernels if k.wanted is None or k.leaf.path in several]
    found, _ = collected(net, early, batches, None, None, lambda _: None)
    for kernel in early:
        state = states[kernel.leaf.path]
        state.convert(range(state.count), found.get(kernel.leaf.path), None)
    waiting = states.keys() - {kernel.leaf.path for kernel in early}
    queue = _Queue(states, waiting, progress)
    queue.serve(runs)
    if waiting and not found and not queue.met:
        raise_no_tokens(WHO)
    done = {path: state.packed() for path, state in states.items()}
    return done, [state.row(losses is not None) for state in states.values()]


def _array(value: Any) -> Any:
    """A NumPy array as one of JAX; anything else as it is."""
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


class _Run:
    """One batch on its way through the float network and through the converted one."""

    def __init__(self, net: FrontEnd, number: int, args: Args):
        with fitting(WHO, number):
            walk = net.walk(args)
        self.number, self.several = number, walk.several
        self._ahead = {
            start.path: {*range(math.prod(start.batch))} for start in walk.starts.values()
        }
        self._own, self._float = walk.steps(packed=True), walk.steps(packed=False)
        self._passed: dict[tuple[Path, bytes], Callable[[], jax.Array] | None] = {}
        self.met: Met | None = None

    def advance(self, given: Stored | None) -> None:
        """To the next meeting of the converted network, which is sent what the kernel is here."""
        if self.met is not None:
            self._ahead[self.met.path] -= {*self.met.slices.flat}
        with fitting(WHO, self.number):
            self.met = _next(self._own, given, begun=self.met is not None)

    def is_behind(self, met: Met) -> bool:
        """Whether it is on its way to what another run has met."""
        if self.met is None or _key(self.met) == _key(met):
            return False
        return not self._ahead.get(met.path, set()).isdisjoint(met.slices.flat)

    def float_rows(self, waiting: Collection[Path]) -> jax.Array:
        """What the float network brings to this meeting; y where it does not come by.

        ``waiting``: the kernels whose inputs will be asked for.
        """
        assert self.met is not None  # it is asked at a meeting
        key = _key(self.met)
        while key not in self._passed:
            with fitting(WHO, self.number):
                other = _next(self._float, None, begun=True)
            if other is None:
                break
            if other.path in waiting:
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


def _turn(runs: Sequence[_Run]) -> Met:
    """The meeting that comes next: the first one for which no other batch is still to come.

    Programs of batches may differ, and so the places of a kernel in them. Where batches take other
    branches of one, or meet kernels in another order, it is the first of all.
    """
    every = sorted((run.met for run in runs if run.met is not None), key=lambda met: met.place)
    ready = (m for m in every if not any(run.is_behind(m) for run in runs))
    return next(ready, every[0])


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
        states: dict[Path, ConversionState],
        waiting: Collection[Path],
        progress: Callable[[float], None],
    ):
        self._states, self._waiting, self._progress = states, waiting, progress
        self._total = sum(state.count for state in states.values())
        self.met = False  # any input that is not 0
        self._known: tuple[dict[str, bool], list[_Pair], _Sums] | None = None

    def serve(self, runs: Sequence[_Run]) -> None:
        """Runs all batches until every kernel is converted, or none meets another."""
        for run in runs:
            self._proceed(run, None)
        while any(run.met is not None for run in runs):
            met = _turn(runs)
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
        self.met |= bool(sums.tokens.any())
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
        rows = [
            (run.own_rows(), run.float_rows(self._waiting) if matched else None) for run in runs
        ]
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
