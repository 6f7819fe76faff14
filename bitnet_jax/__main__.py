"""The command line, ``python -m bitnet_jax``.

``doctor`` checks the installation on this machine, ``inspect`` lists the contents of a
file, ``verify`` checks that a file is intact, and ``generate`` continues a prompt with a
published model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from bitnet_jax import _doctor
from bitnet_jax.io._inspect import inspect, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bitnet_jax", description="1.58-bit networks for JAX."
    )
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    _add_doctor(commands)
    text = "what a file of bj.io.save contains, reading its header only"
    _add_of_file(commands, "inspect", text, inspect)
    text = "whether a file of bj.io.save is intact, reading all of it"
    _add_of_file(commands, "verify", text, verify)
    _add_generate(commands)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    """Adds the command ``doctor``."""
    text = "what is installed, which kernels run, whether results are right, and how fast it is"
    doctor = commands.add_parser("doctor", help=text, description=f"Prints {text}.")
    doctor.add_argument(
        "--quick",
        action="store_true",
        help="skip the speed measurement: twenty seconds",
    )
    doctor.set_defaults(run=lambda parsed: _doctor.examine(speed=not parsed.quick))


def _add_generate(commands: argparse._SubParsersAction) -> None:
    """Adds ``generate`` and what it runs; models are imported when it does."""
    text = "what a published model says after a prompt"
    parser = commands.add_parser(
        "generate",
        help=text,
        description="Loads a published checkpoint and continues a prompt. The text comes as it is "
        "made; what is said about it goes to the standard error.",
    )
    parser.add_argument("path", help="a folder with config.json and *.safetensors, or a .gguf file")
    parser.add_argument("--prompt", help="what to continue; read from standard input if left out")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt through the checkpoint's chat template"
    )
    parser.add_argument("--system", help="with --chat, a system message before the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): the likeliest token"
    )
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="X")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="a text that ends the answer")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation"
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="int8 for the head, and for projections that the checkpoint holds as floats",
    )
    parser.set_defaults(run=_generate)


def _generate(parsed: argparse.Namespace) -> int:
    """Runs ``generate``."""
    from bitnet_jax.models import _command

    return _command.run(parsed)


def _add_of_file(
    commands: argparse._SubParsersAction, name: str, text: str, run: Callable[[str], int]
) -> None:
    """Adds a command that reads one file."""
    command = commands.add_parser(name, help=text, description=f"Prints {text}.")
    command.add_argument("file", help="the file to read")
    command.set_defaults(run=lambda parsed: run(parsed.file))


if __name__ == "__main__":
    sys.exit(main())
