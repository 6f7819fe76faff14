"""``matmul`` and ``prepare``: checks, the choice of an implementation, the gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, Float32, Int, PyTree

from bitnet_jax import _checks, _mesh
from bitnet_jax._matmul.implementations import IMPLEMENTATIONS, Name, choose
from bitnet_jax._ops.codes_product import Operator, contract_codes, planes_apart
from bitnet_jax._ops.contraction import input_gradient
from bitnet_jax._ops.convolution import Convolution
from bitnet_jax._ops.product import Product
from bitnet_jax._packed import intact
from bitnet_jax._packed.adapted import Adapted
from bitnet_jax._packed.kernel import Packed, block, is_packed, is_stored, split
from bitnet_jax._packed.prepared import Prepared, PreparedInt8, PreparedTernary
from bitnet_jax._packed.stored import PackedInt8, PackedTernary, look_up, without_planes
from bitnet_jax._quantize.arrays import (
    Activations,
    CanonicalCodes,
    CanonicalScale,
    DTypeLike,
    Gradient,
)
from bitnet_jax._quantize.config import INT8, ActivationConfig
from bitnet_jax._quantize.int8 import (
    activation_codes,
    check_activations,
    require_activation_groups,
    require_no_activation_groups,
)
from bitnet_jax._quantize.rotation import require_rotated_channels, rotated
from bitnet_jax._quantize.ternary import dequantize_canonical


def matmul(
    x: Activations,
    packed: Packed,
    *,
    activations: ActivationConfig | None = INT8,
    implementation: Name | None = None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "..."]:
    """x times a packed kernel, from its two-bit (or int8) codes.

    The same int8 codes, int32 sums and epilogue as :func:`ternary_dot`, so the
    same bits. Differentiable in x, straight through: ``dx = g w_q^T``.

    Args:
      x: activations; the last axes meet the kernel's contracting axes. With
        batch axes, x starts with them.
      packed: from :func:`pack` or :func:`prepare`.
      activations: as in training, or None for weight-only: a float product with
        the dequantised kernel, which is unpacked whole, whatever the implementation.
      implementation: None picks, for a native product once the program is lowered: for
        another platform than a CPU, and in ``jax.export``, it is plain JAX. ``"cpu"``
        (native), ``"xla"`` or ``"reference"`` runs that one.
      dtype: of the output; by default what x and the kernel's dtype promote to.
      precision: of the float product where ``activations`` is None.

    Returns:
      (*batch, ..., *outputs) of ``dtype``.

    Raises:
      TypeError: x is not floating point, or ``packed`` is not packed.
      ValueError: shapes or groups that do not meet, an unknown implementation, or one
        that a prepared kernel was not prepared for.
      NotImplementedError: the implementation asked for cannot do this, or cannot on
        the platform that the program is lowered for.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> packed = bj.pack(jnp.array([[0.9], [-0.1], [-0.8], [0.6]]))
      >>> bj.matmul(jnp.ones((2, 4)), packed).tolist()
      [[0.6000000238418579], [0.6000000238418579]]

    References:
      Ma et al., arXiv:2402.17764.
    """
    _require_operands("matmul", x, packed, activations)
    _require_known_implementation("matmul", implementation)
    batch, contraction, outputs = split(packed)
    _checks.require_contraction("matmul", x.shape, contraction, batch)
    require_activation_groups("matmul", activations, contraction)
    name = choose(packed, implementation, activations=activations)
    if activations is not None:  # a float product is XLA's, whatever the implementation
        _require_same_implementation("matmul", implementation, name)
        _require_able("matmul", packed, name, activations)
    dtype = dtype or jnp.promote_types(x.dtype, packed.dtype)
    lead = x.shape[: x.ndim - len(contraction)]

    def run(x: Activations, packed: Packed) -> Float[Array, "..."]:
        x = x.reshape(*lead, math.prod(contraction))  # (*rows, K)
        if activations is None:
            x = rotated(x, block(packed))
            y = Product().apply(x.astype(dtype), _float_kernel(packed).astype(dtype), precision)
        else:
            how = _How(activations, name, implementation is not None, np.dtype(dtype))
            y = cast(jax.Array, _matmul(how, x, packed))  # custom_vjp loses the type
        return y.reshape(*lead, *outputs)

    return _on_mesh(run, x, packed)


def convolve(
    x: Float[Array, "b *space c"],
    packed: Packed,
    convolution: Convolution,
    *,
    activations: ActivationConfig | None = INT8,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "b *out n"]:
    """A convolution with a packed kernel, unpacked to int8 where it is used.

    The bits of :func:`bitnet_jax._ops.ternary_dot.ternary_conv`; differentiable in x.
    """
    _require_operands("convolve", x, packed, activations)
    require_no_activation_groups("convolve", activations)
    require_rotated_channels("convolve", packed.config, convolution.has_channels_last)
    dtype = dtype or jnp.promote_types(x.dtype, packed.dtype)

    def run(x: Activations, packed: Packed) -> Float[Array, "..."]:
        x = rotated(x, block(packed))
        if activations is None:
            w = _float_kernel(packed).astype(dtype)
            return convolution.apply(x.astype(dtype), w, precision)
        return cast(jax.Array, _convolve(convolution, activations, x, packed)).astype(dtype)

    return _on_mesh(run, x, packed)


def _on_mesh(
    run: Callable[[Activations, Packed], Float[Array, "..."]], x: Activations, packed: Packed
) -> Float[Array, "..."]:
    """``run(x, packed)``; on Explicit axes the result is sharded as x's rows and the outputs."""
    # In canonical order the outputs come last, so the result's last axes are theirs.
    outputs = split(packed)[2]
    placed: _mesh.Spec = (None,) * len(outputs)
    if is_stored(packed):  # a prepared kernel is whole wherever it is
        entries = without_planes(_mesh.spec_of(packed.codes), packed.plane_axis)
        placed = packed.axes.split(entries)[2]
    return _mesh.in_auto_rows(run, *_mesh.varying_alike(x, packed), outputs=placed)


