"""A network on eight devices: what travels between them, and which bits are those of one.

    python examples/sharded.py                     about three minutes, on eight forced CPU devices
    python examples/sharded.py --axes explicit     with Explicit mesh axes instead of Auto
    python examples/sharded.py --quick             10 steps, sharded in one way, one process

Four tables. Serving: a packed layer, its kernel cut along either axis, and the collectives that
XLA compiled. Training: the bytes that are gathered for one step under FSDP, of a float network
and of a ternary one. Losses: the same run on one device and on eight, and the first step at which
they part. Processes: the same network in two processes of four devices each, through
``jax.distributed`` on localhost. The exit code is 1 if codes, scales or outputs differ in a bit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from results import Table, save

import bitnet_jax as bj

DEVICES = 8
FEATURES = (512, 1024, 1024, 64)  # in, hidden, hidden, classes
BATCH = 256

Spec = tuple[str | None, str | None]
# How the kernels lie: (contraction, outputs) of each of the three layers.
WAYS: dict[str, tuple[Spec, ...]] = {
    "data": ((None, None),) * 3,
    "FSDP": (("data", None),) * 3,
    "tensor": ((None, "model"), ("model", None), (None, "model")),
    "FSDP and tensor": (("data", "model"), ("model", "data"), ("data", "model")),
}


class Net(nn.Module):
    """Three layers with ReLU, kernels annotated with mesh axes."""

    specs: tuple[Spec, ...]
    ternary: bool = True

    @nn.compact
    def __call__(self, x):
        """Logits (batch, 64) of inputs (batch, 512)."""
        kind = bj.linen.BitDense if self.ternary else nn.Dense
        for i, (features, spec) in enumerate(zip(FEATURES[1:], self.specs, strict=True)):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), spec)
            x = kind(features, kernel_init=init, name=f"layer_{i}")(x)
            x = nn.relu(x) if i < 2 else x
        return x


def make_mesh(axes: str, model: int) -> Mesh:
    """Eight devices as (data, model)."""
    kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[axes]
    return jax.make_mesh((DEVICES // model, model), ("data", "model"), axis_types=(kind, kind))


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels that a linear teacher gave them, one-hot."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, FEATURES[0]), np.float32)
    teacher = rng.standard_normal((FEATURES[0], FEATURES[-1]), np.float32)
    return x, np.eye(FEATURES[-1], dtype=np.float32)[np.argmax(x @ teacher, axis=-1)]


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """On a mesh, with the codes of kernels gathered over ``data``; None: on one device."""
    stack = contextlib.ExitStack()
    if mesh is not None:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(bj.sharding.gather_codes("data"))
    return stack


def initial(net: Net) -> Any:
    """The parameters that every run starts from, in their boxes, on the host.

    To be called off the mesh: on Explicit axes linen's boxes refuse what is not sharded yet.
    """
    params = net.init(jax.random.key(0), jnp.ones((1, FEATURES[0])))["params"]
    return jax.tree.map(np.asarray, params)


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """Where each parameter goes, by its own annotation."""
    specs = bj.sharding.partition_specs(boxed, mesh=mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


# Serving.


class Served(NamedTuple):
    """What serving one packed layer took."""

    way: str
    collectives: str
    nbytes: int
    differ: int


def serve(axes: str) -> list[Served]:
    """A packed kernel of 1,024 x 1,024, cut in every way, against one device."""
    mesh = make_mesh(axes, model=4)
    x = jax.random.normal(jax.random.key(1), (BATCH, FEATURES[1]))
    packed = {"kernel": bj.pack(jax.random.normal(jax.random.key(2), FEATURES[1:3]))}
    want = jax.jit(bj.matmul)(x, packed["kernel"])
    rows = []
    for way, x_spec, spec in (
        ("rows", P("data"), P()),
        ("outputs", P(), P(None, "model")),
        ("rows and outputs", P("data"), P(None, "model")),
        ("contraction", P(), P("model", None)),
        ("contraction, x as well", P(None, "model"), P("model", None)),
        ("rows and contraction", P("data"), P("model", None)),
    ):
        specs = bj.sharding.partition_specs(packed, [("kernel", spec)], mesh=mesh)
        places = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        kernel = jax.device_put(packed, places)["kernel"]
        sharded = jax.device_put(x, NamedSharding(mesh, x_spec))
        program = jax.jit(bj.matmul).lower(sharded, kernel).compile()
        told = bj.sharding.collectives(program)
        what = [f"{c.kind} {c.dtype}{list(c.shape)}" for c in told.rows]
        differ = int((np.asarray(program(sharded, kernel)) != np.asarray(want)).sum())
        rows.append(Served(way, ", ".join(what) or "none", told.nbytes, differ))
    return rows


# Training.


def loss_of(net: Net, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy."""
    logits = net.apply({"params": params}, x)
    return optax.softmax_cross_entropy(logits, labels).mean()


