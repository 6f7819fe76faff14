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
