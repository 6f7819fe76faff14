"""matmul and prepare: every implementation through one suite, and the rules of the table."""

import functools

import jax
import jax.numpy as jnp
import kernel_suite as suite
import numpy as np
import oracles
import pytest
from cases import cases

import bitnet_jax as bj
from bitnet_jax._matmul import IMPLEMENTATIONS, api, implementations
from bitnet_jax._packed.prepared import PreparedTernary

pytestmark = pytest.mark.optimised

every_run = pytest.mark.parametrize(("name", "layout"), suite.RUNS)
# The native product's own layout: test_native.py, on every path of it.
every_run_but_native = pytest.mark.parametrize(
    ("name", "layout"), [run for run in suite.RUNS if run != ("cpu", "prepared")]
)
every_layout = pytest.mark.parametrize("layout", suite.LAYOUTS)
IN_CORE = ("odd-k-and-n", "outer", "groups", "experts-heads", "bfloat16", "int8-odd", "4-bit")
IN_CORE += ("x-groups", "x-groups-unlike", "planes-odd", "planes-groups-conv", "rotated-576")
IN_CORE += ("rotated-planes-of-four",)
every_case = cases("case", suite.CASES, core=IN_CORE)
GRADIENTS = ("dense", "odd-k-and-n", "513-columns", "outer", "groups", "conv", "experts-heads")
GRADIENTS += ("groups-of-7", "int8-many-rows", "int8-table", "x-groups-alike", "rotated-outer")
GRADIENTS += ("planes-odd", "planes-groups", "rotated-planes-outer")


def some(*names, core=IN_CORE):
    return cases("case", {n: suite.CASES[n] for n in names}, core=[n for n in names if n in core])


@every_case
@every_run_but_native
def test_products_have_the_oracles_bits(name, layout, case):
    suite.check_product(case, name, layout)


@some(*GRADIENTS, core=("outer", "groups"))
@every_run
def test_the_gradient_to_x_is_the_closed_form(name, layout, case):
    suite.check_gradient(case, name, layout)


@some(
    *("odd-k", "513-columns", "outer", "groups", "int8-odd", "x-groups-unlike", "rotated"),
    core=("groups",),
)
@every_run
def test_vmap(name, layout, case):
    suite.check_vmap(case, name, layout)


@every_run
def test_codes_at_their_extremes(name, layout):
    suite.check_full_range(name, layout)


@cases(
    "config",
    {"tensor": bj.B158, "groups": bj.TernaryConfig(granularity=4), "int8": bj.Int8Config()},
    core=["tensor"],
)
@every_run
def test_bad_tokens(name, layout, config):
    suite.check_bad_tokens(name, layout, config)


@every_run
def test_no_rows(name, layout):
    suite.check_no_rows(name, layout)


@every_run
def test_one_trace_per_shape(name, layout):
    suite.check_traces_once(name, layout)


def test_the_readable_implementation_agrees_with_float64():
    for name in ("dense", "conv", "groups", "experts-heads"):
        case = suite.CASES[name]
        x = case.x(5)
        y = jax.jit(functools.partial(bj.matmul, implementation="reference"))(x, case.pack())
        truth = oracles.dot64(
            x, case.kernel(), case.config, case.activations, case.contracting, case.batch
        )
        np.testing.assert_allclose(y, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).max())


@some("dense", "outer", "groups", "conv", "experts-heads", core=("groups",))
@every_layout
def test_weight_only_is_a_float_product_with_the_unpacked_kernel(case, layout):
    leaf = case.pack() if layout == "stored" else bj.prepare(case.pack(), "xla")
    x = case.x(5)

    @jax.jit
    def run(x, leaf):
        y, pull = jax.vjp(lambda x: bj.matmul(x, leaf, activations=None), x)
        return y, pull(jnp.ones_like(y))[0]

    with suite.counting() as calls:
        y, dx = run(x, leaf)
    assert sum(calls.values()) == 0
    trained = bj.ternary_dot(x, case.kernel(), case.config, activations=None, **case.axes)
    exact = oracles.quantize32(case.kernel(), case.config, case.contracting, case.batch)
    hat = exact.codes.astype(np.float64) * exact.scale
    letters = {"dense": "mk,kn->mn", "outer": "mkl,knl->mn", "conv": "mabc,abcn->mn"}
    letters |= {"groups": "mk,kn->mn", "experts-heads": "emab,eabn->emn"}
    rule = next(letters[n] for n, c in suite.CASES.items() if c is case)
    want = np.einsum(rule, x, hat)
    atol = suite.weight_only_tolerance(case) * np.abs(want).max()
    np.testing.assert_allclose(y, want, rtol=0, atol=atol)
    np.testing.assert_allclose(y, trained, rtol=0, atol=atol)
    inputs, output = rule.split("->")
    left, right = inputs.split(",")
    want_dx = np.einsum(f"{output},{right}->{left}", np.ones_like(want), hat)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-5 * np.abs(want_dx).max())