class Gathered(NamedTuple):
    """What one training step gathered of kernels."""

    network: str
    dtype: str
    times: int
    nbytes: int


def gathered(axes: str) -> list[Gathered]:
    """The all-gathers of kernels in a step under FSDP: float, and ternary with its codes."""
    rows, x = [], data()[0]
    shapes = list(itertools.pairwise(FEATURES))
    kernels = {(dtype, shape) for dtype in ("f32", "s8") for shape in shapes}
    kernels |= {("u8", (k // 4, n)) for k, n in shapes}
    ways = [
        ("float32, nn.Dense", False, False, "auto"),
        ("ternary, left to XLA", True, False, "auto"),
    ]
    for name, ternary, codes, kind in [
        *ways,
        ("ternary, bj.sharding.gather_codes", True, True, axes),
    ]:
        mesh, net = make_mesh(kind, model=1), Net(WAYS["FSDP"], ternary)
        boxed = initial(net)
        places = shardings(mesh, boxed)
        how = {"out_shardings": (None, places)} if kind == "auto" else {}
        operands = (
            jax.device_put(boxed, places),
            *(jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, data()[1])),
        )
        step = jax.jit(jax.value_and_grad(functools.partial(loss_of, net)), **how)
        with on(mesh) if codes else jax.set_mesh(mesh):
            program = step.lower(*operands).compile()
        told = bj.sharding.collectives(program).of("all-gather").rows
        found = [c for c in told if (c.dtype, c.shape) in kernels]
        dtypes = " ".join(sorted({c.dtype for c in found}))
        rows.append(Gathered(name, dtypes, len(found), sum(c.nbytes for c in found)))
    return rows


class Run(NamedTuple):
    """A training run: its losses, and the codes that it ended with."""

    losses: list[float]
    codes: list[np.ndarray]


def train(way: str, steps: int, mesh: Mesh | None) -> Run:
    """AdamW on the whole batch; on one device where there is no mesh."""
    net, tx = Net(WAYS[way]), optax.adamw(1e-3)
    params, places = initial(net), None
    x, labels = data()
    if mesh is not None:
        places = shardings(mesh, params)
        params = jax.device_put(params, places)
        x, labels = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, labels))

    @jax.jit
    def step(params, state, x, labels):
        loss, grads = jax.value_and_grad(functools.partial(loss_of, net))(params, x, labels)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if places is not None and not explicit(mesh):  # where types say it, they say it
            params = jax.lax.with_sharding_constraint(params, places)
        return params, state, loss

    losses = []
    with on(mesh):
        state = tx.init(params)
        for _ in range(steps):
            params, state, loss = step(params, state, x, labels)
            losses.append(float(loss))
        return Run(losses, [whole(bj.quantize(kernel).codes) for kernel in kernels_of(params)])


def kernels_of(params: Any) -> list[jax.Array]:
    """The kernels of the three layers, out of their boxes."""
    return [params[f"layer_{i}"]["kernel"].value for i in range(3)]


