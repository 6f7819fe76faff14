"""``python -m bitnet_jax doctor``: checks the installation, the results and the speed.

Results: small products must have the bits of ``implementation="reference"``, with every
instruction set of this processor. Speed: compared with two limits, which are measured in
turn with it. A product with one token reads each kernel once, so its limit is the memory
bandwidth. With 512 tokens the limit is how fast the instruction set multiplies values
that are already in registers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import _native
from bitnet_jax._matmul import IMPLEMENTATIONS, Name, choose, cpu, limits, matmul, prepare
from bitnet_jax._packed import trits
from bitnet_jax._packed.kernel import Packed
from bitnet_jax._packed.pack import pack
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._packed.stored import PackedTernary
from bitnet_jax._quantize.config import B158, PHASE4, Int8Config, TernaryConfig

Line = tuple[str, str]  # a label and a finding

Candidate = tuple[Callable[[], Any], int]  # a function to time, and its bytes or operations

_SAME = "same bits"

# Sizes that no kernel's blocks divide: K is no multiple of a block, N none of a panel.
_SHAPE, _GROUP = (300, 100), 60

_ROWS = ((1, jnp.float32), (6, jnp.bfloat16), (70, jnp.float32))

_CONFIGS = {
    "ternary with one scale": B158,
    "ternary with a scale per output": PHASE4,
    f"ternary in groups of {_GROUP}": TernaryConfig(granularity=_GROUP),
    "int8": Int8Config(),
}


class Load(NamedTuple):
    """Sizes of the speed measurement; by default far larger than a cache."""

    side: int = 8192  # inputs and outputs of each kernel, at two bits a weight
    kernels: int = 24  # kernels that one token passes through
    read: int = 16  # kernels in the array that measures the bandwidth
    rows: int = 512  # tokens of the product that is limited by multiplication
    seconds: float = 4.0  # for each of the two measurements


def examine(*, speed: bool = True, load: Load | None = None) -> int:
    """Prints the report line by line; returns the exit code, 1 for wrong bits."""
    _show("versions", _describe_versions())
    _show("native product", _describe_native())
    _show("preferred here", _describe_preferred())
    title = f"bits of {len(_CONFIGS) * len(_ROWS)} small products against 'reference'"
    wrong = [label for label, text in _show(title, check_bits()) if text != _SAME]
    if speed:
        _show("speed, about ten seconds", measure_speed(load or Load()))
    if not wrong:
        print("The results are right.")
        return 0
    print(f"WRONG RESULTS by {'; '.join(wrong)}: do not use them, and please report all of this.")
    if any(label.startswith("cpu") for label in wrong):
        print(f"{_native.OFF}=0 turns the native product off.")
    return 1


def _show(title: str, lines: Iterable[Line]) -> list[Line]:
    """Prints a section, flushing each line: the next one may take long, or crash."""
    print(title, flush=True)
    shown = []
    for label, text in lines:
        print(f"  {label:18}{text}", flush=True)
        shown.append((label, text))
    print()
    return shown


def _describe_versions() -> Iterator[Line]:
    """Versions of the software, and the hardware."""
    # Imported by name, because imports inside the package only go down.
    yield "bitnet_jax", importlib.import_module("bitnet_jax").__version__
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    yield "jax", jax.__version__
    yield "jaxlib", importlib.metadata.version("jaxlib")
    yield "backend", f"{jax.default_backend()}, devices {', '.join(map(str, jax.devices()))}"
    cores = os.cpu_count() or 1
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    yield "cores", f"{cores}" if ours == cores else f"{ours} of {cores}"


def _describe_native() -> Iterator[Line]:
    """The native library and its instruction sets, or why there is none."""
    found = _native.load()
    if found.library is None:
        yield "library", f"none: {found.reason}"
        yield "remedy", _find_remedy()
        return
    yield "library", found.library._name
    yield "paths built", ", ".join(found.built())
    yield "this CPU runs", ", ".join(found.paths())
    yield "serves", found.chosen() or "" if native_serves() else "none, for the reason below"


def native_serves() -> bool:
    """Whether ``implementation=None`` selects the native product here."""
    return jax.default_backend() == "cpu" and choose(pack(jnp.ones((8, 4)))) == "cpu"


def _find_remedy() -> str:
    """How to get the native library."""
    if os.environ.get(_native.OFF) == "0":
        return f"unset {_native.OFF}"
    if sys.platform == "win32":
        return "none, it is not built on Windows"
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler on PATH: install GCC or Clang, then bitnet_jax again"
    return f"install bitnet_jax again; there is a C++ compiler, {compiler}"


def _describe_preferred() -> Iterator[Line]:
    """The implementation that None selects, and why not those before it in the table."""
    for label, config in (("ternary kernel", B158), ("int8 kernel", Int8Config())):
        packed = pack(jnp.ones((8, 4)), config)
        preferred, leaf = choose(packed), prepare(packed)
        if jax.default_backend() != "cpu":  # where the native product is plain JAX
            preferred = "reference"
        layout = f"for {leaf.implementation!r}" if isinstance(leaf, Prepared) else "as stored"
        yield label, f"matmul runs {preferred!r}, prepare lays it out {layout}"
        for name, row in IMPLEMENTATIONS.items():
            if name == preferred:
                break
            slower = f"{name!r} would be slower here; it runs if it is named"
            yield "", row.unsupported_reason(packed) or slower


def check_bits() -> Iterator[Line]:
    """Small products with each implementation: ``"same bits"``, or what differs."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal(_SHAPE, np.float32))
    stored = {name: pack(w, config) for name, config in _CONFIGS.items()}
    xs = [jnp.asarray(rng.standard_normal((m, _SHAPE[0])), dtype) for m, dtype in _ROWS]
    want = _multiply_all(xs, stored, "reference")

    def judge(implementation: Name | None) -> str:
        try:
            leaves = prepare(stored, implementation)
            return _compare(_multiply_all(xs, leaves, implementation), want)
        except Exception as error:  # any error is a finding to print
            return f"FAILS: {error!r}"

    # With each instruction set of the native product where it runs; and the preferred
    # implementation where that is another one.
    if not native_serves():
        preferred = dict.fromkeys(choose(packed, preparing=True) for packed in stored.values())
        yield ", ".join(preferred), judge(None)
    if cpu.unsupported_reason(stored["int8"]) is not None:
        return
    try:
        for path in _native.load().paths():
            _native.load().choose(path)
            yield f"cpu, {path}", judge("cpu")
    finally:
        _native.load().choose(None)


