"""The page for big runs: its code runs, and its numbers are those of today."""

import contextlib
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from cases import cases
from draws import normal, params_of
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bitnet_jax as bj

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


PAGE = pathlib.Path(__file__).parents[2] / "examples" / "guides" / "big_runs.md"


@pytest.fixture(scope="module")
def page():
    """What the page's code leaves behind."""
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"):
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
            exec(compile(block, "big_runs.md", "exec"), names)
    return names


def table(page):
    """The page's table, of the page's own shapes."""
    found = [
        (page["memory"](page["models"][name], devices), page["models"][name], devices)
        for name in ("7B", "70B")
        for devices in (8, 64)
    ]
    block = [page["memory"]({"block": m["block_0"]} | HEAD(m), n).saved for _, m, n in found]
    rows = {
        "parameters": [m.parameters for m, *_ in found],
        "gradients": [m.gradients for m, *_ in found],
        "AdamW's state": [m.optimizer for m, *_ in found],
        "saved by ternary contractions": [m.saved for m, *_ in found],
        "the same under `nn.remat`: one block and the head": block,
        "largest kernel: its codes, gathered": [m.largest_codes for m, *_ in found],
        "largest kernel: its gradient, not yet summed": [m.largest_gradient for m, *_ in found],
        "gathered in a step: codes": [m.gathered for m, *_ in found],
        "as bfloat16 kernels": [2 * m.gathered_weights for m, *_ in found],
        "as float32 kernels": [4 * m.gathered_weights for m, *_ in found],
        "served, whole model: float16": [m.served_float16 for m, *_ in found],
        "served: eight bits": [m.served_int8 for m, *_ in found],
        "served: packed": [m.served_packed for m, *_ in found],
    }
    lines = ["| on each device | 7B on 8 | 7B on 64 | 70B on 8 | 70B on 64 |", "|---|" + "---|" * 4]
    for name, cells in rows.items():
        lines.append(f"| {name} | {' | '.join(map(bj._display.size_text, cells))} |")
    return "\n".join(lines)


def HEAD(model):
    return {name: model[name] for name in ("embedding", "head")}


WIDE = bj.TernaryConfig(granularity=32)  # a group on each device
ROWS = {
    # x, kernel, quantiser: what the scale sends, what a step sends besides
    "rows": (P("data"), P(), bj.B158, "", "f32 all-reduce"),
    "outputs": (P(), P(None, "data"), bj.PHASE4, "", "f32 all-reduce"),
    "contraction": (P(None, "data"), P("data"), bj.B158, "f32 rows", "s32 all-reduce"),
    "x whole": (P(), P("data"), bj.B158, "f32 rows", "f32 all-gather, s32 all-reduce"),
    "fsdp": (P("data"), P("data"), bj.PHASE4, "f32 rows", "f32 all-reduce, u8 all-gather"),
    "groups": (P(None, "data"), P("data"), WIDE, "", "s32 all-gather"),
    "fsdp, groups": (P("data"), P("data"), WIDE, "", "f32 all-reduce, u8 all-gather"),
}


