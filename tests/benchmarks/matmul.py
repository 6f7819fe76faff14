"""``bj.matmul`` on ``cpu`` and ``xla`` against the float32 product of the same shape.

    python tests/benchmarks/matmul.py

Each candidate is one jit that chains several different kernels, so that neither
dispatch nor a warm cache is what is timed; x is quantised inside. Beside it: the
resident int8 product (no packing), the stored layout, and the physical limit of
the float32 product, reading its kernels, taken in the same run. Last: the peak
temporary memory that XLA plans for one jitted product.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from _bench import HEADER, in_turn, machine, table, versus

import bitnet_jax as bj

SHAPES = ((4096, 11008), (2560, 6912))
ROWS = (1, 8, 128, 512)
GOALS = {
    "cpu, prepared": dict.fromkeys(ROWS, 0.40),
    "xla, prepared": dict(zip(ROWS, (0.60, 0.25, 0.25, 0.25), strict=True)),
}


def chained(product):
    """One jit that multiplies the same x by every kernel in turn."""

    def run(x, kernels):
        return sum(product(x, kernel)[:, 0].sum() for kernel in kernels)

    return jax.jit(run)


def int8_product(x, kernel):
    codes, gamma = bj.quantize_activations(x)
    sums = jax.lax.dot_general(
        codes, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )
    return sums.astype(jnp.float32) * gamma


def candidates(x, floats, stored):
    prepared = [bj.prepare(leaf, implementation="xla") for leaf in stored]
    panels = [bj.prepare(leaf, implementation="cpu") for leaf in stored]
    int8 = [bj.quantize(w).codes for w in floats]
    pairs = {
        "float32 dot": (lambda x, w: x @ w, floats),
        "cpu, prepared": (lambda x, w: bj.matmul(x, w, implementation="cpu"), panels),
        "xla, prepared": (lambda x, w: bj.matmul(x, w, implementation="xla"), prepared),
        "xla, stored": (lambda x, w: bj.matmul(x, w, implementation="xla"), stored),
        "int8 dot, unpacked": (int8_product, int8),
        "reading float32": (lambda x, w: w.sum()[None, None] + x[:1, :1], floats),
    }
    return {
        name: functools.partial(chained(product), x, kernels)
        for name, (product, kernels) in pairs.items()
    }


def temporary_bytes(x, leaf) -> int:
    product = jax.jit(lambda x, leaf: bj.matmul(x, leaf, implementation="xla"))
    return product.lower(x, leaf).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=20, help="kernels in a chain")
    args = parser.parse_args()
    machine()
    memory = []
    for k, n in SHAPES:
        rng = np.random.default_rng(0)
        count = args.layers
        floats = [jnp.asarray(rng.standard_normal((k, n), np.float32)) for _ in range(count)]
        stored = [bj.pack(w) for w in floats]
        rows = []
        for m in ROWS:
            x = jnp.asarray(rng.standard_normal((m, k), np.float32))
            used = count if m <= 8 else min(count, 4)
            timings = in_turn(candidates(x, floats[:used], stored[:used]), args.rounds)
            for name, t in timings.items():
                wanted = GOALS.get(name, {}).get(m)
                rows.append([f"M = {m}: {name}", *versus(t, wanted)])
            peak = temporary_bytes(x, bj.prepare(stored[0], implementation="xla"))
            memory.append(
                [f"{k}x{n}", str(m), f"{peak / 2**20:.1f} MiB", f"{peak / (4 * k * n):.3f}"]
            )
        title = f"matmul {k}x{n}, {count} kernels chained (at most 4 where M > 8)"
        table(title, ("product", *HEADER), rows)
    table(
        "Peak temporary memory of one jitted product; goal <= 0.25 of the float32 kernel",
        ("kernel", "M", "bytes", "ratio"),
        memory,
    )


if __name__ == "__main__":
    main()
