"""Runs a program with some of its leaves quantised where they are multiplied.

The equations that no such leaf reaches are run as they are. The others move a kernel, multiply
it, run code that does, or compute with it in float; for each there is a rule. Nothing here is
left in the program: interpreting is tracing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.typing import ArrayLike

from bitnet_jax import _mesh
from bitnet_jax._layers.stated import STATED
from bitnet_jax._ops.gather import gathering
from bitnet_jax._quantize.arrays import AnyArray
from bitnet_jax._quantize.pinned import pinned
from bitnet_jax._transform import jaxprs, layout
from bitnet_jax._transform.convs import ConvPlan
from bitnet_jax._transform.dots import DotPlan
from bitnet_jax._transform.higher_order import RULES
from bitnet_jax._transform.jaxprs import Atom, Eqn, Jaxpr
from bitnet_jax._transform.probe import Probed, once, toll
from bitnet_jax._transform.products import MEETS, MULTIPLIES, plan_of
from bitnet_jax._transform.site import Chosen, Site
from bitnet_jax._transform.tracked import Operand, Tracked, shown
from bitnet_jax._transform.view import View, of_leaf
from bitnet_jax._tree.leaves import placement


class Interpreter:
    """Runs one program.

    Args:
      chosen: the quantised leaves, by their number.
      probing: whether the program is run in float, to collect what probed kernels meet.
    """

    def __init__(self, chosen: dict[int, Chosen], probing: bool = False):
        self._chosen, self._probing = chosen, probing
        self.jitted: dict[Any, Any] = {}
        self.tolls: list[jax.Array] = []
        self.manual: tuple[str, ...] = ()

    def body(self, jaxpr: Jaxpr, operands: Sequence[Any]) -> list[Any]:
        """Runs a jaxpr; operands and results are arrays, and kernels on their way."""
        inner, consts = jaxprs.opened(jaxpr)
        return _Run(self, inner, consts, operands).results()

    def closed(self, jaxpr: Jaxpr, operands: Sequence[Any]) -> tuple[list[Any], list[jax.Array]]:
        """:meth:`body`, and what it owes: one number where kernels are probed, else nothing."""
        if not self._probing:
            return self.body(jaxpr, operands), []
        outer, self.tolls = self.tolls, []
        try:
            outs = self.body(jaxpr, operands)
            return outs, [sum(self.tolls, start=once(jnp.float32(0), self.manual))]
        finally:
            self.tolls = outer

    def require_collectable(self, operands: Sequence[Any], what: str) -> None:
        """Refuses code in which no statistics can be collected of the probed operands."""
        for o in operands:
            if isinstance(o, Tracked) and isinstance(o.value, Probed):
                raise_not_collectable(self._chosen[o.view.leaf].where, what)

    def alike(self, views: Sequence[View | None]) -> Any:
        """A key that is the same for operands that are quantised and seen the same way."""

        def one(view: View | None) -> Any:
            if view is None:
                return None
            chosen = self._chosen[view.leaf]
            spec = placement(chosen.box) if gathering() else None
            return view._replace(leaf=0), chosen.config, spec

        return tuple(map(one, views))

    def arrays(self, operands: Sequence[Any], eqn: Eqn) -> list[ArrayLike]:
        """What the program sees of its operands; refuses packed kernels."""
        return [
            shown(o, self._chosen[o.view.leaf].where, eqn.primitive.name)
            if isinstance(o, Tracked)
            else o
            for o in operands
        ]

    def meet(self, eqn: Eqn, operands: list[Any], uncast: AnyArray | None) -> list[Any]:
        """A product or a look-up; ``uncast``: the input as it was before the layer cast it."""
        sides = [i for i, o in enumerate(operands) if isinstance(o, Tracked)]
        (side,) = sides  # two kernels that meet were refused
        view, value, strength = operands[side]
        plan = plan_of(eqn, side, view)
        assert not isinstance(plan, str)  # such leaves were not chosen
        x = jnp.asarray(operands[1 - side] if uncast is None else uncast)
        if self._probing:
            if isinstance(value, Probed):
                assert isinstance(plan, DotPlan | ConvPlan)  # no ternary config fits a look-up
                rows = plan.inputs(eqn, self._chosen[view.leaf].where, x)
                alone = tuple(plan.batch.index(a) for a in plan.alone)
                self.tolls.append(once(toll(rows, value.probe, alone), self.manual))
            return self.computed(eqn, operands)
        chosen = self._chosen[view.leaf]
        if view.stated is not None:
            chosen = chosen._replace(config=view.stated)
        y = plan.run(Site(eqn, chosen, strength), x, value)
        return [_placed(y, eqn.outvars[0])]

    def computed(self, eqn: Eqn, operands: list[Any]) -> list[Any]:
        """An equation as it is, from what the program sees of its operands."""
        params = eqn.primitive.get_bind_params(eqn.params)
        outs = eqn.primitive.bind(*self.arrays(operands, eqn), **params)
        return outs if eqn.primitive.multiple_results else [outs]

    def state(self, eqn: Eqn, operands: list[Any]) -> Tracked:
        """The kernel of a layer of ours, a leaf or not: from here on it is quantised as stated."""
        kernel, *strength = operands
        if not isinstance(kernel, Tracked):
            number = -1 - len(self._chosen)  # no leaf has it
            self._chosen[number] = Chosen("a kernel that is no parameter", eqn.params["config"])
            kernel = Tracked(of_leaf(number, jnp.shape(kernel)), jnp.asarray(kernel))
        view = kernel.view._replace(stated=eqn.params["config"])
        return Tracked(view, kernel.value, strength[0] if strength else eqn.params["strength"])


def raise_not_collectable(path: str, what: str) -> NoReturn:
    """Refuses to collect what a kernel meets where that cannot be counted."""
    raise NotImplementedError(
        f"calibrate: the kernel at {path} enters {what}, in which no statistics of its inputs can "
        "be collected. Give it a method that needs none, method={'*': 'gptq', "
        f"{path!r}: 'survivors'}}, or leave it in float (select=)."
    )


def _placed(y: jax.Array, like: Atom) -> jax.Array:
    """A result where its equation said, on Explicit mesh axes."""
    wanted = getattr(like.aval, "sharding", None)
    if wanted is None or not _mesh.is_typed(y) or wanted.spec == jax.typeof(y).sharding.spec:
        return y
    return jax.sharding.reshard(y, wanted.spec)


class _Run:
    """One evaluation of one jaxpr. Plain equations wait, and run together when they must."""

    def __init__(
        self,
        interpreter: Interpreter,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        operands: Sequence[Operand],
    ):
        self._interpreter, self._jaxpr = interpreter, jaxpr
        self._values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        self._values.update(zip(jaxpr.invars, operands, strict=True))
        self._waiting: list[Any] = []
        self._casts: dict[Any, tuple[Any, str]] = {}
        self._products: set[Any] = set()
        self._last = last_uses(jaxpr)

    def results(self) -> list[Any]:
        """Runs all of it."""
        for at, eqn in enumerate(self._jaxpr.eqns):
            tracked = any(isinstance(self._values.get(v), Tracked) for v in _variables(eqn))
            if tracked or eqn.primitive.name == STATED:
                self._special(at, eqn)
            elif eqn.primitive.name == "add" and self._products & {*_variables(eqn)}:
                self._bias(at, eqn)
            else:
                self._waiting.append(eqn)
                self._note(eqn)
        self._catch_up(len(self._jaxpr.eqns))
        return [self._read(v) for v in self._jaxpr.outvars]

    def _note(self, eqn: Eqn) -> None:
        """What later equations ask of a plain one: was it a cast, is it still a product."""
        if is_cast(eqn):
            self._casts[eqn.outvars[0]] = eqn.invars[0], jaxprs.scope(eqn)
        if eqn.primitive.name in _MOVES and self._products & {*_variables(eqn)}:
            self._products.update(eqn.outvars)

    def _bias(self, at: int, eqn: Eqn) -> None:
        """The add after a product, of a bias as a rule, rounded as the layers round it."""
        self._catch_up(at)
        with jaxprs.inside(eqn):
            (y,) = self._interpreter.computed(eqn, [self._read(v) for v in eqn.invars])
            self._values[eqn.outvars[0]] = pinned(y)

    def _read(self, atom: Atom) -> Any:
        return atom.val if isinstance(atom, core.Literal) else self._values[atom]

    def _catch_up(self, at: int) -> None:
        """Runs the equations that wait, for whoever needs their results from ``at`` on."""
        if self._waiting:
            made = dict.fromkeys(v for eqn in self._waiting for v in eqn.outvars)
            needed = [v for v in made if self._last.get(v, -1) >= at]
            done = jaxprs.evaluate(self._jaxpr, self._waiting, needed, self._values)
            self._values.update(zip(needed, done, strict=True))
            self._waiting = []

    def _special(self, at: int, eqn: Eqn) -> None:
        """An equation that a kernel reaches."""
        name = eqn.primitive.name
        variables = _variables(eqn)
        if any(v not in self._values for v in variables):
            self._catch_up(at)
        operands = [self._read(v) for v in eqn.invars]
        with jaxprs.inside(eqn):
            if name == STATED:
                outs = [self._interpreter.state(eqn, operands)]
            elif name in RULES:
                outs = RULES[name].run(self._interpreter, eqn, operands)
            elif name == "optimization_barrier":
                outs = barrier(operands)
            elif name in MEETS and is_met(operands):
                outs = self._interpreter.meet(eqn, operands, self._uncast(eqn, operands))
                self._products.update(eqn.outvars if name in MULTIPLIES else ())
            else:
                outs = moved(eqn, operands) or self._interpreter.computed(eqn, operands)
        self._values.update(zip(eqn.outvars, outs, strict=True))

    def _uncast(self, eqn: Eqn, operands: list[Any]) -> jax.Array | None:
        """The input before the cast that its own layer made: it is quantised as the kernel is."""
        (atom,) = (v for v, o in zip(eqn.invars, operands, strict=True) if not _is_kernel(o))
        value = self._values.get(before_cast(atom, self._casts, eqn))
        return None if isinstance(value, Tracked) else value


# What moves a product on its way to its bias.
_MOVES = frozenset({"transpose", "reshape", "squeeze", "broadcast_in_dim"})


def _is_kernel(operand: Operand) -> bool:
    return isinstance(operand, Tracked)


def _variables(eqn: Eqn) -> list[Any]:
    return [v for v in eqn.invars if jaxprs.is_variable(v)]


def is_cast(eqn: Eqn) -> bool:
    """Whether an equation casts floats to floats."""
    if eqn.primitive.name != "convert_element_type":
        return False
    (v,) = eqn.invars
    kinds = jaxprs.dtype_of(v), eqn.params["new_dtype"]
    return jaxprs.is_variable(v) and all(jnp.issubdtype(k, jnp.floating) for k in kinds)


def before_cast(atom: Atom, casts: Mapping[Any, tuple[Any, str]], eqn: Eqn) -> Any:
    """The variable that an equation's own layer cast to an operand; None: there is none."""
    source, scope = casts.get(atom, (None, "")) if jaxprs.is_variable(atom) else (None, "")
    return source if scope == jaxprs.scope(eqn) else None


