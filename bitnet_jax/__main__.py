"""The command line, ``python -m bitnet_jax``.

``doctor`` checks the installation on this machine, ``inspect`` lists the contents of a
file, and ``verify`` checks that a file is intact.
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
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    """Adds the command ``doctor``."""
    text = "what is installed, which kernels run, whether results are right, and how fast it is"
    doctor = commands.add_parser("doctor", help=text, description=f"Prints {text}.")
    doctor.add_argument(
        "--quick", action="store_true", help="skip the speed measurement, which takes ten seconds"
    )
    doctor.set_defaults(run=lambda parsed: _doctor.examine(speed=not parsed.quick))


def _add_of_file(
    commands: argparse._SubParsersAction, name: str, text: str, run: Callable[[str], int]
) -> None:
    """Adds a command that reads one file."""
    command = commands.add_parser(name, help=text, description=f"Prints {text}.")
    command.add_argument("file", help="the file to read")
    command.set_defaults(run=lambda parsed: run(parsed.file))


if __name__ == "__main__":
    sys.exit(main())
