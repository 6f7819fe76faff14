"""Names for what an interpreter handles, for annotations."""

from __future__ import annotations

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

AnyJaxpr = Jaxpr | ClosedJaxpr

# A jax.extend.core.JaxprEqn. Its variables have avals with shapes and dtypes, which its type
# does not say.
Eqn = Any

# An array or a tracer, a packed or adapted kernel in its place, or a kernel seen through
# layout operations: what a variable of a jaxpr stands for while it is interpreted.
Value = Any
