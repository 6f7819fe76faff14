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
codes c is ``<R^T c, R^T w> / <R^T c, R^T c>``. The best pair of all turns is kept. Of several
planes (``_plane_grid``) the scales of a group are first those of ``_plane_scales``, then those of
the least squares in R^T c_1, R^T c_2, ...: everything else is as for one.

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

from bitnet_jax.convert._best_scale import Granularity, group_size
from bitnet_jax.convert._plane_grid import Grid, combined, grid_of, lowered, solved
from bitnet_jax.convert._plane_scales import plane_scales

_AT_ONCE = 2**21  # weights that are coded together: 8 MiB, and a few copies


class Choice(NamedTuple):
    """Codes for some scales, and the parabola of the error over a change of the scales.

    A change d of the scales turns ``loss`` into ``loss - 2 d^T along + d^T square d``.
    """

    codes: np.ndarray  # (P, k, n) int8
    loss: np.ndarray  # (1, 1 or n) float64
    along: np.ndarray  # (P, 1 or n)
    square: np.ndarray  # (P, P, 1 or n)


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
    w: np.ndarray, weight: np.ndarray, granularity: Granularity, eps: float, planes: int, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (P, K, N) int8 and scales (P, G, 1 or N) float32 of a kernel.

    Args:
      w: (K, N) float32.
      weight: (K,) float64, the diagonal of H.
      granularity: what shares a scale.
      eps: the smallest scale.
      planes: P.
      plan: the order of coding, and H factored in it.
    """
    order = plan.order
    if granularity == "tensor":
        codes, scale = _shared(w, weight, eps, planes, plan)
        return codes[:, np.argsort(order)], scale[:, None]
    size = group_size(granularity, len(w))
    codes = np.empty((planes, *w.shape), np.int8)
    scale = np.empty((planes, len(w) // size, w.shape[1]), np.float32)
    for columns in column_blocks(*w.shape):
        rows = _rows_in_order(w, weight, order, columns)
        slab = _Slab(rows, weight[order], eps, planes, plan)
        slab.code_groups(0, scale.shape[1])
        codes[:, order, columns] = slab.codes
        scale[:, order[::size] // size, columns] = slab.scale
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

    def __init__(
        self, w: np.ndarray, weight: np.ndarray, eps: float, planes: int, plan: Plan
    ) -> None:
        self.w, self.weight, self.eps, self.plan = w, weight, eps, plan
        self.size = len(plan.roots[0])
        self.codes = np.empty((planes, *w.shape), np.int8)
        self.scale = np.empty((planes, len(w) // self.size, w.shape[1]), np.float32)

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
        first = plane_scales(w, self.weight[rows], self.size, self.eps, len(self.scale))

        def choose(scale: np.ndarray) -> Choice:
            return _choice(w, upper, root, scale, 0)

        found = _in_turns(choose, first[:, 0], self.plan.rounds, self.eps)
        self.codes[:, rows], self.scale[:, g] = found
        w -= combined(found[0], found[1][:, None])
        w[:] = root.T @ w


def _shared(
    w: np.ndarray, weight: np.ndarray, eps: float, planes: int, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """Codes, their rows in the order of coding, and the one scale a plane of a whole kernel."""

    def choose(scale: np.ndarray) -> Choice:
        codes, sums = np.empty((planes, *w.shape), np.int8), []
        for columns in column_blocks(*w.shape):
            rows = _rows_in_order(w, weight, plan.order, columns)
            part = _choice(rows, plan.upper, plan.roots[0], scale, None)
            codes[:, :, columns] = part.codes
            sums.append(part[1:])
        loss, along, square = (np.sum(of, axis=0) for of in zip(*sums, strict=True))
        return Choice(codes, loss, along, square)

    first = plane_scales(w, weight, "tensor", eps, planes)
    return _in_turns(choose, first[:, 0], plan.rounds, eps)


def _in_turns(
    choose: Callable[[np.ndarray], Choice], scale: np.ndarray, rounds: int, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (P, k, n) and scales (P, 1 or n) of the least error of so many turns of each."""
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
    fitted = (scale + solved(now.square, now.along)).astype(np.float32)
    fitted = np.where((fitted >= eps).all(axis=0), fitted, scale)
    less, more = lowered(now.square, now.along, fitted.astype(np.float64) - scale)
    return fitted, now.loss - less + more


def _choice(
    w: np.ndarray, upper: np.ndarray, root: np.ndarray, scale: np.ndarray, axis: int | None
) -> Choice:
    """Codes of the rows of one group (k, n), one after the other."""
    e, index, values = w.copy(), np.empty(w.shape, np.int8), grid_of(scale)
    _code_rows(e, index, upper, values, 0, len(w))
    codes = values.codes(index)
    moved = [root.T @ plane.astype(np.float32) for plane in codes]

    def total(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        products = (a * b).sum(axis=0, dtype=np.float64)
        return products if axis == 0 else products.sum(keepdims=True)

    along = np.stack([total(z, e) for z in moved])
    square = np.stack([np.stack([total(z, other) for other in moved]) for z in moved])
    return Choice(codes, total(e, e)[None], along, square)


def _code_rows(
    e: np.ndarray, index: np.ndarray, upper: np.ndarray, values: Grid, first: int, last: int
) -> None:
    """Codes rows that have moved against all errors before them, and leaves their e."""
    if last - first == 1:
        index[first] = values.indices(e[first])
        e[first] -= values.row(index[first])
        e[first] /= upper[first, first]
        return
    middle = (first + last) // 2
    _code_rows(e, index, upper, values, first, middle)
    done, rest = slice(first, middle), slice(middle, last)
    e[rest] -= upper[done, rest].T @ e[done]
    _code_rows(e, index, upper, values, middle, last)
