"""The doctor: what it prints with the native product and without, and its exit code."""

import importlib
import os
import shutil
import subprocess
import sys

import jax
import pytest

from bitnet_jax import _doctor
from bitnet_jax import _native as native
from bitnet_jax.__main__ import main
from bitnet_jax._matmul import IMPLEMENTATIONS

PATHS = native.load().paths()
needs_it = pytest.mark.skipif(not PATHS, reason="no C++ compiler built the native product")
TINY = _doctor.Load(side=512, kernels=2, read=16, rows=4, seconds=0.0)


def section(text, title):
    """The lines below a title, as what each is about and what was found."""
    lines = text.split(f"{title}\n", 1)[1].split("\n\n")[0].splitlines()
    return [(line[:20].strip(), line[20:]) for line in lines]


def bits(text):
    return section(text, "bits of 12 small products against 'reference'")


def replace_contract(monkeypatch, name, change):
    """Lets an implementation compute ``change`` of what it computes."""
    row = IMPLEMENTATIONS[name]
    wrong = row._replace(contract=lambda *args: change(row.contract(*args)))
    monkeypatch.setitem(IMPLEMENTATIONS, name, wrong)


def chosen(monkeypatch):
    """The paths that are chosen from now on."""
    calls, choose = [], native.Native.choose

    def choose_and_tell(self, path):
        calls.append(path)
        choose(self, path)

    monkeypatch.setattr(native.Native, "choose", choose_and_tell)
    return calls


def remove_native(monkeypatch, reason="it was not built: no GCC or Clang"):
    monkeypatch.setattr(native, "load", lambda: native.Native(None, reason))


def in_a_new_process(*arguments, **env):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_it
def test_the_command_with_the_native_product():
    done = in_a_new_process("-m", "bitnet_jax", "doctor", "--quick")
    assert (done.returncode, done.stderr) == (0, "")
    versions = dict(section(done.stdout, "versions"))
    assert list(versions) == ["bitnet_jax", "Python", "jax", "jaxlib", "backend", "cores"]
    assert versions["jax"] == jax.__version__
    assert versions["backend"].startswith("cpu, devices ")
    found = dict(section(done.stdout, "native product"))
    assert found["library"] == native.load().library._name
    assert found["paths built"] == ", ".join(native.load().built())
    assert found["this CPU runs"] == ", ".join(PATHS)
    assert [label for label, _ in bits(done.stdout)][-len(PATHS) :] == [f"cpu, {p}" for p in PATHS]
    assert {text for _, text in bits(done.stdout)} == {"same bits"}
    assert done.stdout.endswith("\nThe results are right.\n")
    assert "speed" not in done.stdout


WITHOUT_EXTRAS = """
import runpy, sys
for name in ("matplotlib", "orbax", "sklearn", "tabulate", "tqdm"):
    sys.modules[name] = None
sys.argv[1:] = ["doctor"]
runpy.run_module("bitnet_jax", run_name="__main__", alter_sys=True)
"""


@pytest.mark.full
def test_the_command_turned_off_and_without_any_extra():
    done = in_a_new_process("-c", WITHOUT_EXTRAS, BITNET_JAX_NATIVE="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert section(done.stdout, "native product") == [
        ("library", "none: BITNET_JAX_NATIVE=0 turns it off"),
        ("remedy", "unset BITNET_JAX_NATIVE"),
    ]
    picked = dict(section(done.stdout, "preferred here"))
    assert picked["ternary kernel"] == "matmul runs 'reference', prepare lays it out for 'xla'"
    assert picked["int8 kernel"] == "matmul runs 'reference', prepare lays it out as stored"
    assert "'cpu' is not there: BITNET_JAX_NATIVE=0 turns it off" in done.stdout
    assert bits(done.stdout) == [("xla, reference", "same bits")]
    assert (
        "the native product is not in use" in dict(section(done.stdout, "ten seconds"))["skipped"]
    )


