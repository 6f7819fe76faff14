"""What differs between versions of JAX about a jaxpr, and the plain evaluation of its equations."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.extend import core

Eqn = core.JaxprEqn

# Closed, open, or the one class that both are on jax 0.12.
Jaxpr = core.Jaxpr | core.ClosedJaxpr

Atom = core.Var | core.Literal


def opened(jaxpr: Jaxpr) -> tuple[core.Jaxpr, Sequence[Any]]:
    """A jaxpr and its constants."""
    inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, getattr(jaxpr, "consts", ())


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of an operand or a result; () of what is no array."""
    return getattr(atom.aval, "shape", ())


def dtype_of(atom: Atom) -> np.dtype:
    """The dtype of an operand or a result."""
    return getattr(atom.aval, "dtype", np.dtype(bool))


def is_variable(atom: Atom) -> TypeGuard[core.Var]:
    """Whether an operand of an equation is a variable, and not a literal."""
    return not isinstance(atom, core.Literal)


def scope(eqn: Eqn) -> str:
    """The names around an equation: of modules, of ``jax.named_scope``, of transformations."""
    return str(eqn.source_info.name_stack)


def has_jaxpr(eqn: Eqn) -> bool:
    """Whether an equation runs other jaxprs: whether its primitive is a higher-order one."""
    return any(True for _ in core.jaxprs_in_params(eqn.params))


def scan_parts(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a ``scan`` are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


# What runs its one jaxpr once, on its operands.
_CALLS = frozenset({"jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "core_call"})


def handed_on(jaxpr: Jaxpr) -> list[int | None]:
    """For each result of a jaxpr, the number of the operand that it is; None: it is computed."""
    inner, _ = opened(jaxpr)
    numbers: dict[Any, int | None] = {v: i for i, v in enumerate(inner.invars)}
    for eqn in inner.eqns:
        for v, at in zip(eqn.outvars, forwarded(eqn), strict=True):
            source = None if at is None else eqn.invars[at]
            numbers[v] = None if isinstance(source, core.Literal) else numbers.get(source)
    return [numbers.get(v) if is_variable(v) else None for v in inner.outvars]


def forwarded(eqn: Eqn) -> list[int | None]:
    """For each result of an equation, the number of the operand that it is, as a whole."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        n, m = scan_parts(params)
        # What is carried and comes round as it was; of what is scanned, all steps.
        pairs = enumerate(-1 if at is None else at for at in handed_on(params["jaxpr"]))
        return [at if (at == n + i if i < m else at >= n + m) else None for i, at in pairs]
    if name == "cond":
        each = [handed_on(branch) for branch in params["branches"]]
        same = [outs[0] if len({*outs}) == 1 else None for outs in zip(*each, strict=True)]
        return [None if at is None else at + 1 for at in same]
    if name in _CALLS:
        return handed_on(next(core.jaxprs_in_params(params)))
    return [None] * len(eqn.outvars)


def inside(eqn: Eqn) -> contextlib.AbstractContextManager[Any]:
    """The context that an equation was traced in: its settings and its names."""
    stack = contextlib.ExitStack()
    stack.enter_context(eqn.ctx.manager)
    names = scope(eqn)
    if names:
        stack.enter_context(jax.named_scope(names))
    return stack


def evaluate(
    jaxpr: core.Jaxpr, eqns: Sequence[Any], results: Sequence[Any], values: dict[Any, Any]
) -> list[Any]:
    """Runs equations of a jaxpr as they are: ``results`` of them, from the ``values`` they need."""
    made: set[Any] = set()
    free: dict[Any, None] = {}
    for eqn in eqns:
        free.update(dict.fromkeys(v for v in eqn.invars if is_variable(v) and v not in made))
        made.update(eqn.outvars)
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    debug_info = jaxpr.debug_info.with_unknown_names()
    part = core.Jaxpr([], list(free), list(results), list(eqns), effects, debug_info)
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*(values[v] for v in free))
