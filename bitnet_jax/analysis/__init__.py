"""Reports of a model: sensitivity before packing, comparison after, statistics in training."""

from bitnet_jax.analysis._compare import Comparison, compare
from bitnet_jax.analysis._gradient_flow import GradientFlow, LeafGradient, gradient_flow
from bitnet_jax.analysis._sensitivity import LayerSensitivity, Sensitivity, sensitivity
from bitnet_jax.analysis._trit_stats import LayerTrits, TritStats, trit_stats

__all__ = [
    "Comparison",
    "GradientFlow",
    "LayerSensitivity",
    "LayerTrits",
    "LeafGradient",
    "Sensitivity",
    "TritStats",
    "compare",
    "gradient_flow",
    "sensitivity",
    "trit_stats",
]
