"""Which norms' scales could be divided by factors that the kernels behind them take up.

A norm is not known by its name: it is vectors among the parameters, added to each other or
multiplied with anything, whose every use ends in a contraction with a quantised kernel, and each
such kernel has no other use. Then vectors over f and rows of the kernels times f are the same
function. What cannot be proved so is left, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bitnet_jax._layers.forward import LayerConfig
from bitnet_jax._transform import channels
from bitnet_jax._transform.decide import Decision
from bitnet_jax._transform.higher_order import CALLS, RULES
from bitnet_jax._transform.jaxprs import Eqn, Jaxpr, is_variable, scan_parts
from bitnet_jax._transform.marks import Channels, Mark
from bitnet_jax._transform.products import MEETS, MULTIPLIES
from bitnet_jax._transform.survey import Survey
from bitnet_jax._transform.view import of_leaf
from bitnet_jax._tree.select import Path


class Norm(NamedTuple):
    """Vectors, and the kernels that all they scale is multiplied by.

    Attributes:
      vectors: paths of leaves (K,), perhaps with axes of length 1: a scale, a bias.
      kernels: paths of the kernels, each with the axis of the leaf, of length K, that meets them.
      stacked: whether a scan steps through the first axis of all of them: there are so many norms.
    """

    vectors: tuple[Path, ...]
    kernels: tuple[tuple[Path, int], ...]
    stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Norms:
    """What was found of all quantised kernels.

    Attributes:
      found: norms that scale the inputs of quantised kernels and nothing else.
      refused: path of every other quantised kernel to why it has none.
    """

    found: tuple[Norm, ...] = ()
    refused: tuple[tuple[Path, str], ...] = ()


class _Meeting(NamedTuple):
    """A kernel that is multiplied by what a vector scales, over one of its axes."""

    vector: int
    kernel: int
    axis: int


class _Loop(NamedTuple):
    """A loop, a branch or a shard.

    Attributes:
      name: of the primitive.
      body: the jaxpr of a scan.
      first: how many operands of that body come before those that the scan steps through.
      leaves: what it steps through as it is stored, and sees in no other way.
    """

    name: str
    body: Any = None
    first: int = 0
    leaves: frozenset[int] = frozenset()


class NormSurvey(Survey):
    """A walk that also follows vectors, up to the kernels that they meet."""

    def __init__(self, constants: Mark) -> None:
        super().__init__(constants)
        self._joined: dict[int, int] = {}  # vectors that are added: to their first one
        self._lost: dict[int, str] = {}  # vector to the first primitive that ends it
        self._scales: set[int] = set()  # vectors that something was multiplied with
        self._meetings: list[_Meeting] = []
        self._beyond: dict[int, Channels] = {}  # kernel to the lost vector that it meets
        self._products: Counter[int] = Counter()  # kernel to how many products meet it
        self._looped: dict[int, str] = {}  # kernel to the loop around its product
        self._loops: tuple[_Loop, ...] = ()  # around what is walked
        self._stacked: set[int] = set()  # vectors of a scan, one for each of its steps
        self._whole: dict[int, str] = {}  # leaf to the first primitive that reads all of it

    @property
    def _scan(self) -> _Loop | None:
        """The scan around what is walked, if it is the one loop."""
        return self._loops[0] if [loop.name for loop in self._loops] == ["scan"] else None

    def walk(self, jaxpr: Jaxpr, marks: Sequence[Mark], times: float) -> list[Mark]:
        scan = self._scan
        if scan is None or jaxpr is not scan.body:
            return super().walk(jaxpr, marks, times)
        steps = [self._step(scan, mark) for mark in marks[scan.first :]]
        outs = super().walk(jaxpr, [*marks[: scan.first], *steps], times)
        for mark in outs:
            self._end(mark.channels, "scan")  # what leaves a step is of no one vector
        return [dataclasses.replace(mark, channels=None) for mark in outs]

    def _step(self, scan: _Loop, mark: Mark) -> Mark:
        """What a scan steps through, as one step sees it."""
        view = mark.view
        axis = None if view is None else channels.axis_of_vector(view.shape)
        if view is None or axis is None or view.leaf not in scan.leaves:
            return mark
        self._stacked.add(view.leaf)
        return dataclasses.replace(mark, channels=Channels(view.leaf, axis))

    def _equation(self, eqn: Eqn, marks: list[Mark], times: float) -> list[Mark]:
        name = eqn.primitive.name
        if name in CALLS:
            return super()._equation(eqn, marks, times)
        if name in RULES:
            return self._loop(eqn, marks, times)
        made = super()._equation(eqn, marks, times)
        for mark in marks:
            if mark.view is not None and mark.channels is None:
                self._whole.setdefault(mark.view.leaf, name)
            if mark.view is not None and name in MULTIPLIES:
                self._note_product(mark.view.leaf, times)
        if all(mark.channels is None for mark in marks):
            return made
        each_as_it_was = name == "optimization_barrier"
        found = [m.channels for m in marks] if each_as_it_was else self._channels(eqn, marks)
        return [dataclasses.replace(m, channels=c) for m, c in zip(made, found, strict=True)]

    def _note_product(self, kernel: int, times: float) -> None:
        """Counts a product, unless it is walked again, and notes the loop that it is in."""
        self._products[kernel] += times > 0
        if self._loops and (self._scan is None or kernel not in self._scan.leaves):
            self._looped.setdefault(kernel, self._loops[-1].name)

    def _loop(self, eqn: Eqn, marks: list[Mark], times: float) -> list[Mark]:
        """A loop, a branch or a shard. Inside, what a scan steps through is followed."""
        for mark in marks:
            self._lose(eqn, mark.channels)
        bare = [dataclasses.replace(mark, channels=None) for mark in marks]
        outer = self._loops
        self._loops = (*outer, _loop_of(eqn, marks))
        try:
            return super()._equation(eqn, bare, times)
        finally:
            self._loops = outer

    def _channels(self, eqn: Eqn, marks: list[Mark]) -> Sequence[Channels | None]:
        """What scales each result of a plain equation, some of whose operands are scaled."""
        name = eqn.primitive.name
        own = [mark.channels for mark in marks]
        if name in MEETS:
            # A kernel with one output, or one input, is no vector where it is multiplied.
            for i, mark in enumerate(marks):
                if mark.view is not None:
                    self._lose(eqn, own[i])
                    own[i] = None
        scaled = {i: c for i, c in enumerate(own) if c is not None and not c.lost}
        if not scaled:
            lost = None if name in MEETS else next(filter(None, own), None)
            if name in MULTIPLIES:
                self._note_beyond(marks, own)
            return [lost] * len(eqn.outvars)
        if name in MULTIPLIES and len(scaled) == 1:
            (at,) = scaled
            met = channels.met_axis(eqn, at, scaled[at].axis)
            if met is not None and self._is_meeting(marks[1 - at], met, scaled[at].vector):
                return [None] * len(eqn.outvars)
        found = self._followed(eqn, scaled)
        if found is not None:
            return found
        lost = [self._lose(eqn, c) for c in scaled.values()]
        return lost[:1] * len(eqn.outvars)

    def _followed(self, eqn: Eqn, scaled: dict[int, Channels]) -> list[Channels] | None:
        """What scales the results, where the equation keeps it up."""
        if eqn.primitive.name in channels.JOINING:
            first = 1 if eqn.primitive.name == "select_n" else 0
            rest = [v for i, v in enumerate(eqn.invars) if i >= first and i not in scaled]
            if not all(_is_zero(v) for v in rest):
                return None
        elif len(scaled) > 1:
            return None
        every = [channels.follow(eqn, at, c.axis) for at, c in scaled.items()]
        vector = min(self._first(c.vector) for c in scaled.values())
        if every[0] is None or any(axes != every[0] for axes in every):
            return None
        for c in scaled.values():
            self._joined[self._first(c.vector)] = vector
        if eqn.primitive.name == "mul" or any(c.vector in self._scales for c in scaled.values()):
            self._scales.add(vector)
        return [Channels(vector, axis) for axis in every[0]]

    def _is_meeting(self, mark: Mark, met: int, vector: int) -> bool:
        """Notes a kernel over one of its own axes; False: it is none."""
        axis = None if mark.view is None else mark.view.whole(met)
        if mark.view is None or axis is None:
            return False
        if vector in self._stacked and (not self._scan or mark.view.leaf not in self._scan.leaves):
            return False  # one kernel for the vectors of all steps
        self._meetings.append(_Meeting(vector, mark.view.leaf, axis))
        return True

    def _note_beyond(self, marks: list[Mark], own: Sequence[Channels | None]) -> None:
        for mark, other in zip(marks, own[::-1], strict=True):
            if mark.view is not None and other is not None:
                self._beyond.setdefault(mark.view.leaf, other)

    def _lose(self, eqn: Eqn, own: Channels | None) -> Channels | None:
        """Notes that a vector has another use; returns what its result is scaled by."""
        if own is None or own.lost:
            return own
        self._end(own, eqn.primitive.name)
        return own._replace(lost=True) if own.vector in self._scales else None

    def _end(self, own: Channels | None, name: str) -> None:
        if own is not None and not own.lost:
            self._lost.setdefault(own.vector, name)

    def returned(self, outs: Sequence[Mark]) -> None:
        """Notes what scales a result of the program, and the kernels among its results."""
        for mark in outs:
            self.read(mark, "return")
            self._end(mark.channels, "return")
            if mark.view is not None:
                self._whole.setdefault(mark.view.leaf, "return")

    def _first(self, vector: int) -> int:
        while self._joined.get(vector, vector) != vector:
            vector = self._joined[vector]
        return vector

    def norms(
        self,
        paths: Sequence[Path],
        decisions: Sequence[Decision | None],
        layer: LayerConfig,
    ) -> Norms:
        """What was found, of the kernels that are quantised."""
        chosen = [i for i, d in enumerate(decisions) if d is not None and d.config is not None]
        groups: dict[int, list[_Meeting]] = {}
        for meeting in self._meetings:
            groups.setdefault(self._first(meeting.vector), []).append(meeting)
        every = {*self._joined, *groups}
        found, reasons = [], {}
        for first, meetings in groups.items():
            vectors = sorted(v for v in every if self._first(v) == first)
            names = _Names(paths, vectors)
            problems = self._problems(meetings, names, {*chosen}, layer)
            kernels = dict.fromkeys((m.kernel, m.axis) for m in meetings)
            if not problems:
                pairs = tuple((paths[kernel], axis) for kernel, axis in kernels)
                stacked = first in self._stacked
                found.append(Norm(tuple(paths[v] for v in vectors), pairs, stacked))
                continue
            one, how = next(iter(problems.items()))
            for kernel, _ in kernels:
                other = f"it shares {names.all} with {names.of(one)}, which {how}"
                reasons[kernel] = f"it {problems[kernel]}" if kernel in problems else other
        folded = {path for norm in found for path, _ in norm.kernels}
        refused = {paths[k]: reasons.get(k) or self._why_none(k, paths) for k in chosen}
        return Norms(tuple(found), tuple((p, w) for p, w in refused.items() if p not in folded))

    def _problems(
        self, meetings: Sequence[_Meeting], names: _Names, chosen: set[int], layer: LayerConfig
    ) -> dict[int, str]:
        """Kernel to why what scales its inputs cannot be divided by anything, "it" left out."""
        others = [self._whole.get(v) if v in self._stacked else None for v in names.vectors]
        lost = next(filter(None, (*map(self._lost.get, names.vectors), *others)), None)
        if lost is not None:
            why = f"is not all that reads {names.all} or what is scaled by it: `{lost}` does, too"
            return dict.fromkeys((m.kernel for m in meetings), why)
        stated = {use.leaf: use.stated for use in self.found.uses if use.stated is not None}
        problems = {}
        for kernel in dict.fromkeys(m.kernel for m in meetings):
            if kernel not in chosen:
                problems[kernel] = "stays in float"
            elif self._products[kernel] != 1:
                problems[kernel] = f"is multiplied in {self._products[kernel]} places"
            elif kernel in self.found.read or kernel in self.found.changed:
                problems[kernel] = "is also read as float"
            elif (stated.get(kernel) or layer).norm:
                problems[kernel] = "is quantised behind a norm of its own layer (norm=True)"
        return problems

    def _why_none(self, kernel: int, paths: Sequence[Path]) -> str:
        """Why a kernel meets no vector."""
        if kernel in self._looped:
            return f"it is multiplied in a `{self._looped[kernel]}`, where norms are not followed"
        beyond = self._beyond.get(kernel)
        if beyond is not None:
            ended = self._lost[beyond.vector]
            return f"`{ended}` lies between {'/'.join(paths[beyond.vector])} and it"
        return "no norm with a scale comes right before it"


class _Names(NamedTuple):
    """How the leaves around a norm are called."""

    paths: Sequence[Path]
    vectors: Sequence[int]

    def of(self, leaf: int) -> str:
        """One leaf."""
        return "/".join(self.paths[leaf])

    @property
    def all(self) -> str:
        """The vectors."""
        return " and ".join(map(self.of, self.vectors))


def _loop_of(eqn: Eqn, marks: Sequence[Mark]) -> _Loop:
    """A loop, and what it steps through."""
    name = eqn.primitive.name
    if name != "scan":
        return _Loop(name)
    first = sum(scan_parts(eqn.params))
    views = [mark.view for mark in marks]
    also = {v.leaf for v in views[:first] if v is not None}
    stored = {v.leaf for v in views[first:] if v is not None and v == of_leaf(v.leaf, v.shape)}
    return _Loop(name, eqn.params["jaxpr"], first, frozenset(stored - also))


def _is_zero(atom: Any) -> bool:
    """Whether an operand is the number 0."""
    return not is_variable(atom) and np.ndim(atom.val) == 0 and bool(atom.val == 0)
