"""Random nets in every context, on every instruction set: 0 outputs differ in a bit."""

import functools
import os
import pathlib
import subprocess
import sys

import pytest
import random_nets
from cases import cases

pytestmark = pytest.mark.optimised

SOME = ("jit", "params constant", "vmap", "training", "eight devices")
PROCESSORS = {
    isa: {"XLA_FLAGS": f"--xla_cpu_max_isa={isa}"} for isa in ("SSE4_2", "AVX2", "AVX512")
}
PROCESSORS["no native"] = {"BITNET_JAX_NATIVE": "0"}


@cases(
    ("number", "contexts"),
    [(1, ("x constant",)), *((number, SOME) for number in range(3))],
    core=[(1, ("x constant",))],
)
def test_a_sample(number, contexts):
    differ, total, _, where = random_nets.check(number, contexts)
    assert total > 0
    assert (differ, where) == (0, [])


@functools.cache
def printed(processor):
    """What the program prints where XLA compiles for a processor: counts, and digests by dtype."""
    program = pathlib.Path(random_nets.__file__)
    environment = {**os.environ, "PYTHONPATH": str(program.parents[1]), **PROCESSORS[processor]}
    command = [sys.executable, str(program), "--nets", "0", "9"]
    if processor == "SSE4_2":  # jax 0.12 compiles no float16 for it
        command += ["--dtypes", "float32", "bfloat16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_all_contexts_on_other_processors(processor):
    code, lines, errors = printed(processor)
    assert code == 0, "\n".join([*lines, errors])
    assert any(line.startswith("0 of ") for line in lines)
    digests = printed("AVX2")[1][-len(random_nets.DTYPES) :]  # of the outputs themselves
    without = "float16" if processor == "SSE4_2" else "none"
    assert {line for line in digests if not line.startswith(without)} <= {*lines}
