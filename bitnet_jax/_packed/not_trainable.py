"""Raises a helpful error when ``jax.grad`` or optax gets a packed kernel.

Two-bit codes have no gradient. ``jax.grad`` raises for uint8 leaves without a
remedy, optax silently makes moments of uint8 for them, and neither has a
hook. Both flatten the tree. So a packed leaf, while it is flattened, looks at
the frame that asked for it. If a later version of either renames its functions,
this guard is silent and their own behaviour is back; a test holds both on the
installed versions.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import NoReturn, no_type_check

_TREE_MODULES = ("jax._src.tree", "jax._src.tree_util")

_TRAINERS = ("value_and_grad_f", "tree_zeros_like")


@no_type_check  # a checker's frames would come between
def refuse_training(codes: object) -> None:
    """Raises where ``jax.grad`` or an optax ``init`` flattens a packed leaf.

    Every call of a jitted function flattens its arguments: this comes first in all
    of them, and looks at one name.

    Args:
      codes: the leaf's codes; a placeholder (``optax.MaskedNode``) passes, and so
        does ``jax.grad(..., allow_int=True)``.
    """
    # Two frames up: past flatten, to whoever flattens; then out of JAX's tree modules.
    asker: FrameType | None = sys._getframe(2)
    while asker is not None and asker.f_globals.get("__name__") in _TREE_MODULES:
        asker = asker.f_back
    if asker is None or asker.f_code.co_name not in _TRAINERS or not hasattr(codes, "dtype"):
        return
    name = asker.f_code.co_name
    if name == "value_and_grad_f" and not asker.f_locals.get("allow_int"):
        raise_not_trainable("jax.grad")
    if name == "tree_zeros_like" and _is_optax(asker) and _is_optax(asker.f_back):
        raise_not_trainable("optax init")


def _is_optax(frame: FrameType | None) -> bool:
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("optax.")


def raise_not_trainable(who: str) -> NoReturn:
    """Raised when a packed kernel is given to ``jax.grad`` or to an optimizer."""
    raise TypeError(
        f"{who}: `params` holds packed kernels (PackedTernary), and two-bit codes have no "
        "gradient. To train the float leaves around them, split the tree: `trainable, frozen "
        "= bj.partition(params)`, differentiate `lambda t: loss(bj.combine(t, frozen))` and "
        "give the optimizer `trainable` alone (nnx: wrt=bj.nnx.trainable). To train the "
        "kernels themselves, train float params and pack them afterwards, or start from "
        "bj.unpack_params(params)."
    )
