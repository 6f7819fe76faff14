"""Random networks in every context that could change a bit; prints how many outputs differ.

    python tests/random_nets.py --nets 0 12

A net is drawn from a number: a dtype, then layers (dense, heads, experts, convolutions, an
int8 embedding), each with its quantiser, activations, norm and bias, a ReLU or a residual
behind it. What one eager call of the float params returns is compared, bit for bit, with every
context and every form of the kernels. The last lines are digests of the outputs of each dtype:
they are the same on every processor. ``XLA_FLAGS=--xla_cpu_max_isa=`` makes this one of an older
kind (jax 0.12 compiles no float16 for one without F16C), and ``BITNET_JAX_NATIVE=0`` one without
the native product.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from draws import params_of
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bitnet_jax as bj
from bitnet_jax import _native as native
from bitnet_jax import linen
from bitnet_jax._matmul import IMPLEMENTATIONS
from bitnet_jax._packed.kernel import is_packed

BATCH, TOKENS, FEATURES = 8, 3, 16
DTYPES = ("float32", "bfloat16", "float16")
CONFIGS = (
    bj.B158,
    bj.PHASE4,
    bj.TWN,
    bj.TernaryConfig(scale="survivors", threshold=0.7),
    bj.TernaryConfig(scale="absmedian"),
    bj.TernaryConfig(scale="absmedian", granularity="channel"),
    bj.TernaryConfig(granularity=8),
    bj.TernaryConfig(scale="survivors", granularity=4),
    bj.Int8Config(),
)
ACTIVATIONS = (
    bj.ActivationConfig(),
    bj.ActivationConfig(group=4),
    bj.ActivationConfig(bits=4),
)
KINDS = ("dense", "dense", "heads", "experts", "conv")
JOINTS = ("residual", "relu", "relu and residual", "none")


class Layer(NamedTuple):
    """One layer of a net."""

    kind: str
    joint: str
    config: Any
    activations: bj.ActivationConfig
    norm: bool
    bias: bool


class Net(nn.Module):
    """Tokens (or ids, if it embeds) to features."""

    layers: tuple[Layer, ...]
    embeds: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, ids):
        if self.embeds:
            x = x + nn.Embed(32, FEATURES, param_dtype=self.dtype)(ids)
        for i, layer in enumerate(self.layers):
            y = self._layer(f"layer_{i}", layer)(x)
            y = nn.relu(y) if "relu" in layer.joint else y
            x = x + y if "residual" in layer.joint else y
        return x

    def _layer(self, name, layer):
        how = {
            "weights": layer.config,
            "activations": layer.activations,
            "norm": layer.norm,
            "param_dtype": self.dtype,
            "use_bias": layer.bias,
        }
        if layer.kind == "conv":
            how["activations"] = dataclasses.replace(layer.activations, group=None)
            return linen.BitConv(FEATURES, (3,), **how, name=name)
        if layer.kind == "experts":
            shape = (TOKENS, FEATURES, FEATURES)
            return linen.BitEinsum(shape, "btd,tdf->btf", **how, name=name)
        if layer.kind == "dense":
            return linen.BitDense(FEATURES, **how, name=name)
        into = linen.BitDenseGeneral((2, 8), **how, name=f"{name}_in")
        out = linen.BitDenseGeneral(FEATURES, axis=(-2, -1), **how, name=f"{name}_out")
        return lambda x: out(into(x))


def _for_xla(leaf):
    """A two-bit kernel laid out for XLA; others as they are."""
    if not isinstance(leaf, bj.PackedTernary) or IMPLEMENTATIONS["xla"].unsupported_reason(leaf):
        return leaf
    return bj.prepare(leaf, "xla")


class Case(NamedTuple):
    """A net with its parameters and inputs."""

    apply: Callable[..., jax.Array]
    trees: dict[str, Any]
    operands: tuple[jax.Array, jax.Array]


def dtype_of(number: int) -> str:
    """The dtype of a net's parameters and inputs."""
    return DTYPES[number % len(DTYPES)]


def drawn(number: int) -> Case:
    """The net of a number."""
    rng = np.random.default_rng(number)
    dtype = dtype_of(number)

    def one() -> Layer:
        config = CONFIGS[rng.integers(len(CONFIGS))]
        kind, joint = KINDS[rng.integers(len(KINDS))], JOINTS[rng.integers(len(JOINTS))]
        activations = ACTIVATIONS[rng.integers(len(ACTIVATIONS))]
        return Layer(kind, joint, config, activations, *(rng.random(2) < (0.4, 0.7)).tolist())

    layers = tuple(one() for _ in range(rng.integers(2, 5)))
    net = Net(layers, bool(rng.random() < 0.5), jnp.dtype(dtype))

    def select(path, _):
        return bj.Int8Config() if "embedding" in path else None

    model = bj.linen.ternarize(net, select=select) if net.embeds else net
    x = jnp.asarray(rng.standard_normal((BATCH, TOKENS, FEATURES)), dtype)
    ids = jnp.asarray(rng.integers(0, 32, (BATCH, TOKENS)), jnp.int32)
    params = params_of(model, x, ids, seed=number)
    packed = bj.linen.pack(model, params, x, ids)[0]
    trees = {"float": params, "packed": packed, "prepared": bj.prepare(packed)}
    trees["prepared for xla"] = jax.tree.map(_for_xla, packed, is_leaf=is_packed)

    def apply(tree, x, ids):
        return model.apply({"params": tree}, x, ids)

    return Case(apply, trees, (x, ids))


# Each is called with a case and one of its trees, and returns the net's outputs.


def _jit(case, tree):
    return jax.jit(case.apply)(tree, *case.operands)


