"""Adapters of a packed tree: made, and put beside its kernels."""

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

from bitnet_jax import _checks
from bitnet_jax._matmul import require_usable
from bitnet_jax._packed.adapted import Adapted, is_adapted
from bitnet_jax._packed.kernel import Packed, is_packed, split
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._packed.static_data import register_export
from bitnet_jax._tree.leaves import Leaf, flatten, rebox
from bitnet_jax._tree.select import Select, matched


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
        require_stored(who, leaf)
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
    leaves, treedef = adapted_leaves(who, packed, adapters)
    done = [leaf.boxed if a is None else rebox(leaf.boxed, a) for leaf, a in leaves]
    return jax.tree.unflatten(treedef, done)


def adapted_leaves(
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


def require_stored(who: str, leaf: Leaf) -> None:
    """Raises on a prepared kernel."""
    if isinstance(leaf.value, Prepared):
        _checks.raise_prepared(who, leaf.where, leaf.value.implementation)


def _canonical_shape(kernel: Packed) -> tuple[tuple[int, ...], int, int]:
    """(batch, K, N) of a packed kernel."""
    batch, contraction, outputs = split(kernel)
    return batch, math.prod(contraction), math.prod(outputs)


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
