"""``ternarize`` of functions: an interpreter of jaxprs, its rules by primitive, the table."""

from bitnet_jax._transform.ternarize import Ternarized, ternarize

__all__ = ["Ternarized", "ternarize"]
