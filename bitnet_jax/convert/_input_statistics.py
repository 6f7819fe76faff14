"""What a calibration records of the inputs of one kernel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitnet_jax._quantize.rotation import transform64


class Statistics(NamedTuple):
    """Sums over the tokens that a kernel has seen.

    Attributes:
      tokens: (B,) int64, tokens seen by each slice.
      moments: (B, K) or (B, K, K) float64: sums over tokens of x_i**2, or of x_i x_j, not
        divided. None: the method needs none.
    """

    tokens: np.ndarray
    moments: np.ndarray | None

    def rotated(self, block: int, matrix: bool) -> Statistics:
        """The same sums over inputs ``x R``: ``R^T H R`` in float64, or its diagonal.

        Args:
          block: how many features are rotated together; 1: none.
          matrix: whether all of them are wanted, or the diagonal alone.

        Returns:
          Moments (B, K, K) or (B, K); those of a diagonal that is not rotated are themselves.
        """
        moments = self.moments
        if moments is None or (block == 1 and (matrix or moments.ndim == 2)):
            return self
        if block > 1:
            moments = np.array(moments, np.float64, order="C")
            transform64(moments, block, -1)
            transform64(moments, block, -2)
            _hold_to_bounds(moments)
        return self._replace(moments=moments if matrix else np.einsum("bkk->bk", moments).copy())


def _hold_to_bounds(moments: np.ndarray) -> None:
    """Brings ``h_ii >= 0`` and ``|h_ij| <= sqrt(h_ii h_jj)`` back, in place.

    The sums of x_i x_j are float32, and where they cancel (the sum of centred inputs is a rotated
    feature) their rounding is all that is left.
    """
    for matrix in moments:
        norm = np.sqrt(np.maximum(matrix.diagonal(), 0.0))
        for row, own in zip(matrix, norm, strict=True):
            np.clip(row, -own * norm, own * norm, out=row)
