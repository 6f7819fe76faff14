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
from bitnet_jax._int8 import Int8Config
from bitnet_jax._packed import PackedInt8, PackedTernary, Stored, is_packed
from bitnet_jax._ternary import KernelConfig, Ternary


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What packing did to one kernel.

    Attributes:
      path: names joined by ``/``.
      shape: of the float kernel.
      config: the quantiser.
      minus: count of codes below 0.
      zero: count of codes 0.
      plus: count of codes above 0.
      scale_min: the smallest scale, in units of the weights.
      scale_max: the largest scale.
      error: relative squared error, ``sum((w - w_hat)**2) / sum(w**2)``; NaN
        for a kernel of zeros.
      bytes_before: of the float kernel.
      bytes_after: of the packed codes and scales.
      bytes_dense: of the same in a file of ``bj.io.save(..., dense=True)``.
    """

    path: str
    shape: tuple[int, ...]
    config: KernelConfig
    minus: int
    zero: int
    plus: int
    scale_min: float
    scale_max: float
    error: float
    bytes_before: int
    bytes_after: int
    bytes_dense: int

    @property
    def ratio(self) -> float:
        """Bytes before over bytes after."""
        return self.bytes_before / self.bytes_after

    @property
    def kind(self) -> str:
        """``ternary`` or ``int8``."""
        return kind(self.config)


def kind(config: KernelConfig | None) -> str:
    """How a kernel is kept: ``ternary``, ``int8`` or ``float``."""
    if config is None:
        return "float"
    return "int8" if isinstance(config, Int8Config) else "ternary"


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
      path                shape     -1      0     +1         scale  error  before  after   ratio
      head/kernel         64x16  33.7%  31.6%  34.7%  0.776..0.776  0.269  4.1 kB  260 B  15.75x
      ternary kernels                                                      4.1 kB  260 B  15.75x
      whole model                                                          4.2 kB  324 B  12.84x
      whole model, dense                                                   4.2 kB  276 B  15.07x
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

    @property
    def model_bytes_dense(self) -> int:
        """Bytes of the whole model in a file of ``bj.io.save(..., dense=True)``, but its header."""
        saved = sum(layer.bytes_after - layer.bytes_dense for layer in self.layers)
        return self.model_bytes_after - saved

    @property
    def model_dense_ratio(self) -> float:
        """Bytes before over those in a dense file, of the whole model."""
        return self.model_bytes_before / self.model_bytes_dense

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, ready for ``json.dumps`` or a logger.

        Returns:
          ``{"layers": [...], "ternary": {...}, "model": {...}}``, with ``"int8"``
          where there are such kernels; an error that is NaN (a kernel of zeros)
          is None.
        """

        def row(layer: LayerReport) -> dict[str, Any]:
            more = {"shape": list(layer.shape), "ratio": layer.ratio, "kind": layer.kind}
            return plain(dataclasses.asdict(layer) | more)

        def totals(before: int, after: int) -> dict[str, Any]:
            return {"bytes_before": before, "bytes_after": after, "ratio": before / after}

        return {
            "layers": [row(layer) for layer in self.layers],
            **{name: totals(*size) for name, size in self._by_kind().items()},
            "model": totals(self.model_bytes_before, self.model_bytes_after)
            | {"bytes_dense": self.model_bytes_dense, "dense_ratio": self.model_dense_ratio},
        }

    def _by_kind(self) -> dict[str, tuple[int, int]]:
        """Bytes before and after of the kernels of each kind that there are."""
        kinds = sorted({layer.kind for layer in self.layers}, reverse=True)
        return {
            name: (
                sum(layer.bytes_before for layer in self.layers if layer.kind == name),
                sum(layer.bytes_after for layer in self.layers if layer.kind == name),
            )
            for name in kinds
        }

    def __str__(self) -> str:
        """The report as a table, one row a kernel, then the totals."""
        header = ("path", "shape", "-1", "0", "+1", "scale", "error", "before", "after", "ratio")
        rows = [_row(layer) for layer in self.layers]
        totals = [(f"{name} kernels", *size) for name, size in self._by_kind().items()]
        totals.append(("whole model", self.model_bytes_before, self.model_bytes_after))
        if self.model_bytes_dense != self.model_bytes_after:
            totals.append(("whole model, dense", self.model_bytes_before, self.model_bytes_dense))
        for name, before, after in totals:
            sizes = (size_text(before), size_text(after), f"{before / after:.2f}x")
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


def measure(w: jax.Array, t: Ternary, packed: Stored) -> dict[str, jax.Array]:
    """The numbers of one layer that need its values; runs inside jit."""
    is_ternary = isinstance(packed, PackedTernary)
    zero, plus = _packing.count(packed.codes) if is_ternary else _int8_count(packed)
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


