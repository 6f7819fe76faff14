"""LoRA over packed kernels: train small float adapters, keep the two-bit base frozen.

>>> import jax, jax.numpy as jnp, bitnet_jax as bj
>>> layer = bj.linen.BitDense(16)
>>> x = jax.random.normal(jax.random.key(0), (8, 64))
>>> params = layer.init(jax.random.key(1), x)["params"]
>>> packed, _ = bj.pack_params(params)
>>> adapters = bj.lora.init(packed, 4, key=jax.random.key(2))
>>> def loss(adapters):
...     y = layer.apply({"params": bj.lora.attach(packed, adapters)}, x)
...     return jnp.square(y - 1.0).mean()
>>> grads = jax.grad(loss)(adapters)  # of the adapters alone
>>> jax.tree.map(jnp.shape, grads.kernels)
{'kernel': {'a': (64, 4), 'b': (4, 16)}}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bitnet_jax import _checks, _display
from bitnet_jax._packed import trits
from bitnet_jax._packed.adapted import Adapted
from bitnet_jax._packed.kernel import (
    Packed,
    PackedTernary,
    Prepared,
    Stored,
    is_packed,
    is_stored,
    split,
)
from bitnet_jax._packed.pack import pack_quantized
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._tree.leaves import Leaf, flatten, rebox
from bitnet_jax._tree.select import Select, matched

__all__ = ["Adapters", "MergeReport", "MergedKernel", "attach", "init", "merge"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a model: a pytree to differentiate, optimise and checkpoint.

    Attributes:
      kernels: path (names joined by ``/``) to ``{"a": (*batch, K, rank), "b": (*batch,
        rank, N)}``.
      alpha: the update is ``(alpha / rank) a b``.
    """

    kernels: dict[str, dict[str, jax.Array]]
    alpha: float = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """How many weights are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.kernels))


def init(
    packed: Any,
    rank: int,
    select: Select | None = None,
    *,
    key: jax.Array,
    alpha: float | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Adapters:
    """Adapters that change nothing yet: ``a`` is normal / sqrt(K), ``b`` is zero.

    Args:
      packed: a packed tree (or ``nnx.State``), from ``pack`` or ``bj.io.load``.
      rank: of each update, 1 to the smaller side of the smallest kernel.
      select: which packed kernels get one; by default all.
      key: a random key.
      alpha: the update's weight is alpha / rank; by default alpha is rank.
      dtype: of the adapters.

    Returns:
      :class:`Adapters`, for :func:`attach`.

    Raises:
      ValueError: a rank that is no integer in range (the path is named), a tree
        without packed kernels, a selector that matches nothing.
      TypeError: a prepared kernel: pass the stored tree, prepare it afterwards.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> packed = {"head": {"kernel": bj.pack(jax.numpy.ones((64, 10)))}}
      >>> bj.lora.init(packed, 4, key=jax.random.key(0)).size
      296

    References:
      Hu et al., arXiv:2106.09685, section 4.1.
    """
    who = "lora.init"
    leaves = [leaf for leaf in flatten(who, "packed", packed)[0] if is_packed(leaf.value)]
    if not leaves:
        _checks.raise_nothing_packed(who)
    decisions = [select is None or bool(select(leaf.path, leaf.value)) for leaf in leaves]
    matched(who, [leaf.path for leaf in leaves], any(decisions), select)
    chosen = [leaf for leaf, decision in zip(leaves, decisions, strict=True) if decision]
    for leaf in chosen:
        _refuse_prepared(who, leaf)
    sizes = [_canonical_shape(leaf.value) for leaf in chosen]
    for leaf, (_, k, n) in zip(chosen, sizes, strict=True):
        _require_rank(who, leaf.where, rank, min(k, n))
    if alpha is not None:
        _checks.require_positive(who, "alpha", alpha)
    kernels = {}
    keys = jax.random.split(key, len(chosen))
    for leaf, (batch, k, n), own in zip(chosen, sizes, keys, strict=True):
        a = jax.random.normal(own, (*batch, k, rank), dtype) * jnp.asarray(k**-0.5, dtype)
        kernels[leaf.where] = {"a": a, "b": jnp.zeros((*batch, rank, n), dtype)}
    return Adapters(kernels, float(rank if alpha is None else alpha))


def attach(packed: Any, adapters: Adapters) -> Any:
    """The packed tree with adapters at its kernels, for the same ``apply``.

    Call it inside the loss, and differentiate with respect to the adapters. In
    NNX: ``nnx.merge(graphdef, bj.lora.attach(state, adapters))``.

    Args:
      packed: the tree that :func:`init` was given, stored or prepared.
      adapters: from :func:`init`, trained or not.

    Returns:
      The tree with ``Adapted`` leaves in place of the adapted kernels.

    Raises:
      TypeError: ``adapters`` are none.
      ValueError: a path that the tree has not, or that is not packed; an adapter
        of another shape than its kernel.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> packed = {"kernel": bj.pack(jax.numpy.ones((64, 10)))}
      >>> adapters = bj.lora.init(packed, 4, key=jax.random.key(0))
      >>> bj.lora.attach(packed, adapters)["kernel"].a.shape
      (64, 4)

    References:
      Hu et al., arXiv:2106.09685, eq. 3.
    """
    who = "lora.attach"
    leaves, treedef = _adapted_leaves(who, packed, adapters)
    done = [leaf if a is None else rebox(leaf, a) for leaf, _, a in leaves]
    return jax.tree.unflatten(treedef, done)


def _adapted_leaves(who: str, packed: Any, adapters: Adapters):
    """Every leaf as (boxed, leaf, its Adapted or None), and the structure; all checked."""
    remedy = "Make them with bj.lora.init(packed, rank, key=...)."
    _checks.require_instance(who, "adapters", adapters, Adapters, remedy)
    leaves, treedef = flatten(who, "packed", packed)
    found = {leaf.where: leaf for leaf in leaves if is_packed(leaf.value)}
    _require_known_paths(who, [path for path in adapters.kernels if path not in found], list(found))
    done = []
    for leaf in leaves:
        pair, adapted = adapters.kernels.get(leaf.where), None
        if pair is not None:
            batch, k, n = _canonical_shape(leaf.value)
            rank = pair["a"].shape[-1]
            wanted = (*batch, k, rank), (*batch, rank, n)
            _require_adapter_shapes(who, leaf.where, wanted, (pair["a"].shape, pair["b"].shape))
            adapted = Adapted(leaf.value, pair["a"], pair["b"], adapters.alpha / rank)
        done.append((leaf.boxed, leaf, adapted))
    return done, treedef


def _refuse_prepared(who: str, leaf: Leaf) -> None:
    if isinstance(leaf.value, Prepared):
        _checks.raise_prepared(who, leaf.where, leaf.value.implementation)


def _canonical_shape(kernel: Packed) -> tuple[tuple[int, ...], int, int]:
    """(batch, K, N) of a packed kernel."""
    batch, contraction, outputs = split(kernel)
    return batch, math.prod(contraction), math.prod(outputs)


@dataclasses.dataclass(frozen=True)
class MergedKernel:
    """What merging did to one kernel.

    Attributes:
      path: names joined by ``/``.
      rank: of the update.
      update: size of the update, ``|dW| / |W_q|`` (Frobenius).
      error: what quantising again lost, ``|W_m - (W_q + dW)| / |W_q + dW|``.
      changed: share of the codes that changed.
    """

    path: str
    rank: int
    update: float
    error: float
    changed: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What :func:`merge` did; ``print`` it. Rows are in ``kernels``."""

    kernels: tuple[MergedKernel, ...]

    def __str__(self) -> str:
        """A table, one row a kernel."""
        rows = [
            (
                row.path,
                str(row.rank),
                f"{row.update:.3g}",
                f"{row.error:.3g}",
                f"{100 * row.changed:.2f}%",
            )
            for row in self.kernels
        ]
        return _display.table(("path", "rank", "update", "error", "codes changed"), rows)


