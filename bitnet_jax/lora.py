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
>>> grads = jax.grad(loss)(adapters)  # with respect to the adapters alone
>>> jax.tree.map(jnp.shape, grads.kernels)
{'kernel': {'a': (64, 4), 'b': (4, 16)}}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jaxtyping import PyTree

from bitnet_jax import _checks, _display
from bitnet_jax._matmul import require_usable
from bitnet_jax._packed import trits
from bitnet_jax._packed.adapted import Adapted, is_adapted
from bitnet_jax._packed.kernel import Packed, Stored, block, is_packed, is_stored, split
from bitnet_jax._packed.pack import pack_kernel
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._packed.static_data import register_export
from bitnet_jax._packed.stored import PackedTernary
from bitnet_jax._quantize import kernel_axes, statistics
from bitnet_jax._quantize.kernel_spec import KernelSpec
from bitnet_jax._quantize.rotation import rotated_kernel
from bitnet_jax._quantize.rounded import quotient
from bitnet_jax._tree.leaves import Leaf, flatten, rebox
from bitnet_jax._tree.select import Select, matched

__all__ = ["Adapters", "MergeReport", "MergedKernel", "attach", "init", "merge"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Adapters:
    """The adapters of a model: a pytree to differentiate, optimise and checkpoint.

    Attributes:
      kernels: path (names joined by ``/``) to ``{"a": (*batch, K, rank), "b": (*batch,
        rank, N)}``.
      alpha: the update of a kernel is ``(alpha / rank) * a @ b``.
    """

    kernels: dict[str, dict[str, Any]]  # a tree.map may put anything in the place of arrays
    alpha: float = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        """How many kernels, and alpha: not every weight."""
        return f"Adapters({len(self.kernels)} kernels, alpha={self.alpha:g})"

    def to_dict(self) -> dict[str, Any]:
        """A tree for :func:`bitnet_jax.io.save`: the kernels, and alpha as a float64 scalar."""
        return {"kernels": self.kernels, "alpha": np.float64(self.alpha)}

    @classmethod
    def from_dict(cls, tree: Mapping[Any, Any]) -> Adapters:
        """The adapters that :meth:`to_dict` made a tree of.

        Args:
          tree: of :func:`bitnet_jax.io.load`.

        Returns:
          :class:`Adapters`, with their alpha.

        Raises:
          ValueError: another tree, or an alpha that is not above 0.

        Example:
          >>> import jax, bitnet_jax as bj
          >>> packed = {"kernel": bj.pack(jax.numpy.ones((64, 10)))}
          >>> adapters = bj.lora.init(packed, 4, key=jax.random.key(0), alpha=8)
          >>> bj.lora.Adapters.from_dict(adapters.to_dict()).alpha
          8.0
        """
        if not isinstance(tree, Mapping) or set(tree) != {"kernels", "alpha"}:
            raise ValueError(
                f"Adapters.from_dict: `tree` must have the keys kernels and alpha, got "
                f"{sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__}. "
                "Pass what adapters.to_dict() returned, saved and loaded."
            )
        alpha = float(tree["alpha"])
        _checks.require_positive("Adapters.from_dict", "alpha", alpha)
        return cls({str(path): dict(pair) for path, pair in tree["kernels"].items()}, alpha)

    @property
    def size(self) -> int:
        """How many weights the adapters have."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.kernels))


register_export(Adapters)
serialization.register_serialization_state(
    Adapters,
    lambda adapters: serialization.to_state_dict(adapters.to_dict()),
    lambda target, state: Adapters.from_dict(
        dict(serialization.from_state_dict(target.to_dict(), state))
    ),
)


def init(
    packed: PyTree,
    rank: int,
    *,
    key: jax.Array,
    select: Select | None = None,
    alpha: int | float | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Adapters:
    """New adapters, whose update is zero: ``a`` is normal / sqrt(K), ``b`` is 0.

    Args:
      packed: a packed tree (or ``nnx.State``), from ``pack`` or ``bj.io.load``.
      rank: of each update, from 1 to the smaller side of the smallest kernel.
      key: a random key.
      select: which packed kernels get an adapter; by default all.
      alpha: the update is multiplied by alpha / rank; by default alpha is rank.
      dtype: of the adapters.

    Returns:
      :class:`Adapters`, for :func:`attach`.

    Raises:
      ValueError: a rank that is not an integer in range (the error names the path), a
        tree without packed kernels, a selector that matches nothing.
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
    leaves = [leaf for leaf in _leaves(who, packed)[0] if is_packed(leaf.value)]
    if not leaves:
        _checks.raise_nothing_packed(who)
    decisions = [select is None or bool(select(leaf.path, leaf.value)) for leaf in leaves]
    matched(who, [leaf.path for leaf in leaves], any(decisions), select)
    chosen = [leaf for leaf, decision in zip(leaves, decisions, strict=True) if decision]
    for leaf in chosen:
        _require_stored(who, leaf)
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


def attach(packed: PyTree, adapters: Adapters) -> PyTree:
    """The packed tree with an adapter beside each adapted kernel, for the same ``apply``.

    Call it inside the loss, and differentiate with respect to the adapters. In
    NNX: ``nnx.merge(graphdef, bj.lora.attach(state, adapters))``.

    Args:
      packed: the tree that :func:`init` was given, stored or prepared.
      adapters: from :func:`init`, trained or not.

    Returns:
      The tree with ``Adapted`` leaves in place of the adapted kernels.

    Raises:
      TypeError: ``adapters`` is not an :class:`Adapters`.
      ValueError: a path that the tree lacks, or that is not packed; an adapter whose
        shape does not fit its kernel.

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
    done = [leaf.boxed if a is None else rebox(leaf.boxed, a) for leaf, a in leaves]
    return jax.tree.unflatten(treedef, done)


def _adapted_leaves(
    who: str, packed: PyTree, adapters: Adapters
) -> tuple[list[tuple[Leaf, Adapted | None]], Any]:
    """Every leaf with its Adapted or None, and the structure; raises if they do not fit."""
    remedy = (
        "Make them with bj.lora.init(packed, rank, key=...); of a loaded tree, with "
        "bj.lora.Adapters.from_dict(tree)."
    )
    _checks.require_instance(who, "adapters", adapters, Adapters, remedy)
    leaves, treedef = _leaves(who, packed)
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
        done.append((leaf, adapted))
    return done, treedef


def _leaves(who: str, packed: PyTree) -> tuple[list[Leaf], Any]:
    """The leaves of a packed tree and its structure; raises on adapters and equal paths."""
    leaves, treedef = flatten(who, "packed", packed, is_leaf=is_adapted)
    paths: set[str] = set()
    for leaf in leaves:
        if is_adapted(leaf.value):
            raise TypeError(
                f"{who}: {leaf.where} has an adapter already. Pass the packed tree that "
                "bj.lora.attach was given."
            )
        if leaf.where in paths:  # adapters are kept by path
            raise ValueError(
                f"{who}: `packed` has two leaves with the path {leaf.where}. Rename one."
            )
        paths.add(leaf.where)
        if is_packed(leaf.value):
            require_usable(who, leaf.where, leaf.value)
    return leaves, treedef


def _require_stored(who: str, leaf: Leaf) -> None:
    """Raises on a prepared kernel."""
    if isinstance(leaf.value, Prepared):
        _checks.raise_prepared(who, leaf.where, leaf.value.implementation)


def _require_one_plane(who: str, leaf: Leaf) -> None:
    """Raises on a kernel of planes: no rounding of the sum to all of their grids is known."""
    if leaf.value.planes > 1:
        raise NotImplementedError(
            f"{who}: {leaf.where} is a sum of {leaf.value.planes} ternary planes, which an update "
            "cannot be merged into. Keep the adapter and bj.lora.attach it, or pack "
            "dequantize() plus the update anew."
        )


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
      update: relative size of the update, ``|dW| / |W_q|`` (Frobenius norms).
      error: relative error of the merged kernel, ``|W_m - (W_q + dW)| / |W_q + dW|``.
      changed: share of the codes that changed, 0 to 1.
    """

    path: str
    rank: int
    update: float
    error: float
    changed: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What :func:`merge` did; ``str`` is a table.

    Attributes:
      rows: one :class:`MergedKernel` for each adapted kernel.
    """

    rows: tuple[MergedKernel, ...]

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """``{"rows": [...]}`` as plain Python, each row a dict of its fields."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows]}

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
            for row in self.rows
        ]
        return _display.table(("path", "rank", "update", "error", "codes changed"), rows)


