"""Published language models: one decoder, loaded, trained, packed, and generated from."""

from bitnet_jax.models._decoder import Decoder
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._report import LoadedKernel, LoadReport
from bitnet_jax.models._rope import Rope

__all__ = ["Decoder", "DecoderConfig", "LoadReport", "LoadedKernel", "Rope"]
