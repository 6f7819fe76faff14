"""``python -m bitnet_jax generate``: a checkpoint talks in the terminal."""

from __future__ import annotations

import argparse
import sys
import time

import jax.numpy as jnp

from bitnet_jax._quantize.int8 import Int8Config
from bitnet_jax.models import _generation
from bitnet_jax.models._decoder import Decoder
from bitnet_jax.models._request import Request, checked
from bitnet_jax.models._sampling import Sampling


def run(parsed: argparse.Namespace) -> int:
    """Loads, generates and reports; returns the exit code."""
    prompt = sys.stdin.read() if parsed.prompt is None else parsed.prompt
    begin = time.perf_counter()
    narrow = Int8Config() if parsed.int8 else None
    model = Decoder.from_pretrained(
        parsed.path,
        dtype=jnp.dtype(parsed.dtype),
        weights=narrow,
        head=narrow,
        scan=None,
        prepared=True,
        progress=Progress(begin),
    )
    loaded = time.perf_counter()
    print(f"loaded in {loaded - begin:.1f} s", file=sys.stderr)
    asked: str | list[dict[str, str]] = prompt
    if parsed.chat:
        system = [{"role": "system", "content": parsed.system}] if parsed.system else []
        asked = [*system, {"role": "user", "content": prompt}]
    sampling = Sampling(
        parsed.temperature,
        parsed.top_k,
        parsed.top_p,
        parsed.min_p,
        parsed.repetition_penalty,
        parsed.seed,
    )
    request = checked(model, asked, parsed.max_new_tokens, sampling, parsed.stop, None, None)
    times: list[float] = []
    for piece in _generation.stream(model, request, times.append):
        print(piece, end="", flush=True)
    print()
    _report(model, request, loaded, times)
    return 0


def _report(model: Decoder, request: Request, loaded: float, times: list[float]) -> None:
    """Tokens a second: of the prompt, in a second run without compilation, and of the answer."""
    begin = time.perf_counter()
    next(_generation.tokens_of(model, request))
    took = time.perf_counter() - begin
    length = len(request.rows[0])
    lines = [
        f"first token {times[0] - loaded:.2f} s after loading, compilation included",
        f"prefill {length} tokens, {length / took:.1f} a second",
    ]
    if len(times) > 2:  # the second token waits for the compilation of a step
        rate = (len(times) - 2) / (times[-1] - times[1])
        lines.append(f"decode {len(times)} tokens, {rate:.1f} a second")
    print("\n".join(lines), file=sys.stderr)


class Progress:
    """How much is loaded, on one line, where that takes more than a moment."""

    def __init__(self, begin: float):
        self.begin, self.shown = begin, 0

    def __call__(self, part: float) -> None:
        percent = int(100 * part)
        if time.perf_counter() - self.begin > 2 and percent > self.shown and sys.stderr.isatty():
            self.shown = percent
            print(f"\rloading {percent} %", end="", file=sys.stderr, flush=True)
            if part >= 1:
                print("\r", end="", file=sys.stderr)
