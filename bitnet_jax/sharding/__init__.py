"""Meshes: where packed kernels lie, what is gathered, what a program sends, what a run needs."""

from bitnet_jax._ops.gather import gather_codes
from bitnet_jax.sharding._collectives import Collective, Traffic, traffic
from bitnet_jax.sharding._partition_specs import partition_specs
from bitnet_jax.sharding._training_memory import TrainingMemory, training_memory

__all__ = [
    "Collective",
    "Traffic",
    "TrainingMemory",
    "gather_codes",
    "partition_specs",
    "traffic",
    "training_memory",
]