def test_output_dtypes():
    packed = suite.CASES["dense"].pack()
    x = suite.CASES["dense"].x(5)
    exact = suite.CASES["dense"].oracle(x)
    for dtype in (jnp.float32, jnp.bfloat16, "float16", np.dtype(np.float32)):
        y = bj.matmul(x, packed, dtype=dtype)
        oracles.assert_same_bits(y, exact.astype(dtype))
        assert bj.matmul(x, packed, dtype=dtype, activations=None).dtype == y.dtype
    low = suite.CASES["bfloat16"].pack()
    y = bj.matmul(x.astype(jnp.bfloat16), low)
    assert y.dtype == jnp.bfloat16
    with jax.numpy_dtype_promotion("standard"):
        assert bj.matmul(x, low).dtype == jnp.float32


# The table --------------------------------------------------------------------------------


def first_that_can(packed, preparing=False):
    rows = IMPLEMENTATIONS.items()
    return next(
        n
        for n, row in rows
        if row.unsupported_reason(packed) is None and row.preferred(packed, preparing)
    )


@some(
    "dense",
    "groups-of-2",
    "groups-of-7",
    "groups-conv-odd",
    "two-batch",
    "1030-columns",
    "int8",
    "int8-table",
)
def test_none_picks_the_first_row_that_can(case):
    packed, x = case.pack(), case.x(5)
    want = first_that_can(packed)
    with suite.counting() as calls:
        y = bj.matmul(x, packed)
    assert suite.only(want, calls)
    oracles.assert_same_bits(y, case.oracle(x))
    prepared = bj.prepare(packed)
    with suite.counting() as calls:
        y = bj.matmul(x, prepared)
    assert suite.only(first_that_can(packed, preparing=True), calls)
    oracles.assert_same_bits(y, case.oracle(x))


def test_xla_says_which_groups_it_cannot_run():
    packed = suite.CASES["groups-of-2"].pack()
    match = r"implementation 'xla' needs groups.*multiple of 4; got groups of 2 along \(24,\).*Use"
    with pytest.raises(NotImplementedError, match=f"^matmul: {match}"):
        bj.matmul(suite.CASES["groups-of-2"].x(2), packed, implementation="xla")
    with pytest.raises(NotImplementedError, match=f"^prepare: {match}"):
        bj.prepare(packed, implementation="xla")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("xla", r"needs groups, .*got groups of 2 along \(24,\). Use implementation='reference'"),
        ("cpu", r"needs groups of activations of a multiple of 4, or .*got groups of 2, and 24 w"),
    ],
)
def test_groups_of_activations_that_an_implementation_cannot_run(name, match):
    case = suite.CASES["x-groups-of-2"]
    if IMPLEMENTATIONS[name].unsupported_reason(case.pack()):
        pytest.skip("no C++ compiler built the native product")
    for leaf in (case.pack(), bj.prepare(case.pack(), name)):
        with pytest.raises(NotImplementedError, match=f"^matmul: implementation '{name}' {match}"):
            bj.matmul(case.x(2), leaf, activations=case.activations, implementation=name)
    with suite.counting() as calls:
        y = bj.matmul(case.x(2), case.pack(), activations=case.activations)
    assert suite.only("reference", calls)
    oracles.assert_same_bits(y, case.oracle(case.x(2)))


def test_a_row_that_refuses_everything_is_passed_over_and_never_hidden(monkeypatch):
    def refuse(*args):
        raise AssertionError("it was run")

    reason = "implementation 'lame' is not for this machine."
    row = IMPLEMENTATIONS["reference"]
    lame = row._replace(contract=refuse, unsupported_reason=lambda *_: reason)
    # The whole table, not its items: putting items back would change their order.
    lames = {"lame": lame, **IMPLEMENTATIONS}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", lames)
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", lames)
    case = suite.CASES["dense"]
    oracles.assert_same_bits(bj.matmul(case.x(2), case.pack()), case.oracle(case.x(2)))
    with pytest.raises(NotImplementedError, match=r"^matmul: .*'lame'"):
        bj.matmul(case.x(2), case.pack(), implementation="lame")


