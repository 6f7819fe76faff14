"""Generation from a random model of the shape of BitNet b1.58 2B-4T, beside what bounds it.

python tests/benchmarks/decode.py
python tests/benchmarks/decode.py --quick        (four layers)
python tests/benchmarks/decode.py --layers 8 --apart

Codes are drawn in packed form, a kernel at a time, so the float model is never there. The
roof of a decoded token is the time in which this machine reads what a token has to: packed
kernels, the int8 head, and the cache; that of a prefill also the time in which it
multiplies as much in registers. Both limits are taken before and after each answer, and what
is quoted is the median of an answer's part of its own roof.

llama.cpp runs the same shape in TQ2_0, its embedding in Q8_0, in turn with ours, where its
Python package (built for this processor, which takes minutes) and ``gguf``, which writes its
file, are installed::

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _bench import machine, parse, record, table
from flax import nnx

import bitnet_jax as bj
from bitnet_jax._display import size_text
from bitnet_jax._matmul import limits
from bitnet_jax.io import _memory
from bitnet_jax.models import _load_gguf, _names, _pretrained
from bitnet_jax.models._generation import tokens_of
from bitnet_jax.models._parts import Blank
from bitnet_jax.models._request import checked
from bitnet_jax.models._sampling import Sampling

PROMPTS = (128, 512)
NEW = 24  # tokens after a prompt
TURNS = 4_000_000
LLAMA = ("llama_cpp", "gguf")
GOALS = {"prefill": 1 / 3, "decode after": 1 / 1.5}  # of llama.cpp's time


def config_of(layers: int, *, scan: bool) -> bj.models.DecoderConfig:
    """The shape of 2B-4T, its head and embedding one table at int8."""
    return bj.models.DecoderConfig(
        vocabulary=128256,
        width=2560,
        hidden=6912,
        depth=layers,
        heads=20,
        kv_heads=5,
        head_dim=128,
        rope=bj.models.Rope(theta=500000.0),
        embedding=bj.Int8Config(),
        scan=scan,
    )


def random_codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of four trits, each two bits: 0, 1 or 2."""
    four = np.indices((3,) * 4).reshape(4, -1).astype(np.uint8)
    valid = four[0] | four[1] << 2 | four[2] << 4 | four[3] << 6
    return valid[rng.integers(0, len(valid), shape, np.uint8)]


