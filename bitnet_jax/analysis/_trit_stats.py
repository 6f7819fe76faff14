"""What ternary kernels do while they train: how many codes flip, how many are about to.

A latent weight moves a little each step; its code moves only where it crosses the
threshold. For each kernel, with ``r`` the weight over its statistic (``_quantize.ternary``):

    flip_rate       share of codes that differ from last time
    zeros           share of codes that are 0
    scale           mean of its scales
    scale_drift     scale / scale last time - 1
    near_threshold  share of weights with ``| |r| - threshold | <= near``

and of a layer's input, where it is given: ``clipped``, the share of codes at the
end of the int8 range, and ``zeroed``, that of values which are not 0 and whose
code is. Of a kernel of planes, over the codes of all, each with the ``r`` it is made from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bitnet_jax import _checks, _display, _mesh
from bitnet_jax._packed import trits
from bitnet_jax._packed.pack import pack_quantized
from bitnet_jax._packed.stored import PackedTernary, with_planes
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.config import planes_of
from bitnet_jax._quantize.int8 import INT8, ActivationConfig, quantize_activations
from bitnet_jax._quantize.kernel_spec import KernelSpec
from bitnet_jax._quantize.rotation import rotated, rotated_kernel
from bitnet_jax._quantize.ternary import B158, TernaryConfig, ratio_canonical
from bitnet_jax._tree.params import chosen_leaves, spec_of_leaf
from bitnet_jax._tree.select import AxesOf, Select, axes_for

Snapshot = Mapping[str, Mapping[str, jax.Array | np.ndarray]]

Watched = dict[str, tuple[jax.Array | np.ndarray, TernaryConfig, kernel_axes.KernelAxes]]


# Below every flip rate and drift: there is no last time. Not NaN, which jax_debug_nans refuses.
NEVER = -2.0


@dataclasses.dataclass(frozen=True)
class LayerTrits:
    """The statistics of one kernel; see the head of this module.

    Attributes:
      path: names joined by ``/``.
      flip_rate: NaN where there is no last time.
      zeros: share of codes that are 0.
      scale: mean of the scales, in units of the weights.
      scale_drift: NaN where there is no last time.
      near_threshold: share of weights close to changing their code.
      clipped: of the layer's input; NaN where it was not given.
      zeroed: of the layer's input; NaN where it was not given.
    """

    path: str
    flip_rate: float
    zeros: float
    scale: float
    scale_drift: float
    near_threshold: float
    clipped: float = math.nan
    zeroed: float = math.nan


@dataclasses.dataclass(frozen=True)
class TritStats:
    """The statistics of a tree, and what the next ones are compared with.

    Attributes:
      rows: one :class:`LayerTrits` for each kernel.
      snapshot: path to its codes (uint8, two bits each) and mean scale: plain
        arrays, to keep, to save, and to pass as ``previous``.
    """

    rows: tuple[LayerTrits, ...]
    snapshot: Snapshot = dataclasses.field(repr=False, compare=False)

    def to_dict(self) -> dict[str, float]:
        """A flat dict for any logger, ``{"path/flip_rate": ..., ...}``; what is NaN is left out."""
        return {
            f"{row.path}/{name}": value
            for row in self.rows
            for name, value in list(vars(row).items())[1:]
            if not math.isnan(value)
        }

    def __str__(self) -> str:
        """A table, one row a kernel."""
        names = [field.name for field in dataclasses.fields(LayerTrits)]
        rows = [(row.path, *(_cell(n, getattr(row, n)) for n in names[1:])) for row in self.rows]
        columns = zip(names, *rows, strict=True)
        kept = [column for column in columns if any(column[1:])]
        header, *body = zip(*kept, strict=True)
        return _display.table(header, body)


def _cell(name: str, value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.4g}" if name == "scale" else f"{100 * value:.2f}%"


def trit_stats(
    params: PyTree,
    config: TernaryConfig = B158,
    *,
    previous: TritStats | Snapshot | None = None,
    select: Select | None = None,
    axes: AxesOf | None = None,
    near: float | int = 0.1,
    inputs: Mapping[str, jax.Array] | None = None,
    activations: ActivationConfig = INT8,
) -> TritStats:
    """What the ternary kernels of a float tree look like, and what changed since last time.

    Args:
      params: the latent float parameters.
      config: as for :func:`pack_params`, ternary.
      previous: the last result, or its ``snapshot``.
      select: as for :func:`pack_params`.
      axes: as for :func:`pack_params`.
      near: how close to the threshold is near, in units of the statistic.
      inputs: path of a kernel to what went into its layer (..., features),
        as Flax's ``sow`` or ``capture_intermediates`` collects it.
      activations: the layers' quantiser of those inputs.

    Returns:
      :class:`TritStats`: print it, log its ``to_dict()``, pass it as ``previous``.

    Raises:
      ValueError: as :func:`pack_params`; ``previous`` has other
        kernels, or codes of another shape; inputs of a kernel that is not
        selected; ``near`` that is not above 0.
      TypeError: a kernel selected with another config than a ``TernaryConfig``;
        ``previous`` holds something else than a snapshot.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> w = jnp.array([[0.9, -0.1], [-0.8, 0.2]])
      >>> first = bj.analysis.trit_stats({"kernel": w})
      >>> second = bj.analysis.trit_stats({"kernel": w.at[0, 1].set(-0.6)}, previous=first)
      >>> print(second)
      path    flip_rate   zeros  scale  scale_drift  near_threshold
      kernel     25.00%  25.00%  0.625       25.00%           0.00%
      >>> second.to_dict()["kernel/flip_rate"]
      0.25
    """
    who = "trit_stats"
    _checks.require_positive(who, "near", near)
    kernels = watched(who, params, config, select, axes)
    last = previous.snapshot if isinstance(previous, TritStats) else previous
    if last is not None:
        check_previous(who, kernels, last)
    given = dict(inputs or {})
    _require_watched_inputs(who, sorted(set(given) - set(kernels)), list(kernels))
    rows, snapshot = [], {}
    for where, (w, c, found) in kernels.items():
        snapshot[where], stats = measure(w, None if last is None else last[where], c, found, near)
        if not jnp.isfinite(stats["scale"]):
            _checks.raise_not_finite(who, where, int((~jnp.isfinite(w)).sum()))
        if where in given:
            block = KernelSpec(c, found).block(w.shape)
            stats |= _inputs(rotated(given[where], block), activations)
        values = {k: float(v) for k, v in jax.device_get(stats).items()}
        values = {k: math.nan if v == NEVER else v for k, v in values.items()}
        rows.append(LayerTrits(where, **values))
    return TritStats(tuple(rows), snapshot)


def watched(
    who: str,
    params: PyTree,
    config: TernaryConfig,
    select: Select | None,
    axes: AxesOf | None,
) -> Watched:
    """Path to kernel, config and axes of what is selected."""
    axes, kernels = axes_for(select, axes), {}
    for leaf, c in chosen_leaves(who, params, config, select, values=True)[0]:
        if c is not None:
            remedy = f"Leave {leaf.where} out of `select`: int8 codes do not flip."
            _checks.require_instance(who, "config", c, TernaryConfig, remedy)
            kernels[leaf.where] = (leaf.value, c, spec_of_leaf(who, leaf, c, axes).axes)
    return kernels


def check_previous(who: str, kernels: Watched, last: Snapshot) -> None:
    """Raises unless a snapshot is of these kernels."""
    shapes = {
        where: _codes_shape(w.shape, KernelSpec(c, found))
        for where, (w, c, found) in kernels.items()
    }
    _checks.require_instance(who, "previous", last, Mapping, "Pass what trit_stats returned.")
    for where, entry in last.items():
        _require_snapshot_entry(who, where, entry)
    for where, shape in shapes.items():
        got = last[where]["codes"].shape if where in last else None
        _require_same_shapes(who, where, shape, got)
    _require_snapshot_paths(who, sorted(set(last) - set(shapes)), list(shapes))


def _codes_shape(shape: tuple[int, ...], spec: KernelSpec) -> tuple[int, ...]:
    """The shape of a kernel's packed codes."""
    last = spec.axes.contracting[-1] - len(shape)
    planes = planes_of(spec.config)
    return trits.packed_shape(with_planes(shape, spec.plane_axis, planes), last)


