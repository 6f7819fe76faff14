"""A whole tree of parameters at once: pack it, unpack it, fake-quantise it, split it.

The trees are what Flax makes: nested dicts, ``FrozenDict``, ``nnx.State``, with
leaves boxed or not; anything else that is a pytree works too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import Array, Float, PyTree

from bitnet_jax import _checks, _mesh
from bitnet_jax._checks import describe
from bitnet_jax._packed import intact
from bitnet_jax._packed.adapted import is_adapted
from bitnet_jax._packed.kernel import Stored, is_packed, is_stored
from bitnet_jax._packed.pack import pack_quantized, packing_spec, require_one_plane, unpack_kernel
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._quantize.config import B158, KernelConfig
from bitnet_jax._quantize.kernel_axes import AxesLike
from bitnet_jax._quantize.kernel_spec import KernelSpec, kernel_spec, require_kernel_config
from bitnet_jax._quantize.straight_through import fake_quantize_kernel, traced_strength
from bitnet_jax._quantize.strength import Strength
from bitnet_jax._tree.leaves import Leaf, flatten, is_box, rebox
from bitnet_jax._tree.pack_report import PackReport, layer_report, measure, nbytes
from bitnet_jax._tree.select import AxesOf, Select, axes_for, choose


def pack_params(
    params: PyTree,
    config: KernelConfig = B158,
    *,
    select: Select | None = None,
    axes: AxesOf | None = None,
) -> tuple[PyTree, PackReport | Any]:
    """Rewrites the kernels of a parameter tree to two bits, and reports what that did.

    A head or an embedding that two bits would hurt can have eight: the selector
    returns an ``Int8Config`` for it.

    Args:
      params: a tree of arrays. It is not changed.
      config: the quantiser of the selected leaves.
      select: which leaves; see :func:`exclude` and :func:`only`. A function of
        path and leaf may return a config of its own for each (``TernaryConfig``,
        ``Int8Config`` or None). By default the leaves named ``kernel``.
      axes: a function of path and leaf that returns the keywords of
        :func:`pack` (``contracting_axes``, ``batch_axes``) for a kernel. By
        default those of ``select``, where ``bj.linen.kernels`` or
        ``bj.nnx.kernels`` made it; else a 2-D kernel is (in, out), and other
        ranks are refused.

    Returns:
      The tree with ``PackedTernary`` and ``PackedInt8`` leaves, boxes kept, and a
      :class:`PackReport`. While tracing (``jax.eval_shape``, ``jit``) there are
      no values to report or to check, and the report is None.

    Raises:
      TypeError: a selected leaf is packed already or not floating point.
      ValueError: an empty tree, a selector that matches nothing, a kernel whose
        axes are not known, NaN or Inf weights (the path is named).

    Example:
      >>> import jax, bitnet_jax as bj
      >>> params = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (64, 16))}}
      >>> packed, report = bj.pack_params(params, bj.PHASE4)
      >>> packed["layer"]["kernel"]
      PackedTernary(shape=(64, 16), scale=(1, 16), 320 bytes)
      >>> report.ratio
      12.8
    """
    who = "pack_params"
    chosen, treedef = chosen_leaves(who, params, config, select, values=True)
    axes = axes_for(select, axes)
    specs = [c and spec_of_leaf(who, leaf, c, axes) for leaf, c in chosen]
    traced = any(isinstance(leaf.value, core.Tracer) for leaf, _ in chosen)
    done, rows = [], []
    for (leaf, _), spec in zip(chosen, specs, strict=True):
        packed = leaf.value
        if spec is not None:
            run = functools.partial(_pack_measured, spec=spec)
            packed, measured = _mesh.in_auto_like(run, leaf.value, more=spec.plane_axis)
            if not traced:
                rows.append(layer_report(who, leaf.where, leaf.value, packed, measured))
        done.append(packed)
    boxed = [rebox(leaf.boxed, v) for (leaf, _), v in zip(chosen, done, strict=True)]
    tree = jax.tree.unflatten(treedef, boxed)
    if traced:
        return tree, None  # the annotation's Any: callers would test for None in vain
    before = [leaf.value for leaf, _ in chosen]
    return tree, PackReport(tuple(rows), nbytes(before), nbytes(done))


def spec_of_leaf(who: str, leaf: Leaf, config: KernelConfig, axes: AxesOf | None) -> KernelSpec:
    """The spec of one kernel to pack, checked against its shape and config."""
    contracting, batch = named_axes(who, leaf, axes)
    return packing_spec(f"{who}: {leaf.where}", leaf.value, config, contracting, batch)


@functools.partial(jax.jit, static_argnames="spec")
def _pack_measured(w: Float[Array, "..."], spec: KernelSpec) -> tuple[Stored, dict[str, jax.Array]]:
    t, packed = pack_quantized(w, spec)
    return packed, measure(w, t, packed)


def unpack_params(
    packed: PyTree, *, dtype: jax.typing.DTypeLike | None = None, dequantize: bool = False
) -> PyTree:
    """The float tree of a packed one: kernels that quantise to the same codes and scales.

    Train on from it with ternary layers, or pack it again: nothing changes, to the bit. A
    float network needs ``dequantize=True``: the values that ternary layers compute with,
    codes times scale. Those have another mean, so quantised again with ``"absmean"`` they
    have a smaller scale, and a ternary layer computes other numbers from them.

    Args:
      packed: a tree from :func:`pack_params` or :func:`bitnet_jax.io.load`.
      dtype: of the kernels; by default the dtype that each had.
      dequantize: whether kernels are codes times scale.

    Returns:
      The tree with float kernels in place of packed ones, as :func:`unpack` makes them,
      boxes kept.

    Raises:
      ValueError: no packed kernel in the tree; codes or scale are not as they were made.
      TypeError: a kernel is prepared, or has an adapter.
      NotImplementedError: a kernel has planes, and is not to be dequantised.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> w = jax.random.normal(jax.random.key(0), (64, 16))
      >>> packed, _ = bj.pack_params({"kernel": w})
      >>> again, _ = bj.pack_params(bj.unpack_params(packed))
      >>> bool((again["kernel"].scale == packed["kernel"].scale).all())
      True
      >>> floats = bj.unpack_params(packed, dequantize=True)
      >>> bool((floats["kernel"] == bj.fake_quantize(w)).all())
      True
    """
    leaves, treedef = flatten("unpack_params", "packed", packed, is_leaf=is_adapted)
    for leaf in leaves:
        if is_adapted(leaf.value):
            _raise_adapted(leaf.where)
    if not any(is_packed(leaf.value) for leaf in leaves):
        _checks.raise_nothing_packed("unpack_params")
    for leaf in leaves:
        if isinstance(leaf.value, Prepared):
            _checks.raise_prepared("unpack_params", leaf.where, leaf.value.implementation)
        if is_stored(leaf.value):
            intact.require_arrays("unpack_params", leaf.where, leaf.value)
            if not dequantize:
                require_one_plane("unpack_params", leaf.where, leaf.value)
    done = [
        rebox(leaf.boxed, _unpacked(leaf.value, dtype, dequantize))
        if is_stored(leaf.value)
        else leaf.boxed
        for leaf in leaves
    ]
    return jax.tree.unflatten(treedef, done)


def _unpacked(
    kernel: Stored, dtype: jax.typing.DTypeLike | None, dequantize: bool
) -> Float[Array, "..."]:
    return kernel.dequantize(dtype) if dequantize else unpack_kernel(kernel, dtype)


def fake_quantize_params(
    params: PyTree,
    config: KernelConfig = B158,
    *,
    select: Select | None = None,
    axes: AxesOf | None = None,
    strength: Strength = 1.0,
) -> PyTree:
    """The tree with its kernels fake-quantised, straight-through, for use inside a loss.

    Quantisation-aware training of any library's model: the forward pass sees
    ternary kernels, the gradient reaches the float ones. Activations stay float.

    Args:
      params: a tree of float arrays.
      config: as for :func:`pack_params`.
      select: as for :func:`pack_params`.
      axes: as for :func:`pack_params`.
      strength: 0 (float) to 1 (ternary); static or traced.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      TypeError: as :func:`pack_params`.
      ValueError: as :func:`pack_params`, values excepted.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> params = {"kernel": jnp.array([[0.9], [-0.3]]), "bias": jnp.zeros(1)}
      >>> loss = lambda p: (jnp.ones(2) @ bj.fake_quantize_params(p)["kernel"]).sum()
      >>> jax.grad(loss)(params)["kernel"].tolist()
      [[1.0], [1.0]]
    """
    who = "fake_quantize_params"
    chosen, treedef = chosen_leaves(who, params, config, select, values=True)
    axes = axes_for(select, axes)
    phase = traced_strength(who, strength)
    done = []
    for leaf, c in chosen:
        if c is None:
            done.append(leaf.boxed)
            continue
        contracting, batch = named_axes(who, leaf, axes)
        spec = kernel_spec(f"{who}: {leaf.where}", leaf.value, c, contracting, batch)
        w = _mesh.in_auto_like(
            functools.partial(fake_quantize_kernel, spec=spec), leaf.value, phase
        )
        done.append(rebox(leaf.boxed, w))
    return jax.tree.unflatten(treedef, done)


def chosen_leaves(
    who: str,
    params: PyTree,
    config: KernelConfig,
    select: Select | None,
    *,
    values: bool = False,
) -> tuple[list[tuple[Leaf, KernelConfig | None]], Any]:
    """Every leaf with its config, None where it stays float, and the tree's structure.

    With ``values``, raises for selected leaves that are abstract.
    """
    require_kernel_config(who, config)
    leaves, treedef = flatten(who, "params", params)
    chosen = choose(who, [(leaf.path, leaf.value) for leaf in leaves], config, select)
    for leaf, c in zip(leaves, chosen, strict=True):
        if c is not None:
            if is_packed(leaf.value):
                _checks.raise_already_packed(who, leaf.where)
            _checks.require_kernel(who, leaf.value, leaf.where)
            if values:
                _checks.require_values(who, leaf.where, leaf.value)
    return list(zip(leaves, chosen, strict=True)), treedef


def named_axes(who: str, leaf: Leaf, axes: AxesOf | None) -> tuple[AxesLike | None, AxesLike]:
    """The contracting and the batch axes that ``axes`` gives one kernel."""
    _require_axes_function(who, axes)
    given = axes(leaf.path, leaf.value) if axes is not None else None
    if given is None:
        if leaf.value.ndim != 2:
            _raise_axes_unknown(who, leaf.where, leaf.value.shape)
        return None, ()
    _require_axis_keywords(who, leaf.where, given)
    return given.get("contracting_axes"), given.get("batch_axes", ())


def partition(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into what can be trained and what cannot.

    Packed kernels and integer arrays have no gradient. Differentiate with
    respect to the first tree and give it alone to the optimizer.

    Args:
      params: any tree, packed or not.

    Returns:
      (trainable, frozen), both of the tree's structure, with None in the place
      of every leaf that is in the other.

    Raises:
      ValueError: an empty tree.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> packed, _ = bj.pack_params(params)
      >>> trainable, frozen = bj.partition(packed)
      >>> trainable
      {'bias': Array([0., 0., 0., 0.], dtype=float32), 'kernel': None}
      >>> bj.combine(trainable, frozen)["kernel"]
      PackedTernary(shape=(8, 4), scale=(1, 1), 12 bytes)
    """
    leaves, treedef = flatten("partition", "params", params)
    trains = [
        not is_packed(leaf.value) and jnp.issubdtype(jnp.result_type(leaf.value), jnp.inexact)
        for leaf in leaves
    ]
    both = zip(leaves, trains, strict=True)
    sides = [(leaf.boxed, None) if train else (None, leaf.boxed) for leaf, train in both]
    trainable, frozen = zip(*sides, strict=True)
    return jax.tree.unflatten(treedef, trainable), jax.tree.unflatten(treedef, frozen)


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """Puts together what :func:`partition` split.

    Args:
      trainable: the first tree.
      frozen: the second tree.

    Returns:
      The whole tree.

    Raises:
      ValueError: trees of different structure.

    Example:
      >>> import bitnet_jax as bj
      >>> bj.combine({"a": 1.0, "b": None}, {"a": None, "b": 2.0})
      {'a': 1.0, 'b': 2.0}
    """

    def is_leaf(leaf: object) -> bool:
        return leaf is None or is_packed(leaf) or is_box(leaf)

    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=is_leaf)


