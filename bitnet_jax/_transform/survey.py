"""What a program does with the leaves of its parameters, read from its jaxpr.

Every leaf of two and more axes is followed through the operations that only move it, into
jitted, scanned and mapped code, until it is multiplied, looked up, or computed with. Nothing is
run. What is computed *from* a leaf is followed too, where it may still be a kernel (a
normalised, masked or concatenated one): where that reaches a product, the leaf is not the
kernel, and it stays float in all that it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bitnet_jax._layers.stated import STATED
from bitnet_jax._transform import layout
from bitnet_jax._transform.convs import ConvPlan
from bitnet_jax._transform.higher_order import CUSTOM, RULES
from bitnet_jax._transform.jaxprs import (
    Atom,
    Eqn,
    Jaxpr,
    has_jaxpr,
    is_variable,
    opened,
    scope,
    shape_of,
)
from bitnet_jax._transform.lookups import LookupPlan
from bitnet_jax._transform.marks import KNOWN, LIVE, Changed, Found, Mark, Use
from bitnet_jax._transform.products import MEETS, multiplications, plan_of
from bitnet_jax._transform.view import View


class Survey:
    """One walk over a program.

    Args:
      constants: what its constants are: inputs, where it has no others.
    """

    def __init__(self, constants: Mark) -> None:
        self.found, self._constants = Found(), constants

    def walk(self, jaxpr: Jaxpr, marks: Sequence[Mark], times: float) -> list[Mark]:
        """The marks of a jaxpr's results, from those of its operands."""
        inner, _ = opened(jaxpr)
        env: dict[Any, Mark] = dict.fromkeys(inner.constvars, self._constants)
        env.update(zip(inner.invars, marks, strict=True))

        def of(atom: Atom) -> Mark:
            return env[atom] if is_variable(atom) else KNOWN

        for eqn in inner.eqns:
            made = self._equation(eqn, [of(v) for v in eqn.invars], times)
            env.update(zip(eqn.outvars, made, strict=True))
        return [of(v) for v in inner.outvars]

    def _equation(self, eqn: Eqn, marks: list[Mark], times: float) -> list[Mark]:
        rule = RULES.get(eqn.primitive.name)
        if rule is not None:
            before = len(self.found.uses)
            outs = rule.analyse(self, eqn, marks, times)
            if eqn.primitive.name in CUSTOM:
                met = (use.leaf for use in self.found.uses[before:])
                self.found.custom.update(dict.fromkeys(met, eqn.primitive.name))
            return outs
        if not any(mark.view or mark.changed for mark in marks):
            if has_jaxpr(eqn):
                self._unknown(eqn, marks)
            self.found.multiplications += times * multiplications(eqn)
            live = any(mark.live for mark in marks)
            return [LIVE if live else KNOWN] * len(eqn.outvars)
        if has_jaxpr(eqn):
            self._unknown(eqn, marks)
            return self._computed(eqn, marks)
        if eqn.primitive.name == "optimization_barrier":
            return list(marks)
        if eqn.primitive.name == STATED and marks[0].view is None:
            # A layer of ours quantises what was computed from the leaf, and not the leaf.
            self.sources(eqn, marks[0])
            return [Mark(live=marks[0].live)]
        if eqn.primitive.name in MEETS:
            return self._product(eqn, marks, times)
        viewed = [i for i, mark in enumerate(marks) if mark.view is not None]
        if len(viewed) == 1 and not any(mark.changed for mark in marks):
            view = marks[viewed[0]].view
            assert view is not None  # it was asked for
            steps = layout.follow(eqn, viewed[0], view)
            if steps is not None:
                return [Mark(step.view, live=False) for step in steps]
        return self._computed(eqn, marks)

    def sources(self, eqn: Eqn, mark: Mark) -> dict[int, Changed]:
        """The leaves that an operand stands for, once an equation has computed with it."""
        found = dict(mark.changed)
        if mark.view is not None:
            found[mark.view.leaf] = Changed(eqn.primitive.name, math.prod(mark.view.shape))
            self.read(mark, eqn.primitive.name)
        return found

    def read(self, mark: Mark, name: str) -> None:
        """Notes that something but a product uses a leaf."""
        if mark.view is not None:
            names = self.found.read.setdefault(mark.view.leaf, [])
            if name not in names:
                names.append(name)

    def _computed(self, eqn: Eqn, marks: Sequence[Mark]) -> list[Mark]:
        live = any(mark.live for mark in marks)
        sources: dict[int, Changed] = {}
        for mark in marks:
            sources.update(self.sources(eqn, mark))
        done = []
        for v in eqn.outvars:
            size = math.prod(shape_of(v))
            # Of an input and a kernel comes a kernel only where there are as many numbers of it.
            kept = {
                leaf: Changed(c.primitive, size)
                for leaf, c in sources.items()
                if (c.size == size if live else size > 1)
            }
            done.append(Mark(None, kept, live))
        return done

    def _product(self, eqn: Eqn, marks: list[Mark], times: float) -> list[Mark]:
        count = times * multiplications(eqn)
        self.found.multiplications += count
        lookup = eqn.primitive.name == "gather"
        for side, mark in enumerate(marks):
            for leaf, changed in mark.changed.items():
                self.found.changed.setdefault(leaf, changed.primitive)
            if mark.view is None:
                continue
            plan = plan_of(eqn, side, mark.view)
            other = None if lookup else marks[1 - side].view
            if isinstance(plan, LookupPlan) and not plan.has_rows:
                self.found.not_rows.add(mark.view.leaf)
            problem = plan if isinstance(plan, str) else None
            axes = ((), ()) if isinstance(plan, str) else (plan.contracting, plan.batch)
            self.found.uses.append(
                Use(
                    leaf=mark.view.leaf,
                    primitive=eqn.primitive.name,
                    contracting=axes[0],
                    batch=tuple(sorted((*axes[1], *mark.view.taken))),
                    problem=problem,
                    partner=None if other is None else other.leaf,
                    beside=other is not None and _is_spread(other),
                    multiplications=count,
                    stated=mark.view.stated,
                    channels_last=not isinstance(plan, ConvPlan)
                    or plan.convolution.has_channels_last,
                    times=times,
                    taken=mark.view.taken,
                )
            )
        if not lookup and all(mark.leaves for mark in marks) and not _is_input(marks):
            return self._of_both(eqn, marks)
        return [LIVE if _is_input(marks) else KNOWN] * len(eqn.outvars)

    def _of_both(self, eqn: Eqn, marks: list[Mark]) -> list[Mark]:
        """What comes of two parameters is a kernel itself, as a low-rank one is."""
        name, size = eqn.primitive.name, math.prod(shape_of(eqn.outvars[0]))
        leaves = {leaf for mark in marks for leaf in mark.leaves}
        return [Mark(None, {leaf: Changed(name, size) for leaf in leaves}, live=False)]

    def _unknown(self, eqn: Eqn, marks: Sequence[Mark]) -> None:
        for mark in marks:
            for leaf in mark.leaves:
                self.found.missing.setdefault(leaf, (eqn.primitive.name, scope(eqn)))


def _is_input(marks: Sequence[Mark]) -> bool:
    """Whether one of the operands of a product is an input, or a parameter that stands for one."""
    return any(mark.live or (mark.view is not None and _is_spread(mark.view)) for mark in marks)


def _is_spread(view: View) -> bool:
    """Whether a leaf was broadcast, as what stands for a batch of inputs is."""
    return any(not p and n > 1 for p, n in zip(view.parts, view.shape, strict=True))