def _eager(case, tree):
    return case.apply(tree, *case.operands)


def _x_constant(case, tree):
    return jax.jit(lambda tree: case.apply(tree, *case.operands))(tree)


def _params_constant(case, tree):
    return jax.jit(lambda *operands: case.apply(tree, *operands))(*case.operands)


def _all_constant(case, tree):
    return jax.jit(lambda: case.apply(tree, *case.operands))()


def _one_by_one(case):
    """The net of one example, with a batch axis of 1 inside."""

    def one(tree, x, ids):
        return case.apply(tree, x[None], ids[None])[0]

    return one


def _vmap(case, tree):
    return jax.jit(jax.vmap(_one_by_one(case), (None, 0, 0)))(tree, *case.operands)


def _scan(case, tree):
    one = _one_by_one(case)

    def run(tree, operands):
        return lax.scan(lambda carry, each: (carry, one(tree, *each)), 0, operands)[1]

    return jax.jit(run)(tree, case.operands)


def _gradient(case, tree, around=lambda f: f):
    """The forward pass of a gradient in x."""

    def loss(x, tree, ids):
        y = around(case.apply)(tree, x, ids)
        return jnp.square(y.astype(jnp.float32)).sum(), y

    x, ids = case.operands
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(x, tree, ids)[0][1]


def _remat(case, tree):
    return _gradient(case, tree, jax.checkpoint)


def _training(case, tree):
    """The forward pass of a gradient in the params, which packed ones have not."""

    def loss(tree):
        y = case.apply(tree, *case.operands)
        return jnp.square(y.astype(jnp.float32)).sum(), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(tree)[0][1]


def _cond(case, tree):
    def run(tree, x, ids, yes):
        return lax.cond(yes, case.apply, lambda tree, x, ids: x - x, tree, x, ids)

    return jax.jit(run)(tree, *case.operands, True)


def _while(case, tree):
    def run(tree, x, ids, times):
        def turn(state):
            return state[0] + 1, case.apply(tree, x, ids)

        return lax.while_loop(lambda state: state[0] < times, turn, (0, jnp.zeros_like(x)))[1]

    return jax.jit(run)(tree, *case.operands, 2)


def _donated(case, tree):
    x, ids = case.operands
    return jax.jit(case.apply, donate_argnums=1)(tree, x + jnp.zeros_like(x), ids)


def _eight_devices(case, tree):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    operands = jax.device_put(case.operands, rows)
    return jax.jit(case.apply)(jax.device_put(tree, whole), *operands)


def _followed(case, tree):
    """Other functions of the outputs in the same program."""

    def run(tree, *operands):
        y = case.apply(tree, *operands)
        return y, nn.gelu(y), nn.softmax(y), y.sum()

    return jax.jit(run)(tree, *case.operands)[0]


CONTEXTS: dict[str, Callable[[Case, Any], jax.Array]] = {
    "jit": _jit,
    "eager": _eager,
    "x constant": _x_constant,
    "params constant": _params_constant,
    "all constant": _all_constant,
    "vmap": _vmap,
    "scan": _scan,
    "gradient": _gradient,
    "remat": _remat,
    "training": _training,
    "cond": _cond,
    "while": _while,
    "donated": _donated,
    "eight devices": _eight_devices,
    "followed": _followed,
}


def outputs(case: Case, contexts: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """What a net returns in each context, from each tree, by each native path."""
    for name in contexts:
        for form, tree in case.trees.items():
            if name == "training" and form != "float":
                continue
            yield f"{name}, {form}", np.asarray(CONTEXTS[name](case, tree))


def paths(case: Case) -> Iterator[tuple[str, np.ndarray]]:
    """What it returns from prepared kernels on each path of the native product."""
    run = jax.jit(case.apply)
    try:
        for path in native.load().paths():
            native.load().choose(path)
            yield f"path {path}", np.asarray(run(case.trees["prepared"], *case.operands))
    finally:
        if native.load().paths():
            native.load().choose(None)


def check(number: int, contexts: Iterable[str]) -> tuple[int, int, bytes, list[str]]:
    """How many outputs differ, of how many; the bytes of the right ones; what differed."""
    case = drawn(number)
    want = np.asarray(case.apply(case.trees["float"], *case.operands))
    differ, total, where = 0, 0, []
    for name, y in (*outputs(case, contexts), *paths(case)):
        assert (y.dtype, y.shape) == (want.dtype, want.shape), name
        bits = f"u{y.itemsize}"
        wrong = int((y.view(bits) != want.view(bits)).sum())
        differ, total = differ + wrong, total + y.size
        where += [f"net {number}, {name}: {wrong} of {y.size}"] if wrong else []
    return differ, total, want.tobytes(), where


def main() -> int:
    """Checks a range of nets and prints what differs; the exit code is 1 if anything does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", type=int, nargs=2, default=(0, 6), metavar=("FROM", "TO"))
    parser.add_argument("--contexts", nargs="*", default=list(CONTEXTS), choices=list(CONTEXTS))
    parser.add_argument("--dtypes", nargs="*", default=DTYPES, choices=DTYPES)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    digests, differ, total = {name: hashlib.sha256() for name in arguments.dtypes}, 0, 0
    for number in range(*arguments.nets):
        if dtype_of(number) not in digests:
            continue
        wrong, outputs, right, where = check(number, arguments.contexts)
        digests[dtype_of(number)].update(right)
        differ, total = differ + wrong, total + outputs
        for line in where:
            print(line, flush=True)
        jax.clear_caches()
    print(f"{differ} of {total} outputs differ")
    for name, digest in digests.items():
        print(name, digest.hexdigest())
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