def merge(packed: Any, adapters: Adapters) -> tuple[Any, MergeReport]:
    """Adapters merged into the codes: dequantise, add, quantise again.

    A ternary kernel keeps its grid: the nearest codes, ``clip(round(w / s), -1, 1)``
    with the scale ``s`` it had, then the scale that fits them best. Two bits hold
    little of a small update: what moves no code is lost. The report says how much;
    to keep all of it, keep the adapters and :func:`attach`.

    Args:
      packed: the stored tree that the adapters were trained over.
      adapters: from training.

    Returns:
      The packed tree, every kernel with the config and axes it had, so that the
      same layers run it, and a :class:`MergeReport`.

    Raises:
      TypeError: a prepared kernel.
      ValueError: as :func:`attach`; adapters with NaN or Inf.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> packed = {"kernel": bj.pack(jax.random.normal(jax.random.key(0), (64, 16)))}
      >>> adapters = bj.lora.init(packed, 4, key=jax.random.key(1))
      >>> merged, report = bj.lora.merge(packed, adapters)
      >>> report.kernels[0].update, report.kernels[0].changed
      (0.0, 0.0)

    References:
      Hu et al., arXiv:2106.09685, section 4.1 (merging), here with a rounding.
    """
    who = "lora.merge"
    leaves, treedef = _adapted_leaves(who, packed, adapters)
    for _, leaf, adapted in leaves:
        if adapted is not None:
            _refuse_prepared(who, leaf)
            _require_finite_adapter(who, leaf.where, adapted.a, adapted.b)
    done, rows = [], []
    for boxed, leaf, adapted in leaves:
        if adapted is None:
            done.append(boxed)
            continue
        kernel, measured = _merge(adapted)
        done.append(rebox(boxed, kernel))
        rows.append(MergedKernel(leaf.where, adapted.a.shape[-1], *map(float, measured)))
    return jax.tree.unflatten(treedef, done), MergeReport(tuple(rows))


