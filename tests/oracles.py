"""Slow truths in NumPy, written from the equations and not from the package.

Weights [1, eq. 1-3]: ``s = max(mean|W|, eps)``, ``r = W / s``, a code is 0 where
``|r| <= threshold``, else ``sign(r)``. TWN [2, eq. 5-6]: the same threshold, and the scale
is the mean over the weights that survive it. Activations [1]: ``gamma = max(max|x|, eps)``,
``code = round(x * qmax / gamma)``.

Functions with ``64`` in the name work in float64 and are compared within float32's
rounding. Functions with ``32`` follow the pinned float32 order and are compared bit by bit:
the sum is a tree over adjacent pairs, and the epilogue multiplies from the left.

Planes [3]: ``w = s1 T1 + s2 T2``, each of what those before it left over; a product adds the
terms of plane 1, then those of plane 2.

References:
  [1] Ma et al., arXiv:2402.17764.
  [2] Li et al., arXiv:1605.04711.
  [3] PTQTP, arXiv:2509.16989.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

F32 = np.float32


class Kernel(NamedTuple):
    """A quantised kernel, every entry with its own scale."""

    codes: np.ndarray  # int8, the kernel's shape
    scale: np.ndarray  # the kernel's shape, constant on each region
    ratio: np.ndarray  # |w| / s before the threshold, the kernel's shape


def regions(shape, granularity, contracting, batch):
    """Yields, for every scale, the index tuples (n, rank) of the weights that share it."""
    contracting = [a % len(shape) for a in contracting]
    batch = [a % len(shape) for a in batch]
    outputs = [a for a in range(len(shape)) if a not in contracting + batch]
    for b in itertools.product(*(range(shape[a]) for a in batch)):
        rows = list(itertools.product(*(range(shape[a]) for a in contracting)))
        columns = list(itertools.product(*(range(shape[a]) for a in outputs)))
        if granularity == "tensor":
            parts = [(rows, columns)]
        elif granularity == "channel":
            parts = [(rows, [c]) for c in columns]
        else:
            starts = range(0, len(rows), granularity)
            parts = [(rows[i : i + granularity], [c]) for c in columns for i in starts]
        for some_rows, some_columns in parts:
            where = np.empty((len(some_rows), len(some_columns), len(shape)), int)
            where[..., batch] = b
            where[..., contracting] = np.array(some_rows, int)[:, None]
            where[..., outputs] = np.array(some_columns, int)[None]
            yield where


def _default_axes(ndim, contracting, batch):
    batch = (batch,) if isinstance(batch, int) else tuple(batch)
    if contracting is None:
        contracting = (next(a for a in range(ndim) if a not in {b % ndim for b in batch}),)
    contracting = (contracting,) if isinstance(contracting, int) else tuple(contracting)
    return sorted(a % ndim for a in contracting), sorted(a % ndim for a in batch)


def hadamard64(n):
    """The Walsh-Hadamard matrix, by its recursion."""
    if n == 1:
        return np.ones((1, 1))
    h = hadamard64(n // 2)
    return np.block([[h, h], [h, -h]])


def rotation64(length):
    """Orthonormal blocks of the largest power of two that divides a length."""
    block = math.gcd(length, 2**40)
    return np.kron(np.eye(length // block), hadamard64(block) / np.sqrt(block))


def rotated64(a, config, axis=-1):
    """An array times R along an axis, where the config has a rotation."""
    a = np.asarray(a).astype(np.float64)
    if getattr(config, "rotation", None) is None:
        return a
    return np.moveaxis(np.moveaxis(a, axis, -1) @ rotation64(a.shape[axis]), -1, axis)


def rotated32(a, config, axis=-1):
    """The same in float32 with every rounding in its place: i and i ^ 1, i ^ 2, i ^ 4, ..."""
    if getattr(config, "rotation", None) is None:
        return np.asarray(a)
    a = np.moveaxis(np.asarray(a).astype(F32), axis, -1)
    block, i = math.gcd(a.shape[-1], 2**40), np.arange(a.shape[-1])
    for bit in range(block.bit_length() - 1):
        other = a[..., i ^ (1 << bit)]
        a = np.where(i >> bit & 1, other - a, a + other)
    return np.moveaxis(a * F32(1 / math.sqrt(block)), -1, axis)


def quantize64(w, config, contracting=None, batch=()):
    """The quantiser in float64."""
    w = np.asarray(w).astype(np.float64)
    contracting, batch = _default_axes(w.ndim, contracting, batch)
    w = rotated64(w, config, contracting[-1])
    codes, scale, ratio = np.zeros(w.shape, np.int8), np.zeros(w.shape), np.zeros(w.shape)
    for where in regions(w.shape, config.granularity, contracting, batch):
        at = tuple(np.moveaxis(where, -1, 0))
        v = w[at]
        center = np.median(np.abs(v)) if config.scale == "absmedian" else np.mean(np.abs(v))
        s = max(center, config.eps)
        r = v / s
        kept = np.abs(r) > config.threshold
        codes[at], ratio[at] = np.where(kept, np.sign(r), 0), np.abs(r)
        if config.scale == "survivors":
            s = max(np.abs(v)[kept].mean() if kept.any() else 0.0, config.eps)
        scale[at] = s
    return Kernel(codes, scale, ratio)


def planes_of(config):
    """How many planes a config has, and the config of each, of a kernel that is rotated already."""
    planes = getattr(config, "planes", 1)
    return planes, config if planes == 1 else dataclasses.replace(config, planes=1, rotation=None)


def planes(quantize, w, config, contracting=None, batch=()):
    """The kernel of each plane, by a quantiser of this file, in the precision of w.

    With a rotation they are of ``R^T w``, which is rotated once.
    """
    count, one = planes_of(config)
    if count > 1:
        axis = _default_axes(w.ndim, contracting, batch)[0][-1]
        w = {4: rotated32, 8: rotated64}[w.dtype.itemsize](w, config, axis)
    made = []
    for _ in range(count):
        made.append(quantize(w, one, contracting, batch))
        w = w - made[-1].codes.astype(w.dtype) * made[-1].scale.astype(w.dtype)
    return made


def tree_sum32(v, axis):
    """float32 sum along an axis: zeros up to a power of two, then adjacent pairs."""
    v = np.moveaxis(np.asarray(v, F32), axis, 0)
    size = 1
    while size < v.shape[0]:
        size *= 2
    v = np.concatenate([v, np.zeros((size - v.shape[0], *v.shape[1:]), F32)])
    while v.shape[0] > 1:
        v = v[0::2] + v[1::2]
    return v[0]


def quantize32(w, config, contracting=None, batch=()):
    """The quantiser, ternary or int8, with every float32 rounding in its pinned place."""
    w = np.asarray(w).astype(F32)
    contracting, batch = _default_axes(w.ndim, contracting, batch)
    w = rotated32(w, config, contracting[-1])
    codes, ratio = np.zeros(w.shape, np.int8), np.zeros(w.shape, F32)
    scale = np.zeros(w.shape, F32)
    for where in regions(w.shape, config.granularity, contracting, batch):
        at = tuple(np.moveaxis(where, -1, 0))  # (rows, columns) of the region
        v = w[at]
        if not hasattr(config, "threshold"):  # eight bits: s = max(max|W|, eps) / 127
            largest = np.maximum(np.abs(v).max(), F32(config.eps))
            codes[at] = np.round(v * (F32(127) / largest))
            scale[at] = largest * F32(1 / 127)
            continue
        if config.scale == "absmedian":
            ordered = np.sort(np.abs(v).ravel())
            center = (ordered[(v.size - 1) // 2] + ordered[v.size // 2]) * F32(0.5)
        else:
            center = tree_sum32(tree_sum32(np.abs(v), 0), 0) * F32(1 / v.size)
        s = np.maximum(center, F32(config.eps))
        r = v * (F32(1) / s)
        kept = np.abs(r) > F32(config.threshold)
        codes[at], ratio[at] = np.where(kept, np.sign(r), 0), np.abs(r)
        if config.scale == "survivors":
            total = tree_sum32(tree_sum32(np.where(kept, np.abs(v), F32(0)), 0), 0)
            s = np.maximum(total / F32(max(kept.sum(), 1)), F32(config.eps))
        scale[at] = s
    return Kernel(codes, scale, ratio)


def quantize_hugging_face(w):
    """b1.58 as Hugging Face writes it, in float32, given the scale's pinned sum."""
    w = np.asarray(w).astype(F32)
    s = np.maximum(tree_sum32(tree_sum32(np.abs(w), 0), 0) * F32(1 / w.size), F32(1e-5))
    return np.clip(np.round(w * (F32(1) / s)), -1, 1)


