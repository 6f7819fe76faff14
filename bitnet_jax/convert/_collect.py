"""What kernels meet in all batches, summed while the network runs in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import jax
import numpy as np

from bitnet_jax._transform.slopes import Losses
from bitnet_jax._tree.select import Path
from bitnet_jax.convert._batches import fitting
from bitnet_jax.convert._chosen_methods import WHO
from bitnet_jax.convert._converted import FloatKernel
from bitnet_jax.convert._front_ends import Args, FrontEnd
from bitnet_jax.convert._input_statistics import Statistics


def collected(
    net: FrontEnd,
    kernels: Sequence[FloatKernel],
    batches: Iterable[Args],
    losses: Losses | None,
    length: int | None,
    progress: Callable[[float], None],
) -> tuple[dict[Path, Statistics], dict[Path, np.ndarray]]:
    """What each kernel that asks for it met in all batches, and its mean squared gradient."""
    wanted = {kernel.leaf.path: kernel.wanted for kernel in kernels if kernel.wanted is not None}
    if not wanted:
        return {}, {}
    sums: dict[Path, list[np.ndarray]] = {}
    slopes = None if losses is None else _Slopes(net, kernels, losses)
    for number, args in enumerate(batches):
        with fitting(WHO, number):
            for path, probe in net.moments(wanted, args).items():
                parts = jax.device_get(probe)
                require_finite(path, parts.moments, number)
                if path in sums:
                    for total, part in zip(sums[path], parts, strict=True):
                        total += part
                else:
                    sums[path] = [np.array(part, np.float64) for part in parts]
            if slopes is not None:
                slopes.add(args, number)
        if length:
            progress(0.5 * (number + 1) / length)
    if not any(tokens.any() for tokens, _ in sums.values()):
        raise_no_tokens(WHO)
    means = {} if slopes is None else slopes.means()
    return {path: _canonical(*sums[path]) for path in sums}, means


def squared_gradients(
    net: FrontEnd, kernels: Sequence[FloatKernel], batches: Iterable[Args], losses: Losses | None
) -> dict[Path, np.ndarray]:
    """The mean squared gradient of each kernel over all batches; nothing without losses."""
    if losses is None:
        return {}
    slopes = _Slopes(net, kernels, losses)
    for number, args in enumerate(batches):
        with fitting(WHO, number):
            slopes.add(args, number)
    return slopes.means()


class _Slopes:
    """The squared gradients of kernels, summed over batches."""

    def __init__(self, net: FrontEnd, kernels: Sequence[FloatKernel], losses: Losses):
        self._net, self._losses, self._count = net, losses, 0.0
        self._axes = {kernel.leaf.path: len(kernel.spec.axes.batch) for kernel in kernels}
        self._sums: dict[Path, np.ndarray] = {}

    def add(self, args: Args, number: int) -> None:
        """Another batch."""
        key = jax.random.key(number)
        squares, count = jax.device_get(self._net.slopes(self._axes, self._losses, key, args))
        self._count += float(count)
        for path, square in squares.items():
            if not np.isfinite(square).all():
                _raise_steep(path, number)
            wide = square.astype(np.float64).reshape(-1)
            self._sums[path] = self._sums.get(path, 0.0) + wide

    def means(self) -> dict[Path, np.ndarray]:
        """The mean over losses, (B,) of each kernel."""
        return {path: total / self._count for path, total in self._sums.items()}


def _canonical(tokens: np.ndarray, moments: np.ndarray) -> Statistics:
    """Statistics with the batch axes as one."""
    each = moments.shape[tokens.ndim :]
    return Statistics(tokens.reshape(-1).astype(np.int64), moments.reshape(-1, *each))


def require_finite(path: Path, moments: np.ndarray, number: int) -> None:
    """Raises for statistics that are NaN or Inf; of several kernels, the program's first."""
    if not np.isfinite(moments).all():
        count = int((~np.isfinite(moments)).sum())
        raise ValueError(
            f"{WHO}: the inputs of {'/'.join(path)} have {count} NaN or Inf second moments in "
            f"batch {number}. Look for NaN in that batch, and for what overflows on the way to "
            "this kernel."
        )


def _raise_steep(path: Path, number: int) -> NoReturn:
    """Reports gradients that are NaN or Inf."""
    raise ValueError(
        f"{WHO}: the gradient of `loss` for {'/'.join(path)} is NaN or Inf in batch {number}. Look "
        "for a logarithm or a root of 0 in `loss`, and for what overflows after this kernel."
    )


def raise_no_tokens(who: str) -> NoReturn:
    """Reports batches in which no kernel met anything."""
    raise ValueError(
        f"{who}: no kernel met an input in `batches`: they are empty, or all that reaches the "
        "kernels is 0. Pass examples of real inputs."
    )
