"""One kernel converted by its method, checked, packed, and measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bitnet_jax import _mesh
from bitnet_jax._checks import describe
from bitnet_jax._packed.kernel import Stored
from bitnet_jax._packed.pack import pack_kernel, stored
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.config import Int8Config, KernelConfig, TernaryConfig, planes_of
from bitnet_jax._quantize.kernel_spec import KernelSpec
from bitnet_jax._quantize.rotation import rotated_kernel
from bitnet_jax._quantize.ternary import of_canonical
from bitnet_jax._transform.probe import Wanted
from bitnet_jax._tree.leaves import Leaf
from bitnet_jax.convert._calibration import CalibratedKernel
from bitnet_jax.convert._chosen_methods import WHO, takes
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._methods import METHODS, Method
from bitnet_jax.convert._options import Option, change, fits, mean_error, stakes, stored_bytes
from bitnet_jax.convert._output_square import whole_squares
from bitnet_jax.convert._quantized import Quantized
from bitnet_jax.convert._relative_error import errors


class FloatKernel(NamedTuple):
    """One kernel to convert.

    Attributes:
      leaf: where it lies.
      spec: how it is quantised.
      name: of its method.
      method: None: an int8 kernel has none.
      equal: whether every token counts the same in what is known of its inputs.
      probed: whether its inputs are looked at though its method needs nothing.
      candidates: other configs to measure, each of which it can have; None: none are asked for,
        and no options are reported.
      target: (B, K, N) float32, what a method is to come near to; None: the kernel.
    """

    leaf: Leaf
    spec: KernelSpec
    name: str
    method: Method | None
    equal: bool = False
    probed: bool = False
    candidates: tuple[KernelConfig, ...] | None = None
    target: np.ndarray | None = None

    @property
    def wanted(self) -> Wanted | None:
        """What is to be known of its inputs; None: nothing."""
        needs = "nothing" if self.method is None else self.method.needs
        if needs == "nothing" and not self.probed:
            return None
        # The diagonal of rotated inputs is made of the whole matrix.
        matrix = needs == "matrix" or any(self.block(c) > 1 for c in self.configs)
        return Wanted(tuple(self.leaf.value.shape), self.spec.axes, matrix, self.equal)

    @property
    def configs(self) -> list[KernelConfig]:
        """Its own config, then the others to measure."""
        return [self.spec.config, *(c for c in self.candidates or () if c != self.spec.config)]

    def block(self, config: KernelConfig) -> int:
        """How many of its inputs a config rotates together; 1: none."""
        return self.spec._replace(config=config).block(tuple(self.leaf.value.shape))


def converted(
    kernel: FloatKernel,
    statistics: Statistics | None,
    squares: np.ndarray | None = None,
) -> tuple[Stored, CalibratedKernel]:
    """One kernel packed, and its row of the report.

    Args:
      kernel: the kernel.
      statistics: of its inputs; None: nothing is known.
      squares: (B,) the mean of its squared gradient; None: no loss is known.
    """
    made, row = measured(kernel, statistics, squares)
    return packed_kernel(kernel, made), row


def packed_kernel(kernel: FloatKernel, made: Quantized) -> Stored:
    """A kernel packed, with the codes and scales that were made of it."""
    w = kernel.leaf.value
    w = w if isinstance(w, jax.Array) else jnp.asarray(w)
    return pack_kernel(w, kernel.spec) if kernel.method is None else _packed(w, made, kernel.spec)


def measured(
    kernel: FloatKernel,
    statistics: Statistics | None,
    squares: np.ndarray | None = None,
) -> tuple[Quantized, CalibratedKernel]:
    """Codes and scales of one kernel, and its row of the report; see :func:`converted`."""
    leaf, spec, name, method = kernel[:4]
    w = leaf.value if isinstance(leaf.value, jax.Array) else jnp.asarray(leaf.value)
    tokens = None if statistics is None else int(statistics.tokens.min())
    if statistics is None:
        slices = math.prod(spec.axes.split(w.shape)[0])
        statistics = Statistics(np.zeros(slices, np.int64), None)
    configs = kernel.configs
    blocks = [kernel.block(c) for c in configs]
    sides = {block: _side(kernel, statistics, block) for block in dict.fromkeys(blocks)}
    own = sides[blocks[0]]
    made = [_quantized(kernel, w, sides[b], c) for b, c in zip(blocks, configs, strict=True)]
    plain = made[0]
    if method is not None and name != "absmean":
        plain = METHODS["absmean"].quantize(own.w, own.statistics, _ternary(spec.config))
    plainly, *lost = _errors(sides, [(blocks[0], plain), *zip(blocks, made, strict=True)])
    stake = None if squares is None else stakes(*own, squares)
    options = () if kernel.candidates is None else _options(kernel, lost, stake)
    return made[0], CalibratedKernel(
        path=leaf.where,
        method=name,
        shape=tuple(w.shape),
        config=spec.config,
        tokens=tokens,
        error=mean_error(lost[0]),
        absmean_error=mean_error(plainly),
        notes=tuple(made[0].notes),
        change=change(lost[0], stake),
        options=options,
    )


class _Side(NamedTuple):
    """A canonical kernel, the statistics of its inputs, in the basis of a config, and its outputs.

    Attributes:
      w: (B, K, N).
      statistics: of its inputs.
      whole: (B,) its ``whole_squares``.
    """

    w: np.ndarray
    statistics: Statistics
    whole: np.ndarray


def _side(kernel: FloatKernel, statistics: Statistics, block: int) -> _Side:
    """Both rotated by blocks; of the statistics no more than the method needs."""
    matrix = kernel.method is not None and kernel.method.needs == "matrix"
    w, statistics = _canonical_kernel(kernel, block), statistics.rotated(block, matrix)
    return _Side(w, statistics, whole_squares(w, statistics))


def _errors(sides: Mapping[int, _Side], made: Sequence[tuple[int, Quantized]]) -> list[np.ndarray]:
    """The error of each, on the side where it was made."""
    found = {}
    for block, side in sides.items():
        here = [i for i, (b, _) in enumerate(made) if b == block]
        several = [made[i][1] for i in here]
        found |= zip(here, errors(side.w, several, side.statistics, side.whole), strict=True)
    return [found[i] for i in range(len(made))]


def _ternary(config: KernelConfig) -> TernaryConfig:
    assert isinstance(config, TernaryConfig)  # of a kernel with a method
    return config


def _quantized(kernel: FloatKernel, w: jax.Array, side: _Side, config: KernelConfig) -> Quantized:
    """A kernel by its method and a config, or by the quantiser of an int8 one."""
    spec, name, method = kernel.spec, kernel.name, kernel.method
    if isinstance(config, Int8Config) or method is None:
        return Quantized(*_canonical_parts(pack_kernel(w, spec._replace(config=config))), ())
    made = method.quantize(side.w, side.statistics, config)
    _require_quantized(kernel.leaf.where, name, made, side.w.shape, config)
    return made


def possible(kernel: FloatKernel, config: KernelConfig) -> bool:
    """Whether a kernel can have a config; one without a method stays as its selector said."""
    if kernel.method is None or not takes(kernel.method, config):
        return False
    return fits(config, kernel.spec, kernel.leaf.value.shape)


def _options(
    kernel: FloatKernel, errors: Sequence[np.ndarray], stake: np.ndarray | None
) -> tuple[Option, ...]:
    """The ways to keep a kernel, float last."""
    w, spec = kernel.leaf.value, kernel.spec
    found = [
        Option(
            config=config,
            bytes=stored_bytes(spec._replace(config=config), w.shape, w.dtype),
            error=mean_error(error),
            change=change(error, stake),
        )
        for config, error in zip(kernel.configs, errors, strict=True)
    ]
    return (*found, Option(None, w.nbytes, 0.0, 0.0))


def _canonical_kernel(kernel: FloatKernel, block: int) -> np.ndarray:
    """A kernel as float32 (B, K, N), rotated by blocks; not to be written to, it may be no copy."""
    w: Any = np.asarray(kernel.leaf.value, np.float32)
    w = kernel_axes.to_canonical(w, kernel.spec.axes)
    if kernel.target is not None:
        w = kernel.target.reshape(w.shape)
    if block > 1:  # as the quantiser rotates, to the bit
        w = np.asarray(rotated_kernel(jnp.asarray(w), block))
    w = np.ascontiguousarray(w.reshape(-1, *w.shape[-2:])).view()
    w.flags.writeable = False
    return w


def _canonical_parts(packed: Stored) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale of a packed kernel, each (B, ., .)."""
    parts = map(np.asarray, (packed.canonical_codes(), packed.canonical_scale()))
    codes, scale = (part.reshape(-1, *part.shape[-2:]) for part in parts)
    return codes, scale


