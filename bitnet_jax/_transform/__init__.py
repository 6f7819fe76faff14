"""``ternarize`` of functions: an interpreter of jaxprs, its rules by primitive, the table."""

from bitnet_jax._transform.decide import EMBEDDING
from bitnet_jax._transform.explain import ProgramCoverage
from bitnet_jax._transform.program import Plan as ProgramPlan
from bitnet_jax._transform.program import Spec
from bitnet_jax._transform.ternarize import Ternarized, ternarize

__all__ = ["EMBEDDING", "ProgramCoverage", "ProgramPlan", "Spec", "Ternarized", "ternarize"]
