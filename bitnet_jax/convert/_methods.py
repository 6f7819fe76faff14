"""How a float kernel becomes ternary: a table of methods over one canonical kernel.

A method is a function of a kernel (B, K, N), of the statistics of its inputs and of a config,
and says what statistics it needs. Of the config it takes granularity and eps; ``"absmean"``
takes all of it. ``_relative_error`` measures what any of them lost.

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
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bitnet_jax import _checks
from bitnet_jax._quantize.config import TernaryConfig, planes_of
from bitnet_jax._quantize.ternary import quantize_canonical
from bitnet_jax.convert import _second_moment
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._quantized import Quantized
from bitnet_jax.convert._slice_methods import by_slice, gptq_slice, planes_slice, weighted_slice


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
    return by_slice(weighted_slice, w, alike, config)


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
    return by_slice(weighted_slice, w, statistics, config)


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
        gptq_slice, damping=float(damping), act_order=act_order, rounds=rounds, refit=refit
    )
    return by_slice(run, w, statistics, config)


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
    return by_slice(planes_slice, w, statistics, config)


METHODS: dict[str, Method] = {
    "absmean": Method("nothing", absmean),
    "survivors": Method("nothing", survivors),
    "weighted": Method("diagonal", weighted),
    "gptq": Method("matrix", gptq),
    "gptq-act-order": Method("matrix", functools.partial(gptq, act_order=True)),
    "planes": Method("diagonal", planes),
}


def _require_options(damping: float, rounds: int) -> None:
    """Raises unless the options of gptq are numbers that it can use."""
    if damping != 0:
        _checks.require_positive("gptq", "damping", damping)
    if not _checks.is_integer(rounds) or rounds < 0:
        raise ValueError(f"gptq: `rounds` must be an integer >= 0, got {rounds!r}.")
