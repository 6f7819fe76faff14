"""The command line, ``python -m bitnet_jax``.

``generate`` continues a prompt with a published model, ``convert`` writes a model in
another form, ``inspect`` lists what a folder or a file holds, ``verify`` checks that a
file is intact, and ``doctor`` checks the installation on this machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from bitnet_jax import _doctor, _tune
from bitnet_jax.io._inspect import verify

_EXAMPLES = """\
examples:
  python -m bitnet_jax inspect bitnet-b1.58-2B-4T
  python -m bitnet_jax generate bitnet-b1.58-2B-4T --chat --prompt "Who are you?"
  python -m bitnet_jax convert bitnet-b1.58-2B-4T model.bitnet.safetensors
  python -m bitnet_jax doctor --quick
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bitnet_jax",
        description="1.58-bit networks for JAX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    _add_doctor(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_generate(commands)
    _add_convert(commands)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    """Adds the command ``doctor``."""
    text = "what is installed, which kernels run, whether results are right, and how fast it is"
    doctor = commands.add_parser("doctor", help=text, description=f"Prints {text}.")
    how = doctor.add_mutually_exclusive_group()
    how.add_argument(
        "--quick",
        action="store_true",
        help="skip the speed measurement: twenty seconds",
    )
    how.add_argument(
        "--tune",
        action="store_true",
        help="measure instead whether other constants of the native product gain on this "
        "processor: half a minute for each of its instruction sets; changes nothing",
    )
    doctor.set_defaults(run=_run_doctor)


def _run_doctor(parsed: argparse.Namespace) -> int:
    return _tune.tune() if parsed.tune else _doctor.examine(speed=not parsed.quick)


def _add_generate(commands: argparse._SubParsersAction) -> None:
    """Adds ``generate`` and what it runs; models are imported when it does."""
    text = "what a published model says after a prompt"
    parser = commands.add_parser(
        "generate",
        help=text,
        description="Loads a published checkpoint and continues a prompt. The text comes as it is "
        "made; what is said about it goes to the standard error.",
    )
    parser.add_argument(
        "path",
        help="a .gguf file, a folder with config.json and *.safetensors, or a file of convert or "
        "Decoder.save",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="what to continue; read from standard input if left out")
    prompt.add_argument(
        "--ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="token ids in place of a prompt, for a checkpoint without a tokenizer: ids come out",
    )
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt through the checkpoint's chat template"
    )
    parser.add_argument("--system", help="with --chat, a system message before the prompt")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="at most so many; default 128"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default): the likeliest token; above, tokens are drawn",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest of probability P together"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="draw from those of P times the likeliest's"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1, repeats are less likely"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws; default 0")
    parser.add_argument(
        "--stop", action="append", default=[], help="a text that ends the answer; again for more"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the computation; default float32",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="int8 for the head, and for projections that the checkpoint holds as floats",
    )
    parser.set_defaults(run=_generate)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    """Adds ``convert`` and what it runs."""
    text = "a model in another form, with the same bits"
    parser = commands.add_parser(
        "convert",
        help=text,
        description="Reads a model and writes it in another form: a DST that ends in .safetensors "
        "is one file of this library, which loads fastest; any other DST is a Hugging Face "
        "folder, which transformers loads too. DST appears when it is whole, or not at all.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a folder with config.json and *.safetensors, a .gguf file, or a file of this library",
    )
    parser.add_argument("target", metavar="DST", help="a .safetensors file, or a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace DST where it is there")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of what stays float; by default as SRC has it",
    )
    parser.add_argument(
        "--dense", action="store_true", help="to a file: 1.6 bits a weight and not 2"
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="to a file: int8 for the head, and for projections that SRC holds as floats",
    )
    parser.add_argument(
        "--layout",
        choices=("bitlinear", "autobitlinear"),
        help="to a folder: whether 1/s is stored (bitlinear) or s; by default as SRC has it",
    )
    parser.set_defaults(run=_convert)


def _generate(parsed: argparse.Namespace) -> int:
    """Runs ``generate``."""
    from bitnet_jax.models import _command

    return _saying_errors(_command.run, parsed)


def _convert(parsed: argparse.Namespace) -> int:
    """Runs ``convert``."""
    from bitnet_jax.models import _translate

    return _saying_errors(_translate.run, parsed)


def _inspect(parsed: argparse.Namespace) -> int:
    """Runs ``inspect``."""
    from bitnet_jax.models import _summary

    return _summary.inspect(parsed.path)


def _saying_errors(run: Callable[[argparse.Namespace], int], parsed: argparse.Namespace) -> int:
    """The exit code of a command; what it raises is said in a line."""
    try:
        return run(parsed)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    """Adds ``inspect``."""
    text = "what a folder or a file holds, reading headers only"
    parser = commands.add_parser("inspect", help=text, description=f"Prints {text}.")
    parser.add_argument(
        "path",
        help="a folder with config.json and *.safetensors, a .gguf file, or a file of bj.io.save, "
        "Decoder.save or convert",
    )
    parser.set_defaults(run=_inspect)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    """Adds ``verify``."""
    text = "whether a file of bj.io.save is intact, reading all of it"
    command = commands.add_parser("verify", help=text, description=f"Prints {text}.")
    command.add_argument("file", help="a file of bj.io.save, Decoder.save or convert")
    command.set_defaults(run=lambda parsed: verify(parsed.file))


if __name__ == "__main__":
    sys.exit(main())