def test_a_prepared_kernel_runs_only_by_its_own_implementation():
    case = suite.CASES["dense"]
    prepared = bj.prepare(case.pack(), "xla")
    with suite.counting() as calls:
        y = bj.matmul(case.x(5), prepared, implementation="xla")
    assert suite.only("xla", calls)
    oracles.assert_same_bits(y, case.oracle(case.x(5)))
    with pytest.raises(ValueError, match=r"^matmul: .*prepared for .*'xla', and 'reference'.*Keep"):
        bj.matmul(case.x(5), prepared, implementation="reference")


def test_prepare_takes_a_tree_and_leaves_the_rest_alone():
    packed, bias = suite.CASES["dense"].pack(), jnp.ones(10)
    tree = {"a": {"kernel": packed, "bias": bias}, "b": [packed, None], "n": 3}
    done = bj.prepare(tree, "xla")
    assert jax.tree.structure(done, is_leaf=lambda n: isinstance(n, PreparedTernary)) == (
        jax.tree.structure(tree, is_leaf=lambda n: isinstance(n, bj.PackedTernary))
    )
    assert done["a"]["bias"] is bias
    assert done["n"] == 3
    for leaf in (done["a"]["kernel"], done["b"][0]):
        assert leaf.implementation == "xla"
    for name, row in IMPLEMENTATIONS.items():
        unchanged = bj.prepare(tree, name)["a"]["kernel"] is packed
        assert unchanged == (row.prepare is None)
    jitted = jax.jit(functools.partial(bj.prepare, implementation="xla"))(packed)
    jax.tree.map(oracles.assert_same_bits, jitted, done["a"]["kernel"])


def test_gpus_keep_kernels_as_they_are_stored(monkeypatch):
    packed = suite.CASES["dense"].pack()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert bj.prepare(packed) is packed
    assert bj.prepare(packed, "xla").implementation == "xla"


# Errors -----------------------------------------------------------------------------------

DENSE = suite.CASES["dense"]


@pytest.mark.parametrize(
    ("kind", "x", "kwargs", "match"),
    [
        (TypeError, np.ones((2, 24), np.int8), {}, r"`x` must be floating .*int8.*Cast it"),
        (TypeError, [[1.0] * 24], {}, r"`x` must be a floating-point array, got list"),
        (ValueError, DENSE.x(2)[:, :23], {}, r"`x` must end .*\(24,\), got shape \(2, 23\). Check"),
        (ValueError, np.float32(3) * DENSE.x()[0], {}, r"`x` must end .*got shape \(\)"),
        (ValueError, DENSE.x(2), {"implementation": "xlaa"}, r"`implementation` .*mean 'xla'"),
        (ValueError, DENSE.x(2), {"implementation": 3}, r"`implementation` must be one of None"),
        (TypeError, DENSE.x(2), {"activations": 8}, r"`activations` .*Use ActivationConfig\(\)"),
    ],
)
@every_layout
def test_bad_arguments_are_refused_with_a_remedy(layout, kind, x, kwargs, match):
    leaf = DENSE.pack() if layout == "stored" else bj.prepare(DENSE.pack(), "xla")
    with pytest.raises(kind, match=f"^matmul: .*{match}"):
        bj.matmul(x, leaf, **kwargs)


@every_layout
def test_batch_axes_must_meet(layout):
    case = suite.CASES["experts"]
    leaf = case.pack() if layout == "stored" else bj.prepare(case.pack(), "xla")
    match = r"`x` must end .*\(8,\) and start with the kernel's batch axes \(3,\), got"
    for shape in ((2, 5, 8), (5, 8), (8,), (3, 5, 7)):
        with pytest.raises(ValueError, match=match):
            bj.matmul(np.ones(shape, np.float32), leaf)


def test_a_kernel_that_is_not_packed_is_refused():
    for other in (DENSE.kernel(), None, {"kernel": DENSE.pack()}):
        with pytest.raises(TypeError, match=r"^matmul: `packed` must be a PackedTernary or .*M"):
            bj.matmul(DENSE.x(2), other)


def test_prepare_refuses_with_a_remedy():
    packed = DENSE.pack()
    prepared = bj.prepare(packed, "xla")
    with pytest.raises(ValueError, match=r"^prepare: `implementation` .*Did you mean 'xla'"):
        bj.prepare(packed, "xlaa")
    with pytest.raises(ValueError, match=r"^prepare: the tree holds no packed kernel.*pack_params"):
        bj.prepare({"kernel": DENSE.kernel()})
    with pytest.raises(TypeError, match=r"^prepare: `tree` is prepared for .*'xla'.*stored tree"):
        bj.prepare(prepared)
    with pytest.raises(TypeError, match=r"^prepare: \['a'\]\['kernel'\] is prepared for"):
        bj.prepare({"a": {"kernel": prepared}, "b": packed})