def _merge(adapted: Adapted) -> tuple[Stored, tuple[jax.Array, ...]]:
    """The merged kernel, and (update, error, changed)."""
    base = adapted.base
    assert is_stored(base)
    a, b = adapted.a.astype(jnp.float32), adapted.b.astype(jnp.float32)
    axes = base.axes
    _, contraction, outputs = axes.split(base.shape)
    w = base.dequantize(jnp.float32)
    update = kernel_axes.from_canonical(adapted.scale * (a @ b), axes, contraction, outputs)
    whole = w + update
    if isinstance(base, PackedTernary):
        merged: Stored = _on_grid(base, whole)
    else:
        merged = pack_quantized(whole.astype(base.dtype), base.config, axes)[1]

    def norm(v: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(v).sum())

    tiny = jnp.float32(1e-30)
    changed = (merged.int8_codes() != base.int8_codes()).astype(jnp.float32).mean()
    lost = norm(merged.dequantize(jnp.float32) - whole) / jnp.maximum(norm(whole), tiny)
    return merged, (norm(update) / jnp.maximum(norm(w), tiny), lost, changed)


def _on_grid(base: PackedTernary, w: jax.Array) -> PackedTernary:
    """The nearest codes on the kernel's own grid, and for them the best scale.

    The config's own rule would not do: the mean of weights that are ternary
    already is their scale times the share of nonzero ones, a third too small.
    The scale that minimises ``|w - s codes|`` is ``<w, codes> / <codes, codes>``.
    """
    w = kernel_axes.to_canonical(w, base.axes)
    old = base.canonical_scale()
    groups, shared = old.shape[-2], old.shape[-1] == 1
    w = w.reshape(*w.shape[:-2], groups, w.shape[-2] // groups, w.shape[-1])
    codes = jnp.clip(jnp.round(w / old[..., None, :]), -1.0, 1.0)
    over = (-2, -1) if shared else -2
    along = (w * codes).sum(over, keepdims=True)[..., 0, :]
    count = jnp.abs(codes).sum(over, keepdims=True)[..., 0, :]
    scale = jnp.where(along > 0.0, along / jnp.maximum(count, 1.0), old)
    _, contraction, outputs = base.axes.split(base.shape)
    flat = codes.astype(jnp.int8).reshape(*w.shape[:-3], -1, w.shape[-1])
    flat = kernel_axes.from_canonical(flat, base.axes, contraction, outputs)
    return dataclasses.replace(
        base,
        codes=trits.pack_trits(flat, base.contracting_axes[-1]),
        scale=kernel_axes.from_canonical(
            scale,
            base.axes,
            [base.scale.shape[a] for a in base.axes.contracting],
            [base.scale.shape[a] for a in base.axes.outputs],
        ),
    )


def _require_rank(who: str, path: str, rank: Any, most: int) -> None:
    """Refuses a rank that is none, or that no update of this kernel has."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise ValueError(
            f"{who}: `rank` must be an integer from 1 to {most}, the smaller side of {path}, got "
            f"{rank!r}. Choose a smaller one, or leave the kernel out (select=)."
        )


def _require_known_paths(who: str, strangers: Sequence[str], paths: Sequence[str]) -> None:
    """Refuses adapters for kernels that a tree has not."""
    if strangers:
        raise ValueError(
            f"{who}: `adapters` has {', '.join(strangers)}, which is no packed kernel of `packed`; "
            f"those are {', '.join(paths) or 'none'}. Pass the tree that they were made for."
        )


def _require_adapter_shapes(who: str, path: str, wanted: Sequence[Any], got: Sequence[Any]) -> None:
    """Refuses an adapter of another shape than its kernel."""
    if [tuple(shape) for shape in wanted] != [tuple(shape) for shape in got]:
        raise ValueError(
            f"{who}: the adapter of {path} has a and b of shapes {tuple(got[0])} and "
            f"{tuple(got[1])}, and its kernel takes {tuple(wanted[0])} and {tuple(wanted[1])}. "
            "Pass the tree that the adapters were made for."
        )


def _require_finite_adapter(who: str, path: str, a: Any, b: Any) -> None:
    """Refuses to merge an adapter with NaN or Inf; reads its values."""
    if not (bool(jnp.isfinite(a).all()) and bool(jnp.isfinite(b).all())):
        raise ValueError(
            f"{who}: the adapter of {path} has NaN or Inf. Restore one from before it diverged."
        )