@functools.partial(jax.jit, static_argnums=(2, 3))
def measure(
    w: jax.Array,
    last: Mapping[str, jax.Array] | None,
    config: TernaryConfig,
    axes: kernel_axes.KernelAxes,
    near: jax.typing.ArrayLike,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """A kernel's snapshot, and its statistics as float32 scalars."""
    spec = KernelSpec(config, axes)
    run = functools.partial(pack_quantized, spec=spec)
    packed = _mesh.in_auto_like(run, w, more=spec.plane_axis)[1]
    assert isinstance(packed, PackedTernary)
    size = packed.planes * w.size
    zero = trits.count(packed.codes)[0].astype(jnp.float32).sum()
    padding = trits.PER_BYTE * packed.codes.size - size
    rotated_w = rotated_kernel(kernel_axes.to_canonical(w, axes), spec.block(w.shape))
    r = ratio_canonical(rotated_w, config)
    close = jnp.abs(jnp.abs(r) - np.float32(config.threshold)) <= jnp.asarray(near, jnp.float32)
    scale = packed.scale.mean()
    never = jnp.float32(NEVER)
    stats = {
        "flip_rate": never if last is None else trits.differ(packed.codes, last["codes"]) / size,
        "zeros": (zero - padding) / size,
        "scale": scale,
        "scale_drift": never if last is None else scale / last["scale"] - 1.0,
        "near_threshold": close.astype(jnp.float32).mean(),
    }
    return {"codes": packed.codes, "scale": scale}, stats


def _inputs(x: jax.Array, config: ActivationConfig) -> dict[str, jax.Array]:
    codes, _ = quantize_activations(x, config)
    lost = (codes == 0) & (x != 0)
    return {
        "clipped": (jnp.abs(codes) == config.qmax).astype(jnp.float32).mean(),
        "zeroed": lost.astype(jnp.float32).mean(),
    }


def _require_same_shapes(
    who: str, path: str, shape: Sequence[int], got: Sequence[int] | None
) -> None:
    """Raises unless a kernel's codes have the shape they had in the snapshot."""
    if got is None or tuple(got) != tuple(shape):
        what = "has no codes of it" if got is None else f"has codes of shape {tuple(got)}"
        raise ValueError(
            f"{who}: {path} has codes of shape {tuple(shape)}, and `previous` {what}. Pass the "
            "result for the same model, config and selection."
        )


def _require_snapshot_entry(who: str, path: str, entry: object) -> None:
    """Raises unless an entry of a snapshot has codes and scale."""
    if not isinstance(entry, Mapping) or set(entry) != {"codes", "scale"}:
        raise TypeError(
            f"{who}: `previous` must hold codes and scale for {path}, got "
            f"{type(entry).__name__}. Pass what trit_stats returned, or its `snapshot`."
        )


def _require_snapshot_paths(who: str, strangers: Sequence[str], paths: Sequence[str]) -> None:
    """Raises if a snapshot has kernels that are not selected."""
    if strangers:
        raise ValueError(
            f"{who}: `previous` has {', '.join(strangers)}, which is no selected kernel; those "
            f"are {', '.join(paths)}. Pass the result for the same model, config and selection."
        )


def _require_watched_inputs(who: str, strangers: Sequence[str], paths: Sequence[str]) -> None:
    """Raises if there are inputs of kernels that are not selected."""
    if strangers:
        raise ValueError(
            f"{who}: `inputs` has {', '.join(strangers)}, which is no selected kernel; those "
            f"are {', '.join(paths)}."
        )
