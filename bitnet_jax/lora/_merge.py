"""Merging: adapters into the codes of their kernels, and a report of what that lost."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bitnet_jax import _display
from bitnet_jax._packed import trits
from bitnet_jax._packed.adapted import Adapted
from bitnet_jax._packed.kernel import Stored, block, is_stored
from bitnet_jax._packed.pack import pack_kernel
from bitnet_jax._packed.stored import PackedTernary
from bitnet_jax._quantize import kernel_axes, statistics
from bitnet_jax._quantize.kernel_spec import KernelSpec
from bitnet_jax._quantize.rotation import rotated_kernel
from bitnet_jax._quantize.rounded import quotient
from bitnet_jax._tree.leaves import Leaf, rebox
from bitnet_jax.lora._adapters import Adapters, adapted_leaves, require_stored


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
    leaves, treedef = adapted_leaves(who, packed, adapters)
    for leaf, adapted in leaves:
        if adapted is not None:
            require_stored(who, leaf)
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


def _require_one_plane(who: str, leaf: Leaf) -> None:
    """Raises on a kernel of planes: no rounding of the sum to all of their grids is known."""
    if leaf.value.planes > 1:
        raise NotImplementedError(
            f"{who}: {leaf.where} is a sum of {leaf.value.planes} ternary planes, which an update "
            "cannot be merged into. Keep the adapter and bj.lora.attach it, or pack "
            "dequantize() plus the update anew."
        )


def _require_finite_adapter(who: str, path: str, a: jax.Array, b: jax.Array) -> None:
    """Raises if an adapter has NaN or Inf; reads its values."""
    if not (bool(jnp.isfinite(a).all()) and bool(jnp.isfinite(b).all())):
        raise ValueError(
            f"{who}: the adapter of {path} has NaN or Inf. Restore one from before it diverged."
        )
