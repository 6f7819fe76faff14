"""``smooth``: large channels of a kernel's inputs made smaller, by the norm before it.

With factors s, one for each channel, ``x W = (x / s) (s W)``. Where a norm comes right before W,
its scale and bias over s give x / s, and nothing is computed that was not before. Whether that is
so the program says; see ``_transform/norms.py``. The ranges of x are read by the probes that
``calibrate`` reads second moments by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._quantize.config import B158
from bitnet_jax._transform.norms import Norms
from bitnet_jax._transform.probe import Wanted
from bitnet_jax._tree.leaves import Leaf, rebox
from bitnet_jax._tree.params import chosen_leaves, spec_of_leaf
from bitnet_jax._tree.select import Kernels, Path, axes_for
from bitnet_jax.convert._batches import fitting, opened, require_callback
from bitnet_jax.convert._chosen_methods import WHO as CALIBRATE
from bitnet_jax.convert._collect import raise_no_tokens
from bitnet_jax.convert._folds import WHO, Fold, divided, fold_of, spread
from bitnet_jax.convert._front_ends import Args, FrontEnd, front_end, require_values
from bitnet_jax.convert._smoothing import SmoothedKernel, Smoothing


def smooth(
    ternary: Any,
    params: PyTree,
    batches: Iterable[Any],
    *,
    alpha: int | float = 0.5,
    call: Mapping[str, Any] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[Any, Smoothing]:
    """Divides norms' scales by factors that the kernels behind them are multiplied with.

    For the channels j of a norm and the kernels W that all of its output is multiplied by::

        s_j = max|x_j|**alpha / max|W_j|**(1 - alpha)

    with x the kernels' inputs in all batches and W_j the rows of all these kernels. The norm's
    scale and bias are divided by s, row j of each kernel is multiplied with s_j. In exact
    arithmetic the float network is the same function; in floating point it is so to rounding.
    Channels in which x or W is always 0 keep 1.

    Which norm belongs to which kernels is read from the program of a call and not from names: a
    vector of the parameters that multiplies something, perhaps with another one added, of which
    every use ends in products with quantised kernels that have no other use. Stacked layers that
    one ``scan`` steps through have factors for each step. A norm whose output is read by anything
    else (a residual, a float layer, a nonlinearity), one without a scale, and what is in another
    loop, a branch or a ``shard_map`` is left, and the report says why. What is proved is so for the
    calls that the batches make, and not for other methods of a model.

    It changes what the quantisers see, and is no method by itself: calibrate afterwards. Where a
    few channels are much larger than the others, these get more of the inputs' int8 levels, and
    the kernels pay: rows that became large set the scale that they share with all others.
    In three blocks of a norm and a gated perceptron, width 64, with four channels of each norm 30
    times as large (groups of 32, int8 inputs, alpha 0.5, medians of three), the relative squared
    error of what the blocks add went so, if the kernels' rows of these channels are as all others,
    or are small::

                        rows as the others              rows 30 times smaller
                        plain           rotated         plain           rotated
        absmean         0.72 to 0.98    0.71 to 0.63    0.76 to 0.71    21   to 0.70
        survivors       0.52 to 0.44    0.55 to 0.30    0.57 to 0.50    104  to 0.48
        gptq            .124 to .124    .054 to .047    0.48 to 0.40    0.68 to 0.39

    So a rotation wants it, and ``"absmean"`` without one can lose. On SmolLM2-135M (``"weighted"``
    in groups of 64) it did not pay: 8.16 to 8.72 nats a token of one text and 8.83 to 8.77 of
    another, rotated 12.6 to 13.3 and 13.3 to 12.5.

    Args:
      ternary: as for :func:`calibrate`.
      params: its float parameters; None for an NNX model, which holds its own.
      batches: as for :func:`calibrate`: examples of calls, read once.
      alpha: 0 to 1: at 1 all channels of x get the same range, at 0 all rows of the kernels.
      call: as for :func:`calibrate`.
      progress: called with the part that is done, 0 to 1.

    Returns:
      Float parameters of the same structure and dtypes (of an NNX model, a copy with them), and a
      :class:`Smoothing`.

    Raises:
      TypeError: as :func:`calibrate`; ``alpha`` is no number.
      ValueError: ``alpha`` is not in [0, 1]; no norm can be divided, with the reason for each
        kernel; no batches, or one that does not fit the network or makes NaN or Inf inputs, by
        its number; no tokens at all; parameters that are NaN or Inf, or whose dtype is too narrow
        for what they would be.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> def fn(params, x):
      ...     mean = jnp.square(x).mean(-1, keepdims=True)
      ...     return x * jax.lax.rsqrt(mean + 1e-6) * params["scale"][None] @ params["w"]
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> params = {
      ...     "scale": jnp.ones(16).at[3].set(30),
      ...     "w": jax.random.normal(keys[0], (16, 8)),
      ... }
      >>> x = jax.random.normal(keys[1], (32, 16))
      >>> smoothed, report = bj.convert.smooth(bj.ternarize(fn), params, [x])
      >>> print(report)
      path  shape  norm   spread  smoothed  why not
      w      16x8  scale    34.9      6.94
      >>> bool(jnp.allclose(fn(smoothed, x), fn(params, x), rtol=1e-5, atol=1e-4))
      True

    References:
      Xiao et al., SmoothQuant, arXiv:2211.10438, equation 4.
    """
    alpha = _alpha(alpha)
    with _as_smooth():
        return _smoothed(ternary, params, batches, alpha, call, progress)


def _smoothed(
    ternary: Any,
    params: PyTree,
    batches: Iterable[Any],
    alpha: float,
    call: Mapping[str, Any] | None,
    progress: Callable[[float], None],
) -> tuple[Any, Smoothing]:
    net = front_end(WHO, ternary, params, call)
    require_callback(WHO, progress)
    require_values(WHO, net.params)
    first, calls, length = opened(WHO, batches)
    with fitting(WHO, 0):
        uses = net.packable(first)
        norms = net.coverage(first).norms
    _require_found(norms)
    chosen, treedef = chosen_leaves(WHO, net.params, B158, uses, values=True)
    leaves = {leaf.path: leaf for leaf, _ in chosen}
    wanted = _wanted(uses, leaves, norms)
    proof = _Proof(lambda: front_end(WHO, ternary, params, call), first, norms)
    peaks: dict[Path, np.ndarray] = {}
    for number, args in enumerate(calls):
        with fitting(WHO, number):
            proof.check(args, number)
            for path, found in _peaks(net, wanted, args, number).items():
                peaks[path] = np.maximum(peaks.get(path, 0.0), found)
        if length:
            progress(0.5 * (number + 1) / length)
    _require_found(proof.norms)
    every = [fold_of(norm, peaks, wanted, leaves, alpha) for norm in proof.norms.found]
    folds = [fold for fold in every if fold.peaks.any()]
    if not folds:
        raise_no_tokens(WHO)
    changed = divided(folds, leaves)
    progress(1.0)
    made = [rebox(leaf.boxed, changed.get(leaf.path, leaf.value)) for leaf, _ in chosen]
    result = net.result(jax.tree.unflatten(treedef, made))
    unseen = [path for fold in every if not fold.peaks.any() for path, _ in fold.norm.kernels]
    reasons = dict(proof.norms.refused) | dict.fromkeys(unseen, _UNSEEN)
    return result, _report(uses, leaves, folds, reasons, alpha)


_UNSEEN = "its inputs are 0 in all batches"

_APART = "it belongs to a module that is ternarised apart from the model"


@contextlib.contextmanager
def _as_smooth() -> Iterator[None]:
    """Errors of what ``calibrate`` and ``smooth`` share, in the name of the one that was called."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        text = str(error)
        if not text.startswith(f"{CALIBRATE}:"):
            raise
        raise type(error)(WHO + text.removeprefix(CALIBRATE)) from error


