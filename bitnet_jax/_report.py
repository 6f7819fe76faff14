"""What packing did to a network, and whether gradients reach it: tables and pictures.

Every number is read from real arrays: codes are counted, bytes are ``nbytes``
of what is stored, scales, biases and float layers included.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bitnet_jax import _boxes, _checks, _packing
from bitnet_jax._packed import PackedTernary
from bitnet_jax._ternary import Ternary, TernaryConfig


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What packing did to one kernel.

    Attributes:
      path: names joined by ``/``.
      shape: of the float kernel.
      config: the quantiser.
      minus: count of code -1.
      zero: count of code 0.
      plus: count of code +1.
      scale_min: the smallest scale, in units of the weights.
      scale_max: the largest scale.
      error: relative squared error, ``sum((w - w_hat)**2) / sum(w**2)``; NaN
        for a kernel of zeros.
      bytes_before: of the float kernel.
      bytes_after: of the packed codes and scales.
    """

    path: str
    shape: tuple[int, ...]
    config: TernaryConfig
    minus: int
    zero: int
    plus: int
    scale_min: float
    scale_max: float
    error: float
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Bytes before over bytes after."""
        return self.bytes_before / self.bytes_after


@dataclasses.dataclass(frozen=True)
class PackReport:
    """What packing did to a tree of parameters. ``print`` it, ``plot`` it, or read it.

    Attributes:
      layers: one :class:`LayerReport` for each packed kernel.
      model_bytes_before: all leaves of the float tree.
      model_bytes_after: all leaves of the packed tree, float ones included.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> w = jax.random.normal(jax.random.key(0), (64, 16))
      >>> _, report = bj.pack_params({"head": {"kernel": w, "bias": jnp.zeros(16)}})
      >>> print(report)
      path             shape     -1      0     +1         scale  error  before  after   ratio
      head/kernel      64x16  33.7%  31.6%  34.7%  0.776..0.776  0.269  4.1 kB  260 B  15.75x
      ternary kernels                                                   4.1 kB  260 B  15.75x
      whole model                                                       4.2 kB  324 B  12.84x
    """

    layers: tuple[LayerReport, ...]
    model_bytes_before: int
    model_bytes_after: int

    @property
    def bytes_before(self) -> int:
        """Bytes of the selected kernels in float."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the selected kernels, packed."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Bytes before over after, of the selected kernels."""
        return self.bytes_before / self.bytes_after

    @property
    def model_ratio(self) -> float:
        """Bytes before over after, of the whole model."""
        return self.model_bytes_before / self.model_bytes_after

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, ready for ``json.dumps`` or a logger.

        Returns:
          ``{"layers": [...], "ternary": {...}, "model": {...}}``; an error that
          is NaN (a kernel of zeros) is None.
        """

        def row(layer: LayerReport) -> dict[str, Any]:
            error = None if math.isnan(layer.error) else layer.error
            plain = {"shape": list(layer.shape), "error": error, "ratio": layer.ratio}
            return dataclasses.asdict(layer) | plain

        def totals(before: int, after: int) -> dict[str, Any]:
            return {"bytes_before": before, "bytes_after": after, "ratio": before / after}

        return {
            "layers": [row(layer) for layer in self.layers],
            "ternary": totals(self.bytes_before, self.bytes_after),
            "model": totals(self.model_bytes_before, self.model_bytes_after),
        }

    def __str__(self) -> str:
        """The report as a table, one row a kernel, then the totals."""
        header = ("path", "shape", "-1", "0", "+1", "scale", "error", "before", "after", "ratio")
        rows = [_row(layer) for layer in self.layers]
        totals = (
            ("ternary kernels", self.bytes_before, self.bytes_after),
            ("whole model", self.model_bytes_before, self.model_bytes_after),
        )
        for name, before, after in totals:
            sizes = (_size(before), _size(after), f"{before / after:.2f}x")
            rows.append((name, *("",) * 6, *sizes))
        return table(header, rows)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws codes, error and bytes of every packed kernel into a picture.

        Args:
          path: the file to write; its ending chooses the format (png, svg, pdf).

        Raises:
          ImportError: matplotlib is missing; ``pip install 'bitnet_jax[plot]'``.
        """
        figure = _draw(self)
        figure.savefig(path, dpi=120, bbox_inches="tight")


def measure(w: jax.Array, t: Ternary, packed: PackedTernary) -> dict[str, jax.Array]:
    """The numbers of one layer that need its values; runs inside jit."""
    zero, plus = _packing.count(packed.codes)
    # Dividing by the largest weight keeps the squares of huge and tiny ones finite.
    wide = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide))
    unit = 1.0 / jnp.maximum(largest, jnp.float32(1e-30))
    lost = jnp.square((wide - t.dequantize()) * unit).sum()
    return {
        "zero": zero,
        "plus": plus,
        "scale_min": t.scale.min(),
        "scale_max": t.scale.max(),
        "error": lost / jnp.square(wide * unit).sum(),
        "finite": jnp.isfinite(largest),
    }


def layer_report(
    who: str, path: str, w: jax.Array, packed: PackedTernary, measured: dict[str, jax.Array]
) -> LayerReport:
    """Reads the measured numbers; refuses weights that are not finite."""
    values = jax.device_get(measured)
    if not values["finite"]:
        _checks.not_finite(who, path, int((~jnp.isfinite(w)).sum()))
    plus = int(values["plus"].sum(dtype=int))
    padding = _packing.PER_BYTE * packed.codes.size - packed.size
    zero = int(values["zero"].sum(dtype=int)) - padding
    return LayerReport(
        path=path,
        shape=packed.shape,
        config=packed.config,
        minus=packed.size - zero - plus,
        zero=zero,
        plus=plus,
        scale_min=float(values["scale_min"]),
        scale_max=float(values["scale_max"]),
        error=float(values["error"]),
        bytes_before=w.nbytes,
        bytes_after=packed.nbytes,
    )


def nbytes(leaves: Iterable[Any]) -> int:
    """Bytes of arrays and packed kernels."""
    return sum(leaf.nbytes if hasattr(leaf, "nbytes") else 0 for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class LeafGradient:
    """The gradient of one leaf.

    Attributes:
      path: names joined by ``/``.
      norm: Euclidean norm, computed in float32; NaN where there is none.
      largest: the largest magnitude.
      state: ``"ok"``, ``"missing"``, ``"dead"``, ``"nan"`` or ``"exploding"``.
    """

    path: str
    norm: float
    largest: float
    state: str


@dataclasses.dataclass(frozen=True)
class GradientFlow:
    """Which leaves gradients reach; see :func:`gradient_flow`."""

    leaves: tuple[LeafGradient, ...]

    @property
    def ok(self) -> bool:
        """Whether every leaf has a finite gradient that is neither dead nor exploding."""
        return all(leaf.state == "ok" for leaf in self.leaves)

    def paths(self, state: str) -> tuple[str, ...]:
        """The paths of the leaves in a state."""
        return tuple(leaf.path for leaf in self.leaves if leaf.state == state)

    def __str__(self) -> str:
        """A table, one row a leaf."""
        rows = [(g.path, f"{g.norm:.3g}", f"{g.largest:.3g}", g.state) for g in self.leaves]
        return table(("path", "norm", "largest", "state"), rows)


def gradient_flow(grads: Any, *, exploding: float = 1e3) -> GradientFlow:
    """Names the leaves that gradients do not reach, or reach badly.

    Args:
      grads: a tree of gradients, as ``jax.grad`` returns it. None stands for a
        leaf without one.
      exploding: the norm above which a leaf counts as exploding.

    Returns:
      A :class:`GradientFlow`: for each leaf its norm, its largest magnitude,
      and a state: ``"missing"`` (None, or no gradient for integers),
      ``"dead"`` (all zeros), ``"nan"`` (NaN or Inf), ``"exploding"``, ``"ok"``.

    Raises:
      ValueError: an empty tree, or ``exploding`` not above zero.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> flow = bj.gradient_flow({"a": jnp.ones(4), "b": jnp.zeros(2), "c": None})
      >>> flow.ok, flow.paths("dead"), flow.paths("missing")
      (False, ('b',), ('c',))
      >>> print(flow)
      path  norm  largest  state
      a        2        1  ok
      b        0        0  dead
      c      nan      nan  missing
    """
    _checks.positive("gradient_flow", "exploding", exploding)
    leaves = _boxes.flatten("gradient_flow", "grads", grads, none_is_leaf=True)[0]
    return GradientFlow(tuple(_leaf_gradient(leaf.where, leaf.value, exploding) for leaf in leaves))


def _leaf_gradient(path: str, g: Any, exploding: float) -> LeafGradient:
    if g is None or g.dtype == jax.dtypes.float0:
        return LeafGradient(path, math.nan, math.nan, "missing")
    wide = jnp.asarray(g, jnp.float32)
    largest = float(jnp.max(jnp.abs(wide), initial=0.0))
    if not math.isfinite(largest):
        return LeafGradient(path, math.nan, largest, "nan")
    if largest == 0.0:
        return LeafGradient(path, 0.0, 0.0, "dead")
    # A power of two keeps the squares of huge and tiny gradients finite.
    unit = 2.0 ** -min(max(math.frexp(largest)[1], -100), 100)
    norm = float(jnp.linalg.norm((wide * unit).reshape(-1))) / unit
    return LeafGradient(path, norm, largest, "exploding" if norm > exploding else "ok")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first and the last column to the left if they hold words."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    left = [not any(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    left[0] = True

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(cells, widths, left, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, [header, *rows]))


def _row(layer: LayerReport) -> tuple[str, ...]:
    total = layer.minus + layer.zero + layer.plus
    shares = (f"{100 * n / total:.1f}%" for n in (layer.minus, layer.zero, layer.plus))
    return (
        layer.path,
        "x".join(map(str, layer.shape)),
        *shares,
        f"{layer.scale_min:.3g}..{layer.scale_max:.3g}",
        f"{layer.error:.3f}",
        _size(layer.bytes_before),
        _size(layer.bytes_after),
        f"{layer.ratio:.2f}x",
    )


def _size(n: int) -> str:
    value, units = float(n), ("B", "kB", "MB", "GB", "TB")
    for unit in units:
        if value < 1000 or unit == units[-1]:
            return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def _draw(report: PackReport) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "PackReport.plot: matplotlib is missing. Install it with: pip install "
            "'bitnet_jax[plot]'."
        ) from error
    layers = report.layers[::-1]
    names = [layer.path for layer in layers]
    figure = Figure(figsize=(11, 1.8 + 0.32 * len(layers)), layout="constrained")
    codes, error, size = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 2))

    start = [0.0] * len(layers)
    for label, color in (("minus", "#3b6fb6"), ("zero", "#d9d9d9"), ("plus", "#c8553d")):
        share = [100 * getattr(x, label) / (x.minus + x.zero + x.plus) for x in layers]
        sign = {"minus": "-1", "zero": "0", "plus": "+1"}[label]
        codes.barh(names, share, left=start, color=color, label=sign)
        start = [a + b for a, b in zip(start, share, strict=True)]
    codes.set(title="codes", xlabel="% of weights", xlim=(0, 100))
    codes.margins(y=0.02)

    error.barh(names, [layer.error for layer in layers], color="#6b6b6b")
    error.set(title="relative squared error", xlim=(0, None))

    size.barh(names, [layer.bytes_before for layer in layers], color="#d9d9d9", label="float")
    size.barh(names, [layer.bytes_after for layer in layers], color="#2a9d6f", label="packed")
    largest = max(layer.bytes_before for layer in layers)
    size.set(title="bytes", xscale="log", xlim=(None, 5 * largest))
    for y, layer in enumerate(layers):
        size.annotate(f" {layer.ratio:.1f}x", (layer.bytes_before, y), va="center")
    handles = [*codes.containers, *size.containers]
    labels = [str(handle.get_label()) for handle in handles]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    figure.suptitle(
        f"{len(layers)} ternary kernels {_size(report.bytes_before)} to "
        f"{_size(report.bytes_after)} ({report.ratio:.2f}x), whole model "
        f"{_size(report.model_bytes_before)} to {_size(report.model_bytes_after)} "
        f"({report.model_ratio:.2f}x)"
    )
    return figure
