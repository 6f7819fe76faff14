"""The commands that look at a file: what they print, what they refuse, what they cost."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from damaged_files import contents, with_leaves
from io_files import canonical, gaussian, join, pack, signed, split

import bitnet_jax as bj
import bitnet_jax.io
from bitnet_jax.__main__ import main
from bitnet_jax.io import _chunks


def model():
    return {
        "layer": {"kernel": pack((64, 32), bj.PHASE4), "bias": jnp.ones(32)},
        "grouped": pack((64, 32), bj.TernaryConfig(granularity=16)),
        "head": bj.pack(jnp.asarray(gaussian((64, 10))), bj.Int8Config()),
        "step": np.int64(3),
        "none": {},
    }


@pytest.mark.parametrize("dense", [False, True])
def test_inspect_prints_what_is_there(path, capsys, dense):
    tree = model()
    bitnet_jax.io.save(path, tree, dense=dense)
    assert main(["inspect", path]) == 0
    printed = capsys.readouterr().out
    table, totals = printed.split("\n\n")
    rows = {line.split()[0]: line.split() for line in table.splitlines()[1:]}
    assert list(rows) == ["grouped", "head", "layer/bias", "layer/kernel", "none", "step"]
    stored = "5 trits/byte" if dense else "2 bits"
    assert f"absmean 0.5, groups of 16  float32  {stored}" in table.replace("     2", "  2")
    assert f"absmean 0.1, per channel   float32  {stored}" in table.replace("     2", "  2")
    assert rows["layer/kernel"][1:3] == ["ternary", "64x32"]
    # 512 bytes of codes, or 412 of trits, and 128 of scales.
    assert rows["layer/kernel"][-4:] == (["540", "B", "640", "B"] if dense else ["640", "B"] * 2)
    assert rows["head"][1:5] == ["int8", "64x10", "per", "channel"]
    assert rows["layer/bias"][1:4] == ["array", "32", "float32"]
    assert rows["none"] == ["none", "empty"]
    assert rows["step"][1:4] == ["array", "scalar", "int64"]
    parameters = 2 * 64 * 32 + 64 * 10 + 32 + 1
    loaded = 2 * 512 + 128 + 4 * 4 * 32 + 680 + 128 + 8
    size = os.path.getsize(path)
    lines = [line.split("  ", 1) for line in totals.splitlines()]
    found = {name.strip(): value.strip() for name, value in lines}
    assert found["parameters"] == f"{parameters:,}"
    assert found["bytes in file"].startswith(f"{size:,}, ")
    assert found["bytes loaded"] == f"{loaded:,}"
    assert found["bytes as float32"] == f"{4 * parameters:,}"
    ratios = f"{4 * parameters / size:.2f}x in file, {4 * parameters / loaded:.2f}x loaded"
    assert found["ratio"] == ratios
    assert found["format"] == "version 2"


def test_inspect_reads_the_header_alone(path, monkeypatch, capsys):
    bitnet_jax.io.save(path, model())
    monkeypatch.setattr(_chunks, "read", None)
    monkeypatch.setattr(_chunks.Source, "read", None)
    assert main(["inspect", path]) == 0
    assert "not read" in capsys.readouterr().out


def test_verify_says_ok_in_one_line(tmp_path, capsys):
    path, found = contents(tmp_path)
    for name, content in found.items():
        with open(path, "wb") as file:
            file.write(content)
        assert main(["verify", path]) == 0
        printed = capsys.readouterr().out
        version = "1" if name == "version 1" else "2"
        assert printed.startswith(f"ok {path}: 8 leaves, 242 parameters, {len(content):,} bytes, ")
        assert f"version {version}, sha256 " in printed
        assert printed.count("\n") == 1


def test_verify_refuses_what_load_refuses(tmp_path, capsys):
    path, found = contents(tmp_path)
    for content in found.values():
        for at in range(0, len(content), 7):
            with open(path, "wb") as file:
                file.write(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            assert main(["verify", path]) == 1
            printed = capsys.readouterr()
            assert printed.out == ""
            assert printed.err.startswith(f"verify: {path!r} ")
            assert printed.err.count("\n") == 1


def test_verify_checks_what_is_signed(tmp_path, capsys):
    path, found = contents(tmp_path)
    header, data = split(found["plain"])
    begin, _ = header["layer/kernel.codes"]["data_offsets"]
    with open(path, "wb") as file:
        file.write(signed(header, data[:begin] + b"\xff" + data[begin + 1 :]))
    assert main(["verify", path]) == 1
    assert "'layer/kernel' has 1 bytes with a code of 3" in capsys.readouterr().err
    empty = {"kind": "empty", "path": ["layer"]}
    with open(path, "wb") as file:
        file.write(with_leaves(found["plain"], lambda _, leaves: leaves.append(empty)))
    assert main(["verify", path]) == 1
    assert "two leaves at ['layer']" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_files_that_are_none(tmp_path, capsys, command):
    for name in ("missing", "."):
        assert main([command, str(tmp_path / name)]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert str(tmp_path) in printed.err
    (tmp_path / "text").write_text("no model")
    assert main([command, str(tmp_path / "text")]) == 1
    assert "is not a safetensors file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main([command])
    assert error.value.code == 2


def test_a_folder_is_no_file(tmp_path, capsys):
    match = "this is a folder, and a file of bj.io.save is read. Name the file"
    with pytest.raises(IsADirectoryError, match=f"load: {match}"):
        bj.io.load(tmp_path)
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"verify: {match}: {tmp_path}\n"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_terminals_are_left_alone(tmp_path, capsys, command):
    path, found = contents(tmp_path)
    nasty = "\x1b]0;mine\x07\u202e\n\x9b2J"
    header, data = split(found["plain"])
    for key in ("__metadata__", "entry"):
        changed = json.loads(json.dumps(header))
        if key == "entry":
            changed[nasty] = changed.pop("raw")
        else:
            changed[key]["format"] = nasty
        with open(path, "wb") as file:
            file.write(signed(changed, data))
        assert main([command, path]) == 1
        assert capsys.readouterr().err.rstrip("\n").isprintable()
    named = with_leaves(found["plain"], lambda n, _: n["raw"].update(path=[nasty]), {"raw": nasty})
    with open(path, "wb") as file:
        file.write(named)
    assert main([command, path]) == 1
    assert capsys.readouterr().err.rstrip("\n").isprintable()
    strange = tmp_path / "ok\x1b[2J\nok"
    strange.write_bytes(found["plain"])
    assert main([command, str(strange)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main([command, f"{strange}?"]) == 1
    assert capsys.readouterr().err.rstrip("\n").isprintable()


def test_names_that_the_terminal_cannot_show(path):
    bitnet_jax.io.save(path, {"naïve": jnp.ones(1)})
    done = subprocess.run(
        [sys.executable, "-m", "bitnet_jax", "inspect", path],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "na\\xefve" in done.stdout


def leaf_of(index, name):
    return {"dtype": "int8", "kind": "array", "path": [name], "shape": [index, 0]}


def test_many_and_long_names_cost_little(path, capsys):
    names = ["n" * 10**6, *(f"leaf {i}" for i in range(20_000))]
    header = {
        n: {"dtype": "I8", "shape": [i, 0], "data_offsets": [0, 0]} for i, n in enumerate(names)
    }
    leaves = canonical([leaf_of(i, name) for i, name in enumerate(names)])
    metadata = {"format": "bitnet_jax", "version": "2", "leaves": leaves, "sha256": ""}
    with open(path, "wb") as file:
        file.write(join({"__metadata__": metadata} | header, b""))
    assert main(["inspect", path]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 20_000 + 10
    assert max(map(len, printed.splitlines())) < 250


CLAIMS = """
import resource, sys
from bitnet_jax.__main__ import main
limit = 4 << 30
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(sum(main([command, path]) for path in sys.argv[1:] for command in ("inspect", "verify")))
"""


def test_claims_are_not_believed(tmp_path):
    """A terabyte that the file does not have, and one that it has and that is empty."""
    leaves = canonical([{"dtype": "float32", "kind": "array", "path": ["x"], "shape": [2**38]}])
    metadata = {"format": "bitnet_jax", "version": "2", "leaves": leaves, "sha256": "0" * 64}
    entry = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    content = join({"__metadata__": metadata, "x": entry}, b"")
    (tmp_path / "short").write_bytes(content)
    (tmp_path / "long").write_bytes((2**62).to_bytes(8, "little") + content)
    with open(tmp_path / "header", "wb") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**34)  # of holes
    names = [str(tmp_path / name) for name in ("short", "long", "header")]
    done = subprocess.run(
        [sys.executable, "-c", CLAIMS, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 6, done.stderr
    assert done.stderr.count("\n") == 6
    assert "is truncated: 'x' ends at byte" in done.stderr
    assert "has a header of 8589934592 bytes; the most is" in done.stderr


def test_verify_keeps_one_chunk_at_a_time(path, capsys, monkeypatch):
    bitnet_jax.io.save(path, {"x": np.zeros(6 << 20, np.uint8)})
    sizes, real = [], np.empty
    monkeypatch.setattr(np, "empty", lambda n, *a: sizes.append(n) or real(n, *a))
    assert main(["verify", path]) == 0
    assert sizes
    assert max(sizes) == 1 << 20
