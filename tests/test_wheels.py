"""What ``wheels.py`` refuses in a built wheel."""

import json
import zipfile

import pytest
import wheels

VERSION = "1.2.3"
INFO = f"bitnet_jax-{VERSION}.dist-info"
BILL = {
    "bomFormat": "CycloneDX",
    "metadata": {"component": {"name": "bitnet_jax", "version": VERSION}},
    "components": [{"name": "headers", "version": "0.10.2"}],
}
PLATFORM = "manylinux_2_27_x86_64.manylinux_2_28_x86_64"


def made(folder, platform, *, name=None, drop=(), **changed):
    """A wheel as it should be, but for what is changed."""
    files = {
        "bitnet_jax/py.typed": b"",
        f"{INFO}/licenses/LICENSE": b"Apache",
        f"{INFO}/METADATA": f"Version: {VERSION}\nLicense-Expression: Apache-2.0\n".encode(),
        f"{INFO}/WHEEL": "".join(f"Tag: py3-none-{p}\n" for p in platform.split(".")).encode(),
    }
    if platform != "any":
        files[wheels.LIBRARY] = b"code"
        files[f"{INFO}/sboms/bitnet_jax.cdx.json"] = json.dumps(BILL).encode()
    files |= changed.get("files", {})
    path = folder / (name or f"bitnet_jax-{VERSION}-py3-none-{platform}.whl")
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            if file not in drop:
                archive.writestr(file, content)
    return str(path)


def test_wheels_as_they_should_be(tmp_path):
    for platform in (PLATFORM, "any"):
        assert list(wheels.faults(made(tmp_path, platform))) == []
    bare = made(tmp_path, "linux_x86_64", drop=[wheels.LIBRARY])
    assert list(wheels.faults(bare, compiled=False)) == []


BILL_FILE = f"{INFO}/sboms/bitnet_jax.cdx.json"
OTHER = BILL | {"metadata": {"component": {"name": "bitnet_jax", "version": "1"}}}
NO_VERSION = BILL | {"components": [{"name": "headers", "version": ""}]}
CASES = {
    "of one Python": (PLATFORM, {"name": "bitnet_jax-1-cp311-cp311-any.whl"}, "its name"),
    "no library": (PLATFORM, {"drop": [wheels.LIBRARY]}, "is missing"),
    "a library in the pure one": ("any", {"files": {wheels.LIBRARY: b""}}, "is there"),
    "no licence": ("any", {"drop": [f"{INFO}/licenses/LICENSE"]}, "LICENSE is missing"),
    "no bill": (PLATFORM, {"drop": [BILL_FILE]}, "cdx.json is missing"),
    "a bill of another": (PLATFORM, {"files": {BILL_FILE: json.dumps(OTHER)}}, "is of"),
    "no headers": (PLATFORM, {"files": {BILL_FILE: json.dumps(NO_VERSION)}}, "has headers ''"),
    "tests": ("any", {"files": {"tests/a.py": b""}}, "outside the package"),
    "another tag": ("any", {"files": {f"{INFO}/WHEEL": "Tag: py3-none-win32\n"}}, "its tags"),
    "another licence": (
        "any",
        {"files": {f"{INFO}/METADATA": f"Version: {VERSION}\nLicense-Expression: MIT\n"}},
        "it says",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_faults(name, tmp_path):
    platform, changes, says = CASES[name]
    first, *_ = wheels.faults(made(tmp_path, platform, **changes))
    assert says in first


def test_a_large_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "LARGEST", 10)
    (fault,) = wheels.faults(made(tmp_path, "any"))
    assert "10 are the most" in fault
