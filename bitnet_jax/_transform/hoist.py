"""Runs a program and hands out values that it names, from inside the code that computes them.

A name is that of ``jax.ad_checkpoint.checkpoint_name``. A named value leaves jitted and
rematerialised code as one more result, and a scan as one more stacked result. What is run is the
program with more results, so it is differentiated, mapped and compiled as the program is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
from jax import lax
from jax.extend import core

from bitnet_jax._transform import jaxprs
from bitnet_jax._transform.higher_order import jit_options
from bitnet_jax._transform.jaxprs import Eqn, Jaxpr

WHO = "capture"

# (name) -> how it is called in an error; None: it is not asked for.
Wanted = Callable[[str], str | None]


class Named(NamedTuple):
    """A value that was handed out.

    Attributes:
      name: in the program.
      value: stacked along its first axis where a scan computes it.
    """

    name: str
    value: jax.Array


def names(jaxpr: Jaxpr) -> list[str]:
    """All names in a program, in its order."""
    found: list[str] = []
    for eqn in jaxprs.opened(jaxpr)[0].eqns:
        if eqn.primitive.name == _NAME:
            found.append(eqn.params["name"])
        for inner in core.jaxprs_in_params(eqn.params):
            found += names(inner)
    return found


def run(jaxpr: Jaxpr, operands: Sequence[Any], wanted: Wanted) -> tuple[list[Any], list[Named]]:
    """The results of a program, and the values that are wanted, in its order."""
    return _Hoist(wanted).body(jaxpr, operands)


_NAME = "name"

_CALLS = ("closed_call", "core_call", "core_closed_call", "call")


class _Hoist:
    """Runs one program."""

    def __init__(self, wanted: Wanted):
        self._wanted = wanted
        # By identity, with the jaxpr, which keeps it from being another one's.
        self._holding: dict[int, tuple[Jaxpr, str | None]] = {}
        self._jitted: dict[int, Any] = {}

    def _held(self, jaxpr: Jaxpr) -> str | None:
        """What the first wanted name in a program is called; None: there is none."""
        if id(jaxpr) not in self._holding:
            found = (self._wanted(name) for name in names(jaxpr))
            self._holding[id(jaxpr)] = jaxpr, next((f for f in found if f is not None), None)
        return self._holding[id(jaxpr)][1]

    def body(self, jaxpr: Jaxpr, operands: Sequence[Any]) -> tuple[list[Any], list[Named]]:
        """Runs a jaxpr."""
        inner, consts = jaxprs.opened(jaxpr)
        values: dict[Any, Any] = dict(zip(inner.constvars, consts, strict=True))
        values.update(zip(inner.invars, operands, strict=True))
        found: list[Named] = []

        def read(atom: jaxprs.Atom) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for eqn in inner.eqns:
            with jaxprs.inside(eqn):
                outs, more = self._equation(eqn, [read(v) for v in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))
            found += more
        return [read(v) for v in inner.outvars], found

    def _equation(self, eqn: Eqn, operands: list[Any]) -> tuple[list[Any], list[Named]]:
        """Runs an equation, one that holds wanted values by its rule."""
        name = eqn.primitive.name
        inner = list(core.jaxprs_in_params(eqn.params))
        held = next(filter(None, map(self._held, inner)), None)
        if held is not None:
            if name not in _RULES:
                _raise_not_captured(held, name)
            return _RULES[name](self, eqn, operands)
        outs = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        outs = list(outs) if eqn.primitive.multiple_results else [outs]
        asked = name == _NAME and self._wanted(eqn.params["name"]) is not None
        return outs, [Named(eqn.params["name"], outs[0])] if asked else []

    def wrapped(self, jaxpr: Jaxpr) -> tuple[Callable[..., Any], list[str]]:
        """A program as a function that returns (results, wanted values), and their names."""
        order: list[str] = []

        def body(*operands: Any) -> tuple[list[Any], list[Any]]:
            outs, found = self.body(jaxpr, operands)
            order[:] = [each.name for each in found]
            return outs, [each.value for each in found]

        return body, order

    def jit(self, eqn: Eqn, operands: list[Any]) -> tuple[list[Any], list[Named]]:
        """Jitted code; a block that is called again is traced once."""
        jaxpr = eqn.params["jaxpr"]
        if id(jaxpr) not in self._jitted:
            body, order = self.wrapped(jaxpr)
            body.__name__ = body.__qualname__ = eqn.params["name"]
            run = jax.jit(body, **jit_options(eqn, [None] * len(operands)))
            self._jitted[id(jaxpr)] = run, order
        run, order = self._jitted[id(jaxpr)]
        return _named(run(*operands), order)

    def remat(self, eqn: Eqn, operands: list[Any]) -> tuple[list[Any], list[Named]]:
        """Rematerialised code: the wanted values are results, so they are kept."""
        body, order = self.wrapped(eqn.params["jaxpr"])
        how = {"policy": eqn.params["policy"], "prevent_cse": eqn.params["prevent_cse"]}
        return _named(jax.checkpoint(body, **how)(*operands), order)

    def scan(self, eqn: Eqn, operands: list[Any]) -> tuple[list[Any], list[Named]]:
        """A scan: the wanted values of all steps, stacked."""
        params = eqn.params
        n, m = jaxprs.scan_parts(params)
        body, order = self.wrapped(params["jaxpr"])

        def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], Any]:
            outs, values = body(*operands[:n], *carry, *x)
            return outs[:m], (outs[m:], values)

        how = {name: params[name] for name in ("length", "reverse", "unroll") if name in params}
        if params.get("_split_transpose"):
            how["_split_transpose"] = True
        end, (ys, values) = lax.scan(step, operands[n : n + m], operands[n + m :], **how)
        return _named(([*end, *ys], values), order)

    def call(self, eqn: Eqn, operands: list[Any]) -> tuple[list[Any], list[Named]]:
        """Code that is called as it is."""
        return self.body(next(iter(core.jaxprs_in_params(eqn.params))), operands)


def _named(
    made: tuple[Sequence[Any], Sequence[Any]], order: Sequence[str]
) -> tuple[list[Any], list[Named]]:
    outs, values = made
    return [*outs], [Named(name, value) for name, value in zip(order, values, strict=True)]


_RULES: dict[str, Callable[..., tuple[list[Any], list[Named]]]] = {
    "jit": _Hoist.jit,
    "pjit": _Hoist.jit,
    "remat2": _Hoist.remat,
    "checkpoint": _Hoist.remat,
    "scan": _Hoist.scan,
    **dict.fromkeys(_CALLS, _Hoist.call),
}

_REASONS = {
    "while": "a `while` loop, whose steps are not counted (a fori_loop of static bounds is a scan "
    "once it is differentiated; lax.scan always)",
    "cond": "one branch of a conditional, and may not be computed at all",
    "shard_map": "a `shard_map`, where each device has a value of its own",
    "custom_jvp_call": "a function with a derivative of its own (jax.custom_jvp)",
    "custom_vjp_call": "a function with a derivative of its own (jax.custom_vjp)",
}


def _raise_not_captured(path: str, primitive: str) -> NoReturn:
    """Refuses a value that cannot leave the code that computes it."""
    where = _REASONS.get(primitive, f"`{primitive}`, which has no rule here")
    raise NotImplementedError(
        f"{WHO}: {path} is computed in {where}. Leave it out of the patterns, or return the value "
        "from the function yourself."
    )
