"""A program run step by step, which stops where a kernel meets its input.

A caller that runs many inputs side by side sees at each meeting what all of them bring there, and
says what the kernel is from there on: as it was, or packed. Equations are run at once, one after
the other, so that there are values to look at. Calls and branches are walked through, and loops
as often as they run: each slice of a stack has a meeting of its own.

A kernel goes its way with the numbers of its slices, which are cut with it as a probe is.

Left out: kernels inside a ``shard_map``, whose body sees a part of its operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bitnet_jax._layers.stated import STATED
from bitnet_jax._packed.kernel import Stored
from bitnet_jax._transform import jaxprs, loops
from bitnet_jax._transform.convs import ConvPlan
from bitnet_jax._transform.dots import DotPlan
from bitnet_jax._transform.higher_order import RULES, body_of
from bitnet_jax._transform.interpret import (
    Interpreter,
    barrier,
    before_cast,
    is_cast,
    is_met,
    last_uses,
    moved,
)
from bitnet_jax._transform.jaxprs import Eqn, Jaxpr
from bitnet_jax._transform.probe import Probed
from bitnet_jax._transform.products import MEETS, plan_of
from bitnet_jax._transform.site import Chosen
from bitnet_jax._transform.tracked import Tracked
from bitnet_jax._transform.view import of_leaf
from bitnet_jax._tree.select import Path


class Met(NamedTuple):
    """A kernel, or some of its slices, and the input that it is about to meet.

    Attributes:
      path: of the kernel.
      slices: the numbers of the slices, in the shape of the batch axes that are left.
      rows: a function that gives (*shared, tokens, K), K in the kernel's order; None: rows are
        looked up in it, or it is inside a ``while`` loop.
      alone: which axes of ``slices`` the rows do not have: each of these slices meets all rows.
      place: in the program, in the order in which it runs.
    """

    path: Path
    slices: np.ndarray
    rows: Callable[[], jax.Array] | None
    alone: tuple[int, ...]
    place: tuple[int, ...]


# Yields a meeting; is sent what the kernel is there, or None for the float one.
Steps = Generator[Met, Stored | None, list[Any]]


class Start(NamedTuple):
    """A kernel before the program.

    Attributes:
      path: its names.
      batch: the lengths of its axes of slices, which come first.
      value: the float kernel.
      several: whether a slice of it is met more than once, or rows are looked up in it.
    """

    path: Path
    batch: tuple[int, ...]
    value: Any
    several: bool


class Walk(NamedTuple):
    """One call, ready to be run step by step.

    Attributes:
      jaxpr: the program.
      operands: its operands.
      starts: the kernels among them, by their number.
      chosen: how they are quantised.
    """

    jaxpr: Jaxpr
    operands: list[Any]
    starts: dict[int, Start]
    chosen: dict[int, Chosen]

    @property
    def several(self) -> frozenset[Path]:
        """The kernels of which a slice is met more than once, and tables."""
        return frozenset(start.path for start in self.starts.values() if start.several)

    def renamed(self, names: Mapping[Path, Path]) -> Walk:
        """The same with other paths of kernels."""
        starts = {i: s._replace(path=names[s.path]) for i, s in self.starts.items()}
        return self._replace(starts=starts)

    def steps(self, *, packed: bool) -> Steps:
        """Runs it; ``packed``: whether kernels that are no parameters are quantised, too."""
        operands = list(self.operands)
        for i, start in self.starts.items():
            numbers: Any = np.arange(int(np.prod(start.batch))).reshape(start.batch)
            operands[i] = Tracked(
                of_leaf(i, start.value.shape), Probed(jnp.asarray(start.value), numbers)
            )
        return _Steps(self, packed).body(self.jaxpr, operands)


class _Steps:
    """One run of a walk."""

    def __init__(self, walk: Walk, packed: bool):
        self._starts = walk.starts
        self._chosen = walk.chosen
        self._interpreter = Interpreter(dict(walk.chosen), probing=not packed)
        self._packing = Interpreter(dict(walk.chosen))
        self.loops = 0  # of unknown length around what runs
        self.place: list[int] = []

    def body(self, jaxpr: Jaxpr, operands: Sequence[Any]) -> Steps:
        """Runs a jaxpr; operands and results are arrays, and kernels on their way."""
        inner, consts = jaxprs.opened(jaxpr)
        values: dict[Any, Any] = dict(zip(inner.constvars, consts, strict=True))
        values.update(zip(inner.invars, operands, strict=True))
        last, casts = last_uses(inner), {}

        def read(atom: jaxprs.Atom) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        self.place.append(0)
        for at, eqn in enumerate(inner.eqns):
            self.place[-1] = at
            given = [read(v) for v in eqn.invars]
            if is_cast(eqn):
                casts[eqn.outvars[0]] = eqn.invars[0], jaxprs.scope(eqn)
            sources = [values.get(before_cast(v, casts, eqn)) for v in eqn.invars]
            outs = yield from self._equation(eqn, given, sources)
            values.update(zip(eqn.outvars, outs, strict=True))
            for v in {*filter(jaxprs.is_variable, eqn.invars), *eqn.outvars}:
                for one in (v, casts.get(v, (v,))[0]):  # what a layer cast, it may read uncast
                    if last.get(one, -1) <= at:
                        values.pop(one, None)
        self.place.pop()
        return [read(v) for v in inner.outvars]

    def _equation(self, eqn: Eqn, operands: list[Any], sources: list[Any]) -> Steps:
        name = eqn.primitive.name
        if name == STATED:
            return [self._interpreter.state(eqn, operands)]
        if not any(isinstance(o, Tracked) for o in operands):
            return self._computed(eqn, operands)
        if name in _WALKED:
            return (yield from _WALKED[name](self, eqn, operands))
        if name in RULES:
            self._raise_not_walked(eqn, operands)
        if name == "optimization_barrier":
            return barrier(operands)
        if name in MEETS and is_met(operands):
            return (yield from self._meet(eqn, operands, sources))
        return moved(eqn, operands) or self._computed(eqn, operands)

    def _computed(self, eqn: Eqn, operands: list[Any]) -> list[Any]:
        with jaxprs.inside(eqn):
            return self._interpreter.computed(eqn, operands)

    def arrays(self, operands: Sequence[Any], eqn: Eqn) -> list[Any]:
        """What the program sees."""
        return self._interpreter.arrays(operands, eqn)

    def _meet(self, eqn: Eqn, operands: list[Any], sources: list[Any]) -> Steps:
        (side,) = (i for i, o in enumerate(operands) if isinstance(o, Tracked))
        kernel = operands[side]
        x = operands[1 - side] if sources[1 - side] is None else sources[1 - side]
        if not isinstance(kernel.value, Probed):  # it is no parameter
            with jaxprs.inside(eqn):
                return self._interpreter.meet(eqn, operands, x)
        start, rows, alone = self._starts[kernel.view.leaf], None, ()
        plan = plan_of(eqn, side, kernel.view)
        if isinstance(plan, DotPlan | ConvPlan):
            where = "/".join(start.path)
            if not self.loops:
                rows = functools.partial(plan.inputs, eqn, where, jnp.asarray(x))
            alone = tuple(plan.batch.index(a) for a in plan.alone)
        given = yield Met(
            start.path, np.asarray(kernel.value.probe), rows, alone, tuple(self.place)
        )
        if given is None:
            return self._computed(eqn, operands)
        pair: list[Any] = [operands[1 - side], kernel._replace(value=given)]
        with jaxprs.inside(eqn):
            return self._packing.meet(eqn, pair if side == 1 else pair[::-1], x)

    def _raise_not_walked(self, eqn: Eqn, operands: Sequence[Any]) -> NoReturn:
        """Refuses code that is not walked through."""
        leaf = next(o.view.leaf for o in operands if isinstance(o, Tracked))
        raise NotImplementedError(
            f"calibrate: the kernel at {self._chosen[leaf].where} enters a `{eqn.primitive.name}`, "
            "which sequential=True does not step through. Leave sequential=False, or leave the "
            "kernel in float (select=)."
        )


def _call(steps: _Steps, eqn: Eqn, operands: list[Any]) -> Steps:
    return (yield from steps.body(body_of(eqn.params), operands))


def _scan(steps: _Steps, eqn: Eqn, operands: list[Any]) -> Steps:
    params, length = eqn.params, eqn.params["length"]
    if length == 0:
        return steps._computed(eqn, operands)
    n, m = jaxprs.scan_parts(params)
    same = loops.unchanged(params["jaxpr"], n, m)
    fixed = operands[:n]
    carry = _carried(steps, eqn, operands[n : n + m], same)
    views, stacks = [], []
    for operand in operands[n + m :]:
        view = loops.step_view(operand.view) if isinstance(operand, Tracked) else None
        views.append(view)
        stacks.append(
            steps.arrays([operand], eqn)[0] if view is None else loops.stack_of(operand, view)
        )
    made: dict[int, list[Any]] = {}
    for t in range(length)[:: -1 if params["reverse"] else 1]:
        each = [jax.tree.map(lambda a, t=t: a[t], stack) for stack in stacks]
        each = [x if v is None else Tracked(v, x) for x, v in zip(each, views, strict=True)]
        steps.place.append(len(made))
        outs = yield from steps.body(params["jaxpr"], [*fixed, *carry, *each])
        steps.place.pop()
        carry = _carried(steps, eqn, outs[:m], same)
        made[t] = outs[m:]
    ys = []
    for i, whole in enumerate(loops.handed_through(eqn, operands)[m:]):
        each = [made[t][i] for t in range(length)]
        ys.append(jnp.stack(steps.arrays(each, eqn)) if whole is None else whole)
    return [*carry, *ys]


def _carried(steps: _Steps, eqn: Eqn, carry: Sequence[Any], same: Sequence[bool]) -> list[Any]:
    """What a loop carries: kernels only where it hands them on as they are."""
    pairs = zip(carry, same, strict=True)
    return [c if keeps else steps.arrays([c], eqn)[0] for c, keeps in pairs]


def _while(steps: _Steps, eqn: Eqn, operands: list[Any]) -> Steps:
    params = eqn.params
    c, b = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body, carry = operands[:c], operands[c : c + b], operands[c + b :]
    same = loops.unchanged(params["body_jaxpr"], b, len(carry))
    carry = _carried(steps, eqn, carry, same)
    steps.loops += 1
    while True:
        (going,) = yield from steps.body(params["cond_jaxpr"], [*of_cond, *carry])
        if not going:
            steps.loops -= 1
            return carry
        outs = yield from steps.body(params["body_jaxpr"], [*of_body, *carry])
        carry = _carried(steps, eqn, outs, same)


def _cond(steps: _Steps, eqn: Eqn, operands: list[Any]) -> Steps:
    index, *rest = operands
    branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
    if platforms is None:
        at = int(np.clip(int(index), 0, len(branches) - 1))
    else:
        here = jax.default_backend()
        named = [i for i, names in enumerate(platforms) if names is None or here in names]
        at = named[0]
    steps.place.append(at)
    outs = yield from steps.body(branches[at], rest)
    steps.place.pop()
    through = loops.handed_through(eqn, operands)
    return [
        steps.arrays([out], eqn)[0] if whole is None else whole
        for out, whole in zip(outs, through, strict=True)
    ]


_WALKED: dict[str, Callable[[_Steps, Eqn, list[Any]], Steps]] = {
    **{name: _call for name in RULES if name not in ("shard_map", "scan", "while", "cond")},
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
