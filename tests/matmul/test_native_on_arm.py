"""The native CPU product of Arm processors, built as it is shipped and run under emulation."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from bitnet_jax import _native as native

DRIVER = pathlib.Path(__file__).parents[1] / "native" / "driver.cc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR, "cmake") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}"),
]

# Of each processor, the paths that it runs.
RUNS = {
    "cortex-a53": ["neon", "portable"],
    "neoverse-n1": ["dotprod", "neon", "portable"],
    "max": ["i8mm", "dotprod", "neon", "portable"],
}


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The library, the objects that it is made of, and the driver of every path from them."""
    folder = tmp_path_factory.mktemp("arm")
    sources = pathlib.Path(native.__file__).parent
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    tools = [f"-DCMAKE_CXX_COMPILER={COMPILER}", f"-DPython_EXECUTABLE={sys.executable}"]
    kind = "-DCMAKE_BUILD_TYPE=Release"
    run("cmake", "-S", sources, "-B", folder, *system, *tools, kind)
    run("cmake", "--build", folder)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-static", "-pthread", f"-I{sources}"]
    run(COMPILER, *flags, DRIVER, *objects(folder), "-o", folder / "driver")
    return folder


def objects(folder):
    return sorted(path for path in folder.rglob("*.cc.o") if path.name != "ffi.cc.o")


@pytest.mark.parametrize("processor", RUNS)
def test_paths_of_arm_have_the_sums_of_their_definition(folder, processor):
    lines = run(EMULATOR, "-cpu", processor, folder / "driver").splitlines()
    found = dict(line.split(": ") for line in lines[:-1])
    assert list(found) == RUNS["max"]
    assert found == {name: "0 wrong" if name in RUNS[processor] else "not here" for name in found}
    assert lines[-1] == "0 failures"


def test_the_library_is_one_of_arm(folder):
    assert (folder / "product.native").read_bytes()[18:20] == b"\xb7\0"  # EM_AARCH64


def test_only_attention_fuses_multiplications_with_additions(folder):
    fused = {
        path.name
        for path in objects(folder)
        if "\tfmla\t" in (code := run("aarch64-linux-gnu-objdump", "-d", path))
        or "\tfmadd\t" in code
    }
    assert fused == {"attend.cc.o"}
