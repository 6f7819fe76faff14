"""Meshes: partition specs of packed trees, gathered codes, a program's traffic, training memory."""

from bitnet_jax._ops.gather import gather_codes
from bitnet_jax.sharding._collectives import Collective, Collectives, collectives
from bitnet_jax.sharding._partition_specs import partition_specs
from bitnet_jax.sharding._training_memory import TrainingMemory, training_memory

__all__ = [
    "Collective",
    "Collectives",
    "TrainingMemory",
    "collectives",
    "gather_codes",
    "partition_specs",
    "training_memory",
]