class _Proof:
    """The norms that can be divided in every call; one look at each structure of calls."""

    def __init__(self, network: Callable[[], FrontEnd], first: Args, norms: Norms):
        self._network, self._seen = network, {_structure(first)}
        self.norms = norms

    def check(self, args: Args, number: int) -> None:
        """Leaves the norms that a call uses in another way."""
        structure = _structure(args)
        if structure in self._seen:
            return
        self._seen.add(structure)
        net = self._network()
        net.packable(args)
        there = net.coverage(args).norms
        same = tuple(norm for norm in self.norms.found if norm in there.found)
        others = dict(there.refused)
        gone = {
            path: others.get(path, "its norm has other kernels behind it")
            for norm in self.norms.found
            if norm not in same
            for path, _ in norm.kernels
        }
        why = {path: f"in batch {number}, {reason}" for path, reason in gone.items()}
        self.norms = Norms(same, (*self.norms.refused, *why.items()))


def _structure(args: Args) -> Any:
    """Equal for calls that are traced alike."""
    leaves, treedef = jax.tree.flatten(args)
    kinds = [(np.shape(v), str(v.dtype)) if hasattr(v, "dtype") else repr(v) for v in leaves]
    return treedef, tuple(kinds)


def _wanted(uses: Kernels, leaves: Mapping[Path, Leaf], norms: Norms) -> dict[Path, Wanted]:
    """What is asked of the kernels behind norms; raises for parameters that are not finite."""
    wanted, axes = {}, axes_for(uses, None)
    for norm in norms.found:
        for path in (*norm.vectors, *(path for path, _ in norm.kernels)):
            value = np.asarray(leaves[path].value, np.float32)
            if not np.isfinite(value).all():
                count = int((~np.isfinite(value)).sum())
                _checks.raise_not_finite(WHO, leaves[path].where, count)
        for path, _ in norm.kernels:
            spec = spec_of_leaf(WHO, leaves[path], uses.uses[path].config, axes)
            shape = tuple(leaves[path].value.shape)
            wanted[path] = Wanted(shape, spec.axes, matrix=False, peak=True)
    return wanted


