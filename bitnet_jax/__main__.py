"""The command line: ``python -m bitnet_jax doctor`` says how well it works on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bitnet_jax import _doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bitnet_jax", description="1.58-bit networks for JAX."
    )
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    _add_doctor(commands)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    """Adds ``doctor`` and what it runs."""
    text = "what is installed, what it runs by, whether its bits are right, and how fast it is"
    doctor = commands.add_parser("doctor", help=text, description=f"Prints {text}.")
    doctor.add_argument(
        "--quick", action="store_true", help="leave out the speed, which takes ten seconds"
    )
    doctor.set_defaults(run=lambda parsed: _doctor.examine(speed=not parsed.quick))


if __name__ == "__main__":
    sys.exit(main())
