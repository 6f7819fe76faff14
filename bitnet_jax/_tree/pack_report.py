"""What packing did to a network, and whether gradients reach it: tables and pictures.

Every number is read from real arrays: codes are counted, bytes are ``nbytes``
of what is stored, scales, biases and float layers included.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import _checks
from bitnet_jax._display import blank_figure, plain, size_text, table
from bitnet_jax._packed import trits
from bitnet_jax._packed.kernel import Stored
from bitnet_jax._packed.stored import PackedInt8, PackedTernary
from bitnet_jax._quantize.config import Int8Config, KernelConfig, stated_fields
from bitnet_jax._quantize.ternary import Ternary, TernaryPlanes, dequantize_kernel


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What packing did to one kernel.

    Attributes:
      path: names joined by ``/``.
      shape: of the float kernel.
      config: the quantiser.
      minus: count of codes below 0, in all planes.
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
      rows: one :class:`LayerReport` for each packed kernel.
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

    rows: tuple[LayerReport, ...]
    model_bytes_before: int
    model_bytes_after: int

    @property
    def bytes_before(self) -> int:
        """Bytes of the selected kernels in float."""
        return sum(layer.bytes_before for layer in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of the selected kernels, packed."""
        return sum(layer.bytes_after for layer in self.rows)

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
        saved = sum(layer.bytes_after - layer.bytes_dense for layer in self.rows)
        return self.model_bytes_after - saved

    @property
    def model_dense_ratio(self) -> float:
        """Bytes before over those in a dense file, of the whole model."""
        return self.model_bytes_before / self.model_bytes_dense

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, ready for ``json.dumps`` or a logger.

        Returns:
          ``{"rows": [...], "ternary": {...}, "model": {...}}``, with ``"int8"``
          where there are such kernels; an error that is NaN (a kernel of zeros)
          is None.
        """

        def row(layer: LayerReport) -> dict[str, Any]:
            more = {"shape": list(layer.shape), "ratio": layer.ratio, "kind": layer.kind}
            stated = {"config": stated_fields(layer.config)}
            return plain(dataclasses.asdict(layer) | more | stated)

        def totals(before: int, after: int) -> dict[str, Any]:
            return {"bytes_before": before, "bytes_after": after, "ratio": before / after}

        return {
            "rows": [row(layer) for layer in self.rows],
            **{name: totals(*size) for name, size in self._by_kind().items()},
            "model": totals(self.model_bytes_before, self.model_bytes_after)
            | {"bytes_dense": self.model_bytes_dense, "dense_ratio": self.model_dense_ratio},
        }

    def _by_kind(self) -> dict[str, tuple[int, int]]:
        """Bytes before and after of the kernels of each kind that there are."""
        kinds = sorted({layer.kind for layer in self.rows}, reverse=True)
        return {
            name: (
                sum(layer.bytes_before for layer in self.rows if layer.kind == name),
                sum(layer.bytes_after for layer in self.rows if layer.kind == name),
            )
            for name in kinds
        }

    def __str__(self) -> str:
        """The report as a table, one row a kernel, then the totals."""
        header = ("path", "shape", "-1", "0", "+1", "scale", "error", "before", "after", "ratio")
        rows = [_row(layer) for layer in self.rows]
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


def measure(w: jax.Array, t: Ternary | TernaryPlanes, packed: Stored) -> dict[str, jax.Array]:
    """The numbers of one layer that need its values; runs inside jit."""
    is_ternary = isinstance(packed, PackedTernary)
    zero, plus = trits.count(packed.codes) if is_ternary else _int8_count(packed)
    # Dividing by the largest weight keeps the squares of huge and tiny ones finite.
    wide = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide))
    unit = 1.0 / jnp.maximum(largest, jnp.float32(1e-30))
    lost = jnp.square((wide - dequantize_kernel(t)) * unit).sum()
    return {
        "zero": zero,
        "plus": plus,
        "scale_min": packed.scale.min(),
        "scale_max": packed.scale.max(),
        "lost": lost,
        "whole": jnp.square(wide * unit).sum(),
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
    who: str, path: str, w: jax.Array | np.ndarray, packed: Stored, measured: dict[str, jax.Array]
) -> LayerReport:
    """The measured numbers of one kernel; raises for weights that are not finite."""
    values = jax.device_get(measured)
    if not values["finite"]:
        _checks.raise_not_finite(who, path, int((~jnp.isfinite(w)).sum()))
    plus = int(values["plus"].sum(dtype=int))
    fields = trits.PER_BYTE if isinstance(packed, PackedTernary) else 1
    codes = packed.planes * packed.size
    zero = int(values["zero"].sum(dtype=int)) - (fields * packed.codes.size - codes)
    return LayerReport(
        path=path,
        shape=packed.shape,
        config=packed.config,
        minus=codes - zero - plus,
        zero=zero,
        plus=plus,
        scale_min=float(values["scale_min"]),
        scale_max=float(values["scale_max"]),
        # On the host: of a kernel of zeros it is 0 / 0, which jax_debug_nans would refuse.
        error=float(values["lost"] / values["whole"]) if values["whole"] else math.nan,
        bytes_before=w.nbytes,
        bytes_after=packed.nbytes,
        bytes_dense=_dense_bytes(packed),
    )


def _dense_bytes(packed: Stored) -> int:
    """Bytes of a kernel in a dense file."""
    if not isinstance(packed, PackedTernary):
        return packed.nbytes
    return packed.nbytes - packed.codes.nbytes + trits.dense_length(packed.codes.nbytes)


def nbytes(leaves: Iterable[object]) -> int:
    """Bytes of arrays and packed kernels."""
    return sum(getattr(leaf, "nbytes", 0) for leaf in leaves)


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


def _draw(report: PackReport) -> Any:
    layers = report.rows[::-1]
    names = [f"{x.path} (int8)" if x.kind == "int8" else x.path for x in layers]
    figure = blank_figure("PackReport.plot", (11.0, 1.8 + 0.32 * len(layers)))
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

    size.barh(names, [layer.bytes_before for layer in layers], color="#8a8a8a", label="float")
    size.barh(names, [layer.bytes_after for layer in layers], color="#2a9d6f", label="packed")
    largest = max(layer.bytes_before for layer in layers)
    size.set(title="bytes", xlim=(0, 1.2 * largest))
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
