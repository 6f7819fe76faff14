"""Training and adapters: what has no gradient, what a state was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp


def not_trainable(who: str) -> None:
    """Raised when a packed kernel is given to ``jax.grad`` or to an optimizer."""
    raise TypeError(
        f"{who}: `params` holds packed kernels (PackedTernary), and two-bit codes have no "
        "gradient. To train the float leaves around them, split the tree: `trainable, frozen "
        "= bj.partition(params)`, differentiate `lambda t: loss(bj.combine(t, frozen))` and "
        "give the optimizer `trainable` alone (nnx: wrt=bj.nnx.trainable). To train the "
        "kernels themselves, train float params and pack them afterwards, or start from "
        "bj.unpack_params(params)."
    )


def params_given(who: str, params: Any) -> None:
    """Refuses an update without params."""
    if params is None:
        raise ValueError(
            f"{who}: `params` is missing. Call tx.update(grads, state, params), as weight decay "
            "needs it too."
        )


def same_kernels(who: str, got: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuses params with other kernels than the state was made for."""
    if list(got) != list(wanted):
        raise ValueError(
            f"{who}: `params` has the kernels {', '.join(got)}, and the state was made for "
            f"{', '.join(wanted)}. Call tx.init(params) again."
        )


def same_snapshot(who: str, path: str, shape: Sequence[int], got: Sequence[int] | None) -> None:
    """Refuses to compare a kernel with the codes of another."""
    if got is None or tuple(got) != tuple(shape):
        what = "has no codes of it" if got is None else f"has codes of shape {tuple(got)}"
        raise ValueError(
            f"{who}: {path} has codes of shape {tuple(shape)}, and `previous` {what}. Pass the "
            "result for the same model, config and selection."
        )


def snapshot_entry(who: str, path: str, entry: Any) -> None:
    """Refuses what is no snapshot of a kernel."""
    if not isinstance(entry, Mapping) or set(entry) != {"codes", "scale"}:
        raise TypeError(
            f"{who}: `previous` must hold codes and scale for {path}, got "
            f"{type(entry).__name__}. Pass what trit_stats returned, or its `snapshot`."
        )


def snapshot_paths(who: str, strangers: Sequence[str], paths: Sequence[str]) -> None:
    """Refuses a snapshot with kernels that are not watched."""
    if strangers:
        raise ValueError(
            f"{who}: `previous` has {', '.join(strangers)}, which is no selected kernel; those "
            f"are {', '.join(paths)}. Pass the result for the same model, config and selection."
        )


def watched_activations(who: str, strangers: Sequence[str], paths: Sequence[str]) -> None:
    """Refuses the inputs of kernels that are not watched."""
    if strangers:
        raise ValueError(
            f"{who}: `activations` has {', '.join(strangers)}, which is no selected kernel; those "
            f"are {', '.join(paths)}."
        )


def one_watch(who: str, count: int) -> None:
    """Refuses an optimizer state that holds no statistics, or several."""
    if count != 1:
        raise ValueError(
            f"{who}: `opt_state` holds {count} states of watch_trits, and needs one. Put "
            "bj.optim.watch_trits() into the optax.chain, once."
        )


def lora_rank(who: str, path: str, rank: Any, most: int) -> None:
    """Refuses a rank that is none, or that no update of this kernel has."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise ValueError(
            f"{who}: `rank` must be an integer from 1 to {most}, the smaller side of {path}, got "
            f"{rank!r}. Choose a smaller one, or leave the kernel out (select=)."
        )


def lora_paths(who: str, strangers: Sequence[str], paths: Sequence[str]) -> None:
    """Refuses adapters for kernels that a tree has not."""
    if strangers:
        raise ValueError(
            f"{who}: `adapters` has {', '.join(strangers)}, which is no packed kernel of `packed`; "
            f"those are {', '.join(paths) or 'none'}. Pass the tree that they were made for."
        )


def lora_shapes(who: str, path: str, wanted: Sequence[Any], got: Sequence[Any]) -> None:
    """Refuses an adapter of another shape than its kernel."""
    if [tuple(shape) for shape in wanted] != [tuple(shape) for shape in got]:
        raise ValueError(
            f"{who}: the adapter of {path} has a and b of shapes {tuple(got[0])} and "
            f"{tuple(got[1])}, and its kernel takes {tuple(wanted[0])} and {tuple(wanted[1])}. "
            "Pass the tree that the adapters were made for."
        )


def adapter_finite(who: str, path: str, a: Any, b: Any) -> None:
    """Refuses to merge an adapter with NaN or Inf; reads its values."""
    if not (bool(jnp.isfinite(a).all()) and bool(jnp.isfinite(b).all())):
        raise ValueError(
            f"{who}: the adapter of {path} has NaN or Inf. Restore one from before it diverged."
        )


def adapter_groups(who: str, path: str, groups: int) -> None:
    """Refuses an adapter over a convolution with feature groups."""
    if groups != 1:
        raise NotImplementedError(
            f"{who}: the kernel at {path} has an adapter and {groups} feature groups; a low-rank "
            "update mixes all channels. Leave this kernel out of bj.lora.init (select=)."
        )