def merge(packed: PyTree, adapters: Adapters) -> tuple[PyTree, MergeReport]:
    """Merges adapters into the codes: dequantise, add the update, quantise again.

    A ternary kernel is quantised on its own grid: the nearest codes,
    ``clip(round(w / s), -1, 1)`` with its scale ``s``, then the scale that fits them
    best. A small update that changes no code is lost; the report says how much. To keep
    all of it, keep the adapters and :func:`attach` them.

    Args:
      packed: the stored tree that the adapters were trained over.
      adapters: from training.

    Returns:
      The packed tree, every kernel with its config and axes, so that the same layers run
      it, and a :class:`MergeReport`.

    Raises:
      TypeError: a prepared kernel.
      ValueError: as :func:`attach`; adapters with NaN or Inf.
      NotImplementedError: an adapted kernel of planes.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> packed = {"kernel": bj.pack(jax.random.normal(jax.random.key(0), (64, 16)))}
      >>> adapters = bj.lora.init(packed, 4, key=jax.random.key(1))
      >>> merged, report = bj.lora.merge(packed, adapters)
      >>> report.rows[0].update, report.rows[0].changed
      (0.0, 0.0)

    References:
      Hu et al., arXiv:2106.09685, section 4.1 (merging), here with a rounding.
    """
    who = "lora.merge"
    leaves, treedef = _adapted_leaves(who, packed, adapters)
    for leaf, adapted in leaves:
        if adapted is not None:
            _require_stored(who, leaf)
            _require_one_plane(who, leaf)
            _require_finite_adapter(who, leaf.where, adapted.a, adapted.b)
    done, rows = [], []
    for leaf, adapted in leaves:
        if adapted is None:
            done.append(leaf.boxed)
            continue
        kernel, measured = _merge(adapted)
        done.append(rebox(leaf.boxed, kernel))
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
        merged = pack_kernel(whole.astype(base.dtype), KernelSpec(base.config, axes))

    def norm(v: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(v).sum())

    tiny = jnp.float32(1e-30)
    changed = (merged.int8_codes() != base.int8_codes()).astype(jnp.float32).mean()
    lost = norm(merged.dequantize(jnp.float32) - whole) / jnp.maximum(norm(whole), tiny)
    return merged, (norm(update) / jnp.maximum(norm(w), tiny), lost, changed)