def _compare(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> str:
    """Compares products bit by bit; returns the finding."""
    wrong = []
    for name, y in got.items():
        bits = f"u{y.itemsize}"  # as integers, so that -0 and 0 differ
        count = (y.view(bits) != want[name].view(bits)).sum()
        if count:
            wrong.append(f"{count} of {y.size} outputs of {name}")
    if not wrong:
        return _SAME
    return f"DIFFERS: {'; '.join(wrong[:3])} ({len(wrong)} of {len(got)} products)"


def _multiply_all(
    xs: list[jax.Array], leaves: Mapping[str, Packed], implementation: Name | None
) -> dict[str, np.ndarray]:
    """Each x times each kernel, in a new jit, so that nothing is cached."""

    @jax.jit
    def run(xs: list[jax.Array], leaves: Mapping[str, Packed]) -> dict[str, jax.Array]:
        return {
            f"{name}, M = {len(x)}, {x.dtype}": matmul(
                x, leaf, implementation=implementation, dtype=x.dtype
            )
            for name, leaf in leaves.items()
            for x in xs
        }

    return jax.device_get(run(xs, leaves))


def measure_speed(load: Load) -> Iterator[Line]:
    """The speed of two products next to their limits, or why it is not measured."""
    if not native_serves():
        yield "skipped", "the native product is not in use, and the limits are for it"
        return
    stored = make_kernel(load.side)
    # First the array that takes twice its memory while it is made.
    together = _lay_out_together(stored, load.read)
    # Each by prepare, which asks for large pages; jnp.copy does not.
    leaves = [prepare(stored, "cpu") for _ in range(load.kernels)]
    yield "one token", _measure_reading(leaves, together, load)
    yield "", f"({load.kernels} kernels of {load.side}x{load.side}, each read once)"
    yield f"{load.rows} tokens", _measure_multiplying(leaves[0], load)


def make_kernel(side: int) -> PackedTernary:
    """A random kernel whose outputs are as large as its inputs, so that a chain is stable."""
    codes = np.random.default_rng(0).integers(-1, 2, (side, side), np.int8)
    scale = jnp.full((1, 1), math.sqrt(1.5 / side), jnp.float32)
    return PackedTernary(trits.pack_trits(jnp.asarray(codes), 0), scale, length=side)


def _lay_out_together(stored: PackedTernary, count: int) -> jax.Array:
    """The codes of ``count`` prepared kernels as one array."""
    codes = jnp.broadcast_to(stored.codes, (count, *stored.codes.shape))
    scale = jnp.broadcast_to(stored.scale, (count, *stored.scale.shape))
    stacked = dataclasses.replace(stored, codes=codes, scale=scale)
    return jax.block_until_ready(prepare(stacked, "cpu").codes)


def _measure_reading(leaves: list[Prepared], together: jax.Array, load: Load) -> str:
    """Bytes a second of one token through all kernels, compared with reading alone."""

    @jax.jit
    def run(x: jax.Array, leaves: list[Prepared]) -> jax.Array:
        for leaf in leaves:
            x = matmul(x, leaf)
        return x

    def reader(streams: int) -> Candidate:
        read = jax.jit(functools.partial(limits.read, streams=streams))
        return lambda: read(together), together.nbytes

    x = jnp.ones((1, load.side))
    streamed = sum(leaf.codes.nbytes for leaf in leaves)
    candidates = [(lambda: run(x, leaves), streamed), *map(reader, limits.STREAMS)]
    rate, *reads = _rate_in_turn(candidates, load.seconds)
    limit = max(reads, key=lambda read: float(np.median(read)))
    return f"{_share(rate, limit, 'GB/s')} of this machine's bandwidth"


def _measure_multiplying(leaf: Prepared, load: Load) -> str:
    """Operations a second with many tokens, compared with operations on registers alone."""
    x = np.random.default_rng(1).standard_normal((load.rows, load.side), np.float32)
    product = functools.partial(jax.jit(matmul), jnp.asarray(x), leaf)

    def busy(turns: int) -> Callable[[], jax.Array]:
        return jax.jit(functools.partial(limits.multiply, turns))

    some = busy(1 << 20)
    for run in (product, some):
        seconds_of(run)  # compiles it
    registers = busy(math.ceil((1 << 20) * min(seconds_of(product), 0.1) / seconds_of(some)))
    operations = 2 * load.rows * load.side * load.side
    candidates = [(product, operations), (registers, int(registers()))]
    rate, limit = _rate_in_turn(candidates, load.seconds)
    return f"{_share(rate, limit, 'GOP/s')} that {_native.load().chosen()} does in registers"


def _rate_in_turn(candidates: list[Candidate], seconds: float) -> np.ndarray:
    """Rates in 1e9 a second, (candidates, rounds); timed in turn, because speed drifts."""
    rounds, warm_up, end = [], 2, math.inf
    while len(rounds) < warm_up + 5 or time.perf_counter() < end:
        rounds.append([amount / seconds_of(run) / 1e9 for run, amount in candidates])
        if len(rounds) == warm_up:
            end = time.perf_counter() + seconds
    return np.array(rounds[warm_up:]).T


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds until the result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def _share(rate: np.ndarray, limit: np.ndarray, unit: str) -> str:
    """The median rate, and the median and quartiles of its share of the limit."""
    low, middle, high = np.percentile(100 * rate / limit, (25, 50, 75))
    share = f"{middle:.0f} % ({low:.0f} to {high:.0f}) of the {np.median(limit):,.1f}"
    return f"{np.median(rate):,.1f} {unit}, {share}"