def activations32(x, config, axes=(-1,)):
    """Int8 codes and gamma, in float32; with groups, gamma is (..., groups)."""
    x = np.asarray(x).astype(F32)
    if config.group is not None:
        parts = [x[..., i : i + config.group] for i in range(0, x.shape[-1], config.group)]
        done = [activations32(p, dataclasses.replace(config, group=None)) for p in parts]
        return tuple(np.concatenate(each, -1) for each in zip(*done, strict=True))
    gamma = np.maximum(np.abs(x).max(axis=tuple(axes), keepdims=True), F32(config.eps))
    return np.rint(x * (F32(config.qmax) / gamma)).astype(np.int8), gamma


def activations64(x, config, axes=(-1,)):
    """Unrounded codes and gamma, in float64."""
    x = np.asarray(x).astype(np.float64)
    gamma = np.maximum(np.abs(x).max(axis=tuple(axes), keepdims=True), config.eps)
    return x * config.qmax / gamma, gamma


class Canonical(NamedTuple):
    """Operands of one product: x (*b, m, K), gamma (*b, m, groups), codes and scale (*b, K, N)."""

    x: np.ndarray
    gamma: np.ndarray
    w: np.ndarray
    scale: np.ndarray


def canonical(x, w, config, activations, contracting=None, batch=()):
    """Quantises both operands and flattens them to matrices, batch axes first.

    Planes lie behind each other along K, and x beside itself.
    """
    x, w = np.asarray(x), np.asarray(w)
    contracting, batch = _default_axes(w.ndim, contracting, batch)
    outputs = [a for a in range(w.ndim) if a not in contracting + batch]
    kernels = planes(quantize32, w.astype(F32), config, contracting, batch)
    k = int(np.prod([w.shape[a] for a in contracting]))
    lead = [w.shape[a] for a in batch]

    def flat(a):
        return a.transpose(*batch, *contracting, *outputs).reshape(*lead, k, -1)

    x = rotated32(x.reshape(-1, w.shape[contracting[-1]]), config)  # the last axis that meets
    codes, gamma = activations32(x.reshape(*lead, -1, k), activations)
    x_parts = [np.concatenate([a] * len(kernels), -1) for a in (codes, gamma)]
    w_parts = [
        np.concatenate([flat(getattr(kernel, part)) for kernel in kernels], -2)
        for part in ("codes", "scale")
    ]
    return Canonical(*x_parts, *w_parts)


