"""What differs between versions of JAX about a jaxpr, and the plain evaluation of its equations."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from bitnet_jax._transform.kinds import AnyJaxpr, Eqn

Atom = Any  # core.Var | core.Literal


def opened(jaxpr: AnyJaxpr) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, whether it came closed, open, or as the one class of jax 0.12."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def is_variable(atom: Atom) -> bool:
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
    jaxpr: AnyJaxpr, eqns: Sequence[Any], results: Sequence[Any], values: dict[Any, Any]
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
