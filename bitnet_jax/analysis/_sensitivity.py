"""The change in loss when each kernel alone is quantised: what to leave in float."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bitnet_jax import _display
from bitnet_jax._checks import describe
from bitnet_jax._packed.pack import pack_kernel
from bitnet_jax._quantize.config import stated_fields
from bitnet_jax._quantize.strength import phase_in
from bitnet_jax._quantize.ternary import B158, KernelConfig
from bitnet_jax._tree.leaves import rebox
from bitnet_jax._tree.params import chosen_leaves, spec_of_leaf
from bitnet_jax._tree.select import AxesOf, Select, axes_for


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
    """What quantising one kernel alone does to the loss.

    Attributes:
      path: names joined by ``/``.
      shape: of the float kernel.
      config: the quantiser.
      loss: with this kernel alone quantised.
      change: that loss minus the float loss.
      bytes_saved: what packing this kernel saves.
    """

    path: str
    shape: tuple[int, ...]
    config: KernelConfig
    loss: float
    change: float
    bytes_saved: int


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The change in loss for each kernel; see :func:`sensitivity`. ``print`` it or ``plot`` it.

    Attributes:
      rows: one :class:`LayerSensitivity` for each selected kernel, the worst first.
      base: the float loss.
      all: the loss with every selected kernel quantised at once.
    """

    rows: tuple[LayerSensitivity, ...]
    base: float
    all: float

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, ready for ``json.dumps``; NaN and Inf are None."""
        rows = [
            dataclasses.asdict(x) | {"shape": list(x.shape), "config": stated_fields(x.config)}
            for x in self.rows
        ]
        return {
            "rows": list(map(_display.plain, rows)),
            **_display.plain({"base": self.base, "all": self.all}),
        }

    def __str__(self) -> str:
        """A table, one row a kernel, then all of them at once and none of them."""
        saved = sum(layer.bytes_saved for layer in self.rows)
        rows = [(x.path, x.shape, x.loss, x.change, x.bytes_saved) for x in self.rows]
        rows += [("all at once", (), self.all, self.all - self.base, saved)]
        rows += [("none (float)", (), self.base, 0.0, 0)]
        names, shapes, losses, changes, sizes = zip(*rows, strict=True)
        columns = (
            ["path", *names],
            ["shape", *("x".join(map(str, shape)) for shape in shapes)],
            _display.right("loss", [f"{x:.4g}" for x in losses]),
            _display.right("change", map(_signed, changes)),
            _display.right("saved", [_display.size_text(n) for n in sizes]),
        )
        header, *body = zip(*columns, strict=True)
        return _display.table(header, body)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the change of the loss by kernel into a picture, the worst on top.

        Args:
          path: the file to write; its ending chooses the format (png, svg, pdf).

        Raises:
          ImportError: matplotlib is missing; ``pip install 'bitnet_jax[plot]'``.
        """
        _draw(self).savefig(path, dpi=120, bbox_inches="tight")