@cases("row", list(ROWS), core=["contraction", "fsdp"])
def test_what_a_sharding_sends(row):
    x_spec, spec, config, scale_sends, step_sends = ROWS[row]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    places = NamedSharding(mesh, spec), NamedSharding(mesh, x_spec)
    w, x = jax.device_put((jnp.ones((256, 128)), jnp.ones((64, 256))), places)

    def step(w, x):
        y, back = jax.vjp(lambda w, x: bj.ternary_dot(x, w, config, kernel_spec=spec), w, x)
        return y, back(y)

    def sent(function, *operands, least, **how):
        program = jax.jit(function, **how).lower(*operands).compile()
        found = bj.sharding.collectives(program).rows
        return ", ".join(sorted({f"{c.dtype} {c.kind}" for c in found if c.nbytes >= least}))

    gather = bj.sharding.gather_codes("data") if "fsdp" in row else contextlib.nullcontext()
    with jax.set_mesh(mesh), gather:
        rows = sent(lambda w: bj.quantize(w, config).scale, w, least=0)
        assert rows == {"f32 rows": "f32 all-reduce, f32 collective-permute"}.get(scale_sends, "")
        # A quarter of the kernel's codes is more than any row of sums.
        assert sent(step, w, x, least=256 * 128 // 4, out_shardings=(None, places)) == step_sends


class DenseGeneral(nn.Module):
    """A layer that does with its ``quant`` what MaxText's does."""

    quant: object
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, inputs):
        axes = ("embed", "mlp")
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
        kernel = self.param("kernel", init, (inputs.shape[-1], 64))
        inputs, kernel = (jnp.asarray(a, self.dtype) for a in (inputs, kernel))
        dot_general = self.quant.dot_general_cls(mesh_axes=axes)()
        dims = ((inputs.ndim - 1,), (0,)), ((), ())
        return dot_general(inputs, kernel, dims, precision=None)


class Bare:
    """``TernaryDotGeneral``, which nobody tells how the kernel lies."""

    def dot_general_cls(self, mesh_axes):
        del mesh_axes
        return bj.linen.TernaryDotGeneral


@cases(
    ("kind", "told", "dtypes"),
    [
        ("auto", True, ["u8", "u8"]),
        ("explicit", True, ["u8", "u8"]),
        ("explicit", False, ["u8", "u8"]),
        ("auto", False, None),
    ],
    core=[("explicit", True, ["u8", "u8"]), ("auto", False, None)],
)
def test_what_a_plug_in_gathers(page, kind, told, dtypes):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(KINDS[kind],))
    layer = DenseGeneral(page["TernaryQuantization"]() if told else Bare())
    x = normal(16, 256)
    boxed = params_of(layer, x)
    want = bj.ternary_dot(x, nn.unbox(boxed)["kernel"])

    def run(params, x):
        y, back = jax.vjp(lambda *a: layer.apply({"params": a[0]}, a[1]), params, x)
        return y, back(y)

    with (
        nn.logical_axis_rules([("embed", "data"), ("mlp", None)]),
        jax.set_mesh(mesh),
        bj.sharding.gather_codes("data"),
    ):
        specs = bj.sharding.partition_specs(boxed, mesh=mesh)
        params = jax.device_put(boxed, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
        operands = params, jax.device_put(x, NamedSharding(mesh, P("data")))
        if dtypes is None:
            with pytest.raises(ValueError, match="does not know how this kernel is sharded"):
                jax.jit(run)(*operands)
            return
        program = jax.jit(run).lower(*operands).compile()
        y = program(*operands)[0]
    gathers = bj.sharding.collectives(program).of("all-gather").rows
    assert [c.dtype for c in gathers if c.nbytes >= 256 * 64 // 4] == dtypes
    assert (y == want).all()


def test_a_plug_in_under_nnx(page):
    """MaxText's NNX layers wrap the product; what is no linen module cannot be wrapped."""
    from flax import nnx

    x, w = jnp.ones((4, 64)), normal(64, 16)
    product = page["TernaryQuantization"](bj.PHASE4).dot_general_cls(mesh_axes=("embed", "mlp"))()
    wrapped = nnx.bridge.ToNNX(product, rngs=nnx.Rngs(0))
    operands = x, w, (((1,), (0,)), ((), ()))
    nnx.bridge.lazy_init(wrapped, *operands, precision=None)
    assert (wrapped(*operands, precision=None) == bj.ternary_dot(x, w, bj.PHASE4)).all()


def test_the_page_runs_and_its_step_gathers_two_bits(page):
    gathers = bj.sharding.collectives(page["step"]).of("all-gather").rows
    assert [(c.dtype, c.nbytes) for c in gathers if c.nbytes > 10_000] == [("u8", 512 * 1024 // 4)]


def test_the_page_has_the_numbers_of_today(page):
    assert table(page) in PAGE.read_text()
