"""``bj.matmul`` on the CPU, against what a user would pick instead and against the machine.

    python tests/benchmarks/matmul.py                       # all of it, about half an hour
    python tests/benchmarks/matmul.py --shapes 2560x6912 --rows 1 128 --threads 1
    python tests/benchmarks/matmul.py --path avx2           # as a lesser processor would
    python tests/benchmarks/matmul.py --plot roofline.png

Each candidate is one jit that chains different kernels: at M <= 8 at least twenty, over
600 MB where they are ours, so that neither dispatch nor a warm cache is what is timed;
`hot` multiplies by one kernel again and again. Ours quantises x and applies the epilogue
inside, `groups` with a scale for each 128 inputs of a token, `planes` with kernels of two
ternary planes (twice the codes, and the operations); `sums` is the integer product
alone. With PyTorch installed, its bfloat16 and its
int8 (oneDNN's prepacked linear, and the same with quantising and epilogue around it) are
timed in the same rounds.

Beside the times: GB/s of codes as a share of what this machine reads, the better of one
stream and four, and GOP/s as a share of what the instruction set multiplies in registers,
both taken in the same process. Then int8 kernels as they are stored, against XLA's product
of the same codes; XLA takes the instruction set of the processor whatever ``--path`` and
``--xla_cpu_max_isa`` say. The last tables: latency of a single row through small networks, a
head of 128,256 int8 outputs, layers under ``lax.scan``, and what XLA plans of
temporary memory for a jitted product.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _bench import HEADER, in_turn, machine, parse, record, table, versus

import bitnet_jax as bj
from bitnet_jax import _native as native
from bitnet_jax._matmul import cpu, limits

try:
    import torch
except ImportError:  # a peer, and no requirement
    torch = None

SHAPES = ((2560, 2560), (2560, 6912), (6912, 2560), (4096, 4096), (4096, 11008))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
STREAMED = 8  # rows up to which memory may be what limits
BYTES, LAYERS = 600e6, 20
FEW = 4  # kernels where multiplying is what limits
GROUPED = (1, 128)  # rows at which activations in groups are timed too
GROUP = bj.ActivationConfig(group=128)
PLANES = bj.TernaryConfig(planes=2)
GOAL = 0.40  # of float32, at every M: without AMX, which this is written for as well


class Limits(NamedTuple):
    """Of this machine, in this process."""

    bytes_per_ms: float
    operations_per_ms: float


def measure_limits(rounds: int) -> Limits:
    buffer = prepare_copies(bj.pack(jnp.ones((16384, 16384))), 4)
    read = [jax.jit(functools.partial(limits.read, streams=s)) for s in limits.STREAMS]
    busy = jax.jit(functools.partial(limits.multiply, 2_000_000))
    timings = in_turn(
        {
            "one stream": lambda: [read[0](leaf.codes) for leaf in buffer],
            "four streams": lambda: [read[1](leaf.codes) for leaf in buffer],
            "registers": busy,
        },
        rounds,
    )
    size = sum(leaf.codes.nbytes for leaf in buffer)
    reads = {name: size / t.median for name, t in timings.items() if "stream" in name}
    operations = float(busy()) / timings["registers"].median
    print(
        f"\nLimits: reads {reads['one stream'] / 1e6:.1f} GB/s in one stream and "
        f"{reads['four streams'] / 1e6:.1f} in four; {native.load().chosen()} multiplies "
        f"{operations / 1e6:.0f} GOP/s in registers"
    )
    return Limits(max(reads.values()), operations)


def prepare_copies(packed: Any, count: int) -> list[Any]:
    """Prepared kernels with memory of their own: copies would not lie in large pages."""
    return [bj.prepare(packed, "cpu") for _ in range(count)]


def chained(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """One jit that multiplies the same x by every kernel, one after the other.

    The barrier keeps XLA from sharing one quantisation of x among them, and from
    holding all outputs at once.
    """

    def run(x, kernels):
        total = jnp.float32(0)
        for kernel in kernels:
            x, total = jax.lax.optimization_barrier((x, total))
            total += product(x, kernel)[..., 0].astype(jnp.float32).sum()
        return total

    return jax.jit(run)


def int8_product(x, kernel):
    codes, gamma = bj.quantize_activations(x)
    sums = jax.lax.dot_general(
        codes, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )
    return sums.astype(jnp.float32) * gamma


class Kernels:
    """One shape's kernels, in every form, made as they are asked for."""

    def __init__(self, k: int, n: int):
        rng = np.random.default_rng(0)
        make = functools.partial(rng.standard_normal, (k, n), np.float32)
        self.floats = [jnp.asarray(make()) for _ in range(LAYERS)]
        self.stored = [bj.pack(w) for w in self.floats]
        each = self.stored[0].codes.nbytes
        copies = max(1, -(-int(BYTES) // (each * LAYERS)))
        self.panels = [leaf for p in self.stored for leaf in prepare_copies(p, copies)]
        twice = (bj.pack(w, PLANES) for w in self.floats)
        self.planes = [leaf for p in twice for leaf in prepare_copies(p, -(-copies // 2))]
        self.xla = [bj.prepare(p, "xla") for p in self.stored]
        self.bfloat16 = [w.astype(jnp.bfloat16) for w in self.floats]
        self.int8 = [p.int8_codes() for p in self.stored]


def jax_candidates(x: jax.Array, kernels: Kernels, count: int, hot: bool) -> dict[str, Any]:
    """What to run, and by how many kernels."""
    low = x.astype(jnp.bfloat16)
    codes, _ = bj.quantize_activations(x)
    rows = x.shape[0]
    ours = kernels.panels if rows <= STREAMED and not hot else kernels.panels[:count]
    planes = kernels.planes if rows <= STREAMED else kernels.planes[:count]
    grouped = functools.partial(bj.matmul, activations=GROUP, implementation="cpu")
    pairs = {
        "float32": (lambda x, w: x @ w, x, kernels.floats[:count]),
        "cpu": (lambda x, w: bj.matmul(x, w, implementation="cpu"), x, ours),
        **({"cpu, groups": (grouped, x, ours)} if rows in GROUPED else {}),
        **({"cpu, planes": (bj.matmul, x, planes)} if rows in GROUPED else {}),
        "cpu, bfloat16": (lambda x, w: bj.matmul(x, w, dtype=jnp.bfloat16), low, ours),
        "cpu, sums": (lambda x, w: cpu.sums(x, w)[0], codes, ours),
        "xla": (lambda x, w: bj.matmul(x, w, implementation="xla"), x, kernels.xla[:count]),
        "bfloat16": (lambda x, w: x @ w, low, kernels.bfloat16[:count]),
        "int8, unpacked": (int8_product, x, kernels.int8[:count]),
    }
    if hot:
        pairs = {name: pairs[name] for name in ("float32", "cpu")}
        pairs = {name: (f, x, [ws[0]] * LAYERS) for name, (f, x, ws) in pairs.items()}
        pairs = {name: (lambda x, w, f=f: f(x, w), x, ws) for name, (f, x, ws) in pairs.items()}
    return {
        name: (functools.partial(chained(product), x, ws), len(ws))
        for name, (product, x, ws) in pairs.items()
    }


def torch_candidates(x: jax.Array, kernels: Kernels, count: int) -> dict[str, Any]:
    """PyTorch's linear layers on the same numbers."""
    if torch is None:
        return {}
    floats = torch.from_numpy(np.array(x))
    low = floats.bfloat16()
    codes = [torch.from_numpy(np.array(w)).t().contiguous() for w in kernels.int8[:count]]
    packed = [torch.ops.onednn.qlinear_prepack(w, None) for w in codes]
    wide = [w.bfloat16() for w in codes]
    outputs = codes[0].shape[0]
    ones, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    shifted = (torch.from_numpy(np.array(bj.quantize_activations(x)[0])).int() + 128).byte()
    linear = torch.ops.onednn.qlinear_pointwise

    def product(x, w):
        return linear(x, 1.0, 128, w, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")

    def whole(x, w):
        gamma = x.abs().amax(1, keepdim=True).clamp_min(1e-5)
        codes = (torch.round(x * (127 / gamma)) + 128).byte()
        return product(codes, w) * (gamma * (1 / 127))

    runs = {
        "torch bfloat16": lambda: [torch.nn.functional.linear(low, w) for w in wide],
        "torch int8, bare": lambda: [product(shifted, w) for w in packed],
        "torch int8": lambda: [whole(floats, w) for w in packed],
    }
    return {name: (run, count) for name, run in runs.items()}


class Point(NamedTuple):
    """One product of ours, for the picture."""

    label: str
    rows: int
    bytes_read: float
    operations: float
    ms: float


# Median milliseconds of every product of a shape, by (name, rows): one entry a shape.
Medians = dict[tuple[str, int], list[float]]


def print_spans(medians: Medians, rows: list[int]) -> None:
    """Ours over each of the others, lowest to highest of the shapes."""
    over = {
        "float32": "float32, XLA",
        "torch bfloat16": "bfloat16, PyTorch",
        "torch int8": "int8, PyTorch (oneDNN), quantising too",
        "torch int8, bare": "int8, PyTorch, the bare product",
    }

    def span(name: str, m: int) -> str:
        ratios = np.array(medians["cpu", m]) / np.array(medians[name, m])
        return f"{ratios.min():.2f}-{ratios.max():.2f}"

    lines = [
        [shown, *(span(name, m) for m in rows)]
        for name, shown in over.items()
        if (name, rows[0]) in medians
    ]
    title = "Time of matmul over that of others, lowest to highest of the shapes"
    table(title, ("over", *(f"M = {m}" for m in rows)), lines)


def measure_shape(
    k: int, n: int, args: Any, most: Limits, points: list[Point], medians: Medians
) -> None:
    kernels = Kernels(k, n)
    codes_bytes = kernels.panels[0].codes.nbytes
    header = ("product", *HEADER, "GB/s", "of reading", "GOP/s", "of registers")
    for m in args.rows:
        x = jnp.asarray(np.random.default_rng(m).standard_normal((m, k), np.float32))
        for hot in (False, True) if m == 1 else (False,):
            count = LAYERS if m <= STREAMED else FEW
            runs = jax_candidates(x, kernels, count, hot)
            runs |= {} if hot else torch_candidates(x, kernels, count)
            each = {name: 1 / layers for name, (_, layers) in runs.items()}
            plain = {name: run for name, (run, _) in runs.items()}
            timings = in_turn(plain, args.rounds, each=each)
            lines = []
            for name, t in timings.items():
                goal = GOAL if name == "cpu" else None
                line = [name, *versus(t, goal)]
                if name.startswith("cpu"):
                    times = PLANES.planes if name == "cpu, planes" else 1
                    rate, done = (times * a / t.median for a in (codes_bytes, 2 * m * k * n))
                    line += [f"{rate / 1e6:.1f}", f"{rate / most.bytes_per_ms:.0%}"]
                    line += [f"{done / 1e6:.0f}", f"{done / most.operations_per_ms:.0%}"]
                lines.append(line + [""] * (len(header) - len(line)))
                if not hot:
                    medians.setdefault((name, m), []).append(t.median)
                if name == "cpu" and not hot:
                    points.append(Point(f"{k}x{n}", m, codes_bytes, 2 * m * k * n, t.median))
            state = "one kernel, hot" if hot else f"{runs['cpu'][1]} kernels of ours"
            table(f"{k}x{n}, M = {m}, {state}", header, lines)


def small_networks(width: int, depth: int) -> dict[str, tuple[Any, Any]]:
    """Dense and packed, with the kernels as arguments and as a server may have them."""
    floats = [jax.random.normal(jax.random.key(i), (width, width)) for i in range(depth)]
    leaves = [bj.prepare(bj.pack(w)) for w in floats]
    x = jax.random.normal(jax.random.key(99), (1, width))

    def network(product):
        def run(x, kernels):
            for kernel in kernels:
                x = jax.nn.relu(product(x, kernel))
            return x

        return jax.jit(run)

    dense, packed = network(jnp.matmul), network(bj.matmul)
    dense_in = jax.jit(lambda x: dense(x, floats))
    packed_in = jax.jit(lambda x: packed(x, leaves))
    return {
        "arguments": (lambda: dense(x, floats), lambda: packed(x, leaves)),
        "constants": (lambda: dense_in(x), lambda: packed_in(x)),
    }


def measure_small(rounds: int) -> None:
    """A row through networks that fit in a cache: what a layer costs when it is all overhead."""
    lines = []
    for width in (64, 128, 256, 512, 1024):
        for depth in (1, 20):
            for name, (dense, packed) in small_networks(width, depth).items():
                timings = in_turn({"dense": dense, "packed": packed}, 20 * rounds)
                first = [f"{width}, {depth} layers, {name}", f"{timings['dense'].median:.3f}"]
                lines.append(first + versus(timings["packed"], 1.10))
    header = ("width", "dense ms", *HEADER)
    table("A single row through small networks, packed against dense", header, lines)


def measure_int8(k: int, n: int, args: Any) -> None:
    """Int8 kernels, stored as kernels and as tables, and prepared, against XLA's product."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((k, n), np.float32))
    kernel = bj.pack(w, bj.Int8Config())
    table_of = bj.pack(w.T, bj.Int8Config(), contracting_axes=-1)

    def copies(packed):
        return [jax.tree.map(jnp.copy, packed) for _ in range(FEW)]

    native_product = functools.partial(bj.matmul, implementation="cpu")
    plain = functools.partial(bj.matmul, implementation="reference")
    runs = {
        "xla": (chained(plain), copies(kernel)),
        "stored": (chained(native_product), copies(kernel)),
        "table": (chained(native_product), copies(table_of)),
        "prepared": (chained(native_product), prepare_copies(kernel, FEW)),
    }
    lines = []
    for m in args.rows:
        x = jnp.asarray(np.random.default_rng(m).standard_normal((m, k), np.float32))
        candidates = {name: functools.partial(run, x, ws) for name, (run, ws) in runs.items()}
        timings = in_turn(candidates, args.rounds, each=dict.fromkeys(runs, 1 / FEW))
        for name, t in timings.items():
            goal = 1.0 if name in ("stored", "table") else None
            lines.append([f"M = {m}, {name}", *versus(t, goal)])
    table(f"Int8 kernels {k}x{n}, {FEW} of them", ("product", *HEADER), lines)


def measure_head(rounds: int, most: Limits) -> None:
    """The head of a 2B model at eight bits."""
    w = jax.random.normal(jax.random.key(0), (2560, 128_256), jnp.float32)
    stored = bj.pack(w, bj.Int8Config())
    leaf = bj.prepare(stored, "cpu")
    low = w.astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (1, 2560))
    run = jax.jit(bj.matmul)
    timings = in_turn(
        {
            "float32": lambda: jnp.matmul(x, w),
            "bfloat16": lambda: jnp.matmul(x.astype(jnp.bfloat16), low),
            "int8, stored": lambda: run(x, stored),
            "int8, prepared": lambda: run(x, leaf),
        },
        rounds,
    )
    share = leaf.codes.nbytes / timings["int8, prepared"].median / most.bytes_per_ms
    lines = [[name, *versus(t, None)] for name, t in timings.items()]
    table(f"Head 2560x128256, M = 1; prepared reads at {share:.0%}", ("product", *HEADER), lines)


def measure_scan(rounds: int) -> None:
    """Stacked layers: XLA cuts each out of the stack, but where they are read by an index."""
    for k, n, count in ((2560, 2560, 300), (2560, 6912, 12)):
        one = bj.pack(jax.random.normal(jax.random.key(0), (k, n)))
        leaves = prepare_copies(one, count)
        stack = jax.tree.map(lambda *a: jnp.stack(a), *leaves)
        x = jax.random.normal(jax.random.key(1), (1, k))
        programs = {
            "one by one": (one_by_one, leaves),
            "lax.scan, stack[i]": (by_index, stack),
            "lax.scan over the stack": (by_slices, stack),
        }
        runs = {
            name: functools.partial(jax.jit(run), x, kernels)
            for name, (run, kernels) in programs.items()
        }
        timings = in_turn(runs, 300 // count * rounds)
        lines = [[name, *versus(t, None)] for name, t in timings.items()]
        title = f"{count} layers of {k}x{n}, {stack.nbytes / 1e6:.0f} MB, M = 1"
        table(title, ("layers", *HEADER), lines)


def one_layer(x: jax.Array, kernel: Any) -> jax.Array:
    """A product whose result is the next layer's input."""
    return bj.matmul(x, kernel)[:, : x.shape[1]]


def one_by_one(x: jax.Array, kernels: list[Any]) -> jax.Array:
    """Each kernel by itself."""
    return functools.reduce(one_layer, kernels, x)


def by_index(x: jax.Array, stack: Any) -> jax.Array:
    """Each read where it lies."""
    places = jnp.arange(stack.shape[0])
    return jax.lax.scan(lambda x, i: (one_layer(x, stack[i]), None), x, places)[0]


def by_slices(x: jax.Array, stack: Any) -> jax.Array:
    """Each cut out of the stack by the scan."""
    return jax.lax.scan(lambda x, kernel: (one_layer(x, kernel), None), x, stack)[0]


def print_memory() -> None:
    lines = []
    for k, n in SHAPES:
        stored = bj.pack(jnp.ones((k, n)))
        for name in ("cpu", "xla"):
            leaf = bj.prepare(stored, name)
            for m in (1, 512):
                x = jnp.ones((m, k))
                plan = jax.jit(bj.matmul).lower(x, leaf).compile().memory_analysis()
                peak = plan.temp_size_in_bytes
                size = f"{peak / 2**20:.2f} MiB"
                lines.append([f"{k}x{n}", name, str(m), size, f"{peak / (4 * k * n):.3f}"])
    header = ("kernel", "implementation", "M", "temporary", "of the float32 kernel")
    table("Temporary memory of one jitted product; goal <= 0.25", header, lines)


def draw_roofline(points: list[Point], most: Limits, path: str) -> None:
    """Operations a second over operations a byte of codes, under the two limits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    intensity = np.logspace(0.5, 4, 200)
    roof = np.minimum(intensity * most.bytes_per_ms, most.operations_per_ms) / 1e6
    axes.loglog(intensity, roof, color="black", label="limits: reading; multiplying in registers")
    for label in dict.fromkeys(p.label for p in points):
        mine = [p for p in points if p.label == label]
        x = [p.operations / p.bytes_read for p in mine]
        axes.loglog(x, [p.operations / p.ms / 1e6 for p in mine], "o", ms=5, label=label)
    rows = {p.rows: p.operations / p.bytes_read for p in points}
    rates = [25 * 2**i for i in range(12) if roof[0] < 25 * 2**i < 1.5 * roof[-1]]
    axes.set_xticks(list(rows.values()), [f"{m}" for m in rows])
    axes.set_yticks(rates, [f"{rate}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("rows M (8 M operations for a byte of codes)")
    axes.set_ylabel("GOP/s, quantiser and epilogue included")
    axes.set_title(
        f"bj.matmul on {native.load().chosen()}, {os.cpu_count()} cores, jax {jax.__version__}"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"\nroofline: {path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [f"{k}x{n}" for k, n in SHAPES]
    parser.add_argument("--shapes", nargs="*", default=names, choices=names)
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="processors to run on; default: all")
    parser.add_argument("--path", help="an instruction set instead of the fastest")
    parser.add_argument("--plot", help="where to draw the roofline")
    parser.add_argument("--brief", action="store_true", help="the products alone")
    return parse(parser)


def main() -> None:
    args = arguments()
    if args.threads is not None:  # before XLA counts them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if torch is not None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    machine()
    native.load().choose(args.path)
    most, points, medians = measure_limits(args.rounds), [], {}
    for k, n in SHAPES:
        if f"{k}x{n}" in args.shapes:
            measure_shape(k, n, args, most, points, medians)
            measure_int8(k, n, args)
    print_spans(medians, args.rows)
    if args.plot:
        draw_roofline(points, most, args.plot)
    if not args.brief:
        measure_small(args.rounds)
        measure_head(args.rounds, most)
        measure_scan(args.rounds)
        print_memory()
    record(args)


if __name__ == "__main__":
    main()
