"""``matmul`` and ``prepare``: checks, the table of implementations, the gradient.

An implementation is one module and one row of the table. ``unsupported_reason`` says why it
is not for a kernel. ``implementation=None`` takes the first row that can; a name
runs that row, or raises ``NotImplementedError`` with its reason.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bitnet_jax import _checks, _mesh
from bitnet_jax._matmul import cpu, reference, xla
from bitnet_jax._ops.convolution import Convolution
from bitnet_jax._ops.product import Product
from bitnet_jax._ops.ternary_dot import contract_codes, dequantize_canonical, input_gradient
from bitnet_jax._packed.kernel import (
    Packed,
    PackedInt8,
    PackedTernary,
    Prepared,
    PreparedInt8,
    PreparedTernary,
    is_packed,
    is_stored,
    look_up,
    split,
)
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.int8 import (
    INT8,
    ActivationConfig,
    check_activations,
    quantize_activations_as,
)


class Implementation(NamedTuple):
    """One way to compute the product.

    Attributes:
      contract: (x, packed, activations, dtype) -> the product, from float to float.
      unsupported_reason: packed -> the reason why not, or None.
      prepare: stored -> the layout it runs best from; None: the stored one.
      codes_of: prepared -> canonical int8 codes, for the gradient.
      rows_of: (prepared, index) -> int8 codes of rows of an embedding.
      preferred: (packed, preparing) -> whether it may be taken here without being named.
    """

    contract: Callable[..., jax.Array]
    unsupported_reason: Callable[[Packed], str | None]
    prepare: Callable[[Any], Prepared] | None = None
    codes_of: Callable[[Any], jax.Array] | None = None
    rows_of: Callable[[Any, jax.Array], jax.Array] | None = None
    preferred: Callable[[Packed, bool], bool] = lambda *_: True


IMPLEMENTATIONS: dict[str, Implementation] = {
    "cpu": Implementation(
        cpu.contract, cpu.unsupported_reason, cpu.prepare, cpu.codes_of, cpu.rows_of, cpu.preferred
    ),
    "xla": Implementation(
        xla.contract, xla.unsupported_reason, xla.prepare, xla.codes_of, preferred=xla.preferred
    ),
    "reference": Implementation(reference.contract, reference.unsupported_reason),
}


def matmul(
    x: Float[Array, "*b *m k"],
    packed: Packed,
    *,
    activations: ActivationConfig | None = INT8,
    implementation: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*b *m n"]:
    """x times a packed kernel, from its two-bit (or int8) codes.

    The same int8 codes, int32 sums and epilogue as :func:`ternary_dot`, so the
    same bits. Differentiable in x, straight through: ``dx = g w_q^T``.

    Args:
      x: activations; the last axes meet the kernel's contracting axes. With
        batch axes, x starts with them.
      packed: from :func:`pack` or :func:`prepare`.
      activations: as in training, or None for weight-only: a float product with
        the dequantised kernel, which is unpacked whole, whatever the implementation.
      implementation: None picks; ``"cpu"`` (native), ``"xla"`` or ``"reference"``
        runs that one.
      dtype: of the output; by default what x and the kernel's dtype promote to.
      precision: of the float product where ``activations`` is None.

    Returns:
      (*batch, ..., *outputs) of ``dtype``.

    Raises:
      TypeError: x is not floating point, or ``packed`` is not packed.
      ValueError: shapes that do not meet, an unknown implementation, or one
        that a prepared kernel was not prepared for.
      NotImplementedError: the implementation asked for cannot do this.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> packed = bj.pack(jnp.array([[0.9], [-0.1], [-0.8], [0.6]]))
      >>> bj.matmul(jnp.ones((2, 4)), packed).tolist()
      [[0.6000000238418579], [0.6000000238418579]]

    References:
      Ma et al., arXiv:2402.17764.
    """
    who = "matmul"
    _operands(who, x, packed, activations)
    _require_known_implementation(who, implementation, IMPLEMENTATIONS)
    batch, contraction, outputs = split(packed)
    _checks.require_contraction(who, x.shape, contraction, batch)
    dtype = dtype or jnp.promote_types(x.dtype, packed.dtype)
    lead = x.shape[: x.ndim - len(contraction)]

    def run(x: jax.Array, packed: Packed) -> jax.Array:
        x = x.reshape(*lead, math.prod(contraction))
        if activations is None:
            y = Product().apply(x.astype(dtype), _float_kernel(packed).astype(dtype), precision)
        else:
            name = _choose(packed, implementation)
            # custom_vjp loses the type
            y = cast(jax.Array, _matmul(activations, name, np.dtype(dtype), x, packed))
        return y.reshape(*lead, *outputs)

    return _on_mesh(run, x, packed)


def convolve(
    x: Float[Array, "b *space c"],
    packed: Packed,
    convolution: Convolution,
    *,
    activations: ActivationConfig | None = INT8,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "b *space n"]:
    """A convolution with a packed kernel, unpacked to int8 where it is used.

    The bits of :func:`bitnet_jax._ops.ternary_dot.ternary_conv`; differentiable in x.
    """
    _operands("convolve", x, packed, activations)
    dtype = dtype or jnp.promote_types(x.dtype, packed.dtype)

    def run(x: jax.Array, packed: Packed) -> jax.Array:
        if activations is None:
            w = _float_kernel(packed).astype(dtype)
            return convolution.apply(x.astype(dtype), w, precision)
        return cast(jax.Array, _convolve(convolution, activations, x, packed)).astype(dtype)

    return _on_mesh(run, x, packed)


def _on_mesh(run: Callable[..., jax.Array], x: jax.Array, packed: Packed) -> jax.Array:
    """``run(x, packed)``; on Explicit axes the result lies as x's rows and the outputs do."""
    outputs = split(packed)[2]
    placed: _mesh.Spec = (None,) * len(outputs)
    if is_stored(packed):  # a prepared kernel is whole wherever it is
        placed = packed.axes.split(_mesh.spec_of(packed.codes))[2]
    return _mesh.in_auto_rows(run, x, packed, outputs=placed)


