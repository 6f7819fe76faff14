"""What a conversion lost: the squared error of a kernel's outputs, relative to their squares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitnet_jax.convert import _second_moment
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._output_square import output_square, whole_squares
from bitnet_jax.convert._quantized import Quantized


def error(w: np.ndarray, quantized: Quantized, statistics: Statistics) -> np.ndarray:
    """The squared error of the outputs over the tokens seen, relative to the outputs' squares.

    ``tr((W - V)^T H (W - V)) / tr(W^T H W)``, with V codes times scales and H the
    second moment of the inputs: the matrix, its diagonal, or the identity where there is
    none or a slice saw no tokens.

    Args:
      w: (B, K, N) float32.
      quantized: its codes and scales.
      statistics: of its inputs.

    Returns:
      (B,) float64: 0 is exact, and 1 is what zeros in the place of w have. Infinite where the
      outputs were 0 and are no more.

    Raises:
      ValueError: operands that do not fit each other.

    Example:
      >>> import numpy as np, bitnet_jax as bj
      >>> from bitnet_jax.convert._methods import Statistics, survivors
      >>> from bitnet_jax.convert._relative_error import error
      >>> w = np.array([[[0.75], [-0.25], [1.25]]], np.float32)
      >>> none = Statistics(np.array([0]), None)
      >>> error(w, survivors(w, none, bj.B158), none).round(4).tolist()
      [0.0857]
    """
    return errors(w, [quantized], statistics)[0]


def errors(
    w: np.ndarray,
    several: Sequence[Quantized],
    statistics: Statistics,
    whole: np.ndarray | None = None,
) -> list[np.ndarray]:
    """:func:`error` of several conversions of one kernel, whose outputs are squared once.

    ``whole``: these squares, of :func:`whole_squares`, where they are known.
    """
    _second_moment.require_kernel("error", w)
    _second_moment.require_statistics("error", w, statistics, "nothing")
    for quantized in several:
        _require_quantized_of(w, quantized)
    lost = np.empty((len(several), len(w)))
    whole = whole_squares(w, statistics) if whole is None else whole
    for b in range(len(w)):
        h = _second_moment.value(statistics, b, w.shape[1])
        for i, (codes, scale, _) in enumerate(several):
            lost[i, b] = output_square(h, w[b], codes[b], scale[b])
    relative = np.where(lost > 0, np.inf, 0.0)
    np.divide(lost, whole, out=relative, where=whole > 0)
    return list(relative)


def _require_quantized_of(w: np.ndarray, quantized: Quantized) -> None:
    """Raises unless codes and scales are of a kernel of this shape."""
    codes, scale = quantized.codes, quantized.scale
    slices, length, outputs = w.shape
    fits = scale.ndim == 3 and scale.shape[0] == slices and scale.shape[2] in (1, outputs)
    fits = fits and codes.ndim == 3 and codes.shape[::2] == w.shape[::2]
    planes = codes.shape[1] // length if fits else 0
    if not planes or codes.shape[1] != planes * length or not _whole_groups(scale, planes, length):
        raise ValueError(
            f"error: `quantized` must be of a kernel of shape {w.shape}, got codes of shape "
            f"{codes.shape} and scales of shape {scale.shape}. Pass what a method made of this w."
        )


def _whole_groups(scale: np.ndarray, planes: int, length: int) -> bool:
    """Whether there are as many scales for each plane, which cut its contraction evenly."""
    groups = scale.shape[1] // planes
    return groups > 0 and groups * planes == scale.shape[1] and length % groups == 0