def last_uses(jaxpr: core.Jaxpr) -> dict[Any, int]:
    """Where each variable is read last; the input of a cast as long as its result."""
    last: dict[Any, int] = {}
    casts: dict[Any, Any] = {}
    for at, eqn in enumerate(jaxpr.eqns):
        for v in _variables(eqn):
            last[v] = at
            if v in casts:
                last[casts[v]] = at
        if eqn.primitive.name == "convert_element_type" and jaxprs.is_variable(eqn.invars[0]):
            casts[eqn.outvars[0]] = eqn.invars[0]
    last.update(dict.fromkeys((v for v in jaxpr.outvars if jaxprs.is_variable(v)), len(jaxpr.eqns)))
    return last


def is_met(operands: list[Any]) -> bool:
    """Whether one of the operands is a kernel, and one alone."""
    return sum(isinstance(o, Tracked) for o in operands) == 1


def moved(eqn: Eqn, operands: list[Any]) -> list[Any] | None:
    """The results of an equation that only moves a kernel; None: it computes."""
    kernels = [i for i, o in enumerate(operands) if isinstance(o, Tracked)]
    if len(kernels) != 1:
        return None
    view, value, strength = operands[kernels[0]]
    steps = layout.follow(eqn, kernels[0], view)
    if steps is None:
        return None
    return [
        Tracked(s.view, value if s.change is None else s.change(value, operands), strength)
        for s in steps
    ]


def barrier(operands: list[Any]) -> list[Any]:
    """The barrier over what is no kernel: a kernel is quantised after it all the same."""
    rest = [o for o in operands if not _is_kernel(o)]
    held = iter(jax.lax.optimization_barrier(rest) if rest else ())
    return [o if _is_kernel(o) else next(held) for o in operands]
