"""Packing time, whole-model bytes and import time.

python tests/benchmarks/packing.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from _bench import in_turn, machine, parse, record, table
from flax import linen as nn

import bitnet_jax as bj


class MLP(nn.Module):
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.relu(bj.linen.BitDense(size)(x))
        return bj.linen.BitDense(self.sizes[-1])(x)


def packing_seconds() -> None:
    w = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((4096, 11008), np.float32))}
    runs = {
        "reading the kernel": lambda: w["kernel"].sum(),
        "pack_params, B158": lambda: bj.pack_params(w)[0],
        "pack_params, PHASE4": lambda: bj.pack_params(w, bj.PHASE4)[0],
        "pack, B158": lambda: bj.pack(w["kernel"]),
    }
    timings = in_turn(runs, rounds=7)
    goal = "<= 250 ms"
    rows = [
        [name, f"{t.median:.0f} ms", goal if name.startswith("pack_params") else ""]
        for name, t in timings.items()
    ]
    table("Packing a 4096x11008 float32 kernel, after compilation", ("call", "time", "goal"), rows)


def model_bytes() -> None:
    nets = {
        "sandbox net 3: 128, 128, 128, 10": (128, (128, 128, 128, 10), 14.3),
        "25M MLP: 2048, 4096, 2048, 2048, 2048": (2048, (4096, 2048, 2048, 2048), 15.9),
    }
    rows = []
    for name, (features, sizes, goal) in nets.items():
        params = MLP(sizes).init(jax.random.key(0), jnp.ones((1, features)))["params"]
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        _, report = bj.pack_params(params)
        before, after = report.model_bytes_before, report.model_bytes_after
        ratio = f"{report.model_ratio:.3f}x"
        rows.append([name, f"{count:,}", f"{before:,}", f"{after:,}", ratio, f">= {goal}x"])
    header = ("network, B158", "parameters", "float32 bytes", "packed bytes", "ratio", "goal")
    table("Whole-model bytes, scales and biases included", header, rows)


def import_seconds() -> None:
    def run(code: str):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    theirs = "import jax, flax, optax"
    runs = {theirs: run(theirs), "and bitnet_jax": run(theirs + ", bitnet_jax")}
    timings = in_turn(runs, rounds=7, warmup=1)
    base = timings[theirs].median
    rows = [
        [name, f"{t.median / 1e3:.2f} s", f"{(t.median - base) / 1e3:+.2f} s"]
        for name, t in timings.items()
    ]
    title = "Import, a fresh interpreter each time; goal <= +0.30 s"
    table(title, ("import", "time", "more"), rows)


if __name__ == "__main__":
    parsed = parse(argparse.ArgumentParser(description=__doc__.split("\n")[0]))
    machine()
    packing_seconds()
    model_bytes()
    import_seconds()
    record(parsed)