def embedding_rows(
    packed: PackedInt8 | PreparedInt8, index: Int[Array, "..."]
) -> Float[Array, "... features"]:
    """:meth:`PackedInt8.rows`, from a prepared embedding as well."""
    require_usable("embedding", "the table", packed)
    if isinstance(packed, PackedInt8):
        return packed.rows(index)
    rows_of = IMPLEMENTATIONS[choose(packed)].rows_of
    assert rows_of is not None  # a row that prepares embeddings looks them up
    _checks.require_embedding_lookup("PreparedInt8", index, packed.shape)

    def run(index: Int[Array, "..."], packed: PreparedInt8) -> Float[Array, "... features"]:
        codes_of = functools.partial(rows_of, packed)
        # One scale for each row: canonical (1, N), a table contracts over its features.
        return look_up(codes_of, packed.scale[0][:, None], index, packed.dtype)

    return _mesh.in_auto_rows(run, index, packed, outputs=(None,))


def prepare(tree: PyTree, implementation: Name | None = None) -> PyTree:
    """Lays packed kernels out the way an implementation runs best from.

    Do it once, at load. Prepared kernels stay out of files: keep the stored
    tree for :func:`bitnet_jax.io.save`.

    Args:
      tree: a packed kernel, or any tree with packed kernels among its leaves;
        other leaves pass through.
      implementation: None picks ``"cpu"``, the native one, where this processor has
        more than its portable path, else ``"xla"``. ``"cpu"`` pads each group to 16
        weights along the contraction (int8: to 4), and outputs to 16. Both run
        everywhere; in a program that is exported or lowered for another platform,
        ``"xla"`` is the faster one.

    Returns:
      The tree with ``PreparedTernary`` and ``PreparedInt8`` leaves; where the
      implementation runs from the stored layout, or a kernel is in shards, the leaf
      itself.

    Raises:
      ValueError: a tree without packed kernels, or an unknown implementation.
      TypeError: a kernel prepared already.
      NotImplementedError: the implementation asked for cannot run a kernel; or a
        kernel in shards: prepare each inside ``jax.shard_map``.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 16))}
      >>> packed, _ = bj.pack_params(params)
      >>> bj.prepare(packed, implementation="xla")
      {'kernel': PreparedTernary(shape=(64, 16), for 'xla')}
    """
    _require_known_implementation("prepare", implementation)
    _checks.require_no_report("prepare", "tree", tree)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)
    if not any(is_packed(leaf) for _, leaf in leaves):
        _checks.raise_nothing_packed("prepare")
    done = [_prepare_leaf(path, leaf, implementation) for path, leaf in leaves]
    return jax.tree.unflatten(treedef, done)