def _on_grid(base: PackedTernary, w: jax.Array) -> PackedTernary:
    """The nearest codes on the kernel's own grid, and the scale that fits them best.

    Quantising by the config would shrink the scale: the mean of ternary weights is their
    scale times the share of nonzero ones, about two thirds. The scale that minimises
    ``|w - s codes|`` is ``<w, codes> / <codes, codes>``.
    """
    w = rotated_kernel(kernel_axes.to_canonical(w, base.axes), block(base))
    old = base.canonical_scale()
    groups, shared = old.shape[-2], old.shape[-1] == 1
    # (*batch, K, N) as (*batch, groups, K / groups, N): each group has scales of its own.
    w = w.reshape(*w.shape[:-2], groups, w.shape[-2] // groups, w.shape[-1])
    codes = jnp.clip(jnp.round(quotient(w, old[..., None, :])), -1.0, 1.0)
    over = (-2, -1) if shared else -2
    along = statistics.total(w * codes, shared)[..., 0, :]  # in an order that is fixed
    count = jnp.abs(codes).sum(over, keepdims=True)[..., 0, :]
    scale = jnp.where(along > 0.0, quotient(along, jnp.maximum(count, 1.0)), old)
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


def _require_rank(who: str, path: str, rank: object, most: int) -> None:
    """Raises unless a rank is an integer from 1 to the smaller side of the kernel."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise ValueError(
            f"{who}: `rank` must be an integer from 1 to {most}, the smaller side of {path}, got "
            f"{rank!r}. Choose a smaller one, or leave the kernel out (select=)."
        )


def _require_known_paths(who: str, unknown: Sequence[str], paths: Sequence[str]) -> None:
    """Raises if adapters name kernels that a tree lacks."""
    if unknown:
        raise ValueError(
            f"{who}: `adapters` has {', '.join(unknown)}, which is no packed kernel of `packed`; "
            f"those are {', '.join(paths) or 'none'}. Pass the tree that they were made for."
        )


def _require_adapter_shapes(
    who: str, path: str, wanted: Sequence[tuple[int, ...]], got: Sequence[tuple[int, ...]]
) -> None:
    """Raises unless an adapter's shapes fit its kernel."""
    if [tuple(shape) for shape in wanted] != [tuple(shape) for shape in got]:
        raise ValueError(
            f"{who}: the adapter of {path} has a and b of shapes {tuple(got[0])} and "
            f"{tuple(got[1])}, and its kernel takes {tuple(wanted[0])} and {tuple(wanted[1])}. "
            "Pass the tree that the adapters were made for."
        )


def _require_finite_adapter(who: str, path: str, a: jax.Array, b: jax.Array) -> None:
    """Raises if an adapter has NaN or Inf; reads its values."""
    if not (bool(jnp.isfinite(a).all()) and bool(jnp.isfinite(b).all())):
        raise ValueError(
            f"{who}: the adapter of {path} has NaN or Inf. Restore one from before it diverged."
        )
