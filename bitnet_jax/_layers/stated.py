"""A kernel that says how it is quantised, where a program is read instead of run.

A layer of this package quantises its own kernel. A transformation that reads the program would
see the operations that quantise, and not which product they are for. So while it reads, the layer
states its config with the kernel of a float product, and the transformation does the rest.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from bitnet_jax._context import Ambient
from bitnet_jax._quantize.arrays import Kernel
from bitnet_jax._quantize.strength import Strength

# Whether a program is traced to be read.
reading: Ambient[bool] = Ambient("reading", False, False)

STATED = "bitnet_stated"

_stated_p = Primitive(STATED)


def state(kernel: Kernel, config: Hashable, strength: Strength) -> jax.Array:
    """The kernel, in a program that is read: it is quantised by ``config`` where it is multiplied.

    Args:
      kernel: float.
      config: of the layer.
      strength: of its quantisation; a static one is a parameter of the equation, a traced one an
        operand.
    """
    if isinstance(strength, jax.Array):
        return _stated_p.bind(kernel, jnp.asarray(strength), config=config, strength=None)
    return _stated_p.bind(kernel, config=config, strength=float(strength))


def _abstract(kernel: Any, *strength: Any, **params: Any) -> Any:
    del strength, params
    return kernel


def _batched(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> Any:
    """A mapped strength would be one for each product: it is the kernel's, of all of them."""
    if len(args) > 1 and dims[1] is not None:
        raise NotImplementedError(
            "ternarize: a layer's `strength` is mapped by jax.vmap. Map the ternarised function "
            "instead of the layer inside it."
        )
    return _stated_p.bind(*args, **params), dims[0]


def _pushed(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    """Differentiated inside the program: the float product's derivative, as of every kernel."""
    out = _stated_p.bind(*primals, **params)
    tangent = tangents[0]
    return out, tangent


_stated_p.def_abstract_eval(_abstract)
batching.primitive_batchers[_stated_p] = _batched
ad.primitive_jvps[_stated_p] = _pushed