def _int8_count(packed: PackedInt8) -> tuple[jax.Array, jax.Array]:
    """How many codes are 0, and how many above, in each row."""
    # XLA's CPU backend sums integers many times slower than float32.
    rows = packed.codes.reshape(-1, packed.codes.shape[-1])

    def count(mask: jax.Array) -> jax.Array:
        return mask.astype(jnp.float32).sum(axis=-1).astype(jnp.int32)

    return count(rows == 0), count(rows > 0)


def layer_report(
    who: str, path: str, w: jax.Array, packed: Stored, measured: dict[str, jax.Array]
) -> LayerReport:
    """Reads the measured numbers; refuses weights that are not finite."""
    values = jax.device_get(measured)
    if not values["finite"]:
        _checks.not_finite(who, path, int((~jnp.isfinite(w)).sum()))
    plus = int(values["plus"].sum(dtype=int))
    fields = _packing.PER_BYTE if isinstance(packed, PackedTernary) else 1
    padding = fields * packed.codes.size - packed.size
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
        bytes_dense=_dense_bytes(packed),
    )


def _dense_bytes(packed: Stored) -> int:
    """Bytes of a kernel in a dense file."""
    if not isinstance(packed, PackedTernary):
        return packed.nbytes
    return packed.nbytes - packed.codes.nbytes + _packing.dense_length(packed.codes.nbytes)


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
      and a state: ``"missing"`` (None, or no gradient: integers, packed kernels),
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
    leaves = _boxes.flatten("gradient_flow", "grads", grads, is_leaf=lambda x: x is None)[0]
    return GradientFlow(tuple(_leaf_gradient(leaf.where, leaf.value, exploding) for leaf in leaves))


def _leaf_gradient(path: str, g: Any, exploding: float) -> LeafGradient:
    if g is None or is_packed(g) or g.dtype == jax.dtypes.float0:
        return LeafGradient(path, math.nan, math.nan, "missing")
    parts = (jnp.real(g), jnp.imag(g)) if jnp.iscomplexobj(g) else (g,)
    wide = jnp.stack([jnp.asarray(part, jnp.float32) for part in parts])
    largest = float(jnp.max(jnp.abs(wide), initial=0.0))
    if not math.isfinite(largest):
        return LeafGradient(path, math.nan, largest, "nan")
    if largest == 0.0:
        return LeafGradient(path, 0.0, 0.0, "dead")
    # A power of two keeps the squares of huge and tiny gradients finite.
    unit = 2.0 ** -min(max(math.frexp(largest)[1], -100), 100)
    norm = float(jnp.linalg.norm((wide * unit).reshape(-1))) / unit
    return LeafGradient(path, norm, largest, "exploding" if norm > exploding else "ok")


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no NaN and no Inf: None instead."""
    lost = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return {k: None if k in lost else v for k, v in row.items()}


def right(head: str, cells: Iterable[str]) -> list[str]:
    """Cells of one width: a column with signs is aligned to the right too."""
    column = [head, *cells]
    width = max(map(len, column))
    return [cell.rjust(width) for cell in column]


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
    shares = [f"{100 * n / total:.1f}%" for n in (layer.minus, layer.zero, layer.plus)]
    if layer.kind == "int8":  # the signs of 255 codes say little
        shares = ["", "int8", ""]
    return (
        layer.path,
        "x".join(map(str, layer.shape)),
        *shares,
        f"{layer.scale_min:.3g}..{layer.scale_max:.3g}",
        f"{layer.error:.3f}",
        size_text(layer.bytes_before),
        size_text(layer.bytes_after),
        f"{layer.ratio:.2f}x",
    )


def size_text(n: int) -> str:
    """Bytes in units that are read at a glance."""
    value, units = float(n), ("B", "kB", "MB", "GB", "TB")
    for unit in units:
        if value < 1000 or unit == units[-1]:
            return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def blank_figure(who: str, size: tuple[float, float]) -> Any:
    """An empty matplotlib figure of so many inches; matplotlib is an extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{who}: matplotlib is missing. Install it with: pip install 'bitnet_jax[plot]'."
        ) from error
    return Figure(figsize=size, layout="constrained")


def _draw(report: PackReport) -> Any:
    layers = report.layers[::-1]
    names = [f"{x.path} (int8)" if x.kind == "int8" else x.path for x in layers]
    figure = blank_figure("PackReport.plot", (11, 1.8 + 0.32 * len(layers)))
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
        f"{len(layers)} packed kernels {size_text(report.bytes_before)} to "
        f"{size_text(report.bytes_after)} ({report.ratio:.2f}x), whole model "
        f"{size_text(report.model_bytes_before)} to {size_text(report.model_bytes_after)} "
        f"({report.model_ratio:.2f}x)"
    )
    return figure