def sensitivity(
    loss_fn: Callable[[PyTree], Any],
    params: PyTree,
    config: KernelConfig = B158,
    *,
    select: Select | None = None,
    axes: AxesOf | None = None,
    jit: bool = True,
) -> Sensitivity:
    """The change in loss when each kernel alone is quantised, the worst first.

    ``change[i] = loss(params with w[i] -> dequantize(quantize(w[i]))) - loss(params)``.

    It measures weights. A kernel is replaced by a float one of the same shape
    and dtype, so any model of any library runs it, and activations stay as the
    model has them. Ternary layers run at strength 0 (:func:`phase_in`), so that
    the base is a float loss: their activations are float too. Changes do not
    add up; ``all`` is what the whole selection does, and needs memory for a
    second copy of the selected kernels.

    Args:
      loss_fn: a function of the parameters alone that returns a scalar, for
        example the mean over held-out data. It has to be deterministic.
      params: a tree of float arrays. It is not changed.
      config: the quantiser of the selected leaves.
      select: as for :func:`pack_params`.
      axes: as for :func:`pack_params`.
      jit: whether ``loss_fn`` is compiled, once, for all kernels. It is traced
        then, and the arrays that it closes over become constants. False calls it
        as it is, once for each kernel and twice more: for a loss in Python that
        loops over many batches.

    Returns:
      A :class:`Sensitivity`.

    Raises:
      TypeError: as :func:`pack_params`; a loss that is no scalar.
      ValueError: as :func:`pack_params`; a float loss that is NaN or Inf.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> body, head = jnp.array([[1.0, -1.0]]), jnp.array([[2.0], [-1.0]])
      >>> params = {"body": {"kernel": body}, "head": {"kernel": head}}
      >>> def loss(p):
      ...     lost = jnp.abs(p["body"]["kernel"] - body).sum()
      ...     return lost + jnp.abs(p["head"]["kernel"] - head).sum()
      >>> print(bj.analysis.sensitivity(loss, params))
      path          shape  loss  change  saved
      head/kernel     2x1     1      +1    3 B
      body/kernel     1x2     0      +0    2 B
      all at once             1      +1    5 B
      none (float)            0      +0    0 B

    References:
      Dong et al., HAWQ, arXiv:1905.03696, for why layers differ.
    """
    who = "sensitivity"
    chosen, treedef = chosen_leaves(who, params, config, select, values=True)
    axes = axes_for(select, axes)
    picked = [
        (i, leaf, c, spec_of_leaf(who, leaf, c, axes))
        for i, (leaf, c) in enumerate(chosen)
        if c is not None
    ]
    run = functools.partial(_loss, who, jax.jit(loss_fn) if jit else loss_fn)
    boxed = [leaf.boxed for leaf, _ in chosen]
    base = run(jax.tree.unflatten(treedef, boxed))
    _require_finite_loss(who, base)
    rows, together = [], list(boxed)
    for i, leaf, c, spec in picked:
        packed = pack_kernel(leaf.value, spec)
        together[i] = rebox(leaf.boxed, _like(leaf.value, packed.dequantize()))
        loss = run(jax.tree.unflatten(treedef, [*boxed[:i], together[i], *boxed[i + 1 :]]))
        saved = leaf.value.nbytes - packed.nbytes
        shape = tuple(leaf.value.shape)
        rows.append(LayerSensitivity(leaf.where, shape, c, loss, loss - base, saved))
    # A loss that is NaN is the worst there is.
    rows.sort(key=lambda row: math.inf if math.isnan(row.change) else row.change, reverse=True)
    return Sensitivity(tuple(rows), base, run(jax.tree.unflatten(treedef, together)))


def _loss(who: str, loss_fn: Callable[[PyTree], Any], params: PyTree) -> float:
    with phase_in(0.0):
        loss = loss_fn(params)
    _require_scalar_loss(who, loss)
    return float(loss)


def _like(w: jax.Array | np.ndarray, hat: jax.Array) -> jax.Array:
    """``hat`` where ``w`` was put, if it was, so that the loss compiles once, on a mesh too."""
    if isinstance(w, jax.Array) and w.committed:
        return jax.device_put(hat, w.sharding)
    return hat


def _signed(change: float) -> str:
    return "nan" if math.isnan(change) else f"{change:+.3g}"


def _draw(found: Sensitivity) -> Any:
    layers = found.rows[::-1]
    figure = _display.blank_figure("Sensitivity.plot", (9.0, 1.4 + 0.26 * len(layers)))
    bars = figure.subplots()
    widths = [layer.change if math.isfinite(layer.change) else 0.0 for layer in layers]
    colors = ["#c8553d" if width > 0 else "#2a9d6f" for width in widths]
    bars.barh(range(len(layers)), widths, color=colors)
    bars.set_yticks(range(len(layers)), [layer.path for layer in layers])
    for y, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        side = "right" if width < 0 else "left"
        label = f" {_signed(layer.change)} "
        bars.annotate(label, (width, y), va="center", ha=side, fontsize="small")
    bars.axvline(0.0, color="#6b6b6b", linewidth=0.8)
    bars.set_ylim(-0.6, len(layers) - 0.4)
    bars.margins(x=0.15)
    bars.set(xlabel="change of the loss with this kernel alone quantised")
    bars.set_title(f"loss: float {found.base:.4g}, all at once quantised {found.all:.4g}")
    return figure


def _require_scalar_loss(who: str, value: object) -> None:
    """Raises unless a loss is one real number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    array = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and shape == ()
    if not number and not array:
        raise TypeError(
            f"{who}: `loss_fn` must return one real number, got {describe(value)}. Take the mean "
            "over the examples, and return the loss without auxiliary values."
        )


def _require_finite_loss(who: str, value: float) -> None:
    """Raises unless the loss of the float params is finite."""
    if not math.isfinite(value):
        raise ValueError(
            f"{who}: `loss_fn` of the float params is {value!r}. Check the params and the data "
            "first: no kernel has been quantised yet."
        )