@pytest.mark.parametrize("arguments", [[], ["cure"], ["doctor", "--slow"]])
def test_a_wrong_command_is_refused_by_argparse(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m bitnet_jax" in capsys.readouterr().err


def test_importing_the_command_does_nothing(capsys):
    importlib.reload(importlib.import_module("bitnet_jax.__main__"))
    assert capsys.readouterr() == ("", "")


def test_a_wrong_result_is_named_and_is_exit_code_1(monkeypatch, capsys):
    remove_native(monkeypatch)
    replace_contract(monkeypatch, "xla", lambda y: y.at[0, 3].add(1))
    assert main(["doctor", "--quick"]) == 1
    text = capsys.readouterr().out
    [(label, verdict)] = bits(text)
    assert label == "xla, reference"
    assert verdict.startswith(
        "DIFFERS: 1 of 100 outputs of ternary in groups of 60, M = 1, float32"
    )
    assert "1 of 600 outputs of ternary in groups of 60, M = 6, bfloat16" in verdict
    assert verdict.endswith("(9 of 12 products)")  # the int8 ones are not by xla
    assert "WRONG RESULTS by xla, reference: do not use them" in text
    assert "right" not in text
    assert "turns the native product off" not in text


@pytest.mark.full
def test_minus_zero_is_not_zero(monkeypatch, capsys):
    remove_native(monkeypatch)
    replace_contract(monkeypatch, "reference", lambda y: y.at[0, 0].set(0))
    replace_contract(monkeypatch, "xla", lambda y: y.at[0, 0].set(-0.0))
    assert main(["doctor", "--quick"]) == 1
    assert "DIFFERS: 1 of 100 outputs" in capsys.readouterr().out


@needs_it
def test_one_wrong_path_is_told_from_the_right_ones(monkeypatch, capsys):
    calls = chosen(monkeypatch)
    replace_contract(monkeypatch, "cpu", lambda y: y + y.dtype.type(calls[-1] == "portable"))
    assert main(["doctor", "--quick"]) == 1
    text = capsys.readouterr().out
    found = dict(bits(text))
    assert found.pop("cpu, portable").startswith("DIFFERS: ")
    assert set(found.values()) <= {"same bits"}
    assert "WRONG RESULTS by cpu, portable: do not use them" in text
    assert "BITNET_JAX_NATIVE=0 turns the native product off" in text


@needs_it
def test_a_product_that_raises_is_a_finding_and_the_path_is_put_back(monkeypatch, capsys):
    calls = chosen(monkeypatch)

    def fail(y):
        raise RuntimeError("out of order")

    replace_contract(monkeypatch, "cpu", fail)
    assert main(["doctor", "--quick"]) == 1
    found = dict(bits(capsys.readouterr().out))
    assert {found[f"cpu, {path}"] for path in PATHS} == {"FAILS: RuntimeError('out of order')"}
    assert calls == [*PATHS, None]


@needs_it
def test_the_path_is_put_back_when_the_reader_stops(monkeypatch):
    calls = chosen(monkeypatch)
    lines = _doctor.check_bits()
    next(lines)
    lines.close()
    assert calls[-1:] in ([None], [])  # none was chosen where xla came first


@needs_it
@pytest.mark.full
def test_the_portable_path_alone_is_checked_and_does_not_serve(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(native.Native, "paths", lambda self: ["portable"])
        assert _doctor.examine(load=TINY) == 0
    native.load().choose(None)  # the fastest, of all of them again
    text = capsys.readouterr().out
    assert dict(section(text, "native product"))["serves"] == "none, for the reason below"
    assert "'cpu' would be slower here; it runs if it is named" in text
    assert bits(text) == [("xla, reference", "same bits"), ("cpu, portable", "same bits")]
    assert "skipped" in dict(section(text, "ten seconds"))


@pytest.mark.skipif(len(PATHS) < 2, reason="no path that serves")
@pytest.mark.full
def test_the_speed_is_told_as_shares_of_two_limits(capsys):
    assert _doctor.examine(load=TINY) == 0
    text = capsys.readouterr().out
    found = section(text, "speed, about ten seconds")
    assert [label for label, _ in found] == ["one token", "", "4 tokens"]
    for (_, line), end in zip(
        found[::2], ("of this machine's bandwidth", "registers"), strict=True
    ):
        assert " % (" in line
        assert line.endswith(end)
    assert "GB/s" in found[0][1]
    assert f"that {PATHS[0]} does in registers" in found[2][1]


@pytest.mark.parametrize(
    ("platform", "compiler", "off", "remedy"),
    [
        ("linux", None, "0", "unset BITNET_JAX_NATIVE"),
        ("win32", None, "1", "none, it is not built on Windows"),
        ("linux", None, "1", "install GCC or Clang, then bitnet_jax again"),
        ("linux", "clang++", "1", "install bitnet_jax again; there is a C++ compiler, /clang++"),
    ],
)
def test_the_remedy_is_for_what_is_missing(monkeypatch, capsys, platform, compiler, off, remedy):
    remove_native(monkeypatch)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(shutil, "which", lambda name: f"/{name}" if name == compiler else None)
    monkeypatch.setenv(native.OFF, off)
    found = dict(_doctor._describe_native())
    assert found["library"] == "none: it was not built: no GCC or Clang"
    assert found["remedy"].endswith(remedy)
