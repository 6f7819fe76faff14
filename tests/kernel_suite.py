"""One suite for every implementation of ``matmul``: what it computes, and that it ran.

A row of ``IMPLEMENTATIONS`` either computes a case to the bit, from the stored layout and
from its prepared one, or says that it cannot and raises ``NotImplementedError``. Nothing
falls back: :func:`counting` counts the calls of every row while a case runs.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest

import bitnet_jax as bj
from bitnet_jax._matmul import IMPLEMENTATIONS
from bitnet_jax._packed.prepared import PreparedInt8, PreparedTernary

INT8 = bj.ActivationConfig()
ROWS = (1, 2, 5, 33)
LAYOUTS = ("stored", "prepared")
# A row without a layout of its own prepares a kernel to itself: nothing more to run.
RUNS = [
    (name, layout)
    for name, row in IMPLEMENTATIONS.items()
    for layout in LAYOUTS
    if layout == "stored" or row.prepare
]


class Case(NamedTuple):
    """A kernel and the activations that meet it."""

    shape: tuple[int, ...]
    config: bj.TernaryConfig | bj.Int8Config = bj.B158
    contracting: tuple[int, ...] | int | None = None
    batch: tuple[int, ...] = ()
    x_dtype: type = np.float32
    activations: bj.ActivationConfig = INT8

    @property
    def axes(self):
        return {"contracting_axes": self.contracting, "batch_axes": self.batch}

    def kernel(self):
        return np.random.default_rng(0).normal(size=self.shape).astype(np.float32)

    def x(self, *rows):
        """Activations with so many rows between the batch axes and the contraction."""
        contracting = self.contracting
        if contracting is None:
            contracting = len(self.batch)
        tail = [self.shape[a] for a in np.atleast_1d(contracting)]
        lead = [self.shape[a] for a in self.batch]
        x = np.random.default_rng(len(rows)).normal(size=(*lead, *rows, *tail))
        return x.astype(self.x_dtype)

    def oracle(self, x):
        """The product in x's dtype, from a kernel that was rounded to x_dtype first."""
        w = self.kernel().astype(self.x_dtype)
        y = oracles.dot32(x, w, self.config, self.activations, self.contracting, self.batch)
        return y.astype(self.x_dtype)

    @property
    def rows(self):
        """The shapes between batch axes and contraction that the suite tries."""
        plain = self.x_dtype == np.float32 and self.activations == INT8
        if (
            plain
            and self.shape in ((24, 10), (37, 11), (259, 70))
            and not isinstance(self.config.granularity, int)
        ):
            return [(m,) for m in ROWS] + [(), (2, 3)]
        return [(1,), (5,)]

    @functools.cache  # noqa: B019 - a case is a constant of this file
    def pack(self):
        w = jnp.asarray(self.kernel(), self.x_dtype)
        return bj.pack(w, self.config, **self.axes)

    @functools.cache  # noqa: B019
    def truths(self):
        """For each of ``rows``: x, the oracle's product, and what ternary_dot trains with."""
        xs = [self.x(*lead) for lead in self.rows]

        @jax.jit
        def train(xs, w):
            return [
                bj.ternary_dot(x, w, self.config, activations=self.activations, **self.axes)
                for x in xs
            ]

        trained = train(xs, jnp.asarray(self.kernel(), self.x_dtype))
        return [(x, self.oracle(x), t) for x, t in zip(xs, trained, strict=True)]


def _groups(size, scale="absmean"):
    return bj.TernaryConfig(scale=scale, granularity=size)


def _planes(count=2, granularity="tensor", scale="absmean"):
    return bj.TernaryConfig(scale=scale, granularity=granularity, planes=count)


def _rotated(**how):
    return bj.TernaryConfig(rotation="hadamard", **how)


def _x_groups(size):
    return bj.ActivationConfig(group=size)


