"""`DecoderConfig`: what a decoder is made of, in flags."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from bitnet_jax import _checks
from bitnet_jax._quantize.int8 import INT8, ActivationConfig, Int8Config, check_activations
from bitnet_jax._quantize.rotation import require_rotation
from bitnet_jax._quantize.ternary import B158, KernelConfig, TernaryConfig
from bitnet_jax.models._rope import Rope

_DEFAULT_ROPE = Rope()

ACTIVATIONS = ("silu", "relu2")

_PROJECTION = re.compile(r"layers/(0|[1-9]\d{0,8})/(.+)")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, and how each of its kernels is stored.

    The defaults are a small BitNet b1.58 of the published shape: relu^2, sub-norms, tied head.

    Args:
      vocabulary: how many tokens there are.
      width: features between layers.
      hidden: features inside the multilayer perceptron.
      depth: how many layers.
      heads: query heads.
      kv_heads: key and value heads, a divisor of ``heads``; None: ``heads``.
      head_dim: features of a head; None: ``width / heads``.
      context: the longest input, in tokens.
      rope: how positions are encoded.
      activation: of the gate, ``"silu"`` or ``"relu2"`` (ReLU squared).
      sub_norms: a norm before the output projections of attention and perceptron.
      query_key_norm: a norm over each head of queries and keys.
      projection_norm: a norm inside each quantised projection.
      projection_norm_eps: of that norm.
      attention_bias: whether the four projections of attention have a bias.
      mlp_bias: whether the three projections of the perceptron have a bias.
      tied: whether the head is the embedding.
      norm_eps: of all other norms.
      embedding_multiplier: of the embedding's rows (MiniCPM's ``scale_emb``).
      residual_multiplier: of what a branch adds (``scale_depth / sqrt(depth)``).
      logit_multiplier: of the head's input (``dim_model_base / hidden_size``).
      weights: the projections' quantiser: ternary, int8, or None for float.
      activations: the quantiser of what meets quantised kernels; None: weight-only. A group
        (``bj.ActivationConfig(group=64)``) divides the inputs of each.
      activation_rounding: ``"float32"``, or ``"input"``: activations are quantised in
        the dtype that they come in, as transformers' ``BitLinear`` does.
      embedding: the embedding's quantiser; None: float.
      head: an untied head's quantiser; None: float. A tied head is the embedding, and takes none.
      overrides: (path, quantiser) of single kernels, such as
        ``("layers/0/mlp/down", None)``.
      dtype: of the computation between layers. Norms and softmax are float32.
      param_dtype: of parameters that :class:`Decoder` makes.
      scan: whether layers are stacked and run by ``jax.lax.scan``.
      remat: whether layers are computed again in the backward pass.

    Raises:
      ValueError: a number out of range, or numbers that do not fit each other; a quantiser for
        a kernel that the decoder has not.
      TypeError: a field of another type.

    Example:
      >>> import bitnet_jax as bj
      >>> config = bj.models.DecoderConfig(vocabulary=256, width=64, heads=4, kv_heads=2)
      >>> config.head_dim, config.kernel("layers/0/mlp/up").granularity
      (16, 'tensor')
    """

    vocabulary: int
    width: int = 256
    hidden: int = 688
    depth: int = 4
    heads: int = 4
    kv_heads: int = None  # pyright: ignore[reportAssignmentType]  # set by __post_init__
    head_dim: int = None  # pyright: ignore[reportAssignmentType]
    context: int = 4096
    rope: Rope = _DEFAULT_ROPE
    activation: Literal["silu", "relu2"] = "relu2"
    sub_norms: bool = True
    query_key_norm: bool = False
    projection_norm: bool = False
    projection_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    norm_eps: float = 1e-5
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    weights: KernelConfig | None = B158
    activations: ActivationConfig | None = INT8
    activation_rounding: Literal["float32", "input"] = "float32"
    embedding: KernelConfig | None = None
    head: KernelConfig | None = None
    overrides: tuple[tuple[str, KernelConfig | None], ...] = ()
    dtype: Any = np.float32
    param_dtype: Any = np.float32
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        who = "DecoderConfig"
        for name in ("vocabulary", "width", "hidden", "depth", "heads", "context"):
            _require_count(who, name, getattr(self, name))
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim is None:
            _require_divides(who, "heads", self.heads, "width", self.width)
            object.__setattr__(self, "head_dim", self.width // self.heads)
        for name in ("kv_heads", "head_dim"):
            _require_count(who, name, getattr(self, name))
        _require_divides(who, "kv_heads", self.kv_heads, "heads", self.heads)
        _require_divides(who, "2", 2, "head_dim", self.head_dim)
        _checks.require_instance(who, "rope", self.rope, Rope, "Use bj.models.Rope(theta=...).")
        _checks.require_one_of(who, "activation", self.activation, ACTIVATIONS)
        _checks.require_one_of(
            who, "activation_rounding", self.activation_rounding, ("float32", "input")
        )
        for name in ("norm_eps", "projection_norm_eps"):
            _checks.require_epsilon(who, getattr(self, name))
        for name in ("embedding_multiplier", "residual_multiplier", "logit_multiplier"):
            _checks.require_positive(who, name, getattr(self, name))
        check_activations(who, self.activations)
        _require_one_scale(who, self.activation_rounding, self.activations)
        for name in ("weights", "embedding", "head"):
            require_quantiser(who, name, getattr(self, name))
        for path, config in self.overrides:
            require_quantiser(who, f"overrides[{path!r}]", config)
        _require_head(who, self)
        _require_kernels(who, self)
        _require_groups(who, self)
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, _float_dtype(who, name, getattr(self, name)))

    def kernel(self, path: str) -> KernelConfig | None:
        """The quantiser of one kernel.

        Args:
          path: ``"embedding"``, ``"head"``, or of a projection: ``"layers/0/attention/query"``.

        Returns:
          Its config, or None where it is float.
        """
        default = {"embedding": self.embedding, "head": self.head}.get(path, self.weights)
        return dict(self.overrides).get(path, default)

    @property
    def head_activations(self) -> ActivationConfig | None:
        """The activations' quantiser at the head: int8 products always take int8."""
        config = self.kernel("embedding" if self.tied else "head")
        return (self.activations or INT8) if isinstance(config, Int8Config) else self.activations


