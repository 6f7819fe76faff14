"""Quotients and roots against float64, with divisions and roots that are some ulp off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from jax.extend import core

import bitnet_jax as bj
from bitnet_jax._quantize import rounded
from bitnet_jax._quantize.straight_through import rms_normalize
from bitnet_jax.lora import _merge

pytestmark = pytest.mark.optimised

RNG = np.random.default_rng(0)
LIMITS = np.finfo(np.float32)
OFF = [-2, -1, 0, 1, 2]  # ulp


@pytest.fixture(autouse=True)
def corrected(monkeypatch):
    """What other processors run, here."""
    monkeypatch.setattr(rounded, "by_platform", lambda exact, corrected, *x: corrected(*x))
    jax.clear_caches()
    yield
    jax.clear_caches()


def positive(count):
    """Floats of all exponents, and those next to powers of two, where an ulp changes."""
    random = RNG.integers(0x00800000, 0x7F800000, count).astype(np.uint32).view(np.float32)
    edges = np.concatenate([2.0 ** np.arange(-40, 41), np.arange(1, 200)]).astype(np.float32)
    near = [edges, np.nextafter(edges, 0), np.nextafter(edges, np.float32(np.inf))]
    return np.concatenate([random, *near]).astype(np.float32)


def off_by(ulp, function):
    """A function on a backend whose divisions and roots are so many ulp beside the true ones."""

    def run(jaxpr, consts, operands):
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= dict(zip(jaxpr.invars, operands, strict=True))
        for eqn in jaxpr.eqns:
            read = [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars]
            values |= dict(zip(eqn.outvars, step(eqn, read), strict=True))
        return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]

    def step(eqn, operands):
        inner = next((eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params), None)
        if inner is not None and eqn.primitive.name not in ("scan", "while", "cond"):
            return run(inner.jaxpr, inner.consts, operands)
        params = eqn.primitive.get_bind_params(eqn.params)
        outs = eqn.primitive.bind(*operands, **params)
        if eqn.primitive.name not in ("div", "sqrt", "rsqrt"):
            return outs if eqn.primitive.multiple_results else [outs]
        bits = lax.bitcast_convert_type(outs, jnp.int32)
        return [lax.bitcast_convert_type(bits + ulp, jnp.float32)]

    def called(*operands):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*operands)
        outs = run(closed.jaxpr, closed.consts, jax.tree.leaves(operands))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return called


@pytest.mark.parametrize("ulp", OFF)
def test_a_quotient_is_the_nearest_float(ulp):
    a, b = positive(200_000), RNG.permutation(positive(200_000))
    exact = np.float64(a) / np.float64(b)  # 53 bits round to 24 as the true quotient does
    with np.errstate(over="ignore"):
        want = exact.astype(np.float32)
    normal = (exact >= LIMITS.tiny) & (exact <= LIMITS.max)
    got = np.asarray(off_by(ulp, rounded.quotient)(a, b))
    oracles.assert_same_bits(got[normal], want[normal])
    oracles.assert_same_bits(
        np.asarray(off_by(ulp, rounded.quotient)(-a, b))[normal], -want[normal]
    )


@pytest.mark.parametrize("ulp", OFF)
def test_a_root_is_the_nearest_float(ulp):
    x = positive(200_000)
    oracles.assert_same_bits(
        off_by(ulp, rounded.root)(x), np.sqrt(np.float64(x)).astype(np.float32)
    )


W, X = (jnp.asarray(RNG.standard_normal(shape, np.float32)) for shape in ((96, 40), (33, 96)))


@pytest.mark.parametrize("ulp", [-2, 1])
def test_no_code_scale_or_norm_depends_on_how_a_backend_divides(ulp):
    configs = [bj.B158, bj.PHASE4, bj.TWN, bj.Int8Config(), bj.TernaryConfig(granularity=8)]
    configs += [bj.TernaryConfig(scale="absmedian"), bj.TernaryConfig(scale="survivors")]

    def everything(w, x):
        packed = [bj.pack(w, config) for config in configs]
        products = [bj.matmul(x, leaf, implementation="reference") for leaf in packed]
        return packed, products, rms_normalize(x), bj.quantize_activations(x)

    def plain_division(w, x):
        return x / jnp.abs(w).max(0).sum()

    want = jax.jit(everything)(W, X)
    jax.tree.map(oracles.assert_same_bits, off_by(ulp, everything)(W, X), want)
    other = off_by(ulp, plain_division)(W, X)  # the emulation is one
    assert (np.asarray(other) != np.asarray(plain_division(W, X))).all()


@pytest.mark.parametrize("ulp", [-1, 2])
def test_a_merged_adapter_does_not_either(ulp):
    packed = {"kernel": bj.pack(W)}
    adapters = jax.tree.map(
        lambda a: jnp.asarray(RNG.standard_normal(a.shape, np.float32)),
        bj.lora.init(packed, 2, key=jax.random.key(0)),
    )
    base = packed["kernel"]
    update = adapters.kernels["kernel"]["a"] @ adapters.kernels["kernel"]["b"]
    merge = functools.partial(_merge._on_grid, base)
    whole = base.dequantize() + update
    jax.tree.map(oracles.assert_same_bits, off_by(ulp, merge)(whole), jax.jit(merge)(whole))


def test_only_what_is_lowered_for_other_processors_is_corrected(monkeypatch):
    monkeypatch.undo()
    jax.clear_caches()
    traced = jax.jit(lambda w: bj.quantize(w).codes).trace(W)
    for platform, corrected in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("shift_left" in text) == corrected, platform


def test_a_norm_has_one_root_under_jit_and_in_eager(monkeypatch):
    monkeypatch.undo()
    jax.clear_caches()
    oracles.assert_same_bits(jax.jit(rms_normalize)(X), rms_normalize(X))