CASES = {
    "dense": Case((24, 10)),
    "one-by-one": Case((1, 1)),
    "one-column": Case((24, 1), bj.PHASE4),
    "odd-k": Case((7, 4), bj.PHASE4),
    "odd-k-and-n": Case((37, 11), bj.TWN),
    "k-of-many-blocks": Case((1031, 6), bj.TWN),
    "512-columns": Case((8, 512), bj.PHASE4),
    "513-columns": Case((8, 513), bj.B158),
    "1030-columns": Case((12, 1030), bj.TWN),
    "transposed": Case((6, 8), bj.PHASE4, 1),
    "attention-out": Case((3, 4, 5), bj.PHASE4, (0, 1)),
    "attention-in": Case((8, 3, 5), bj.PHASE4, 0),
    "outer": Case((4, 5, 7), bj.TWN, (0, 2)),
    "conv": Case((3, 3, 5, 6), bj.B158, (0, 1, 2)),
    "conv-one-channel": Case((3, 3, 1, 6), bj.PHASE4, (0, 1, 2)),
    "everything-contracted": Case((3, 4), bj.B158, (0, 1)),
    "groups": Case((24, 10), _groups(4)),
    "groups-of-12": Case((24, 10), _groups(12, "survivors")),
    "groups-wide": Case((16, 600), _groups(8)),
    "groups-of-2": Case((24, 10), _groups(2)),
    "groups-of-7": Case((21, 10), _groups(7)),
    "groups-whole": Case((7, 10), _groups(7)),
    "groups-conv": Case((2, 3, 4, 6), _groups(12), (0, 1, 2)),
    "groups-conv-odd": Case((2, 2, 3, 6), _groups(6), (0, 1, 2)),
    "experts": Case((3, 8, 5), bj.PHASE4, None, (0,)),
    "experts-odd-wide": Case((2, 7, 515), bj.B158, None, (0,)),
    "experts-groups": Case((3, 8, 5), _groups(4), None, (0,)),
    "experts-heads": Case((2, 3, 4, 5), bj.TWN, (1, 2), (0,)),
    "two-batch": Case((2, 3, 8, 5), bj.TWN, None, (0, 1)),
    "bfloat16": Case((24, 10), bj.B158, x_dtype=ml_dtypes.bfloat16),
    "float16": Case((24, 10), bj.TWN, x_dtype=np.float16),
    "int8": Case((24, 10), bj.Int8Config()),
    "int8-odd": Case((37, 11), bj.Int8Config()),
    "int8-many-rows": Case((259, 70), bj.Int8Config()),
    "int8-head": Case((6, 130), bj.Int8Config(), x_dtype=ml_dtypes.bfloat16),
    "int8-table": Case((70, 9), bj.Int8Config(), 1),
    "int8-experts": Case((3, 8, 5), bj.Int8Config(), None, (0,)),
    "planes": Case((24, 10), _planes()),
    "planes-odd": Case((37, 11), _planes(granularity="channel")),
    "planes-one-by-one": Case((1, 1), _planes(4)),
    "planes-of-three": Case((24, 10), _planes(3, scale="survivors")),
    "planes-median": Case((24, 10), _planes(4, "channel", "absmedian")),
    "planes-many-blocks": Case((259, 70), _planes()),
    "planes-513-columns": Case((8, 513), _planes(granularity="channel")),
    "planes-transposed": Case((6, 8), _planes(granularity="channel"), 1),
    "planes-attention-out": Case((3, 4, 5), _planes(), (0, 1)),
    "planes-attention-in": Case((8, 3, 5), _planes(granularity="channel"), 0),
    "planes-outer": Case((4, 5, 7), _planes(), (0, 2)),
    "planes-conv": Case((3, 3, 5, 6), _planes(granularity="channel"), (0, 1, 2)),
    "planes-everything": Case((3, 4), _planes(), (0, 1)),
    "planes-groups": Case((24, 10), _planes(granularity=4)),
    "planes-groups-of-7": Case((21, 10), _planes(granularity=7)),
    "planes-groups-whole": Case((7, 10), _planes(granularity=7)),
    "planes-groups-conv": Case((2, 3, 4, 6), _planes(granularity=12), (0, 1, 2)),
    "planes-experts": Case((3, 8, 5), _planes(), None, (0,)),
    "planes-experts-heads": Case((2, 3, 4, 5), _planes(granularity="channel"), (1, 2), (0,)),
    "planes-two-batch": Case((2, 3, 8, 5), _planes(granularity=4), None, (0, 1)),
    "planes-bfloat16": Case((24, 10), _planes(), x_dtype=ml_dtypes.bfloat16),
    "planes-float16": Case((24, 10), _planes(granularity="channel"), x_dtype=np.float16),
    "planes-4-bit": Case((24, 10), _planes(), activations=bj.ActivationConfig(bits=4)),
    "planes-x-groups": Case((96, 10), _planes(), activations=_x_groups(12)),
    "planes-x-groups-larger": Case((96, 10), _planes(granularity=8), activations=_x_groups(48)),
    "planes-x-groups-unlike": Case((96, 10), _planes(granularity=32), activations=_x_groups(24)),
    "planes-x-groups-odd": Case((21, 10), _planes(granularity=7), activations=_x_groups(7)),
    "4-bit": Case((24, 10), activations=bj.ActivationConfig(bits=4)),
    "2-bit": Case((24, 10), activations=bj.ActivationConfig(bits=2)),
    "x-groups": Case((96, 70), bj.PHASE4, activations=_x_groups(12)),
    "x-groups-of-blocks": Case((1024, 70), activations=_x_groups(256)),
    "x-groups-across-blocks": Case((1120, 6), bj.TWN, activations=_x_groups(160)),
    "x-groups-alike": Case((24, 10), _groups(4), activations=_x_groups(4)),
    "x-groups-alike-odd": Case((21, 10), _groups(7), activations=_x_groups(7)),
    "x-groups-larger": Case((96, 10), _groups(8), activations=_x_groups(48)),
    "x-groups-smaller": Case((96, 10), _groups(48), activations=_x_groups(8)),
    "x-groups-unlike": Case((96, 10), _groups(32), activations=_x_groups(24)),
    "x-groups-of-2": Case((24, 10), activations=_x_groups(2)),
    "x-groups-whole": Case((24, 10), activations=_x_groups(24)),
    "x-groups-outer": Case((4, 5, 8), bj.TWN, (0, 2), activations=_x_groups(16)),
    "x-groups-experts": Case((3, 8, 5), bj.PHASE4, None, (0,), activations=_x_groups(4)),
    "x-groups-int8": Case((36, 11), bj.Int8Config(), activations=_x_groups(12)),
    "x-groups-bfloat16": Case((24, 10), x_dtype=ml_dtypes.bfloat16, activations=_x_groups(8)),
    "x-groups-float16": Case((24, 10), x_dtype=np.float16, activations=_x_groups(8)),
    "rotated": Case((24, 10), _rotated()),
    "rotated-576": Case((576, 70), _rotated(granularity="channel")),
    "rotated-1536": Case((1536, 20), _rotated(scale="survivors"), x_dtype=ml_dtypes.bfloat16),
    "rotated-4096": Case((4096, 6), _rotated(granularity=128)),
    "rotated-groups-across-blocks": Case((96, 10), _rotated(granularity=48)),
    "rotated-transposed": Case((6, 8), _rotated(), 1),
    "rotated-attention-out": Case((3, 4, 5), _rotated(granularity="channel"), (0, 1)),
    "rotated-outer": Case((4, 5, 8), _rotated(), (0, 2)),
    "rotated-conv": Case((3, 3, 4, 6), _rotated(), (0, 1, 2)),
    "rotated-experts": Case((3, 8, 5), _rotated(), None, (0,)),
    "rotated-median": Case((24, 10), _rotated(scale="absmedian")),
    "rotated-float16": Case((24, 10), _rotated(), x_dtype=np.float16),
    "rotated-x-groups": Case((96, 10), _rotated(), activations=_x_groups(12)),
    "rotated-planes": Case((12, 10), _rotated(planes=3)),
    "rotated-planes-of-four": Case((12, 11), _rotated(planes=4, granularity="channel")),
    "rotated-planes-576": Case((576, 70), _rotated(planes=2, scale="survivors")),
    "rotated-planes-outer": Case((4, 5, 12), _rotated(planes=2), (0, 2)),
    "rotated-planes-conv": Case((3, 3, 4, 6), _rotated(planes=2, granularity=12), (0, 1, 2)),
    "rotated-planes-experts": Case((2, 3, 4, 5), _rotated(planes=2), (1, 2), (0,)),
    "rotated-planes-median": Case((12, 10), _rotated(planes=4, scale="absmedian")),
    "rotated-planes-bfloat16": Case((12, 10), _rotated(planes=2), x_dtype=ml_dtypes.bfloat16),
    "rotated-planes-x-groups": Case((96, 10), _rotated(planes=2), activations=_x_groups(12)),
    "x-groups-4-bit": Case((24, 10), activations=bj.ActivationConfig(bits=4, group=8)),
}