def explicit(mesh: Mesh | None) -> bool:
    """Whether shapes have shardings on this mesh."""
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def whole(array: jax.Array) -> np.ndarray:
    """All of an array, wherever its parts are."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def losses(axes: str, steps: int, ways: Sequence[str]) -> list[tuple[str, ...]]:
    """Each way against one device: where the losses part, and how far they go."""
    one = train("data", steps, None)
    rows = [("one device", "", f"{one.losses[0]:.6f}", f"{one.losses[-1]:.6f}", "", "")]
    for way in ways:
        mesh = make_mesh(axes, model=4 if "tensor" in way else 1)
        run = train(way, steps, mesh)
        pairs = zip(run.losses, one.losses, strict=True)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        gap = max(abs(a - b) for a, b in zip(run.losses, one.losses, strict=True))
        flipped = sum(int((a != b).sum()) for a, b in zip(run.codes, one.codes, strict=True))
        total = sum(a.size for a in one.codes)
        ends = f"{run.losses[0]:.6f}", f"{run.losses[-1]:.6f}"
        rows.append(
            (
                way,
                "none" if first is None else str(first + 1),
                *ends,
                f"{gap:.1e}",
                f"{flipped:,} of {total:,}",
            )
        )
    return rows


# Bits.


def bits(way: str, mesh: Mesh | None) -> dict[str, str]:
    """SHA-256 of the codes, the scales and the outputs, trained forward and packed."""
    net = Net(WAYS[way])
    params = initial(net)
    packed, _ = bj.pack_params(params)
    x: Any = data()[0]
    if mesh is not None:
        params = jax.device_put(params, shardings(mesh, params))
        packed = jax.device_put(packed, shardings(mesh, packed))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))

    def digest(tree):
        sha = hashlib.sha256()
        for array in jax.tree.leaves(tree):
            sha.update(whole(array).tobytes())
        return sha.hexdigest()[:16]

    forward = jax.jit(lambda params, x: net.apply({"params": params}, x))
    packing = jax.jit(lambda params: [bj.pack(kernel) for kernel in kernels_of(params)])
    with on(mesh):
        return {
            "codes and scales": digest(packing(params)),
            "outputs in training": digest(forward(params, x)),
            "outputs from packed": digest(forward(packed, x)),
        }


def process(index: int, count: int, port: int, axes: str, ways: Sequence[str]) -> None:
    """One of several processes: prints its digests as JSON."""
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    found = {}
    for way in ways:
        mesh = make_mesh(axes, model=4 if "tensor" in way else 1)
        found[way] = bits(way, mesh) | {"losses": train(way, 3, mesh).losses}
    print(json.dumps(found))


def in_processes(axes: str, ways: Sequence[str], count: int = 2) -> list[dict[str, Any]]:
    """What :func:`process` prints in each of several processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--axes", axes, "--ways", *ways, "--process"]
    running = [
        subprocess.Popen(
            [*command, str(i), str(count), str(port)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": ""},
        )
        for i in range(count)
    ]
    outputs = [child.communicate(timeout=600)[0] for child in running]
    if any(child.returncode for child in running):
        raise RuntimeError(f"a process failed: {[child.returncode for child in running]}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def compare_bits(axes: str, ways: Sequence[str]) -> list[tuple[str, ...]]:
    """One device against eight, and one process against two: equal or not."""
    one, apart = bits("data", None), in_processes(axes, ways)
    rows = []
    for way in ways:
        mesh = make_mesh(axes, model=4 if "tensor" in way else 1)
        eight, run = bits(way, mesh), train(way, 3, mesh).losses
        for what, want in one.items():
            same = [eight[what] == want, all(found[way][what] == want for found in apart)]
            rows.append((way, what, *("same bits" if s else "DIFFER" for s in same)))
        same = all(found[way]["losses"] == run for found in apart)
        rows.append((way, "three losses", "", "same bits" if same else "differ"))
    return rows


def main() -> int:
    """Prints the tables; the exit code says whether all bits were the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axes", choices=["auto", "explicit"], default="auto")
    parser.add_argument(
        "--quick", action="store_true", help="10 steps, one way of sharding, one process"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", help="where to record the tables")
    parser.add_argument("--process", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        process(*arguments.process, arguments.axes, arguments.ways)
        return 0
    jax.config.update("jax_num_cpu_devices", DEVICES)
    axes = arguments.axes
    shape = " x ".join(map(str, FEATURES[1:3]))
    steps, ways = (10, ["FSDP and tensor"]) if arguments.quick else (200, arguments.ways)
    served, compared, tables = serve(axes), [], []

    def show(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        cells = [[f"{c:,}" if isinstance(c, int) else c for c in row] for row in rows]
        tables.append(Table(title, header, cells))
        print(f"\n{title}\n\n{tables[-1]}")

    show(
        f"Serving: a packed kernel of {shape}, {BATCH} rows, 8 devices, {axes} axes",
        ["sharded", "collectives", "bytes on one device", "outputs that differ"],
        served,
    )
    show(
        "Training: kernels gathered in one step, 8 devices, FSDP",
        ["network", "dtype", "times", "bytes"],
        gathered(axes),
    )
    header = ["sharded", "first step that differs", "first loss", "last loss", "largest gap"]
    show(
        f"Losses: {steps} steps of AdamW, against one device",
        [*header, "codes that differ at the end"],
        losses(axes, steps, ways),
    )
    print(
        "\nThe first forward pass has the bits of one device; its loss is a float mean over rows,\n"
        "and gradients are float sums over them, which devices and processes add in another order."
    )
    if not arguments.quick:
        compared = compare_bits(axes, ways)
        show(
            "Bits: against one device (losses: against one process)",
            ["sharded", "what", "8 devices", "2 processes of 4"],
            compared,
        )
    save(arguments.json, *tables)
    differ = any(row.differ for row in served) or any("DIFFER" in row for row in compared)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
