"""Optax transforms for ternary training."""

from bitnet_jax.optim._watch import WatchTritsState, read_trits, watch_trits

__all__ = ["WatchTritsState", "read_trits", "watch_trits"]
