"""Optax transforms for ternary training."""

from bitnet_jax.optim._b158_adamw import b158_adamw
from bitnet_jax.optim._grokfast_ema import GrokfastEmaState, grokfast_ema
from bitnet_jax.optim._grokfast_ma import GrokfastMaState, grokfast_ma, grokfast_ma_bytes
from bitnet_jax.optim._mugrokfast import PHASES, MuGrokfastPhase, mugrokfast, muon_dimensions
from bitnet_jax.optim._qk_clip import attention_max_logits, clip_by_max_logits, qk_clip
from bitnet_jax.optim._schedules import strength_schedule, two_stage_lr, two_stage_weight_decay
from bitnet_jax.optim._watch_trits import WatchTritsState, read_trits, watch_trits

__all__ = [
    "PHASES",
    "GrokfastEmaState",
    "GrokfastMaState",
    "MuGrokfastPhase",
    "WatchTritsState",
    "attention_max_logits",
    "b158_adamw",
    "clip_by_max_logits",
    "grokfast_ema",
    "grokfast_ma",
    "grokfast_ma_bytes",
    "mugrokfast",
    "muon_dimensions",
    "qk_clip",
    "read_trits",
    "strength_schedule",
    "two_stage_lr",
    "two_stage_weight_decay",
    "watch_trits",
]