@contextlib.contextmanager
def counting():
    """Counts, by name, which implementations compute (or are traced) inside the block."""
    calls = dict.fromkeys(IMPLEMENTATIONS, 0)
    before = dict(IMPLEMENTATIONS)

    def counted(name, contract):
        def count_and_contract(*args, **kwargs):
            calls[name] += 1
            return contract(*args, **kwargs)

        return count_and_contract

    for name, row in before.items():
        forms = {"contract": row.contract, "anywhere": row.anywhere}
        IMPLEMENTATIONS[name] = row._replace(
            **{form: call and counted(name, call) for form, call in forms.items()}
        )
    try:
        yield calls
    finally:
        IMPLEMENTATIONS.update(before)


def only(name, calls):
    """Whether ``name`` ran, and no other."""
    return calls[name] > 0 and sum(calls.values()) == calls[name]


def leaf_of(case, name, layout):
    """The kernel of a case in the layout asked for, or None where the row refuses it by name."""
    packed, row = case.pack(), IMPLEMENTATIONS[name]
    how = {"activations": case.activations, "implementation": name}
    reason = row.unsupported_reason(packed, case.activations)
    if reason is not None:
        assert name in reason
        with pytest.raises(NotImplementedError, match=f"^matmul: .*'{name}'"):
            bj.matmul(case.x(2), packed, **how)
    if row.unsupported_reason(packed) is not None:
        if row.prepare is not None:
            with pytest.raises(NotImplementedError, match=f"^prepare: .*'{name}'"):
                bj.prepare(packed, name)
        return None
    if layout == "stored":
        return packed if reason is None else None
    prepared = bj.prepare(packed, name)
    if reason is not None:  # the activations are the reason: the layout is none yet
        with pytest.raises(NotImplementedError, match=f"^matmul: .*'{name}'.*stored kernel"):
            bj.matmul(case.x(2), prepared, **how)
        return None
    int8 = isinstance(packed, bj.PackedInt8)
    assert isinstance(prepared, PreparedInt8 if int8 else PreparedTernary)
    assert prepared.implementation == name
    return prepared


