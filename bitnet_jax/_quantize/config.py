"""How kernels and activations are quantised: three small frozen dataclasses, and presets."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from bitnet_jax import _checks
from bitnet_jax._quantize.scale_rules import SCALE_RULES, ScaleRule, scale_rule

LARGEST_INT8 = 127  # the largest code of an int8 kernel

MOST_PLANES = 4  # eight bits a weight: a PackedInt8 holds more in as many

# Fields younger than the first files and their defaults, which neither a file nor a repr states.
YOUNGER = {"planes": 1, "rotation": None}


def _require_granularity(value: object) -> None:
    """Raises unless it is a name or a group size."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(
                f"TernaryConfig: `granularity` as a group size must be >= 1, got {value}."
            )
        return
    if not isinstance(value, str) or value not in ("tensor", "channel"):
        raise ValueError(
            "TernaryConfig: `granularity` must be 'tensor', 'channel' or a group size (int), "
            f"got {value!r}."
        )


def _require_bits(value: object) -> None:
    """Raises unless int8 codes can hold activations of this width."""
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= 8:
        raise ValueError(f"ActivationConfig: `bits` must be an integer from 2 to 8, got {value!r}.")


def _require_group(value: object) -> None:
    """Raises unless it is None or a group size."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            "ActivationConfig: `group` must be None (one scale per token) or a group size, an "
            f"integer >= 1, got {value!r}."
        )


def _require_planes(value: object) -> None:
    """Raises unless it is a number of planes."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_PLANES:
        raise ValueError(
            f"TernaryConfig: `planes` must be an integer from 1 to {MOST_PLANES}, got {value!r}. "
            "Two planes take four bits a weight; for eight use bj.Int8Config()."
        )


@dataclasses.dataclass(frozen=True, repr=False)
class TernaryConfig:
    """How a kernel is quantised to {-1, 0, +1} times a scale.

    Args:
      scale: the statistic behind the scale. ``"absmean"``: mean of \\|w\\|.
        ``"absmedian"``: median of \\|w\\|. ``"survivors"``: the threshold is set
        by mean \\|w\\|, and the scale is the mean over the weights above it.
      threshold: a weight is 0 up to this many times the statistic (the mean,
        or the median for ``"absmedian"``).
      granularity: what shares one scale. ``"tensor"``: the kernel.
        ``"channel"``: each output channel. An int: each run of so many weights
        along the contraction, in each output channel.
      eps: the smallest statistic, in units of the weights.
      planes: how many ternary kernels, each with scales of its own, add up to the
        kernel, ``w = s1 T1 + s2 T2`` [1]: each quantises what those before it left over.
        Two take four bits a weight and twice the time.
      rotation: None, or ``"hadamard"``: x and the kernel are rotated along the last
        contracting axis before they are quantised, ``y = (x R) Q(R^T W)``, so that a few
        large features do not coarsen all others. R is orthonormal and block-diagonal, with
        Walsh-Hadamard blocks of the largest power of two, at least 4, that divides the axis.

    Raises:
      ValueError: a name, threshold, group size, eps, number of planes or rotation out of range.

    Example:
      >>> import bitnet_jax as bj
      >>> bj.TernaryConfig(granularity="channel")
      TernaryConfig(scale='absmean', threshold=0.5, granularity='channel', eps=1e-05)
      >>> bj.TernaryConfig(scale="absmaen")
      Traceback (most recent call last):
        ...
      ValueError: TernaryConfig: `scale` must be one of 'absmean', 'absmedian', 'survivors', \
got 'absmaen'. Did you mean 'absmean'?

    References:
      [1] PTQTP, arXiv:2509.16989.
    """

    scale: Literal["absmean", "absmedian", "survivors"] = "absmean"
    threshold: float = 0.5
    granularity: Literal["tensor", "channel"] | int = "tensor"
    eps: float = 1e-5
    planes: int = 1
    rotation: Literal["hadamard"] | None = None

    def __post_init__(self) -> None:
        _checks.require_one_of("TernaryConfig", "scale", self.scale, tuple(SCALE_RULES))
        _checks.require_positive("TernaryConfig", "threshold", self.threshold)
        _require_granularity(self.granularity)
        _checks.require_epsilon("TernaryConfig", self.eps)
        _require_planes(self.planes)
        _checks.require_one_of("TernaryConfig", "rotation", self.rotation, (None, "hadamard"))

    def __repr__(self) -> str:
        """What a dataclass prints, without younger fields at their defaults."""
        stated = (f"{name}={value!r}" for name, value in stated_fields(self).items())
        return f"{type(self).__name__}({', '.join(stated)})"

    @property
    def one_plane(self) -> TernaryConfig:
        """The config of each plane."""
        return self if self.planes == 1 else dataclasses.replace(self, planes=1)


