"""How a float kernel becomes ternary: a table of methods over one canonical kernel.

A method is a function of a kernel (B, K, N), of the statistics of its inputs and of a config,
and says what statistics it needs. Of the config it takes granularity and eps; ``"absmean"``
takes all of it. :func:`error` measures what any of them lost.

=================== ==========  =======================================================
name                needs       codes and scales
=================== ==========  =======================================================
``absmean``         nothing     those of ``bj.quantize``
``survivors``       nothing     least squared error of the weights, exactly
``weighted``        diagonal    least squared error weighted by the inputs' mean square
``gptq``            matrix      codes that answer for the errors of those before them
``gptq-act-order``  matrix      the same, inputs with the largest mean square first
``planes``          diagonal    several planes together, their error weighted as above
=================== ==========  =======================================================

With a config of several planes, ``TernaryConfig(planes=n)``, a kernel is ``sum_p s_p T_p``. The
first three take one plane after another, each for the rest that those before it leave; ``gptq``
and ``planes`` fit all planes together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bitnet_jax import _checks
from bitnet_jax._quantize.config import TernaryConfig, planes_of
from bitnet_jax._quantize.ternary import quantize_canonical
from bitnet_jax.convert import _second_moment
from bitnet_jax.convert._best_scale import group_size
from bitnet_jax.convert._gptq import column_blocks, gptq_codes, planned
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._output_square import output_square, whole_squares
from bitnet_jax.convert._plane_grid import grid_of, largest_first
from bitnet_jax.convert._plane_scales import plane_scales
from bitnet_jax.convert._refit import refitted


class Quantized(NamedTuple):
    """What a method made of a kernel.

    Of a config with several planes P, codes and scales are of a kernel with a contraction of
    P K, plane by plane, whose inputs are those of the kernel, P times. The planes of a group
    come by falling scale.

    Attributes:
      codes: (B, P K, N) int8 in {-1, 0, +1}.
      scale: (B, P G, 1 or N) float32, with G = 1 or K / granularity.
      notes: what was unusual and how it was handled, a sentence each.
    """

    codes: np.ndarray
    scale: np.ndarray
    notes: tuple[str, ...]


class Method(NamedTuple):
    """A way from a float kernel to a ternary one.

    Attributes:
      needs: the statistics that it cannot do without: ``"nothing"``, the ``"diagonal"`` of the
        inputs' second moment or the whole ``"matrix"``.
      quantize: a function of a float32 kernel (B, K, N), its ``Statistics`` and a
        ``TernaryConfig``, to a ``Quantized``.
    """

    needs: _second_moment.Needs
    quantize: Callable[[np.ndarray, Statistics, TernaryConfig], Quantized]


def absmean(w: np.ndarray, statistics: Statistics, config: TernaryConfig) -> Quantized:
    """The codes and scales of ``bj.quantize``, to the bit.

    Args:
      w: (B, K, N) float32.
      statistics: not looked at, but for their shapes.
      config: the quantiser, all of it.

    Returns:
      A ``Quantized`` without notes.

    Raises:
      ValueError: a kernel or a config that does not fit.

    Example:
      >>> import numpy as np, bitnet_jax as bj
      >>> from bitnet_jax.convert._methods import Statistics, absmean
      >>> w = np.array([[[0.9], [-0.1]]], np.float32)
      >>> found = absmean(w, Statistics(np.array([0]), None), bj.B158)
      >>> found.codes.tolist(), found.scale.tolist()
      ([[[1], [0]]], [[[0.5]]])
    """
    _second_moment.require_operands("absmean", w, statistics, config, "nothing")
    parts = (np.asarray(part) for part in quantize_canonical(jnp.asarray(w), config))
    codes, scale = (part.reshape(len(w), -1, part.shape[-1]) for part in parts)  # plane by plane
    return Quantized(codes, scale, ())


def survivors(w: np.ndarray, statistics: Statistics, config: TernaryConfig) -> Quantized:
    """The codes and scales of least squared error of the weights, ``sum (w - s c)**2``.

    Exact, from one sort of each group: see ``_best_scale``.

    Args:
      w: (B, K, N) float32.
      statistics: not looked at, but for their shapes.
      config: its granularity and eps.

    Returns:
      A ``Quantized`` without notes.

    Raises:
      ValueError: a kernel or a config that does not fit.

    Example:
      >>> import numpy as np, bitnet_jax as bj
      >>> from bitnet_jax.convert._methods import Statistics, survivors
      >>> w = np.array([[[0.75], [-0.25], [1.25]]], np.float32)
      >>> found = survivors(w, Statistics(np.array([0]), None), bj.B158)
      >>> found.codes.tolist(), found.scale.tolist()
      ([[[1], [0], [1]]], [[[1.0]]])
    """
    _second_moment.require_operands("survivors", w, statistics, config, "nothing")
    alike = Statistics(statistics.tokens, None)
    return _by_slice(_weighted_slice, w, alike, config)


def weighted(w: np.ndarray, statistics: Statistics, config: TernaryConfig) -> Quantized:
    """The codes and scales of least squared error, each input's error times its mean square.

    ``sum h (w - s c)**2`` with h the diagonal of the inputs' second moment: the error of the
    outputs, were the inputs uncorrelated. Exact: see ``_best_scale``. Weights of an input that
    was always 0 get the nearest code and no say in the scale.

    Args:
      w: (B, K, N) float32.
      statistics: with ``moments`` (B, K), or (B, K, K) of which the diagonal is taken.
      config: its granularity and eps.

    Returns:
      A ``Quantized``, with notes on inputs that were always 0 and on slices without tokens,
      which are quantised as by ``"survivors"``.

    Raises:
      ValueError: a kernel, statistics or a config that do not fit; moments that are NaN or
        negative.

    Example:
      >>> import numpy as np, bitnet_jax as bj
      >>> from bitnet_jax.convert._methods import Statistics, weighted
      >>> w = np.array([[[0.75], [-0.25], [1.25]]], np.float32)
      >>> seen = Statistics(np.array([2]), np.array([[3.0, 1.0, 1.0]]))
      >>> weighted(w, seen, bj.B158).scale.tolist()
      [[[0.875]]]
    """
    _second_moment.require_operands("weighted", w, statistics, config, "diagonal")
    return _by_slice(_weighted_slice, w, statistics, config)


def gptq(
    w: np.ndarray,
    statistics: Statistics,
    config: TernaryConfig,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    rounds: int = 2,
    refit: bool = True,
) -> Quantized:
    """Codes chosen one input after another, each against the errors of those before it.

    Lowers ``tr((W - V)^T H (W - V))``, the squared error of the outputs over the tokens that
    were seen, with codes and scales by turns: see ``_gptq``. ``functools.partial`` sets the
    options: ``Method("matrix", functools.partial(gptq, rounds=4))``.

    Args:
      w: (B, K, N) float32.
      statistics: with ``moments`` (B, K, K).
      config: its granularity and eps.
      damping: this many times the mean of H's diagonal is added to it. Raised tenfold until
        H can be factored.
      act_order: groups, and inputs inside each, by falling mean square.
      rounds: how often a group's scale is fitted to its codes; 0 leaves it as it was when the
        group's first row was reached.
      refit: at the end all scales of an output are fitted together, its codes fixed.

    Returns:
      A ``Quantized``, with notes on inputs that were always 0, on fewer tokens than inputs, on
      damping that was raised, and on slices without tokens, which are quantised as by
      ``"survivors"``, and if they have several planes as by ``"planes"``.

    Raises:
      ValueError: a kernel, statistics, a config or options that do not fit; moments that are
        NaN, negative or not symmetric.

    Example:
      >>> import numpy as np, bitnet_jax as bj
      >>> from bitnet_jax.convert._methods import Statistics, gptq
      >>> x = np.array([[1.0, 1.0], [2.0, 2.1]])
      >>> w = np.array([[[0.4], [0.4]]], np.float32)
      >>> gptq(w, Statistics(np.array([2]), (x.T @ x)[None]), bj.B158).codes.tolist()
      [[[1], [1]]]

    References:
      Frantar et al., arXiv:2210.17323; PT2-LLM, arXiv:2510.03267.
    """
    _require_options(damping, rounds)
    _second_moment.require_operands("gptq", w, statistics, config, "matrix")
    run = functools.partial(
        _gptq_slice, damping=float(damping), act_order=act_order, rounds=rounds, refit=refit
    )
    return _by_slice(run, w, statistics, config)


def planes(w: np.ndarray, statistics: Statistics, config: TernaryConfig) -> Quantized:
    """Codes and scales of several planes, of very small squared error weighted by the inputs.

    ``sum h (w - sum_p s_p c_p)**2`` with h the diagonal of the inputs' second moment where it is
    known, and 1 where not. For the scales the codes are exactly the best, and for the codes the
    scales, each in turn until neither lowers the error; from several beginnings, among them
    the best plane with the best for the rest: see ``_plane_scales``.

    Args:
      w: (B, K, N) float32.
      statistics: with ``moments`` (B, K), (B, K, K) of which the diagonal is taken, or None.
      config: of at least two planes; its granularity and eps.

    Returns:
      A ``Quantized``, with notes as ``"weighted"`` has them.

    Raises:
      ValueError: a kernel, statistics or a config that do not fit; a config of one plane; moments
        that are NaN or negative.

    References:
      PTQTP, arXiv:2509.16989.
    """
    _second_moment.require_operands("planes", w, statistics, config, "nothing")
    if planes_of(config) == 1:
        raise ValueError(
            f"planes: `config` must have at least two planes, got {config}. Write "
            "TernaryConfig(planes=2), or choose a method for one ('survivors', 'gptq')."
        )
    return _by_slice(_planes_slice, w, statistics, config)


METHODS: dict[str, Method] = {
    "absmean": Method("nothing", absmean),
    "survivors": Method("nothing", survivors),
    "weighted": Method("diagonal", weighted),
    "gptq": Method("matrix", gptq),
    "gptq-act-order": Method("matrix", functools.partial(gptq, act_order=True)),
    "planes": Method("diagonal", planes),
}


def error(w: np.ndarray, quantized: Quantized, statistics: Statistics) -> np.ndarray:
    """The squared error of the outputs over the tokens seen, relative to the outputs' squares.

    ``tr((W - V)^T H (W - V)) / tr(W^T H W)``, with V codes times scales and H the
    second moment of the inputs: the matrix, its diagonal, or the identity where there is
    none or a slice saw no tokens.

    Args:
      w: (B, K, N) float32.
      quantized: its codes and scales.
      statistics: of its inputs.

    Returns:
      (B,) float64: 0 is exact, and 1 is what zeros in the place of w have. Infinite where the
      outputs were 0 and are no more.

    Raises:
      ValueError: operands that do not fit each other.

    Example:
      >>> import numpy as np, bitnet_jax as bj
      >>> from bitnet_jax.convert._methods import Statistics, error, survivors
      >>> w = np.array([[[0.75], [-0.25], [1.25]]], np.float32)
      >>> none = Statistics(np.array([0]), None)
      >>> error(w, survivors(w, none, bj.B158), none).round(4).tolist()
      [0.0857]
    """
    return errors(w, [quantized], statistics)[0]


def errors(
    w: np.ndarray,
    several: Sequence[Quantized],
    statistics: Statistics,
    whole: np.ndarray | None = None,
) -> list[np.ndarray]:
    """:func:`error` of several conversions of one kernel, whose outputs are squared once.

    ``whole``: these squares, of :func:`whole_squares`, where they are known.
    """
    _second_moment.require_kernel("error", w)
    _second_moment.require_statistics("error", w, statistics, "nothing")
    for quantized in several:
        _require_quantized_of(w, quantized)
    lost = np.empty((len(several), len(w)))
    whole = whole_squares(w, statistics) if whole is None else whole
    for b in range(len(w)):
        h = _second_moment.value(statistics, b, w.shape[1])
        for i, (codes, scale, _) in enumerate(several):
            lost[i, b] = output_square(h, w[b], codes[b], scale[b])
    relative = np.where(lost > 0, np.inf, 0.0)
    np.divide(lost, whole, out=relative, where=whole > 0)
    return list(relative)


def _require_quantized_of(w: np.ndarray, quantized: Quantized) -> None:
    """Raises unless codes and scales are of a kernel of this shape."""
    codes, scale = quantized.codes, quantized.scale
    slices, length, outputs = w.shape
    fits = scale.ndim == 3 and scale.shape[0] == slices and scale.shape[2] in (1, outputs)
    fits = fits and codes.ndim == 3 and codes.shape[::2] == w.shape[::2]
    planes = codes.shape[1] // length if fits else 0
    if not planes or codes.shape[1] != planes * length or not _whole_groups(scale, planes, length):
        raise ValueError(
            f"error: `quantized` must be of a kernel of shape {w.shape}, got codes of shape "
            f"{codes.shape} and scales of shape {scale.shape}. Pass what a method made of this w."
        )


def _whole_groups(scale: np.ndarray, planes: int, length: int) -> bool:
    """Whether there are as many scales for each plane, which cut its contraction evenly."""
    groups = scale.shape[1] // planes
    return groups > 0 and groups * planes == scale.shape[1] and length % groups == 0


def _require_options(damping: float, rounds: int) -> None:
    """Raises unless the options of gptq are numbers that it can use."""
    if damping != 0:
        _checks.require_positive("gptq", "damping", damping)
    if not _checks.is_integer(rounds) or rounds < 0:
        raise ValueError(f"gptq: `rounds` must be an integer >= 0, got {rounds!r}.")


# Codes (P, K, N) and scales (P, G, 1 or N) of a slice, and notes.
_Found = tuple[np.ndarray, np.ndarray, list[str]]


def _by_slice(
    run: Callable[[np.ndarray, Statistics, int, TernaryConfig], _Found],
    w: np.ndarray,
    statistics: Statistics,
    config: TernaryConfig,
) -> Quantized:
    """Runs a method on each slice of a kernel."""
    size, count = group_size(config.granularity, w.shape[1]), planes_of(config)
    across = 1 if config.granularity == "tensor" else w.shape[2]
    codes = np.empty((len(w), count, *w.shape[1:]), np.int8)
    scale = np.empty((len(w), count, w.shape[1] // size, across), np.float32)
    notes: list[str] = []
    for b in range(len(w)):
        *found, more = run(w[b], statistics, b, config)
        codes[b], scale[b] = largest_first(*found)
        notes += _second_moment.notes(statistics, b, w.shape[1]) + more
    joined = codes.reshape(len(w), -1, w.shape[2]), scale.reshape(len(w), -1, across)
    return Quantized(*joined, tuple(notes))


def _weighted_slice(w: np.ndarray, statistics: Statistics, b: int, config: TernaryConfig) -> _Found:
    """The least weighted squared error of one slice, one plane after another."""
    h = _second_moment.diagonal(statistics, b, len(w))
    codes, scale, rest = [], [], w
    for _ in range(planes_of(config)):
        own = plane_scales(rest, h, config.granularity, config.eps, 1)
        codes.append(_nearest_codes(rest, own))
        scale.append(own)
        if len(scale) < planes_of(config):
            rest = rest - codes[-1][0] * np.repeat(own[0], len(w) // own.shape[1], axis=0)
    return np.concatenate(codes), np.concatenate(scale), []


def _planes_slice(w: np.ndarray, statistics: Statistics, b: int, config: TernaryConfig) -> _Found:
    """Very small weighted squared error of one slice, all planes together."""
    h, unit = _second_moment.diagonal(statistics, b, len(w)), _unit(w)
    if unit != 1:
        w = w * np.float32(1 / unit)
    eps = float(config.eps) / unit
    scale = plane_scales(w, h, config.granularity, eps, planes_of(config))
    return _nearest_codes(w, scale), (scale * unit).astype(np.float32), []


def _nearest_codes(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The best codes (P, K, N) of weights (K, N) for scales (P, G, 1 or N)."""
    codes = np.empty((len(scale), *w.shape), np.int8)
    _code_nearest(w, np.ones(len(w), bool), codes, scale)
    return codes


