"""Where a kernel meets its input: which equations multiply, and how each meets a kernel.

A plan says over which of the leaf's own axes an equation contracts the kernel, which carry slices
with a scale each, and how the axes of input and output go to the canonical order and back. It
is made from the equation and the view alone; where there is none, the reason says why.
"""

from __future__ import annotations

import math

from bitnet_jax._transform.convs import plan_conv
from bitnet_jax._transform.dots import plan_dot
from bitnet_jax._transform.jaxprs import Eqn, shape_of
from bitnet_jax._transform.lookups import plan_lookup
from bitnet_jax._transform.site import Plan
from bitnet_jax._transform.view import View

MULTIPLIES = ("dot_general", "conv_general_dilated")

_PLANS = {
    "dot_general": plan_dot,
    "conv_general_dilated": plan_conv,
    "gather": plan_lookup,
}

MEETS = tuple(_PLANS)


def multiplications(eqn: Eqn) -> int:
    """How many numbers an equation multiplies; 0: it is no product."""
    if eqn.primitive.name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(shape_of(eqn.invars[0])[a] for a in axes)
    elif eqn.primitive.name == "conv_general_dilated":
        _, rhs, _ = eqn.params["dimension_numbers"]
        depth = math.prod(shape_of(eqn.invars[1])[a] for a in rhs[1:])
    else:
        return 0
    return math.prod(shape_of(eqn.outvars[0])) * depth


def plan_of(eqn: Eqn, side: int, view: View) -> Plan | str:
    """How an equation meets the kernel that is its operand ``side``, or why it does not."""
    return _PLANS[eqn.primitive.name](eqn, side, view)