@dataclasses.dataclass(frozen=True)
class Int8Config:
    """How a kernel is quantised to int8, one scale per output channel.

    For heads and embeddings, which would otherwise dominate a small model's
    bytes or its error. An embedding (vocabulary, features) has one scale per row.

    Args:
      eps: the smallest max \\|w\\| of a channel, in units of the weights.

    Raises:
      ValueError: eps out of range.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> bj.pack(jax.random.normal(jax.random.key(0), (64, 16)), bj.Int8Config())
      PackedInt8(shape=(64, 16), scale=(1, 16), 1088 bytes)
    """

    eps: float = 1e-8
    granularity: ClassVar[str] = "channel"
    rotation: ClassVar[None] = None

    def __post_init__(self) -> None:
        _checks.require_epsilon("Int8Config", self.eps, LARGEST_INT8)


@dataclasses.dataclass(frozen=True)
class ActivationConfig:
    """How activations are quantised: one scale per token, or one for each of its groups.

    Groups are for models that were not trained with int8 activations: there one large
    feature coarsens the codes of its group alone, and not those of the whole token.

    Args:
      bits: 2 to 8; codes lie in [-qmax, qmax] with qmax = 2**(bits-1) - 1.
      eps: the smallest gamma, in units of the activations.
      group: None: one gamma per token. An int: one for each run of so many features
        along the contraction, which must be a multiple of it. A convolution takes none.

    Raises:
      ValueError: bits, eps or a group size out of range.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> bj.ActivationConfig(bits=4).qmax
      7
      >>> codes, gamma = bj.quantize_activations(
      ...     jnp.array([0.5, -1.0, 100.0, 25.0]), bj.ActivationConfig(group=2)
      ... )
      >>> codes.tolist(), gamma.tolist()
      ([64, -127, 127, 32], [1.0, 100.0])
    """

    bits: int = 8
    eps: float = 1e-5
    group: int | None = None

    def __post_init__(self) -> None:
        _require_bits(self.bits)
        _checks.require_epsilon("ActivationConfig", self.eps, self.qmax)
        _require_group(self.group)

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1


KernelConfig = TernaryConfig | Int8Config


def rule_of(config: TernaryConfig) -> ScaleRule:
    """How the scale of a config is made."""
    return scale_rule(config.scale)


def planes_of(config: KernelConfig) -> int:
    """How many planes add up to a kernel of this config."""
    return config.planes if isinstance(config, TernaryConfig) else 1


def stated_fields(config: Any) -> dict[str, Any]:
    """A config's fields by name, as files have them: without younger ones at their defaults."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {k: v for k, v in values.items() if k not in YOUNGER or v != YOUNGER[k]}


# The quantiser of b1.58: one scale for the kernel, a code is 0 up to half of the mean.
B158 = TernaryConfig()

# One scale for each output, and a low threshold: few weights become 0.
PHASE4 = TernaryConfig(threshold=0.1, granularity="channel", eps=1e-8)

# Ternary weight networks: the scale is the mean of the weights that are kept.
TWN = TernaryConfig(scale="survivors", threshold=0.7, granularity="channel")

# One token, one scale, codes in [-127, 127].
INT8 = ActivationConfig()
