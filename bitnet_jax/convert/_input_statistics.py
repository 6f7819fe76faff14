"""What a calibration records of the inputs of one kernel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    """Sums over the tokens that a kernel has seen.

    Attributes:
      tokens: (B,) int64, tokens seen by each slice.
      moments: (B, K) or (B, K, K) float64: sums over tokens of x_i**2, or of x_i x_j, not
        divided. None: the method needs none.
    """

    tokens: np.ndarray
    moments: np.ndarray | None