def _code_nearest(w: np.ndarray, rows: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> None:
    """Writes the nearest codes of the rows that are marked."""
    size = len(w) // scale.shape[1]
    for g in range(scale.shape[1]):
        part = np.flatnonzero(rows[g * size : (g + 1) * size]) + g * size
        for columns in column_blocks(size, w.shape[1]) if len(part) else ():
            values = grid_of(scale[:, g, columns] if scale.shape[2] > 1 else scale[:, g])
            codes[:, part, columns] = values.codes(values.indices(w[part, columns]))


def _code_dead(
    w: np.ndarray, h: np.ndarray, codes: np.ndarray, scale: np.ndarray, eps: float
) -> None:
    """Codes the weights of inputs that were always 0; groups of them alone get scales too."""
    size = len(w) // scale.shape[1]
    for g in np.flatnonzero(~h.reshape(-1, size).any(axis=1)):
        part = slice(g * size, (g + 1) * size)
        scale[:, g : g + 1] = plane_scales(w[part], h[part], size, eps, len(scale))
    _code_nearest(w, h == 0, codes, scale)


def _unit(w: np.ndarray) -> float:
    """A power of two to divide weights by, so that squares neither overflow nor vanish."""
    exponent = int(np.frexp(max(w.max(), -w.min()))[1])
    return 1.0 if abs(exponent) < 30 else 2.0 ** (exponent - 1)


def _gptq_slice(
    w: np.ndarray,
    statistics: Statistics,
    b: int,
    config: TernaryConfig,
    *,
    damping: float,
    act_order: bool,
    rounds: int,
    refit: bool,
) -> _Found:
    """GPTQ of one slice."""
    if _second_moment.stands_in(statistics, b):
        return _planes_slice(w, statistics, b, config)
    assert statistics.moments is not None  # require_operands has looked
    moment = statistics.moments[b]
    size = group_size(config.granularity, len(w))
    plan = planned(moment, size, damping=damping, act_order=act_order, rounds=rounds)
    unit = _unit(w)
    if unit != 1:
        w = w * np.float32(1 / unit)
    eps = float(config.eps) / unit
    many = planes_of(config)
    codes, scale = gptq_codes(w, moment.diagonal(), config.granularity, eps, many, plan)
    used = plan.damping
    del plan  # as large as the moment
    if refit:
        scale = refitted(w, codes, scale, moment, used, eps)
    _code_dead(w, moment.diagonal(), codes, scale, eps)
    raised = [f"slice {b}: damping was raised from {damping:g} to {used:g}"]
    return codes, (scale * unit).astype(np.float32), raised if used > damping else []