def _require_head(who: str, config: DecoderConfig) -> None:
    """Refuses a quantiser for the head of a tied decoder, which has none."""
    if config.tied and config.head is not None:
        raise ValueError(
            f"{who}: `head` is {config.head}, and a tied decoder's head is its embedding. Give "
            "`embedding=` the quantiser, or make the decoder with tied=False."
        )


def _require_kernels(who: str, config: DecoderConfig) -> None:
    """Refuses overrides that name no kernel, or one twice."""
    paths, parts = [path for path, _ in config.overrides], projection_sizes(config)
    for path in paths:
        outer = path == "embedding" or (path == "head" and not config.tied)
        found = _PROJECTION.fullmatch(path) if isinstance(path, str) else None
        inside = found is not None and found[2] in parts and int(found[1]) < config.depth
        if not (outer or inside):
            own = "'embedding'" if config.tied else "'embedding', 'head'"
            raise ValueError(
                f"{who}: `overrides` names {path!r}, which is no kernel of this decoder. Name "
                f"{own}, or a projection such as 'layers/{config.depth - 1}/mlp/down'."
            )
        if paths.count(path) > 1:
            raise ValueError(f"{who}: `overrides` names {path!r} twice. Leave one out.")


def projection_sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Lengths in and out of each projection of a layer."""
    wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "attention/query": (config.width, wide),
        "attention/key": (config.width, narrow),
        "attention/value": (config.width, narrow),
        "attention/out": (wide, config.width),
        "mlp/gate": (config.width, config.hidden),
        "mlp/up": (config.width, config.hidden),
        "mlp/down": (config.hidden, config.width),
    }


def _require_groups(who: str, config: DecoderConfig) -> None:
    """Raises where groups, of activations or of weights, do not divide a kernel's inputs."""
    sizes, own = projection_sizes(config), dict(config.overrides)
    kernels: dict[str, KernelConfig | None] = {"embedding": config.embedding, "head": config.head}
    for part in sizes:  # of layers that are alike the first, however many a file says there are
        paths = (f"layers/{i}/{part}" for i in range(config.depth))
        first = next((path for path in paths if path not in own), None)
        if first is not None:
            kernels[first] = config.weights
    kernels |= own
    inputs = {
        path: sizes[path.split("/", 2)[2]][0] if "/" in path else config.width
        for path, kernel in kernels.items()
        if kernel is not None
    }
    looked_up = () if config.tied else ("embedding",)  # an input, which nothing multiplies
    group = None if config.activations is None else config.activations.group
    met = {path: n_in for path, n_in in inputs.items() if path not in looked_up}
    _require_divisor(who, "activations.group", group, met)
    for kernel in {k for k in kernels.values() if isinstance(k, TernaryConfig)}:
        quantised = {path: n_in for path, n_in in inputs.items() if kernels[path] == kernel}
        _require_divisor(who, "granularity", kernel.granularity, quantised)
        for path, n_in in quantised.items():
            require_rotation(f"{who}: {path}", kernel, (n_in,))


def _require_divisor(who: str, name: str, group: object, inputs: dict[str, int]) -> None:
    for path, n_in in inputs.items():
        if isinstance(group, int) and n_in % group:
            raise ValueError(
                f"{who}: `{name}`={group} does not divide the {n_in} inputs of {path!r}. Use a "
                f"divisor of {math.gcd(*inputs.values())}, which divides them all."
            )


def _require_one_scale(who: str, rounding: str, activations: ActivationConfig | None) -> None:
    """Raises where groups of activations are to be rounded in the input's dtype."""
    if rounding == "input" and activations is not None and activations.group is not None:
        raise ValueError(
            f"{who}: `activation_rounding`='input' is transformers' BitLinear, with one scale per "
            f"token, and `activations.group` is {activations.group}. Use "
            "activation_rounding='float32', or activations without a group."
        )


def _require_count(who: str, name: str, value: Any) -> None:
    """Refuses anything but an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{who}: `{name}` must be an integer >= 1, got {value!r}.")


def _require_divides(who: str, name: str, divisor: int, of: str, value: int) -> None:
    """Refuses a number that does not divide another."""
    if value % divisor:
        raise ValueError(f"{who}: `{of}` must be a multiple of {name} = {divisor}, got {value}.")


def require_quantiser(who: str, name: str, value: object) -> None:
    """Refuses anything but a kernel's quantiser or None."""
    kinds = (TernaryConfig, Int8Config, type(None))
    _checks.require_instance(who, name, value, kinds, "Use bj.B158, bj.Int8Config() or None.")


def _float_dtype(who: str, name: str, value: Any) -> np.dtype:
    """A dtype that is one object however it was named, for configs to be compared."""
    dtype = jnp.dtype(value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{who}: `{name}` must be a floating-point dtype, got {value!r}.")
    return dtype