def random_leaves(config: bj.models.DecoderConfig) -> Iterator[tuple[str, Any]]:
    """Every parameter by path, packed; one at a time."""
    rng = np.random.default_rng(0)
    for path, _, n_in, n_out, _ in _names.projections(config):
        codes = random_codes(rng, (n_in // 4, n_out))
        scale = jnp.full((1, 1), 1.2 * n_in**-0.5, jnp.float32)
        yield f"{path}/linear/kernel", bj.PackedTernary(jnp.asarray(codes), scale, n_in)
    for path, _, length in _names.norms(config):
        yield f"{path}/scale", jnp.ones((length,), jnp.float32)
    shape = config.vocabulary, config.width
    codes = rng.integers(-127, 128, shape, np.int8)
    scale = jnp.full((shape[0], 1), shape[1] ** -0.5 / 64, jnp.float32)
    yield "embed/embedding", bj.PackedInt8(jnp.asarray(codes), scale, contracting_axes=(-1,))


def random_model(config: bj.models.DecoderConfig, *, prepared: bool) -> bj.models.Decoder:
    """A decoder of random codes."""
    leaves: dict[str, Any] = {}
    for path, leaf in random_leaves(config):
        packed = isinstance(leaf, (bj.PackedTernary, bj.PackedInt8))
        leaves[path] = bj.prepare(leaf) if prepared and packed else leaf
    model = nnx.eval_shape(lambda: bj.models.Decoder(config, rngs=Blank(0)))
    _pretrained.fill(model, config, leaves)
    return model


def bytes_of(model: bj.models.Decoder) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def cache_bytes(model: bj.models.Decoder, slots: int) -> int:
    cache = jax.eval_shape(lambda: model.init_cache(1, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def seconds(model: bj.models.Decoder, prompt: int) -> np.ndarray:
    """Of a prefill, and of each token after it."""
    ids = np.random.default_rng(1).integers(0, model.config.vocabulary, prompt)
    request = checked(model, ids.tolist(), NEW, Sampling(), (), None, None)
    times = [time.perf_counter(), *(time.perf_counter() for _ in tokens_of(model, request))]
    return np.diff(times)


def took(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


class Limits:
    """Bytes read and operations done in a second, as fast as all threads can."""

    def __init__(self):
        memory = _memory.empty((512 << 20,), np.dtype(np.uint8))
        memory.fill(1)
        self.memory = jax.device_put(memory)
        self.reads = jax.jit(limits.read, static_argnums=1)
        self.multiplies = jax.jit(limits.multiply, static_argnums=0)
        self.operations = float(self.multiplies(TURNS))
        self.now()

    def now(self) -> np.ndarray:
        """Both, each over about a tenth of a second."""
        reading = min(
            sum(took(lambda s=s: self.reads(self.memory, s)) for _ in range(6)) / 6
            for s in limits.STREAMS
        )
        multiplying = took(lambda: self.multiplies(TURNS))
        return np.array([self.memory.nbytes / reading, self.operations / multiplying])


def generation(model: bj.models.Decoder, rounds: int, peer: Llama | None) -> list[list[str]]:
    """Rows of the table: prefill and decode after each prompt, beside roofs and a peer."""
    machine_limits, weights = Limits(), bytes_of(model)
    products = sum(n_in * n_out for _, _, n_in, n_out, _ in _names.projections(model.config))
    rates: dict[tuple[str, int], list[float]] = {}
    roofs: dict[tuple[str, int], list[float]] = {}
    theirs: dict[tuple[str, int], list[float]] = {}
    for prompt in PROMPTS:
        seconds(model, prompt)  # compiles
    before, seen = machine_limits.now(), []
    for _ in range(rounds):
        for prompt in PROMPTS:
            each = seconds(model, prompt)
            after = machine_limits.now()
            read, multiply = (before + after) / 2
            seen.append((read, multiply))
            held = weights + cache_bytes(model, prompt + NEW // 2)
            roof = prompt / (weights / read + 2 * products * prompt / multiply)
            _note(rates, prompt, each)
            roofs.setdefault(("prefill", prompt), []).append(roof)
            roofs.setdefault(("decode after", prompt), []).append(read / held)
            if peer is not None:
                _note(theirs, prompt, peer.seconds(prompt))
                after = machine_limits.now()
            before = after
    read, multiply = np.median(seen, axis=0) / 1e9
    print(f"reading {read:.1f} GB/s, multiplying {multiply:.0f} GOP/s (medians)")
    return [
        _row(f"{what} {n}", ours, roofs[what, n]) + _beside(what, ours, theirs.get((what, n)))
        for (what, n), ours in rates.items()
    ]


def _note(rates: dict[tuple[str, int], list[float]], prompt: int, each: np.ndarray) -> None:
    """Tokens a second of one answer."""
    rates.setdefault(("prefill", prompt), []).append(prompt / each[0])
    # The second token waits for what compiles, the third for a step without overlap.
    rates.setdefault(("decode after", prompt), []).append(1 / each[3:].mean())


def _beside(what: str, ours: list[float], theirs: list[float] | None) -> list[str]:
    """A peer's rate, our time over its time, the quartiles, and whether that is enough."""
    if theirs is None:
        return ["not installed", "", "", ""]
    low, ratio, high = np.percentile(np.array(theirs) / np.array(ours), (25, 50, 75))
    verdict = f"<= {GOALS[what]:.2f} {'ok' if ratio <= GOALS[what] else 'MISSED'}"
    return [f"{np.median(theirs):.1f}", f"{ratio:.2f}", f"{low:.2f}-{high:.2f}", verdict]


def _row(name: str, rates: list[float], roofs: list[float]) -> list[str]:
    low, part, high = np.percentile(np.array(rates) / np.array(roofs), (25, 50, 75))
    goal = f">= 0.80 {'ok' if part >= 0.8 else 'MISSED'}" if "decode" in name else ""
    figures = (max(rates), np.median(rates), np.median(roofs))
    return [name, *(f"{x:.1f}" for x in figures), f"{part:.2f}", f"{low:.2f}-{high:.2f}", goal]


class Llama:
    """llama.cpp with random weights of the same shape."""

    def __init__(self, config: bj.models.DecoderConfig, folder: str):
        llama_cpp: Any = importlib.import_module("llama_cpp")
        path = os.path.join(folder, "random.gguf")
        write_gguf(config, path)
        threads = os.cpu_count()
        self.vocabulary = config.vocabulary
        self.model = llama_cpp.Llama(
            path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def seconds(self, prompt: int) -> np.ndarray:
        """As :func:`seconds`; what comes next is drawn, which costs less than to choose it."""
        ids = np.random.default_rng(1).integers(0, self.vocabulary, prompt + NEW).tolist()
        self.model.reset()
        parts = [ids[:prompt], *([token] for token in ids[prompt:])]
        return np.array([took(lambda p=part: self.model.eval(p)) for part in parts])


def write_gguf(config: bj.models.DecoderConfig, path: str) -> None:
    """Random trits in TQ2_0, and a random table in Q8_0, as llama.cpp's bitnet."""
    gguf: Any = importlib.import_module("gguf")
    rng, kinds = np.random.default_rng(0), gguf.GGMLQuantizationType
    file = gguf.GGUFWriter(path, "bitnet")
    file.add_block_count(config.depth)
    file.add_context_length(config.context)
    file.add_embedding_length(config.width)
    file.add_feed_forward_length(config.hidden)
    file.add_head_count(config.heads)
    file.add_head_count_kv(config.kv_heads)
    file.add_layer_norm_rms_eps(config.norm_eps)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope.theta)
    file.add_vocab_size(config.vocabulary)
    file.add_tokenizer_model("no_vocab")
    for path, _, n_in, n_out, _ in _names.projections(config):
        codes = random_codes(rng, (n_out, n_in // 256, 64))
        rows = np.concatenate([codes, _scales(1.2 * n_in**-0.5, codes.shape[:2])], -1)
        name = f"{_load_gguf.name_of(path)}.weight"
        file.add_tensor(name, rows.reshape(n_out, -1), raw_dtype=kinds.TQ2_0)
    for path, _, length in _names.norms(config):
        name = "output_norm" if path == "norm" else _load_gguf.name_of(path)
        file.add_tensor(f"{name}.weight", np.ones(length, np.float32))
    shape = config.vocabulary, config.width // 32, 32
    codes = rng.integers(-127, 128, shape, np.int8).view(np.uint8)
    rows = np.concatenate([_scales(config.width**-0.5 / 64, shape[:2]), codes], -1)
    table = rows.reshape(config.vocabulary, -1)
    file.add_tensor("token_embd.weight", table, raw_dtype=kinds.Q8_0)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _scales(scale: float, blocks: tuple[int, ...]) -> np.ndarray:
    """A float16 as two bytes of each block."""
    return np.broadcast_to(np.array([scale], np.float16).view(np.uint8), (*blocks, 2))


def first_token(path: str) -> None:
    """In a process of its own: loads, generates one token, says what it took, and its memory."""
    begin = float(os.environ["BEGIN"])
    jnp.zeros(1).block_until_ready()
    idle = resident("VmRSS")
    model = bj.models.Decoder.from_pretrained(path, scan=None, prepared=True)
    loaded = time.time() - begin
    ids = np.random.default_rng(1).integers(0, model.config.vocabulary, 16).tolist()
    next(iter(model.stream(ids, max_new_tokens=16)))
    first = time.time() - begin
    model.generate(ids, max_new_tokens=16)
    print(loaded, first, resident("VmHWM"), idle, bytes_of(model) + cache_bytes(model, 32))


def resident(key: str) -> int:
    """Bytes. Not ru_maxrss: that of a process counts the one that it was forked from."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"{key}:\s+(\d+) kB", status)[0])


def starts(model: bj.models.Decoder) -> list[list[str]]:
    """Rows of the second table: a first process, and one that finds what it compiled."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.bitnet.safetensors")
        model.save(path)
        del model
        options = {
            "JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for name in ("first start", "second start, jit cache"):
            done = subprocess.run(
                [sys.executable, __file__, "--first-token", path],
                env=os.environ | options | {"BEGIN": repr(time.time())},
                capture_output=True,
                text=True,
                check=True,
            )
            loaded, first, peak, idle, held = map(float, done.stdout.split()[-5:])
            verdict = "ok" if first <= 20 else "MISSED"
            memory = f"{peak / held:.2f} of {size_text(round(held))}"
            beyond = f"{(peak - idle) / held:.2f}"
            times = f"{loaded:.1f}", f"{first:.1f}", f"<= 20 {verdict}"
            rows.append([name, *times, memory, beyond])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="four layers, two rounds")
    parser.add_argument("--apart", action="store_true", help="layers that are not stacked")
    parser.add_argument("--first-token", metavar="FILE", help=argparse.SUPPRESS)
    args = parse(parser)
    if args.first_token:
        first_token(args.first_token)
        return
    if args.quick:
        args.layers, args.rounds = 4, 2
    machine()
    config = config_of(args.layers, scan=not args.apart)
    missing = [name for name in LLAMA if importlib.util.find_spec(name) is None]
    with tempfile.TemporaryDirectory() as folder:
        peer = None if missing else Llama(config, folder)
        rows = generation(random_model(config, prepared=True), args.rounds, peer)
    beside = ("llama.cpp TQ2_0", "ratio", "quartiles", "goal")
    header = ("tokens", "a second, best", "median", "roof", "of the roof", "quartiles", "goal")
    shape = f"{args.layers} layers of 2560/6912, 20+5 heads, {config.vocabulary} tokens"
    table(f"Generating, {shape}", (*header, *beside), rows)
    rows = starts(random_model(config, prepared=False))
    header = (
        "process",
        "loaded, s",
        "first token, s",
        "goal",
        "peak / kernels and cache",
        "less an idle JAX",
    )
    table("From the start of a process to its first token", header, rows)
    record(args)


if __name__ == "__main__":
    main()
