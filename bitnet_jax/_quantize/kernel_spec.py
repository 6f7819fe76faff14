"""``KernelSpec``: how one kernel is quantised, checked once, where the kernel comes in.

Public functions make one with :func:`kernel_spec` (or :func:`contraction_spec`, or
``pack.packing_spec``), which checks the kernel's type, shape, axes and config. Code that
takes a spec checks nothing more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from bitnet_jax import _checks
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.arrays import AnyArray
from bitnet_jax._quantize.config import Int8Config, KernelConfig, TernaryConfig, planes_of
from bitnet_jax._quantize.kernel_axes import AxesLike, KernelAxes
from bitnet_jax._quantize.rotation import block_of, require_rotation


class KernelSpec(NamedTuple):
    """A kernel's quantiser and its axes. Static: ``jax.jit`` may take it as such.

    Attributes:
      config: the quantiser.
      axes: which axes are contracted, carry slices, are outputs.
    """

    config: KernelConfig
    axes: KernelAxes

    @property
    def plane_axis(self) -> int | None:
        """The axis of planes in packed codes, counted from the end; None: there is none."""
        if planes_of(self.config) == 1:
            return None
        return self.axes.contracting[0] - len(self.axes.order) - 1

    def scale_grid(self, contraction: tuple[int, ...]) -> tuple[int, ...]:
        """The lengths of a scale along the contracting axes."""
        if not isinstance(self.config.granularity, int):
            return (1,) * len(contraction)
        # Groups run along the flattened contraction; the scale keeps the kernel's rank.
        grid = kernel_axes.group_grid(contraction, self.config.granularity)
        assert grid is not None  # kernel_spec has looked
        return grid

    def block(self, shape: tuple[int, ...]) -> int:
        """How many features of a kernel of this shape are rotated together; 1: none."""
        return block_of(self.config, self.axes.split(shape)[1])

    def rotated_axis(self, ndim: int) -> int | None:
        """The axis that is rotated, counted from the end; None: none."""
        return None if self.config.rotation is None else self.axes.contracting[-1] - ndim


def kernel_spec(
    who: str,
    w: AnyArray | jax.ShapeDtypeStruct,
    config: KernelConfig,
    contracting_axes: AxesLike | None,
    batch_axes: AxesLike,
) -> KernelSpec:
    """The spec of a kernel to quantise; raises unless type, shape, axes and config are right."""
    # What later checks read comes first: a config, then an array with axes, then their names.
    require_kernel_config(who, config)
    _checks.require_kernel(who, w)
    axes = kernel_axes.resolve(who, w, contracting_axes, batch_axes)
    contraction = axes.split(w.shape)[1]
    kernel_axes.require_whole_groups(who, "granularity", config.granularity, contraction)
    require_rotation(who, config, contraction)
    return KernelSpec(config, axes)


def contraction_spec(
    who: str,
    w: AnyArray | jax.ShapeDtypeStruct,
    config: KernelConfig,
    contracting_axes: AxesLike | None,
    batch_axes: AxesLike,
) -> KernelSpec:
    """:func:`kernel_spec` of a kernel whose codes are to be summed in int32."""
    spec = kernel_spec(who, w, config, contracting_axes, batch_axes)
    # A ternary sum is at most 127 * K: int32 is full only at K = 16.9 million.
    if isinstance(config, Int8Config):
        _require_int32_sums(who, math.prod(spec.axes.split(w.shape)[1]))
    return spec


def require_kernel_config(who: str, config: object, name: str = "config") -> None:
    """Raises unless it is a config of kernels."""
    kinds = (TernaryConfig, Int8Config)
    _checks.require_instance(who, name, config, kinds, "Use bj.B158 or your own.")


def _require_int32_sums(who: str, length: int) -> None:
    """Raises where the integer sums of an int8 kernel could leave int32."""
    most = (2**31 - 1) // (127 * 127)  # 127 is the largest code of x and of w
    if length > most:
        raise ValueError(
            f"{who}: an int8 kernel may contract over {most} weights, got {length}; more could "
            "overflow the int32 sums. Use a TernaryConfig, or leave this kernel in float."
        )
