"""What else a kernel could have been, in how many bytes, at what predicted loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bitnet_jax._checks import describe
from bitnet_jax._packed.pack import pack_quantized
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.config import Int8Config, KernelConfig, TernaryConfig
from bitnet_jax._quantize.kernel_spec import KernelSpec, require_kernel_config
from bitnet_jax._quantize.rotation import SMALLEST_BLOCK, has_blocks
from bitnet_jax._tree.pack_report import kind
from bitnet_jax.convert import _second_moment
from bitnet_jax.convert._chosen_methods import WHO
from bitnet_jax.convert._input_statistics import Statistics

# Configs to choose from, coarse to fine. A kernel's own config and float join them; those with
# groups that fit no kernel are left out.
CANDIDATES: tuple[KernelConfig, ...] = (
    TernaryConfig(granularity=128),
    TernaryConfig(granularity=32),
    TernaryConfig(granularity=128, planes=2),
    Int8Config(),
)


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to keep a kernel.

    Attributes:
      config: the quantiser; None: float.
      bytes: of the kernel kept so.
      error: as of a :class:`CalibratedKernel`.
      change: as of a :class:`CalibratedKernel`.
    """

    config: KernelConfig | None
    bytes: int
    error: float
    change: float

    def to_dict(self) -> dict[str, Any]:
        """As plain Python."""
        named = {"config": repr(self.config), "kind": kind(self.config)}
        return {**named, "bytes": self.bytes, "error": self.error, "change": self.change}


def require_candidates(candidates: object) -> tuple[KernelConfig, ...]:
    """The configs, each once; raises unless they are such."""
    if candidates is None:
        return ()
    if not isinstance(candidates, Sequence) or isinstance(candidates, str) or not candidates:
        raise TypeError(
            f"{WHO}: `candidates` must be a list of configs, got {describe(candidates)}. Pass "
            "bj.convert.CANDIDATES or for example [bj.Int8Config()]; a kernel's own config and "
            "float join them."
        )
    for i, config in enumerate(candidates):
        require_kernel_config(WHO, config, f"candidates[{i}]")
    return tuple(dict.fromkeys(candidates))


def fits(config: KernelConfig, spec: KernelSpec, shape: tuple[int, ...]) -> bool:
    """Whether a kernel can have a config: its groups tile the contraction, and blocks do."""
    group = config.granularity
    contraction = spec.axes.split(shape)[1]
    if not has_blocks(config, contraction):
        return False
    return not isinstance(group, int) or kernel_axes.group_grid(contraction, group) is not None


def require_fitting(
    candidates: Sequence[KernelConfig],
    kernels: Sequence[tuple[KernelSpec, tuple[int, ...]]],
) -> None:
    """Raises for a candidate that no kernel can have, unless it came with the ready list."""
    if tuple(candidates) == CANDIDATES:
        return
    for config in candidates:
        if not any(fits(config, *kernel) for kernel in kernels):
            lengths = sorted({math.prod(spec.axes.split(shape)[1]) for spec, shape in kernels})
            rotated = "" if config.rotation is None else f" or blocks of {SMALLEST_BLOCK} to rotate"
            raise ValueError(
                f"{WHO}: no kernel can have the candidate {config!r}: its groups{rotated} tile "
                f"none of the contractions {lengths}. Choose a group size that divides one of them."
            )


def stored_bytes(spec: KernelSpec, shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of a packed kernel, codes and scale; nothing is computed."""
    run = functools.partial(pack_quantized, spec=spec)
    return jax.eval_shape(run, jax.ShapeDtypeStruct(shape, dtype))[1].nbytes


def stakes(
    w: np.ndarray, statistics: Statistics, whole: np.ndarray, squares: np.ndarray
) -> np.ndarray:
    """What a relative error of 1 of each slice would add to the loss, to second order.

    The loss is taken to grow by ``1/2 E[(d . g)**2]``, with d an error of the outputs and g the
    gradient of the loss there: the Fisher form of the curvature. Where d and g are independent,
    as many outputs as there are share it alike. ``E |x|**2 E |g|**2 = E |dL/dW|**2`` gives
    ``E |g|**2`` from the kernel's own gradient.

    Args:
      w: (B, K, N) float32.
      statistics: of its inputs.
      whole: (B,) its ``whole_squares``, ``tr(W^T H W)``.
      squares: (B,) the mean over losses of the squared gradient of the kernel.

    Returns:
      (B,) float64: ``1/2 tr(W^T H W) / tr(H) squares / N``.
    """
    moments = (_second_moment.value(statistics, b, w.shape[1]) for b in range(len(w)))
    trace = np.array([h.sum() if h.ndim == 1 else h.trace() for h in moments])
    return 0.5 * whole / trace * squares / w.shape[2]


def mean_error(errors: np.ndarray) -> float:
    """Over slices; NaN of slices that have no loss to compare with are left out."""
    known = errors[np.isfinite(errors)]
    return float(known.mean()) if known.size else math.nan


def change(errors: np.ndarray, stake: np.ndarray | None) -> float:
    """The predicted change of the loss, summed over slices; without stakes, the mean error."""
    if stake is None:
        return mean_error(errors)
    at_stake = stake > 0  # the others were never seen, or give 0
    return float((errors[at_stake] * stake[at_stake]).sum())
