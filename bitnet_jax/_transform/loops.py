"""Kernels that enter ``scan``, ``while`` and ``cond``.

A kernel that a loop scans over is sliced, each slice with a scale of its own, whatever axis it
is stacked along. One that a loop or a branch hands on unchanged, in whole or step by step, is
behind it what it was before. Any other that comes out is computed there: it is float from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bitnet_jax._packed.slice_of import all_cut
from bitnet_jax._packed.stacks import layer_of, sliced_by_scan
from bitnet_jax._transform.jaxprs import Eqn, Jaxpr, forwarded, handed_on, scan_parts
from bitnet_jax._transform.layout import leading
from bitnet_jax._transform.marks import Mark, Walker
from bitnet_jax._transform.tracked import Interpreter, Tracked, tracked, values_of, views_of
from bitnet_jax._transform.view import View

WHILE = "a `while` loop whose length is not known"  # in errors


def unchanged(jaxpr: Jaxpr, first: int, count: int) -> list[bool]:
    """Which of what a loop carries its body hands on as it is."""
    return [at == first + i for i, at in enumerate(handed_on(jaxpr)[:count])]


def _carried(survey: Walker, eqn: Eqn, marks: Sequence[Mark], same: Sequence[bool]) -> list[Mark]:
    """The marks of what a loop carries: kernels that it changes are kernels no more."""
    done = []
    for mark, keeps in zip(marks, same, strict=True):
        if keeps:
            done.append(mark)
        else:
            done.append(Mark(None, survey.sources(eqn, mark), live=True))
    return done


def _around(
    walk: Callable[[list[Mark], float], list[Mark]], carried: list[Mark], times: float
) -> list[Mark]:
    """The marks of what a loop hands on; what it computes from a kernel comes round again."""
    outs = walk(carried, times)
    again = [
        a if a.view is not None else Mark(None, {**b.changed, **a.changed}, a.live)
        for a, b in zip(carried, outs[: len(carried)], strict=True)
    ]
    if again != carried:
        outs = walk(again, 0.0)
    ends = [a if a.view is not None else b for a, b in zip(again, outs, strict=False)]
    return [*ends, *outs[len(carried) :]]


def step_view(view: View) -> View | None:
    """A stacked kernel as one step of a scan sees it; None: it is not stacked along an axis."""
    one = view if view.shape[0] == 1 and not view.parts[0] else view.take(0)
    return None if one is None else one.squeeze((0,))


def analyse_scan(survey: Walker, eqn: Eqn, marks: list[Mark], times: float) -> list[Mark]:
    """What comes out of a scan; see ``higher_order.Rule``."""
    jaxpr, length = eqn.params["jaxpr"], eqn.params["length"]
    n, m = scan_parts(eqn.params)
    carried = _carried(survey, eqn, marks[n : n + m], unchanged(jaxpr, n, m))
    steps = []
    for mark in marks[n + m :]:
        view = None if mark.view is None else step_view(mark.view)
        if mark.view is not None and view is None:
            mark = Mark(None, survey.sources(eqn, mark), mark.live)
        steps.append(Mark(view, mark.changed, mark.live))

    def walk(carried: list[Mark], times: float) -> list[Mark]:
        return survey.walk(jaxpr, [*marks[:n], *carried, *steps], times)

    outs = _around(walk, carried, times * length)
    seen = [*[None] * (n + m), *(step.view for step in steps)]
    for i, at in list(enumerate(forwarded(eqn)))[m:]:
        if at is None or seen[at] is None:
            outs[i] = Mark(None, survey.sources(eqn, outs[i]), outs[i].live)
        else:
            outs[i] = marks[at]
    return outs


def run_scan(interpreter: Interpreter, eqn: Eqn, operands: list[Any]) -> list[Any]:
    """A scan with its body interpreted."""
    params = eqn.params
    n, m = scan_parts(params)
    fixed, carry = operands[:n], operands[n : n + m]
    kept = _kept(carry, unchanged(params["jaxpr"], n, m))
    start = interpreter.arrays(_left(carry, kept), eqn)
    through = handed_through(eqn, operands)
    steps, xs, stacks = [], [], []
    for operand in operands[n + m :]:
        view = step_view(operand.view) if isinstance(operand, Tracked) else None
        steps.append(view)
        if view is None:
            through = [None if t is operand else t for t in through]
            xs += interpreter.arrays([operand], eqn)
            stacks.append(None)
        else:
            stacks.append(stack_of(operand, view))
            xs.append(sliced_by_scan(stacks[-1]))

    def body(carry: list[Any], at_and_x: tuple[Any, list[Any]]) -> tuple[list[Any], Any]:
        at, x = at_and_x
        pairs = zip(stacks, x, strict=True)
        x = [part if whole is None else layer_of(whole, part, at) for whole, part in pairs]
        outs, tolls = interpreter.closed(
            params["jaxpr"], [*fixed, *_filled(kept, carry), *tracked(x, steps)]
        )
        ends = _left(outs[:m], kept), _left(outs[m:], through[m:])
        return interpreter.arrays(ends[0], eqn), (interpreter.arrays(ends[1], eqn), tolls)

    how = {name: params[name] for name in ("length", "reverse", "unroll") if name in params}
    if params.get("_split_transpose"):
        how["_split_transpose"] = True
    places = jnp.arange(params["length"], dtype=jnp.int32)
    end, (ys, tolls) = lax.scan(body, start, (places, xs), **how)
    interpreter.tolls += [toll.sum() for toll in tolls]
    return [*_filled(kept, end), *_filled(through[m:], ys)]


def handed_through(eqn: Eqn, operands: Sequence[Any]) -> list[Any]:
    """The kernels among operands that an equation hands on in whole, by result; None else."""
    through = [None if at is None else operands[at] for at in forwarded(eqn)]
    return [o if isinstance(o, Tracked) else None for o in through]


def _left(outs: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    """The results that are computed."""
    return [o for o, k in zip(outs, kept, strict=True) if k is None]


def stack_of(kernel: Tracked, step: View) -> Any:
    """A kernel with the axis first that a scan steps along."""
    for axis in {*kernel.view.kept} - {*step.kept}:
        return leading(kernel.value, kernel.view.position(axis))
    # One slice was taken off it before.
    return jax.tree.map(lambda a: a[None], all_cut(kernel.value))


def _kept(carry: Sequence[Any], same: Sequence[bool]) -> list[Any]:
    """The kernels that a loop carries on unchanged; None for the rest."""
    pairs = zip(carry, same, strict=True)
    return [c if keeps and isinstance(c, Tracked) else None for c, keeps in pairs]


def _filled(kept: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
    """What a loop carries, its kernels put back in."""
    left = iter(rest)
    return [next(left) if k is None else k for k in kept]


def analyse_while(survey: Walker, eqn: Eqn, marks: list[Mark], times: float) -> list[Mark]:
    """What comes out of a while loop, whose body counts once; see ``higher_order.Rule``."""
    params = eqn.params
    c, b = params["cond_nconsts"], params["body_nconsts"]
    same = unchanged(params["body_jaxpr"], b, len(marks) - c - b)
    carried = _carried(survey, eqn, marks[c + b :], same)
    survey.walk(params["cond_jaxpr"], [*marks[:c], *carried], times)

    def walk(carried: list[Mark], times: float) -> list[Mark]:
        return survey.walk(params["body_jaxpr"], [*marks[c : c + b], *carried], times)

    return _around(walk, carried, times)


def run_while(interpreter: Interpreter, eqn: Eqn, operands: list[Any]) -> list[Any]:
    """A while loop with its condition and its body interpreted."""
    interpreter.require_collectable(operands, WHILE)
    params = eqn.params
    c, b = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body, carry = operands[:c], operands[c : c + b], operands[c + b :]
    kept = _kept(carry, unchanged(params["body_jaxpr"], b, len(carry)))
    start = interpreter.arrays(_left(carry, kept), eqn)

    def condition(carry: list[Any]) -> Any:
        outs, _ = interpreter.closed(params["cond_jaxpr"], [*of_cond, *_filled(kept, carry)])
        return interpreter.arrays(outs, eqn)[0]

    def body(carry: list[Any]) -> list[Any]:
        outs, _ = interpreter.closed(params["body_jaxpr"], [*of_body, *_filled(kept, carry)])
        return interpreter.arrays(_left(outs, kept), eqn)

    return _filled(kept, lax.while_loop(condition, body, start))


def analyse_cond(survey: Walker, eqn: Eqn, marks: list[Mark], times: float) -> list[Mark]:
    """What comes out of a conditional, whose branches count as their mean."""
    branches = eqn.params["branches"]
    times = times / len(branches)
    each = [survey.walk(branch, marks[1:], times) for branch in branches]
    done = []
    for outs, at in zip(zip(*each, strict=True), forwarded(eqn), strict=True):
        if at is not None and marks[at].view is not None:
            done.append(marks[at])
            continue
        sources = {leaf: c for mark in outs for leaf, c in survey.sources(eqn, mark).items()}
        done.append(Mark(None, sources, any(mark.live for mark in (*outs, marks[0]))))
    return done


def run_cond(interpreter: Interpreter, eqn: Eqn, operands: list[Any]) -> list[Any]:
    """A conditional with its branches interpreted."""
    through = handed_through(eqn, operands)
    index, *operands = operands
    views, values = views_of(operands), values_of(operands)

    def interpreted(branch: Jaxpr) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            outs, tolls = interpreter.closed(branch, tracked(values, views))
            return interpreter.arrays(_left(outs, through), eqn), tolls

        return run

    branches = [interpreted(branch) for branch in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        outs, tolls = lax.switch(index, branches, *values)
    else:
        pairs = list(zip(branches, platforms, strict=True))
        named = {name: branch for branch, names in pairs for name in names or ()}
        default = next((branch for branch, names in pairs if names is None), None)
        outs, tolls = lax.platform_dependent(*values, default=default, **named)
    interpreter.tolls += tolls
    return _filled(through, outs)
