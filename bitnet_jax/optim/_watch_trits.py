"""An optax transform that measures the ternary codes of the kernels during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import export
from jaxtyping import Array, Int32, PyTree

from bitnet_jax._quantize.ternary import B158, TernaryConfig
from bitnet_jax._tree.leaves import unbox
from bitnet_jax._tree.select import AxesOf, Select
from bitnet_jax.analysis._trit_stats import (
    NEVER,
    Snapshot,
    Watched,
    check_previous,
    measure,
    watched,
)
from bitnet_jax.optim._gradients import require_params
from bitnet_jax.optim._hyperparameters import POSITIVE, Scalar, require_integer, require_number


class WatchTritsState(NamedTuple):
    """The state of :func:`watch_trits`.

    Attributes:
      step: int32, steps taken.
      snapshot: path to the last codes (uint8, two bits each) and mean scale.
      stats: ``"path/name"`` to the last statistics, float32 scalars; flip rate and drift
        are -2 before the first measurement.
    """

    step: Int32[Array, ""]
    snapshot: Snapshot
    stats: dict[str, jax.Array]


export.register_namedtuple_serialization(
    WatchTritsState, serialized_name="bitnet_jax.WatchTritsState"
)


def watch_trits(
    every: Scalar = 50,
    *,
    config: TernaryConfig = B158,
    select: Select | None = None,
    axes: AxesOf | None = None,
    near: Scalar = 0.1,
) -> optax.GradientTransformation:
    """Measures :func:`bitnet_jax.analysis.trit_stats` of the params every ``every`` steps.

    Updates pass through unchanged. Every ``every`` steps the codes of the params, before
    that step's update, are compared with the previous ones, which the state holds at two
    bits a weight. Other steps compute nothing; where params are donated, XLA may copy a
    kernel for the branch. Put it anywhere in an ``optax.chain`` and read the statistics
    with :func:`read_trits`.

    Args:
      every: steps between two measurements.
      config: as for :func:`bitnet_jax.pack_params`; a ``TernaryConfig``.
      select: as for :func:`bitnet_jax.pack_params`.
      axes: as for :func:`bitnet_jax.pack_params`.
      near: how close to the threshold counts as near, in units of mean ``|w|``.

    Returns:
      An ``optax.GradientTransformation`` whose ``update`` needs ``params``.

    Raises:
      ValueError: ``every`` below 1. In ``init``: as ``pack_params``. In ``update``:
        no ``params``, or params with other kernels than in ``init``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bitnet_jax as bj
      >>> tx = optax.chain(bj.optim.watch_trits(every=2), optax.sgd(0.5))
      >>> params = {"kernel": jnp.array([[0.9, -0.1], [-0.8, 0.2]])}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bj.optim.read_trits(state)["kernel/zeros"]
      0.5
    """
    who = "watch_trits"
    require_integer(who, "every", every, 1)
    require_number(who, "near", near, POSITIVE)

    def look(kernels: Watched, last: Snapshot) -> tuple[Snapshot, dict[str, jax.Array]]:
        snapshot, stats = {}, {}
        for where, (w, c, found) in kernels.items():
            snapshot[where], of_kernel = measure(w, last.get(where), c, found, near)
            stats |= {f"{where}/{name}": value for name, value in of_kernel.items()}
        return snapshot, stats

    def init(params: PyTree) -> WatchTritsState:
        kernels = watched(who, params, config, select, axes)
        return WatchTritsState(jnp.zeros((), jnp.int32), *look(kernels, {}))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None
    ) -> tuple[PyTree, WatchTritsState]:
        require_params(who, params)
        kernels = watched(who, params, config, select, axes)
        _require_same_kernels(who, sorted(kernels), sorted(state.snapshot))
        check_previous(who, kernels, state.snapshot)
        step = state.step + jnp.int32(1)
        snapshot, stats = jax.lax.cond(
            step % jnp.asarray(every, jnp.int32) == 0,
            lambda old: look(kernels, old[0]),
            lambda old: old,
            (state.snapshot, state.stats),
        )
        return updates, WatchTritsState(step, snapshot, stats)

    return optax.GradientTransformation(init, update)


def read_trits(opt_state: PyTree) -> dict[str, float]:
    """The latest statistics of :func:`watch_trits`, for a logger.

    Args:
      opt_state: the state of an optimizer that contains :func:`watch_trits`, chained or
        wrapped; ``nnx.state(optimizer)`` and a state dict will do.

    Returns:
      ``{"path/flip_rate": ..., "path/zeros": ..., ...}`` as Python floats. Flip rate and
      drift are left out before the first measurement. The scale of a kernel with NaN or
      Inf is NaN or Inf.

    Raises:
      ValueError: a state without :func:`watch_trits`, or with several.

    Example:
      >>> import jax.numpy as jnp, optax, bitnet_jax as bj
      >>> tx = optax.chain(bj.optim.watch_trits(), optax.adamw(1e-3))
      >>> state = tx.init({"kernel": jnp.array([[0.9, -0.1], [-0.8, 0.2]])})
      >>> sorted(bj.optim.read_trits(state))
      ['kernel/near_threshold', 'kernel/scale', 'kernel/zeros']
    """
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(s)]
    _require_one_watch("read_trits", len(found))
    stats = found[0]["stats"] if isinstance(found[0], Mapping) else found[0].stats
    values = jax.device_get({name: unbox(value) for name, value in stats.items()})
    later = ("/flip_rate", "/scale_drift")
    return {k: float(v) for k, v in values.items() if v != NEVER or not k.endswith(later)}


def _is_state(node: object) -> bool:
    """Whether a node is the state, or what ``nnx.state`` or a state dict makes of it."""
    if isinstance(node, Mapping):
        return set(node) == set(WatchTritsState._fields)
    return isinstance(node, WatchTritsState)


def _require_same_kernels(who: str, got: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises unless params have the kernels that the state was made for."""
    if list(got) != list(wanted):
        raise ValueError(
            f"{who}: `params` has the kernels {', '.join(got)}, and the state was made for "
            f"{', '.join(wanted)}. Call tx.init(params) again."
        )


def _require_one_watch(who: str, count: int) -> None:
    """Raises unless an optimizer state holds statistics once."""
    if count != 1:
        raise ValueError(
            f"{who}: `opt_state` holds {count} states of watch_trits, and needs one. Put "
            "bj.optim.watch_trits() into the optax.chain, once."
        )
