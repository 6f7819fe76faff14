"""Float networks to ternary ones: calibration from batches of inputs, distillation."""

from bitnet_jax.convert._budget import Budget, BudgetedKernel, budget
from bitnet_jax.convert._calibrate import calibrate
from bitnet_jax.convert._calibration import CalibratedKernel, Calibration
from bitnet_jax.convert._capture import Captured, capture
from bitnet_jax.convert._distillation import (
    attention_relation,
    hidden_distillation,
    logit_distillation,
)
from bitnet_jax.convert._finetune_recipe import FinetuneRecipe, Losses, finetune_recipe
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._methods import Method
from bitnet_jax.convert._options import CANDIDATES, Option
from bitnet_jax.convert._quantized import Quantized
from bitnet_jax.convert._smooth import smooth
from bitnet_jax.convert._smoothing import SmoothedKernel, Smoothing

__all__ = [
    "CANDIDATES",
    "Budget",
    "BudgetedKernel",
    "CalibratedKernel",
    "Calibration",
    "Captured",
    "FinetuneRecipe",
    "Losses",
    "Method",
    "Option",
    "Quantized",
    "SmoothedKernel",
    "Smoothing",
    "Statistics",
    "attention_relation",
    "budget",
    "calibrate",
    "capture",
    "finetune_recipe",
    "hidden_distillation",
    "logit_distillation",
    "smooth",
]
