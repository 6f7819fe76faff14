"""Raises a helpful error when a derivative, an optimizer or a float layer gets a packed kernel.

Two-bit codes have no gradient. ``jax.grad`` raises for uint8 leaves without a remedy,
``jax.vjp`` returns a gradient of no bits, optax makes moments of codes or adds updates to
them, and none of these has a hook. All flatten the tree. So a packed leaf, while it is
flattened, looks at the frames that asked for it. One rule: no function of optax looks into a
packed leaf on behalf of an ``init`` or an ``update``, but the two that put masks over leaves
(``masked``, ``partition``), and none adds to one. What keeps no state of a leaf (``sgd``
without momentum) never asks. If a later version of either library renames its functions,
this guard is silent and their own behaviour is back; tests hold it on the installed versions.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NoReturn, no_type_check


def _globals_of(name: str) -> dict[str, Any]:
    """The globals of a module by its name in jax 0.10 to 0.12; empty where it has none."""
    return vars(sys.modules[name]) if name in sys.modules else {}


# Looked for by identity: comparing names would cost as much as the rest of flattening.
_TREE_UTIL, _TREE, _FLATTREE, _API = (
    _globals_of(f"jax._src.{name}") for name in ("tree_util", "tree", "flattree", "api")
)

_DERIVATIVES = {
    "value_and_grad_f": "jax.grad",
    "vjp": "jax.vjp",
    "_vjp": "jax.vjp",
    "linearize": "jax.linearize",
    "_jvp": "jax.jvp",
    "jacfun": "the Jacobian",
}

ASKERS = _TREE_UTIL, _TREE, _FLATTREE, _API
"""The globals of who flattens for a derivative or an optimizer; no others need the guard."""

_STEPS = ("init", "init_fn", "update", "update_fn")

_ADDITIONS = ("apply_updates", "incremental_update")

_MASKS = ("optax.transforms._masking", "optax.transforms._combining")


@no_type_check  # a checker's frames would come between
def refuse_training(codes: object, asker: FrameType | None) -> None:
    """Raises where a derivative or an optimizer flattens a packed leaf.

    Called by ``flatten`` itself, where a module of :data:`ASKERS` called that.

    Args:
      codes: the leaf's codes; a placeholder (``optax.MaskedNode``) passes, and so
        does ``jax.grad(..., allow_int=True)``.
      asker: the frame that called ``flatten``.
    """
    # Out of JAX's tree modules, to whoever flattens.
    module = asker.f_globals
    while module is _TREE_UTIL or module is _TREE or module is _FLATTREE:
        asker = asker.f_back
        module = asker.f_globals
    if module is _API:
        _refuse_derivative(asker, codes)
        return
    name = module.get("__name__", "")
    if name[:6] == "optax.":
        _refuse_optimizer(asker, codes)
    elif name == "flax.core.scope" and asker.f_code.co_name == "param" and hasattr(codes, "dtype"):
        _raise_float_layer(str(asker.f_locals.get("name")))


@no_type_check
def _refuse_derivative(asker: FrameType, codes: object) -> None:
    name = asker.f_code.co_name
    who = _DERIVATIVES.get(name)
    if who is None or not hasattr(codes, "dtype") or asker.f_locals.get("allow_int"):
        return
    caller = asker.f_back
    while caller is not None and caller.f_globals.get("__name__") == "jax._src.traceback_util":
        caller = caller.f_back
    # grad and Jacobians are made of these, and have looked already, with their allow_int.
    inner = name in ("vjp", "_vjp", "linearize", "_jvp") and caller is not None
    if not (inner and caller.f_globals is _API and caller.f_code.co_name not in ("jvp", "vjp")):
        raise_not_trainable(who)


@no_type_check
def _refuse_optimizer(asker: FrameType, codes: object) -> None:
    if not hasattr(codes, "dtype") or asker.f_globals["__name__"] in _MASKS:
        return
    frame: FrameType | None = asker
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("optax."):
        name = frame.f_code.co_name
        if name in _ADDITIONS:
            raise_not_trainable(f"optax.{name}")
        if name in _STEPS:
            raise_not_trainable(f"optax {name.removesuffix('_fn')}")
        frame = frame.f_back


def _raise_float_layer(name: str) -> NoReturn:
    """Raised where ``module.param`` finds a packed kernel: the module is a float one."""
    raise TypeError(
        f"flax: the parameter {name!r} is packed, and the module that asks for it is a float one. "
        "Apply the model that was packed: bj.linen.ternarize(model), with its `select`; or pass "
        "bj.unpack_params(params, dequantize=True)."
    )


def raise_not_trainable(who: str) -> NoReturn:
    """Raised when a packed kernel is given to a derivative or to an optimizer."""
    raise TypeError(
        f"{who}: `params` holds packed kernels (PackedTernary), and two-bit codes have no "
        "gradient. To train the float leaves around them, split the tree: `trainable, frozen "
        "= bj.partition(params)`, differentiate `lambda t: loss(bj.combine(t, frozen))` and "
        "give the optimizer `trainable` alone (nnx: wrt=bj.nnx.trainable). To train the "
        "kernels themselves, train float params and pack them afterwards, or start from "
        "bj.unpack_params(params)."
    )
