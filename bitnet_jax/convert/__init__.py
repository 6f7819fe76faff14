"""Float networks to ternary ones: calibration from batches of inputs."""

from bitnet_jax.convert._calibrate import calibrate
from bitnet_jax.convert._calibration import CalibratedKernel, Calibration
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._methods import Method, Quantized

__all__ = [
    "CalibratedKernel",
    "Calibration",
    "Method",
    "Quantized",
    "Statistics",
    "calibrate",
]
