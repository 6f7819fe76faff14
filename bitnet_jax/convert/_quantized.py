"""What a method makes of a kernel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Quantized(NamedTuple):
    """What a method made of a kernel.

    Of a config with several planes P, codes and scales are of a kernel with a contraction of
    P K, plane by plane, whose inputs are those of the kernel, P times. The planes of a group
    come by falling scale.

    Attributes:
      codes: (B, P K, N) int8 in {-1, 0, +1}.
      scale: (B, P G, 1 or N) float32, with G = 1 or K / granularity.
      notes: what was unusual and how it was handled, a sentence each.
    """

    codes: np.ndarray
    scale: np.ndarray
    notes: tuple[str, ...]