def _peaks(
    net: FrontEnd, wanted: Mapping[Path, Wanted], args: Args, number: int
) -> dict[Path, np.ndarray]:
    """The largest ``|x_i|`` of each place of a kernel's contraction in one call."""
    found = {}
    for path, probe in net.moments(wanted, args).items():
        peaks = np.asarray(jax.device_get(probe.moments), np.float64)
        if not np.isfinite(peaks).all():
            raise ValueError(
                f"{WHO}: the inputs of {'/'.join(path)} are NaN or Inf in "
                f"{int((~np.isfinite(peaks)).sum())} channels in batch {number}. Look for NaN in "
                "that batch, and for what overflows on the way to this kernel."
            )
        found[path] = peaks
    return found


def _report(
    uses: Kernels,
    leaves: Mapping[Path, Leaf],
    folds: Iterable[Fold],
    refused: Mapping[Path, str],
    alpha: float,
) -> Smoothing:
    """One row for each kernel, in the order of the parameters."""
    folded = {path: fold for fold in folds for path, _ in fold.norm.kernels}
    rows = []
    for path in sorted(uses.uses, key=list(leaves).index):
        where, shape = leaves[path].where, tuple(leaves[path].value.shape)
        if path not in folded:
            rows.append(SmoothedKernel(where, shape, why=refused.get(path, _APART)))
            continue
        norm, peaks, factors = folded[path]
        names = tuple(leaves[vector].where for vector in norm.vectors)
        spreads = spread(peaks), spread(peaks / factors)
        rows.append(SmoothedKernel(where, shape, names, factors, *spreads))
    return Smoothing(tuple(rows), alpha)


def _alpha(alpha: object) -> float:
    """The exponent; raises unless it is a number from 0 to 1."""
    if isinstance(alpha, (bool, np.bool_)) or not isinstance(alpha, (int, float, np.number)):
        raise TypeError(f"{WHO}: `alpha` must be a number from 0 to 1, got {describe(alpha)}.")
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"{WHO}: `alpha` must be from 0 to 1, got {alpha}. 0.5 shares the range between inputs "
            "and kernels."
        )
    return float(alpha)


def _require_found(norms: Norms) -> None:
    """Raises where no norm can be divided, with the reasons."""
    if norms.found:
        return
    reasons = [f"{'/'.join(path)}: {why}" for path, why in norms.refused]
    listed = "; ".join(reasons[:8]) + ("; ..." if len(reasons) > 8 else "")
    raise ValueError(
        f"{WHO}: nothing can be smoothed. {listed}. Calibrate it as it is, or give the norms "
        "scales that nothing but quantised kernels reads."
    )
