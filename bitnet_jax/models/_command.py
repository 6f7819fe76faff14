"""``python -m bitnet_jax generate``: a checkpoint talks in the terminal."""

from __future__ import annotations

import argparse
import sys
import time

import jax.numpy as jnp

from bitnet_jax._quantize.int8 import Int8Config
from bitnet_jax.io._source import kind_to_load
from bitnet_jax.models import _generation, _load_folder, _load_gguf
from bitnet_jax.models._decoder import Decoder
from bitnet_jax.models._pretrained import Outline
from bitnet_jax.models._request import Request, checked, stops_of
from bitnet_jax.models._sampling import Sampling


def run(parsed: argparse.Namespace) -> int:
    """Checks, loads, generates and reports; returns the exit code."""
    sampling = _sampling(parsed)
    stops_of(parsed.max_new_tokens, parsed.stop)
    asked = _asked(parsed)
    outline = _outline(parsed.path)
    how = (asked, parsed.max_new_tokens, sampling, parsed.stop, None, None)
    request = None if outline is None else checked(outline, *how)
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
    if outline is not None:
        model.text = outline.text  # whose tokenizer is made
    request = request or checked(model, *how)
    times: list[float] = []
    for piece in _generation.stream(model, request, times.append):
        print(piece, end="" if request.as_text else " ", flush=True)
    print()
    _report(model, request, loaded, times)
    return 0


def _sampling(parsed: argparse.Namespace) -> Sampling:
    return Sampling(
        parsed.temperature,
        parsed.top_k,
        parsed.top_p,
        parsed.min_p,
        parsed.repetition_penalty,
        parsed.seed,
    )


def _asked(parsed: argparse.Namespace) -> str | list[int] | list[dict[str, str]]:
    """The prompt, token ids, or the messages that a chat template makes a text of."""
    if parsed.ids is not None and parsed.chat:
        raise ValueError("generate: --chat is of a prompt, and --ids are tokens. Leave one out.")
    if parsed.system is not None and not parsed.chat:
        raise ValueError("generate: --system is a message of a chat. Pass --chat too.")
    if parsed.ids is not None:
        return parsed.ids
    prompt = sys.stdin.read() if parsed.prompt is None else parsed.prompt
    if not parsed.chat:
        return prompt
    system = [{"role": "system", "content": parsed.system}] if parsed.system else []
    return [*system, {"role": "user", "content": prompt}]


def _outline(path: str) -> Outline | None:
    """What a checkpoint says without its weights; None: a saved file, which is read whole."""
    kind = kind_to_load(path)
    if kind == "saved":
        return None
    return (_load_gguf if kind == "gguf" else _load_folder).outline(path)


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
    """How much is done, on one line, where that takes more than a moment."""

    def __init__(self, begin: float, doing: str = "loading"):
        self.begin, self.doing, self.shown = begin, doing, 0

    def __call__(self, part: float) -> None:
        percent = int(100 * part)
        if time.perf_counter() - self.begin > 2 and percent > self.shown and sys.stderr.isatty():
            self.shown = percent
            print(f"\r{self.doing} {percent} %", end="", file=sys.stderr, flush=True)
            if part >= 1:
                print("\r", end="", file=sys.stderr)