def _packed(w: jax.Array, made: Quantized, spec: KernelSpec) -> Stored:
    """Codes and scale as a packed kernel, placed as the float one is."""
    batch, contraction, outputs = spec.axes.split(w.shape)
    parts = (jnp.asarray(part) for part in (made.codes, made.scale))
    planes = () if planes_of(spec.config) == 1 else (planes_of(spec.config),)
    codes, scale = (part.reshape(*batch, *planes, -1, part.shape[-1]) for part in parts)
    t = of_canonical(codes, scale, spec, contraction, outputs)
    if w.committed:
        placed, whole = w.sharding, w.sharding
        if isinstance(placed, NamedSharding):
            whole = NamedSharding(placed.mesh, PartitionSpec())
        where = jax.tree.map(lambda part: placed if part.dtype == np.int8 else whole, t)
        t = jax.device_put(t, where)
    run = functools.partial(stored, spec=spec, dtype=np.dtype(w.dtype))
    return _mesh.in_auto_like(jax.jit(run), t, more=spec.plane_axis)


def _require_quantized(
    path: str, name: str, made: object, shape: tuple[int, ...], config: TernaryConfig
) -> None:
    """Raises unless a method returned codes and scales of its kernel."""
    slices, length, outputs = shape
    planes = planes_of(config)
    groups = length // config.granularity if isinstance(config.granularity, int) else 1
    scales = (slices, planes * groups, 1 if config.granularity == "tensor" else outputs)
    if not isinstance(made, Quantized):
        raise TypeError(
            f"{WHO}: the method {name!r} returned {describe(made)} for {path}. Return a "
            "bj.convert.Quantized."
        )
    for part, value, wanted, dtype in (
        ("codes", made.codes, (slices, planes * length, outputs), np.int8),
        ("scale", made.scale, scales, np.float32),
    ):
        array = np.asarray(value)
        if array.shape != wanted or array.dtype != dtype:
            raise ValueError(
                f"{WHO}: the method {name!r} returned `{part}` {describe(value)} for {path}; it "
                f"must be {np.dtype(dtype).name} of shape {wanted}."
            )
    if (
        not (np.abs(made.codes) <= 1).all()
        or not (np.isfinite(made.scale) & (made.scale > 0)).all()
    ):
        raise ValueError(
            f"{WHO}: the method {name!r} returned codes other than -1, 0 and 1, or a scale that "
            f"is not finite and above 0, for {path}."
        )