def _shape(y, x, w, contracting, batch):
    contracting, batch = _default_axes(w.ndim, contracting, batch)
    outputs = [w.shape[a] for a in range(w.ndim) if a not in contracting + batch]
    return y.reshape((*x.shape[: x.ndim - len(contracting)], *outputs))


def dot32(x, w, config, activations, contracting=None, batch=()):
    """The product with every rounding in its place: exact sums, then the pinned epilogue."""
    c = canonical(x, w, config, activations, contracting, batch)
    k = c.w.shape[-2]
    plane = k // planes_of(config)[0]
    group = config.granularity if isinstance(config.granularity, int) else plane
    group = math.gcd(group, activations.group or plane)
    gamma = np.repeat(c.gamma, k // c.gamma.shape[-1], -1)
    total = None
    for start in range(0, k, group):
        part = slice(start, start + group)
        sums = c.x[..., part].astype(np.int64) @ c.w[..., part, :].astype(np.int64)
        step = c.scale[..., start : start + 1, :] * F32(1 / activations.qmax)
        y = (sums.astype(F32) * gamma[..., start : start + 1]) * step
        total = y if total is None else total + y
    return _shape(total, np.asarray(x), np.asarray(w), contracting, batch)


def operands64(x, w, config, activations, contracting=None, batch=()):
    """x_q and w_q of the equations: dequantised operands in float64, canonical."""
    c = canonical(x, w, config, activations, contracting, batch)
    gamma = np.repeat(c.gamma.astype(np.float64), c.x.shape[-1] // c.gamma.shape[-1], -1)
    x_q = c.x.astype(np.float64) * gamma / activations.qmax
    w_q = c.w.astype(np.float64) * c.scale.astype(np.float64)
    count, _ = planes_of(config)
    return np.split(x_q, count, -1)[0], sum(np.split(w_q, count, -2))


def dot64(x, w, config, activations, contracting=None, batch=()):
    """``x_q @ w_q`` in float64, from the codes the float32 quantisers chose."""
    x_q, w_q = operands64(x, w, config, activations, contracting, batch)
    return _shape(x_q @ w_q, np.asarray(x), np.asarray(w), contracting, batch)


def gradients64(x, w, g, config, activations, contracting=None, batch=()):
    """``dx = g w_q^T`` and ``dW = x_q^T g`` in float64, in the shapes of x and w."""
    x, w = np.asarray(x), np.asarray(w)
    x_q, w_q = operands64(x, w, config, activations, contracting, batch)
    contracting, batch = _default_axes(w.ndim, contracting, batch)
    outputs = [a for a in range(w.ndim) if a not in contracting + batch]
    g = np.asarray(g).astype(np.float64).reshape(*x_q.shape[:-1], w_q.shape[-1])
    dx = g @ np.swapaxes(w_q, -1, -2)
    last = w.shape[contracting[-1]]
    dx = rotated64(dx.reshape(-1, last), config)  # R is its own transpose
    order = batch + contracting + outputs
    dw = np.swapaxes(x_q, -1, -2) @ g
    dw = dw.reshape([w.shape[a] for a in order]).transpose(np.argsort(order))
    return dx.reshape(x.shape), rotated64(dw, config, contracting[-1])


def pack_bytes(codes, axis):
    """Four adjacent codes to a byte, first in the low bits, code + 1; filled with code 0."""
    lines = np.moveaxis(np.asarray(codes), axis, -1)
    rows = [pack_line(line) for line in lines.reshape(-1, lines.shape[-1]).tolist()]
    packed = np.array(rows, np.uint8).reshape(*lines.shape[:-1], -1)
    return np.moveaxis(packed, -1, axis)


def pack_line(line):
    """One run of codes to a list of bytes, in pure Python."""
    done = []
    for start in range(0, len(line), 4):
        four = [*line[start : start + 4], 0, 0, 0][:4]
        done.append(sum((code + 1) << (2 * i) for i, code in enumerate(four)))
    return done


def unpack_line(packed, length):
    """A list of bytes to codes, in pure Python."""
    return [((byte >> (2 * i)) & 3) - 1 for byte in packed for i in range(4)][:length]


def assert_same_bits(got, want, message=""):
    """Equal dtypes, shapes and bits, signed zeros and NaNs included; says how many differ."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype, f"{message}: {got.dtype} against {want.dtype}"
    assert got.shape == want.shape, f"{message}: {got.shape} against {want.shape}"
    raw = f"u{got.dtype.itemsize}"
    differ = np.ascontiguousarray(got).view(raw) != np.ascontiguousarray(want).view(raw)
    assert not differ.any(), (
        f"{message}: {differ.sum()} of {differ.size} values differ in their bits, the first at "
        f"{np.argwhere(differ)[0].tolist()}: {got[differ][0]!r} against {want[differ][0]!r}"
    )


def assert_codes_agree(codes, exact: Kernel, threshold, slack=1e-5):
    """Equal codes, except where the ratio is within float32's rounding of the threshold."""
    wrong = (np.asarray(codes) != exact.codes) & (np.abs(exact.ratio - threshold) > slack)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} codes are wrong"
    # Were more than a few on the threshold, the comparison above would say little.
    assert (np.asarray(codes) != exact.codes).mean() <= 0.01