def embedding_rows(packed: PackedInt8 | PreparedInt8, index: Int[Array, "..."]) -> jax.Array:
    """:meth:`PackedInt8.rows`, from a prepared embedding as well."""
    if isinstance(packed, PackedInt8):
        return packed.rows(index)
    rows_of = IMPLEMENTATIONS[packed.implementation].rows_of
    assert rows_of is not None  # whoever prepares an embedding can look it up
    _checks.require_embedding_lookup("PreparedInt8", index, packed.shape)
    codes_of = functools.partial(rows_of, packed)
    return look_up(codes_of, packed.scale[0][:, None], index, packed.dtype)


def _operands(who: str, x: Any, packed: Any, activations: Any) -> None:
    _checks.require_float_array(who, "x", x)
    kinds = (PackedTernary, PackedInt8, PreparedTernary, PreparedInt8)
    _checks.require_instance(who, "packed", packed, kinds, "Make one with bj.pack(w).")
    check_activations(who, activations)


def prepare(tree: Any, implementation: str | None = None) -> Any:
    """Lays packed kernels out the way an implementation runs best from.

    Do it once, at load. Prepared kernels stay out of files: keep the stored
    tree for :func:`bitnet_jax.io.save`.

    Args:
      tree: a packed kernel, or any tree with packed kernels among its leaves;
        other leaves pass through.
      implementation: None picks ``"cpu"``, the native one, where this processor has
        more than its portable path, else ``"xla"``. ``"cpu"`` pads each group to 16
        weights along the contraction (int8: to 4), and outputs to 16; ``jax.export``
        refuses its custom calls, ``"xla"`` travels anywhere.

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
    _require_known_implementation("prepare", implementation, IMPLEMENTATIONS)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)
    if not any(is_packed(leaf) for _, leaf in leaves):
        _checks.raise_nothing_packed("prepare")
    done = [_prepare_leaf(path, leaf, implementation) for path, leaf in leaves]
    return jax.tree.unflatten(treedef, done)


def _prepare_leaf(path, leaf: Any, implementation: str | None) -> Any:
    if isinstance(leaf, Prepared):
        where = jax.tree_util.keystr(path) or "`tree`"
        _checks.raise_prepared("prepare", where, leaf.implementation)
    if not is_stored(leaf):
        return leaf
    if _mesh.is_sharded(leaf.codes):
        where = jax.tree_util.keystr(path) or "`tree`"
        _require_unsharded("prepare", where, implementation)
        return leaf
    make = IMPLEMENTATIONS[_choose(leaf, implementation, preparing=True)].prepare
    return leaf if make is None else make(leaf)


def _choose(packed: Packed, implementation: str | None, preparing: bool = False) -> str:
    if isinstance(packed, Prepared):
        _require_same_implementation("matmul", implementation, packed.implementation)
        return packed.implementation
    if implementation is not None:
        return implementation
    rows = IMPLEMENTATIONS.items()
    return next(
        name
        for name, row in rows
        if row.unsupported_reason(packed) is None and row.preferred(packed, preparing)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmul(
    activations: ActivationConfig, name: str, dtype: np.dtype, x: jax.Array, packed: Packed
) -> jax.Array:
    return IMPLEMENTATIONS[name].contract(jax.lax.stop_gradient(x), packed, activations, dtype)


def _matmul_forward(activations, name, dtype, x, packed):
    return _matmul(activations, name, dtype, x, packed), (packed, _like(x))


def _matmul_backward(activations, name, dtype, residuals, g):
    del activations, name, dtype
    return _input_gradient(Product(), residuals, g.astype(jnp.float32)), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(convolution: Convolution, activations: ActivationConfig, x, packed) -> jax.Array:
    axes = convolution.token_axes
    codes, gamma = quantize_activations_as("convolve", x, activations, axes)
    w, scale = _canonical_codes(packed), _canonical_scale(packed)
    return contract_codes(convolution, codes, gamma, w, scale, activations.qmax)


def _convolve_forward(convolution, activations, x, packed):
    return _convolve(convolution, activations, x, packed), (packed, _like(x))


def _convolve_backward(convolution, activations, residuals, g):
    del activations
    return _input_gradient(convolution, residuals, g), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _like(x: jax.Array) -> jax.Array:
    """An array without elements that remembers a shape and a dtype."""
    return jnp.zeros((0, *x.shape), x.dtype)


def _input_gradient(operator, residuals, g):
    packed, like = residuals
    codes, scale = _canonical_codes(packed), _canonical_scale(packed)
    return input_gradient(operator, g, codes, scale, like.shape[1:]).astype(like.dtype)


def _canonical_codes(packed: Packed) -> jax.Array:
    if not isinstance(packed, Prepared):
        return kernel_axes.to_canonical(packed.int8_codes(), packed.axes)
    codes_of = IMPLEMENTATIONS[packed.implementation].codes_of
    assert codes_of is not None  # whoever prepares can undo it
    return codes_of(packed)


def _canonical_scale(packed: Packed) -> jax.Array:
    return packed.scale if isinstance(packed, Prepared) else packed.canonical_scale()


def _float_kernel(packed: Packed) -> jax.Array:
    scale = jax.lax.stop_gradient(_canonical_scale(packed))
    return dequantize_canonical(_canonical_codes(packed), scale)


def _require_known_implementation(who: str, name: Any, table: Iterable[str]) -> None:
    """Refuses an implementation that no one has written."""
    _checks.require_one_of(who, "implementation", name, (None, *table))


def _require_same_implementation(who: str, asked: str | None, prepared: str) -> None:
    """Refuses to run a prepared kernel by another implementation than its own."""
    if asked is not None and asked != prepared:
        raise ValueError(
            f"{who}: this kernel was prepared for implementation {prepared!r}, and "
            f"{asked!r} was asked for. Keep the stored tree and prepare() it for {asked!r}."
        )


def _require_unsharded(who: str, where: str, implementation: str | None) -> None:
    """Refuses to lay out, by name, a kernel that lies in shards."""
    if implementation is not None:
        raise NotImplementedError(
            f"{who}: {where} lies in shards, and a layout has no axis to be sharded along. Call "
            f"{who} inside jax.shard_map, on each shard, or leave the kernel stored "
            "(implementation=None): bj.matmul runs each shard from there."
        )
