"""QK-clip: bounds attention logits by rescaling each head's query and key kernels.

Where the largest logit ``S`` of a head exceeds ``tau``, its query and key projections
(kernel and bias) are both multiplied by ``sqrt(tau / S)``, so its logits are multiplied
by ``tau / S``. Heads below the bound do not change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, PyTree

from bitnet_jax import _checks
from bitnet_jax._tree.leaves import flatten, rebox
from bitnet_jax._tree.select import names_of
from bitnet_jax.optim._gradients import require_params
from bitnet_jax.optim._hyperparameters import POSITIVE, Scalar, require_number


def qk_clip(
    params: PyTree,
    max_logits: PyTree,
    tau: Scalar,
    *,
    names: tuple[str, str] = ("query", "key"),
) -> PyTree:
    """The params with query and key kernels rescaled, so that no logit exceeds ``tau``.

    Ternary kernels with a scale per channel (``granularity="channel"``, ``bj.PHASE4``) keep
    their codes, and their scales shrink. One scale per tensor (``bj.B158``) is shared by
    all heads: rescaling one head changes the codes of the others, and the bound holds
    only roughly. A norm between projection and logit (qk-norm) undoes the rescaling.

    Args:
      params: the tree that holds the attentions.
      max_logits: for each attention the largest absolute logit of each head,
        (heads,): a dict that is nested like ``params`` down to the attention, or
        has its path as a key, ``{"block_0/attention": ...}``; the array alone where
        ``params`` are those of one attention. Under ``nn.scan`` (layers, heads).
        :func:`attention_max_logits` computes them.
      tau: the bound, > 0.
      names: of the query and the key projection in an attention.

    Returns:
      A tree like ``params``. A head whose logit is NaN or Inf does not change. Where
      several query heads share a key head, the key is multiplied by the smallest of
      their square roots, and each query by what its own logit still needs.

    Raises:
      ValueError: ``tau`` not above 0, a path without the two projections, heads
        that do not divide a projection.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> params = {name: {"kernel": jnp.ones((4, 2, 3))} for name in ("query", "key")}
      >>> clipped = bj.optim.qk_clip(params, jnp.array([120.0, 5.0]), tau=30.0)
      >>> clipped["query"]["kernel"][0, :, 0].tolist()
      [0.5, 1.0]

    References:
      Kimi K2: Open Agentic Intelligence (2025), arXiv:2507.20534, section 2.1.
    """
    who = "qk_clip"
    require_number(who, "tau", tau, POSITIVE)
    leaves, treedef = flatten(who, "params", params)
    limits, _ = flatten(who, "max_logits", max_logits)
    for leaf in leaves:
        _checks.require_values(who, leaf.where, leaf.value)
    kernels = {names_of(leaf.path): leaf.value for leaf in leaves}
    factors: dict[tuple[str, ...], jax.Array] = {}
    for limit in limits:
        # A key of max_logits may be a whole path, "block_0/attention".
        where = tuple(name for name in names_of(limit.path) if name)
        logits = jnp.asarray(limit.value, jnp.float32)
        sides = [kernels.get((*where, name, "kernel")) for name in names]
        _require_attention_kernels(who, "/".join(where), names, [k is not None for k in sides])
        heads = _heads(who, "/".join(where), logits, *sides)  # pyright: ignore[reportArgumentType]
        for name, factor in zip(names, _factors(logits, heads, tau), strict=True):
            factors[*where, name] = factor
    done = []
    for leaf in leaves:
        *where, kind = names_of(leaf.path)
        factor = factors.get(tuple(where)) if kind in ("kernel", "bias") else None
        scaled = None if factor is None else _scaled(kind, leaf.value, factor)
        done.append(leaf.boxed if scaled is None else rebox(leaf.boxed, scaled))
    return jax.tree.unflatten(treedef, done)


def clip_by_max_logits(
    tau: Scalar, *, names: tuple[str, str] = ("query", "key")
) -> optax.GradientTransformationExtraArgs:
    """Applies :func:`qk_clip` to the updated params; chain it last.

    ``update`` takes ``max_logits=`` as :func:`qk_clip` does, measured in the forward pass
    of the same step, and changes the updates so that those logits are bounded. What the
    step itself adds to a logit is bounded in the next step. Flax returns the projections
    of an unedited model::

        def is_projection(module, method):
            return module.name in ("query", "key") and method == "__call__"

        logits, kept = model.apply(
            {"params": params}, x, capture_intermediates=is_projection
        )
        a = kept["intermediates"]["attention"]
        q, k = (a[name]["__call__"][0] for name in ("query", "key"))
        largest = {"attention": bj.optim.attention_max_logits(q, k)}

    Args:
      tau: the bound, > 0.
      names: as for :func:`qk_clip`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` without state.

    Raises:
      ValueError: ``tau`` not above 0; in ``update``: no ``params``, no ``max_logits``,
        or as :func:`qk_clip`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bitnet_jax as bj
      >>> params = {name: {"kernel": jnp.ones((4, 1, 2))} for name in ("query", "key")}
      >>> tx = optax.chain(optax.sgd(0.0), bj.optim.clip_by_max_logits(30.0))
      >>> grads = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(grads, tx.init(params), params, max_logits=jnp.array([120.0]))
      >>> optax.apply_updates(params, updates)["key"]["kernel"][0].tolist()
      [[0.5, 0.5]]

    References:
      As :func:`qk_clip`.
    """
    who = "clip_by_max_logits"
    require_number(who, "tau", tau, POSITIVE)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        max_logits: PyTree = None,
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        del extra
        require_params(who, params)
        _require_max_logits(who, max_logits)
        moved = optax.apply_updates(params, updates)
        clipped = qk_clip(moved, max_logits, tau, names=names)

        def step(u: jax.Array, new: jax.Array, bounded: jax.Array, old: jax.Array) -> jax.Array:
            # Where nothing was clipped the update keeps its bits.
            return jnp.where(bounded == new, u, (bounded - old).astype(u.dtype))

        return jax.tree.map(step, updates, moved, clipped, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def attention_max_logits(
    query: Float[Array, "*batch q heads depth"],
    key: Float[Array, "*batch k shared depth"],
    *,
    mask: Bool[Array, "..."] | None = None,
    scale: Scalar | None = None,
) -> Float32[Array, " heads"]:
    """The largest absolute attention logit of each head, for :func:`qk_clip`.

    Args:
      query: (..., queries, heads, depth), as Flax's attention projects it.
      key: (..., keys, key heads, depth); fewer heads than queries are shared.
      mask: boolean, broadcast to (..., heads, queries, keys); False is left out.
      scale: of the products, by default ``1 / sqrt(depth)``.

    Returns:
      (heads,), float32.

    Raises:
      ValueError: heads that the key heads do not divide.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> q, k = 3.0 * jnp.ones((2, 5, 4, 16)), jnp.ones((2, 5, 2, 16))
      >>> bj.optim.attention_max_logits(q, k).tolist()
      [12.0, 12.0, 12.0, 12.0]
    """
    heads, shared = query.shape[-2], key.shape[-2]
    _require_heads_divide("attention_max_logits", "key", shared, heads)
    by = query.shape[-1] ** -0.5 if scale is None else scale
    wide = [x.astype(jnp.float32) for x in (query, jnp.repeat(key, heads // shared, axis=-2))]
    logits = jnp.abs(jnp.einsum("...qhd,...khd->...hqk", *wide, precision="highest")) * by
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.zeros_like(logits))
    axes = tuple(axis for axis in range(logits.ndim) if axis != logits.ndim - 3)
    return logits.max(axes)


def _heads(who: str, where: str, logits: jax.Array, query: jax.Array, key: jax.Array) -> int:
    """How many key heads there are; logits (*stacked, heads) tell the query's."""
    # A kernel is (*stacked, in, heads, depth), or (*stacked, in, heads * depth).
    heads, stacked = logits.shape[-1], logits.ndim - 1
    widths = [math.prod(kernel.shape[stacked + 1 :]) for kernel in (query, key)]
    _require_heads_divide(who, f"{where} query", heads, widths[0])
    depth = widths[0] // heads
    _require_heads_divide(who, f"{where} key", depth, widths[1])
    _require_heads_divide(who, f"{where} key", widths[1] // depth, heads)
    return widths[1] // depth


def _factors(
    logits: Float32[Array, "*stacked heads"], key_heads: int, tau: Scalar
) -> tuple[Float32[Array, "*stacked heads"], Float32[Array, "*stacked shared"]]:
    """What each query head and each key head is multiplied by."""
    over = jnp.isfinite(logits) & (logits > tau)
    ratio = jnp.where(over, tau / jnp.where(over, logits, 1.0), 1.0)
    # (..., heads) as (..., key heads, query heads of each).
    shared = ratio.reshape(*ratio.shape[:-1], key_heads, -1)
    key = jnp.sqrt(shared.min(-1))
    return (shared / key[..., None]).reshape(ratio.shape), key


def _scaled(kind: str, leaf: jax.Array, factor: jax.Array) -> jax.Array:
    """A kernel (*stacked, in, heads, depth), or a bias without ``in``, times a factor a head.

    Heads and depth may be one axis.
    """
    lead = factor.ndim - 1 + (kind == "kernel")
    by_head = leaf.reshape(*leaf.shape[:lead], factor.shape[-1], -1)
    each = factor[..., None, :, None] if kind == "kernel" else factor[..., None]
    return (by_head.astype(jnp.float32) * each).astype(leaf.dtype).reshape(leaf.shape)


def _require_max_logits(who: str, value: PyTree) -> None:
    """Raises where ``update`` was called without ``max_logits``."""
    if value is None:
        raise ValueError(
            f"{who}: `max_logits` is missing. Call tx.update(grads, state, params, max_logits="
            "{'path/of/attention': bj.optim.attention_max_logits(q, k)})."
        )


def _require_attention_kernels(
    who: str, where: str, names: Sequence[str], found: Sequence[bool]
) -> None:
    """Raises unless a path of ``max_logits`` has a query and a key kernel."""
    missing = [name for name, there in zip(names, found, strict=True) if not there]
    if missing:
        raise ValueError(
            f"{who}: `max_logits` names {where or 'the whole tree'}, and `params` has no "
            f"{' and no '.join(missing)} kernel there. Name the attention's own path, or its "
            f"projections by names=, which is {tuple(names)}."
        )


def _require_heads_divide(who: str, what: str, parts: int, whole: int) -> None:
    """Raises unless the number of heads divides the features, or key heads the heads."""
    if parts < 1 or whole % parts:
        raise ValueError(
            f"{who}: {what}: {parts} does not divide {whole}. `max_logits` must be (heads,) of the "
            "query, and (layers, heads) where layers are stacked."
        )
