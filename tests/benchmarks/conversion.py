"""What the conversion of one large kernel takes: seconds and memory of ``bj.convert.calibrate``.

    python tests/benchmarks/conversion.py            a kernel of 4096x11008, 2**15 tokens
    python tests/benchmarks/conversion.py --quick    a small one, a smoke test

Each method has a process of its own, in which the kernel and the inputs lie before the clock
starts. Memory is the highest that the process needed beyond them (``getrusage``): the sums over
inputs, JAX's compiler and the packed kernel are in it. Groups are of 128. Seconds are until the
sums are known, and of the method after them; CPU seconds, user and system, are of both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from _bench import machine, parse, record, table

import bitnet_jax as bj

METHODS = {
    "weighted": (1, "weighted"),
    "gptq": (1, "gptq"),
    "two planes, planes": (2, "planes"),
    "two planes, gptq": (2, "gptq"),
}
GROUP = 128
BATCHES = 16
KERNEL, INPUTS = "kernel.npy", "inputs.npy"


class Cost(NamedTuple):
    """Of one conversion."""

    sums: float  # seconds until the statistics are known
    method: float  # seconds after that
    cpu: float  # seconds of all threads
    peak: int  # bytes beyond kernel and inputs
    error: float  # of the products, as the report has it


def write_operands(folder: pathlib.Path, length: int, outputs: int, tokens: int) -> None:
    """A kernel (length, outputs), and inputs (tokens, length) that go together."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((length, outputs), np.float32)
    np.save(folder / KERNEL, kernel / np.float32(length**0.5))
    few = rng.standard_normal((tokens, length // 8), np.float32)
    inputs = few @ rng.standard_normal((length // 8, length), np.float32)
    inputs /= np.float32((length // 8) ** 0.5)
    inputs += rng.standard_normal((tokens, length), np.float32)
    np.save(folder / INPUTS, inputs)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def cpu_seconds() -> float:
    """User and system, of all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cost(folder: pathlib.Path, name: str) -> Cost:
    """Converts the kernel, in a process that has done nothing else."""
    planes, method = METHODS[name]
    params = {"w": jnp.asarray(np.load(folder / KERNEL))}
    inputs = np.load(folder / INPUTS)
    config = bj.TernaryConfig(granularity=GROUP, planes=planes)
    ternary = bj.ternarize(lambda params, x: x @ params["w"], weights=config)
    before, used, begin = peak_bytes(), cpu_seconds(), time.perf_counter()
    known = begin

    def progress(part: float) -> None:
        nonlocal known
        if part <= 0.5:
            known = time.perf_counter()

    batches = list(parts(inputs))
    _, report = bj.convert.calibrate(ternary, params, batches, method=method, progress=progress)
    end = time.perf_counter()
    return Cost(
        known - begin,
        end - known,
        cpu_seconds() - used,
        peak_bytes() - before,
        report.rows[0].error,
    )


def parts(inputs: np.ndarray) -> Iterator[np.ndarray]:
    """Batches, none of them a copy."""
    size = len(inputs) // BATCHES
    return (inputs[first : first + size] for first in range(0, len(inputs), size))


def main() -> None:
    """Converts by each method in turn, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="a kernel of 256x64")
    args = parse(parser)
    length, outputs, tokens = (256, 64, 2**10) if args.quick else (4096, 11008, 2**15)
    machine()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # Children hold only what they load.
        start = multiprocessing.get_context("spawn")
        with start.Pool(1, maxtasksperchild=1) as pool:
            pool.apply(write_operands, (folder, length, outputs, tokens))
            for method in args.only:
                load = os.getloadavg()[0]
                found = pool.apply(cost, (folder, method))
                rows.append(cells(method, found, load, 4 * length * outputs))
    title = f"One kernel of {length}x{outputs}, {tokens:,} tokens"
    table(title, HEADER, rows)
    record(args)


HEADER = ("", "s, sums", "s, method", "CPU s", "MB", "of the kernel", "error", "load before")


def cells(name: str, found: Cost, load: float, kernel: int) -> list[str]:
    """A row."""
    sizes = [f"{found.peak / 1e6:.0f}", f"{found.peak / kernel:.1f}x"]
    seconds = [f"{found.sums:.0f}", f"{found.method:.0f}", f"{found.cpu:.0f}"]
    return [name, *seconds, *sizes, f"{found.error:.4f}", f"{load:.1f}"]


if __name__ == "__main__":
    main()
