"""Loading and saving a packed tree, beside what only moves its bytes.

python tests/benchmarks/loading.py
python tests/benchmarks/loading.py --bytes 100000000
python tests/benchmarks/loading.py --hasher sha_ni  # as a processor without AVX512; or "hashlib"

The file is in the page cache. Every candidate ends with all bytes in memory, but for
load(mmap=True), which leaves them in the mapped file and has read them once. load works on
several threads: on a machine that others use too, look at its CPU time over the number of cores.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from _bench import HEADER, in_turn, machine, parse, record, table, versus

import bitnet_jax as bj
from bitnet_jax._native import sha256
from bitnet_jax.io import _chunks, _safetensors, _shardings, _tensors

SIDE = 8192  # of a kernel, 16 MiB at two bits a weight
BASE = "numpy.fromfile"


def make_tree(size: int) -> dict[str, bj.PackedTernary]:
    """Kernels of random codes, so many bytes in all."""
    count = max(1, round(size / (SIDE * SIDE / 4)))
    fields = np.random.default_rng(0).integers(0, 3, (4, SIDE // 4, SIDE), np.uint8)
    codes = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
    scale = jnp.ones((1, 1))
    return {
        f"layer_{i}": bj.PackedTernary(jax.device_put(np.roll(codes, i, axis=1)), scale, SIDE)
        for i in range(count)
    }


def keep_memory() -> None:
    """Makes glibc keep what is freed and give it again.

    Memory that is new to a process costs up to ten times what is measured here where a machine
    is virtual, and would be charged to whoever asks for it first.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def loading_seconds(path: str, dense: str, rounds: int) -> None:
    size = os.path.getsize(path)
    cpu: dict[str, list[float]] = {}

    def watch(name, run):
        def watched():
            start = time.process_time()
            result = run()
            cpu.setdefault(name, []).append(1e3 * (time.process_time() - start))
            return result

        return watched

    runs = {
        BASE: lambda: np.fromfile(path, np.uint8),
        "load": lambda: bj.io.load(path),
        "load(mmap=True)": lambda: bj.io.load(path, mmap=True),
        "load, of a dense file": lambda: bj.io.load(dense),
        "safetensors.numpy.load_file": lambda: safetensors.numpy.load_file(path),
    }
    timings = in_turn({name: watch(name, run) for name, run in runs.items()}, rounds=rounds)
    goals = {"load": 2.0}
    rows = [
        [
            name,
            f"{size / t.median / 1e6:.2f} GB/s",
            f"{np.median(cpu[name]):.0f}",
            *versus(t, goals.get(name)),
        ]
        for name, t in timings.items()
    ]
    title = f"Loading {size / 1e9:.2f} GB of two-bit kernels, page cache warm"
    table(title, ("call", "loaded", "CPU ms", *HEADER), rows)


def parts_seconds(path: str, tree: dict[str, bj.PackedTernary], rounds: int) -> None:
    """What load does, each part alone on the same threads."""
    raw = np.fromfile(path, np.uint8)
    chunk = _safetensors.CHUNK
    places = [slice(at, min(at + chunk, raw.size)) for at in range(0, raw.size, chunk)]
    shape = next(iter(tree.values())).codes.shape
    part = _tensors.Part("k", ".codes", "uint8", shape, "bits", -2, SIDE)
    arrays = [np.asarray(kernel.codes) for kernel in tree.values()]

    def each(do, places=places):
        with _chunks.pool() as threads:
            for _ in _chunks.in_order(threads, do, places):
                pass

    together = sha256.streams()
    batches = [places[at : at + together] for at in range(0, len(places), together)]

    out = np.empty(raw.size, np.uint8)

    def read():
        with open(path, "rb") as file:
            each(lambda at: os.preadv(file.fileno(), [out[at].data], at.start))

    runs = {
        BASE: lambda: np.fromfile(path, np.uint8),
        "read": read,
        "digest and checks": lambda: each(
            lambda of: sha256.sha256([raw[at] for at in of]), batches
        ),
        "digest by hashlib": lambda: each(lambda at: hashlib.sha256(raw[at].data).digest()),
        "checks by NumPy": lambda: each(lambda at: part.count_wrong(raw[at], at.start)),
        "arrays": lambda: [_shardings.place(array, None) for array in arrays],
    }
    rows = [[name, *versus(t, None)[:3]] for name, t in in_turn(runs, rounds=rounds).items()]
    table("The parts of load, each alone", ("part", *HEADER[:3]), rows)


def saving_seconds(folder: str, tree: dict[str, bj.PackedTernary], rounds: int) -> None:
    path = os.path.join(folder, "saved")
    raw = np.concatenate([np.asarray(kernel.codes).reshape(-1) for kernel in tree.values()])

    def plain():
        with open(path, "wb") as file:
            raw.tofile(file)
            file.flush()
            os.fsync(file.fileno())

    runs = {
        "numpy.tofile and fsync": plain,
        "save": lambda: bj.io.save(path, tree),
        "save(dense=True)": lambda: bj.io.save(path, tree, dense=True),
    }
    rows = [
        [name, f"{raw.size / t.median / 1e6:.2f} GB/s", *versus(t, None)[:3]]
        for name, t in in_turn(runs, rounds=rounds, warmup=1).items()
    ]
    table(f"Saving {raw.size / 1e9:.2f} GB", ("call", "saved", *HEADER[:3]), rows)


def hash_with(name: str) -> None:
    """Takes one of the native hashers from now on, or none of them."""
    found = {hasher.name: (hasher,) for hasher in sha256.hashers()} | {"hashlib": ()}
    if name not in found:
        raise SystemExit(f"--hasher: this processor has {', '.join(found)}, got {name!r}")
    sha256.hashers = lambda: found[name]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bytes", type=int, default=10**9, help="of the packed tree")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hasher", default=None, help="of _native/sha256.py, or hashlib")
    parsed = parse(parser)
    if parsed.hasher:
        hash_with(parsed.hasher)
    keep_memory()
    machine()
    tree = make_tree(parsed.bytes)
    with tempfile.TemporaryDirectory() as folder:
        names = [os.path.join(folder, name) for name in ("plain", "dense")]
        for name in names:
            bj.io.save(name, tree, dense=name.endswith("dense"))
        time.sleep(1)  # what was written is on its way to the disk
        loading_seconds(*names, parsed.rounds)
        parts_seconds(names[0], tree, parsed.rounds)
        saving_seconds(folder, tree, max(3, parsed.rounds // 2))
    record(parsed)