def _prepare_leaf(path: KeyPath, leaf: object, implementation: Name | None) -> object:
    where = jax.tree_util.keystr(path) or "`tree`"
    if isinstance(leaf, Prepared):
        _checks.raise_prepared("prepare", where, leaf.implementation)
    if not is_stored(leaf):
        return leaf
    intact.require_arrays("prepare", where, leaf)
    # A layout is one flat array: made of shards, it would have to be gathered first.
    if _mesh.is_sharded(leaf.codes):
        _require_no_name(where, implementation)
        return leaf
    name = choose(leaf, implementation, preparing=True)
    _require_able("prepare", leaf, name)
    make = IMPLEMENTATIONS[name].prepare
    return leaf if make is None else make(leaf)


class _How(NamedTuple):
    """What is static about a product.

    Attributes:
      activations: the quantiser of x.
      name: of the implementation.
      named: whether it was asked for: then it runs, or raises where a program is lowered.
      dtype: of the output.
    """

    activations: ActivationConfig
    name: Name
    named: bool
    dtype: np.dtype


# The packed kernel, and an empty array of x's shape and dtype.
_Residuals = tuple[Packed, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(how: _How, x: Activations, packed: Packed) -> Float[Array, "..."]:
    row = IMPLEMENTATIONS[how.name]
    contract = row.contract if how.named else row.anywhere or row.contract
    return contract(jax.lax.stop_gradient(x), packed, how.activations, how.dtype)


def _matmul_forward(
    how: _How, x: Activations, packed: Packed
) -> tuple[Float[Array, "..."], _Residuals]:
    return _matmul(how, x, packed), (packed, _like(x))


def _matmul_backward(
    how: _How, residuals: _Residuals, g: Gradient
) -> tuple[Float[Array, "..."], None]:
    # None: codes have no gradient. The input's is a float product, by XLA for every row; the
    # rotation, its own transpose, is a part of each implementation.
    del how
    dx = _input_gradient(Product(), residuals, g.astype(jnp.float32))
    return rotated(dx, block(residuals[0])).astype(residuals[1].dtype), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(
    convolution: Convolution, activations: ActivationConfig, x: Activations, packed: Packed
) -> Float32[Array, "..."]:
    x = jax.lax.stop_gradient(x)
    codes, gamma = activation_codes(x, activations, convolution.token_axes)
    # Unpacked to int8 here, at each call: the window cannot be walked in packed bytes. Keeping the
    # codes would gain 1 % (3x3, 64 to 64, 32x32: .273 ms to .269, the least of 150; at a batch of
    # 32 nothing), at four times the memory.
    w, scale = _canonical_codes(packed), _canonical_scale(packed)
    return contract_codes(convolution, codes, gamma, w, scale, activations.qmax, packed.planes)


def _convolve_forward(
    convolution: Convolution, activations: ActivationConfig, x: Activations, packed: Packed
) -> tuple[Float32[Array, "..."], _Residuals]:
    return _convolve(convolution, activations, x, packed), (packed, _like(x))


def _convolve_backward(
    convolution: Convolution,
    activations: ActivationConfig,
    residuals: _Residuals,
    g: Gradient,
) -> tuple[Float[Array, "..."], None]:
    del activations
    return _input_gradient(convolution, residuals, g).astype(residuals[1].dtype), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _like(x: Activations) -> jax.Array:
    """An array without elements that remembers a shape and a dtype."""
    # Residuals are arrays: a leading axis of 0 carries the rest through at no cost.
    return jnp.zeros((0, *x.shape), x.dtype)


def _input_gradient(
    operator: Operator, residuals: _Residuals, g: Gradient
) -> Float32[Array, "..."]:
    packed, like = residuals
    w, planes = (_canonical_codes(packed), _canonical_scale(packed)), packed.planes
    return input_gradient(operator, g, *w, like.shape[1:], planes=planes)


def _canonical_codes(packed: Packed) -> CanonicalCodes:
    if not isinstance(packed, Prepared):
        return packed.canonical_codes()
    codes_of = IMPLEMENTATIONS[choose(packed)].codes_of
    assert codes_of is not None  # a row that prepares has both directions
    return planes_apart(codes_of(packed), packed.planes)


def _canonical_scale(packed: Packed) -> CanonicalScale:
    if not isinstance(packed, Prepared):
        return packed.canonical_scale()
    return planes_apart(packed.scale, packed.planes)


def _float_kernel(packed: Packed) -> Float32[Array, "*b k n"]:
    scale = jax.lax.stop_gradient(_canonical_scale(packed))
    return dequantize_canonical(_canonical_codes(packed), scale, packed.planes)


def _require_operands(who: str, x: object, packed: object, activations: object) -> None:
    """Raises unless x is a float array, the kernel packed and the activations' config one."""
    _checks.require_float_array(who, "x", x)
    _checks.require_values(who, "`x`", x)
    kinds = (PackedTernary, PackedInt8, PreparedTernary, PreparedInt8)
    _checks.require_instance(who, "packed", packed, kinds, "Make one with bj.pack(w).")
    _checks.require_values(who, "`packed`", cast(Packed, packed).codes)
    require_usable(who, "`packed`", cast(Packed, packed))
    check_activations(who, activations)


def require_usable(who: str, name: str, packed: Packed | Adapted) -> None:
    """Raises unless the arrays of a packed kernel are those that an implementation reads."""
    intact.require_intact(who, name, packed)
    base = packed.base if isinstance(packed, Adapted) else packed
    if not isinstance(base, Prepared):
        return
    layout = IMPLEMENTATIONS[choose(base)].layout
    assert layout is not None  # a row that prepares has one
    fault = intact.codes_fault(base.codes, "uint8", layout(base), base.shape)
    if fault is not None:
        raise ValueError(f"{who}: {name} {fault}. {intact.REMEDY}")


def _require_known_implementation(who: str, name: object) -> None:
    """Raises unless the table has a row of this name, or there is no name."""
    _checks.require_one_of(who, "implementation", name, (None, *IMPLEMENTATIONS))


def _require_same_implementation(who: str, asked: Name | None, runs: Name) -> None:
    """Raises where a prepared kernel is asked to run by another implementation than its own."""
    if asked is not None and asked != runs:
        raise ValueError(
            f"{who}: this kernel was prepared for implementation {runs!r}, and "
            f"{asked!r} was asked for. Keep the stored tree and prepare() it for {asked!r}."
        )


def _require_able(
    who: str, packed: Packed, name: Name, activations: ActivationConfig | None = None
) -> None:
    """Raises where an implementation cannot run a kernel, with its reason."""
    reason = IMPLEMENTATIONS[name].unsupported_reason(packed, activations)
    if reason is not None:
        raise NotImplementedError(f"{who}: {reason}")


def _require_no_name(where: str, implementation: Name | None) -> None:
    """Raises where a kernel in shards is to be laid out for an implementation by name."""
    if implementation is not None:
        raise NotImplementedError(
            f"prepare: {where} is in shards, and a layout has no axis to be sharded along. Call "
            "prepare inside jax.shard_map, on each shard, or leave the kernel stored "
            "(implementation=None): bj.matmul runs each shard from there."
        )