def _raise_axes_unknown(who: str, path: str, shape: Sequence[int]) -> NoReturn:
    """Reports a kernel whose axes are needed: its shape does not tell them."""
    raise ValueError(
        f"{who}: {path} has shape {tuple(shape)}; only a 2-D kernel (in, out) tells its axes "
        "by its shape. Pass axes= (a function of path and leaf that returns "
        "{'contracting_axes': ..., 'batch_axes': ...}), or leave it out with "
        f"select=bj.exclude({path!r})."
    )


def _require_axis_keywords(who: str, path: str, value: object) -> None:
    """Raises unless an axis function returned the axis keywords of ``pack``."""
    known = {"contracting_axes", "batch_axes"}
    if not isinstance(value, Mapping) or not set(value) <= known:
        raise TypeError(
            f"{who}: `axes` returned {describe(value)} for {path}. Return a dict with "
            "'contracting_axes' and, for stacked kernels, 'batch_axes'; or None for a 2-D kernel."
        )


def _require_axes_function(who: str, value: object) -> None:
    """Raises unless ``axes`` is a function or None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"{who}: `axes` must be a function of path and leaf, got {describe(value)}. Write for "
            "example axes=lambda path, leaf: {'contracting_axes': (0, 1)}."
        )


def _raise_adapted(path: str) -> NoReturn:
    """Raises on a kernel with an adapter, which unpacking would lose."""
    raise TypeError(
        f"unpack_params: {path} has an adapter, which a float kernel would lose. Unpack the tree "
        "that bj.lora.attach was given, or merge the adapters first: "
        "merged, report = bj.lora.merge(packed, adapters)."
    )
