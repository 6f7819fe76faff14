"""GPTQ in three values: each code answers for the errors of the codes before it.

With H the second moment of the inputs, the error of an output is ``(w - v)^T H (w - v)`` for
codes times scales v. Let ``H^-1 = U^T U`` with U upper triangular. Then it is the sum of e**2 of

    U^T e = w - v,    row by row:    e_i = (w_i - sum_j<i U_ji e_j - v_i) / U_ii

So when code i is chosen, ``w_i - sum_j<i U_ji e_j`` is what it should be near to, given the codes
before it: the weight, moved against their errors [1]. This is the textbook's loop, which moves
all later weights after each code; here the moves are put off and made as matrix products, a
half of the rows at a time.

Scales. A group gets its first scale when its first row is reached, from its weights as they
have moved: the exact optimum with the diagonal of H as weights. Then codes and scale take turns,
as in PT2-LLM's two stages [2], here without an offset and by the error that later rows cannot
mend: with ``R = U_gg^-1`` of the group's rows, ``e = R^T (w - s c)``, and the best scale for
codes c is ``<R^T c, R^T w> / <R^T c, R^T c>``. The best pair of all turns is kept.

Order. ``act_order`` takes groups, and the inputs inside each, by falling mean square, so that
the largest are coded while most others can still answer; groups stay whole.

H is divided by its mean diagonal, plus ``damping`` times the identity. Weights of inputs that
were always 0 are coded as 0, so that they have no say in a scale; the caller codes them anew.

References:
  [1] Frantar et al., GPTQ, arXiv:2210.17323.
  [2] PT2-LLM, arXiv:2510.03267.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy.linalg import lapack

from bitnet_jax.convert._best_scale import Granularity, best_scales, group_size, nearest

_AT_ONCE = 2**22  # weights that are coded together: 16 MiB, and a few copies


class Choice(NamedTuple):
    """Codes for some scales, and the parabola of the error over a change of each scale.

    A change d of a scale turns ``loss`` into ``loss - 2 d along + d**2 square``.
    """

    codes: np.ndarray
    loss: np.ndarray
    along: np.ndarray
    square: np.ndarray


class Plan(NamedTuple):
    """How a kernel is coded: rows in which order, and H factored in this order."""

    order: np.ndarray  # (K,)
    upper: np.ndarray  # (K, K) float32, U
    roots: list[np.ndarray]  # R of each group, (K/G, K/G) float32
    damping: float  # with which H could be factored
    rounds: int


def column_blocks(length: int, width: int) -> Iterator[slice]:
    """Runs of outputs of a kernel that are worked on together."""
    size = max(64, _AT_ONCE // length)
    return (slice(first, first + size) for first in range(0, width, size))


def gptq_codes(
    w: np.ndarray, weight: np.ndarray, granularity: Granularity, eps: float, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (K, N) int8 and scales (G, 1 or N) float32 of a kernel.

    Args:
      w: (K, N) float32.
      weight: (K,) float64, the diagonal of H.
      granularity: what shares a scale.
      eps: the smallest scale.
      plan: the order of coding, and H factored in it.
    """
    order = plan.order
    if granularity == "tensor":
        codes, scale = _shared(w, weight, eps, plan)
        return codes[np.argsort(order)], scale
    size = group_size(granularity, len(w))
    codes = np.empty(w.shape, np.int8)
    scale = np.empty((len(w) // size, w.shape[1]), np.float32)
    for columns in column_blocks(*w.shape):
        slab = _Slab(_rows_in_order(w, weight, order, columns), weight[order], eps, plan)
        slab.code_groups(0, len(scale))
        codes[order, columns] = slab.codes
        scale[order[::size] // size, columns] = slab.scale
    return codes, scale


def input_order(weight: np.ndarray, size: int, act_order: bool) -> np.ndarray:
    """The order of coding (K,): groups, and inputs inside each, by falling mean square."""
    groups = weight.reshape(-1, size)
    if not act_order:
        return np.arange(groups.size)
    inside = np.argsort(-groups, axis=1, kind="stable")
    across = np.argsort(-groups.sum(axis=1), kind="stable")
    return (inside + size * np.arange(len(groups))[:, None])[across].reshape(-1)


def planned(moment: np.ndarray, size: int, *, damping: float, act_order: bool, rounds: int) -> Plan:
    """Factors ``moment / mean diagonal + damping``; damping is raised until that succeeds."""
    order = input_order(moment.diagonal(), size, act_order)
    # A lower factor of the rows in reverse is an upper factor of the rows as they are, and
    # the inverse of a factor is a factor of the inverse: no inverse of H is ever made.
    back = order[::-1]
    mean = mean_square(moment)
    potrf, trtri = lapack.get_lapack_funcs(("potrf", "trtri"), dtype=np.float64)
    while True:
        h = moment[np.ix_(back, back)]
        h /= mean
        h[np.diag_indices(len(h))] += damping
        lower, failed = potrf(h.T, lower=1, clean=1, overwrite_a=1)
        if not failed:
            break
        damping = max(10 * damping, 1e-6)
    root = lower[::-1, ::-1]
    parts = (slice(first, first + size) for first in range(0, len(h), size))
    roots = [np.ascontiguousarray(root[rows, rows], np.float32) for rows in parts]
    inverse, _ = trtri(lower, lower=1, overwrite_c=1)
    upper = np.ascontiguousarray(inverse[::-1, ::-1], np.float32)
    return Plan(order, upper, roots, damping, rounds)


def mean_square(moment: np.ndarray) -> float:
    """The mean of the diagonal, which is not all 0, without overflow."""
    largest = moment.diagonal().max()
    return float((moment.diagonal() / largest).mean() * largest)


def _rows_in_order(
    w: np.ndarray, weight: np.ndarray, order: np.ndarray, columns: slice
) -> np.ndarray:
    """Some outputs of a kernel, copied in the order of coding; 0 where an input was always 0."""
    rows = np.ascontiguousarray(w[order, columns])
    rows[weight[order] == 0] = 0
    return rows


class _Slab:
    """Some outputs of a kernel while they are coded; ``w`` holds e where rows are done."""

    def __init__(self, w: np.ndarray, weight: np.ndarray, eps: float, plan: Plan) -> None:
        self.w, self.weight, self.eps, self.plan = w, weight, eps, plan
        self.size = len(plan.roots[0])
        self.codes = np.empty(w.shape, np.int8)
        self.scale = np.empty((len(w) // self.size, w.shape[1]), np.float32)

    def code_groups(self, first: int, last: int) -> None:
        """Codes some groups, whose weights have moved against all errors before them."""
        if last - first == 1:
            self._code_group(first)
            return
        middle = (first + last) // 2
        self.code_groups(first, middle)
        done = slice(first * self.size, middle * self.size)
        rest = slice(middle * self.size, last * self.size)
        self.w[rest] -= self.plan.upper[done, rest].T @ self.w[done]
        self.code_groups(middle, last)

    def _code_group(self, g: int) -> None:
        rows = slice(g * self.size, (g + 1) * self.size)
        w, upper, root = self.w[rows], self.plan.upper[rows, rows], self.plan.roots[g]
        first = best_scales(w, self.weight[rows], self.size, self.eps)

        def choose(scale: np.ndarray) -> Choice:
            return _choice(w, upper, root, scale, 0)

        codes, self.scale[g] = _in_turns(choose, first, self.plan.rounds, self.eps)
        self.codes[rows] = codes
        w -= self.scale[g] * codes
        w[:] = root.T @ w


def _shared(
    w: np.ndarray, weight: np.ndarray, eps: float, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """Codes, their rows in the order of coding, and the one scale of a whole kernel."""

    def choose(scale: np.ndarray) -> Choice:
        codes, sums = np.empty(w.shape, np.int8), []
        for columns in column_blocks(*w.shape):
            rows = _rows_in_order(w, weight, plan.order, columns)
            part = _choice(rows, plan.upper, plan.roots[0], scale, None)
            codes[:, columns] = part.codes
            sums.append(part[1:])
        loss, along, square = np.sum(sums, axis=0)
        return Choice(codes, loss, along, square)

    return _in_turns(choose, best_scales(w, weight, "tensor", eps), plan.rounds, eps)


def _in_turns(
    choose: Callable[[np.ndarray], Choice], scale: np.ndarray, rounds: int, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales (1, 1 or n) of the least error of so many rounds of one after the other."""
    best = choose(scale)
    kept, least = scale, best.loss
    for turn in range(rounds):
        now = choose(scale) if turn else best
        scale, loss = _refitted(now, scale, eps)
        better = loss < least
        np.copyto(best.codes, now.codes, where=better)
        kept, least = np.where(better, scale, kept), np.minimum(loss, least)
    return best.codes, kept


def _refitted(now: Choice, scale: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The best scales for some codes, and the loss with them."""
    step = np.divide(now.along, now.square, out=np.zeros_like(now.along), where=now.square > 0)
    fitted = (scale + step).astype(np.float32)
    fitted = np.where(fitted >= eps, fitted, scale)
    step = fitted.astype(np.float64) - scale
    return fitted, now.loss - 2 * now.along * step + now.square * step**2


def _choice(
    w: np.ndarray, upper: np.ndarray, root: np.ndarray, scale: np.ndarray, axis: int | None
) -> Choice:
    """Codes of the rows of one group (k, n), one after the other."""
    e, codes = w.copy(), np.empty(w.shape, np.int8)
    _code_rows(e, codes, upper, scale[0], 0, len(w))
    z = root.T @ codes.astype(np.float32)

    def total(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        products = (a * b).sum(axis=0, dtype=np.float64, keepdims=True)
        return products if axis == 0 else products.sum(axis=1, keepdims=True)

    return Choice(codes, total(e, e), total(z, e), total(z, z))


def _code_rows(
    e: np.ndarray, codes: np.ndarray, upper: np.ndarray, scale: np.ndarray, first: int, last: int
) -> None:
    """Codes rows that have moved against all errors before them, and leaves their e."""
    if last - first == 1:
        codes[first] = nearest(e[first], scale)
        e[first] -= scale * codes[first]
        e[first] /= upper[first, first]
        return
    middle = (first + last) // 2
    _code_rows(e, codes, upper, scale, first, middle)
    done, rest = slice(first, middle), slice(middle, last)
    e[rest] -= upper[done, rest].T @ e[done]
    _code_rows(e, codes, upper, scale, middle, last)