def check_product(case, name, layout, ways=("",)):
    """Every number of rows, to the bit: against the oracle and against the training op.

    The one program runs again for each of ``ways``, which may change what serves it.
    """
    leaf = leaf_of(case, name, layout)
    if leaf is None:
        return
    xs, wanted, trained = zip(*case.truths(), strict=True)

    @jax.jit
    def run(xs, leaf):
        kwargs = {"activations": case.activations, "implementation": name}
        return [bj.matmul(x, leaf, **kwargs) for x in xs]

    with counting() as calls:
        for way in ways:
            ys = run(xs, leaf)
            for x, y, want, train in zip(xs, ys, wanted, trained, strict=True):
                oracles.assert_same_bits(y, want, f"x {x.shape}, against the oracle {way}")
                oracles.assert_same_bits(y, train, f"x {x.shape}, against ternary_dot {way}")
    assert only(name, calls), calls


def check_gradient(case, name, layout):
    """``dx = g w_q^T`` in float64; nothing is asked of the packed leaf."""
    leaf = leaf_of(case, name, layout)
    if leaf is None:
        return
    x = case.x(5)

    @jax.jit
    def pull(x, leaf, g):
        kwargs = {"activations": case.activations, "implementation": name}
        y, back = jax.vjp(lambda x: bj.matmul(x, leaf, **kwargs), x)
        return back(g.astype(y.dtype))[0]

    y = oracles.dot32(x, case.kernel(), case.config, INT8, case.contracting, case.batch)
    g = np.random.default_rng(7).normal(size=y.shape).astype(np.float32)
    with counting() as calls:
        dx = pull(x, leaf, g)
    assert only(name, calls), calls
    want, _ = oracles.gradients64(
        x, case.kernel(), g, case.config, INT8, case.contracting, case.batch
    )
    assert dx.dtype == x.dtype
    np.testing.assert_allclose(dx, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def check_full_range(name, layout):
    """Every code at its extreme: nothing saturates on the way to int32."""
    case = Case((4096, 3))
    w = np.ones(case.shape, np.float32) * [1, -1, 1]
    w[1::2, 2] = -1
    packed = bj.pack(w.astype(np.float32))
    leaf = packed if layout == "stored" else bj.prepare(packed, name)
    x = np.stack([np.ones(4096), -np.ones(4096), (-1.0) ** np.arange(4096)]).astype(np.float32)
    with counting() as calls:
        y = jax.jit(lambda x, leaf: bj.matmul(x, leaf, implementation=name))(x, leaf)
    assert only(name, calls), calls
    sums = 127 * (x.astype(np.int64) @ w.astype(np.int64))
    assert np.abs(sums).max() == 127 * 4096
    oracles.assert_same_bits(y, sums.astype(np.float32) * np.float32(1 / 127))


def check_bad_tokens(name, layout, config):
    """A token with NaN or Inf gives a NaN row, and the others keep their bits.

    The larger x is where XLA's maximum on CPUs drops NaN.
    """
    for shape in ((24, 10), (520, 10)):
        _check_bad_tokens(Case(shape, config), name, layout)


def _check_bad_tokens(case, name, layout):
    leaf = leaf_of(case, name, layout)
    if leaf is None:
        return
    run = jax.jit(lambda x, leaf: bj.matmul(x, leaf, implementation=name))
    x = case.x(8)
    clean = np.asarray(run(x, leaf))
    for row, bad in ((1, np.nan), (4, np.inf), (5, -np.inf)):
        x[row, 3 * row] = bad
    y = np.asarray(run(x, leaf))
    assert np.isnan(y[[1, 4, 5]]).all()
    rest = [0, 2, 3, 6, 7]
    oracles.assert_same_bits(y[rest], clean[rest])
    assert np.isnan(np.asarray(run(x[1:2], leaf))).all()


def check_vmap(case, name, layout):
    """vmap over tokens, over batches of tokens and over stacked kernels: the same bits."""
    leaf = leaf_of(case, name, layout)
    if leaf is None:
        return

    def dot(x, leaf):
        return bj.matmul(x, leaf, activations=case.activations, implementation=name)

    @jax.jit
    def run(x, leaf):
        stacked = jax.tree.map(lambda a: jnp.stack([a, jnp.flip(a, -1)]), leaf)
        return (
            jax.vmap(dot, (0, None))(x, leaf),
            jax.vmap(jax.vmap(dot, (0, None)), (0, None))(x, leaf),
            jax.vmap(dot, (1, None), 1)(x, leaf),
            jax.vmap(dot, (None, 0))(x, jax.tree.map(lambda a: jnp.stack([a, a]), leaf)),
            jax.vmap(dot)(x[:2], stacked)[0],
        )

    x = case.x(3, 5)
    want = case.oracle(x)
    with counting() as calls:
        rows, tokens, inner, kernels, both = run(x, leaf)
    assert only(name, calls), calls
    for got in (rows, tokens, inner, kernels[0], kernels[1]):
        oracles.assert_same_bits(got, want)
    oracles.assert_same_bits(both, want[0])


def check_no_rows(name, layout):
    """An empty batch gives an empty result."""
    case = CASES["dense"]
    leaf = leaf_of(case, name, layout)
    for lead in ((0,), (2, 0), (0, 2)):
        y = bj.matmul(case.x(*lead), leaf, implementation=name)
        assert (y.shape, y.dtype) == ((*lead, 10), jnp.float32)


def check_traces_once(name, layout):
    """One trace for each shape, whatever the values."""
    case = CASES["dense"]
    leaf = leaf_of(case, name, layout)
    run = jax.jit(lambda x, leaf: bj.matmul(x, leaf, implementation=name))
    other = jax.tree.map(lambda a: jnp.flip(a, -1), leaf)
    with counting() as calls:
        for x in (case.x(2), case.x(2) * 2, case.x(5), case.x(2), case.x(5) * 3):
            run(x, leaf)
            run(x, other)
    assert only(name, calls)
    assert calls[name] == 2


def weight_only_tolerance(case):
    """A float product of K terms: float32's rounding, K times."""
    k = math.prod(case.x(1).shape[len(case.batch) + 1 :])
    return k * 2.0**-23
