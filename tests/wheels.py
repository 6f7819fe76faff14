"""Checks built wheels as users get them: ``python tests/wheels.py dist/*.whl``.

A wheel serves every Python 3. One of a platform holds the native library and its bill of
materials (PEP 770); the pure one, which serves all other platforms, holds neither.

    python tests/wheels.py --installed    the package of this Python loads its library
"""

from __future__ import annotations

import argparse
import email
import json
import re
import sys
import zipfile
from collections.abc import Iterator

LARGEST = 3_000_000  # bytes
LIBRARY = "bitnet_jax/_native/product.native"
NAME = re.compile(r"bitnet_jax-(?P<version>[\w.]+)-py3-none-(?P<platform>[\w.]+)\.whl")


def faults(path: str, compiled: bool = True) -> Iterator[str]:
    """What is wrong with a wheel; ``compiled``: whether that of a platform has the library."""
    name = NAME.fullmatch(path.replace("\\", "/").rpartition("/")[2])
    if name is None:
        yield "its name is not bitnet_jax-VERSION-py3-none-PLATFORM.whl"
        return
    pure = name["platform"] == "any"
    with zipfile.ZipFile(path) as wheel:
        files = {entry.filename: entry for entry in wheel.infolist()}
        packed = sum(entry.compress_size for entry in files.values())
        if packed > LARGEST:
            yield f"{packed} bytes, and {LARGEST} are the most"
        if (LIBRARY in files) != (compiled and not pure):
            yield f"{LIBRARY} is {'there' if LIBRARY in files else 'missing'}"
        strange = [f for f in files if not f.startswith(("bitnet_jax/", "bitnet_jax-"))]
        if strange:
            yield f"it has files outside the package: {strange[:3]}"
        info = f"bitnet_jax-{name['version']}.dist-info"
        needed = [f"{info}/licenses/LICENSE", "bitnet_jax/py.typed"]
        bill = f"{info}/sboms/bitnet_jax.cdx.json"
        needed += [bill] if LIBRARY in files else []
        missing = [f for f in needed if f not in files]
        if missing:
            yield f"{', '.join(missing)} is missing"
            return
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        if (metadata["Version"], metadata["License-Expression"]) != (
            name["version"],
            "Apache-2.0",
        ):
            yield f"it says {metadata['Version']}, {metadata['License-Expression']}"
        tags = email.message_from_bytes(wheel.read(f"{info}/WHEEL")).get_all("Tag", [])
        if {tag.rpartition("-")[2] for tag in tags} != {*name["platform"].split(".")}:
            yield f"its tags are {tags}"
        if bill in needed:
            yield from _faults_of_bill(json.loads(wheel.read(bill)), name["version"])


def _faults_of_bill(bill: dict, version: str) -> Iterator[str]:
    ours, (headers,) = bill["metadata"]["component"], bill["components"]
    if bill["bomFormat"] != "CycloneDX" or ours["version"] != version:
        yield f"its bill of materials is of {ours['name']} {ours['version']}"
    if not re.fullmatch(r"\d+\.\d+\.\d+\S*", headers["version"]):
        yield f"its bill of materials has {headers['name']} {headers['version']!r}"


def faults_of_installed() -> Iterator[str]:
    """What is wrong with the package that this Python imports from where it stands."""
    import bitnet_jax
    from bitnet_jax import _native

    if "site-packages" not in bitnet_jax.__file__:
        yield f"{bitnet_jax.__file__} is not an installed package"
    if _native.load().library is None:
        yield f"the native library does not serve: {_native.load().reason}"


def main() -> int:
    """Prints the faults that were found; 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*")
    parser.add_argument("--installed", action="store_true", help="the package of this Python")
    parser.add_argument("--without-compiler", action="store_true", help="no library in any")
    args = parser.parse_args()
    found = [
        f"{path}: {fault}"
        for path in args.wheels
        for fault in faults(path, not args.without_compiler)
    ]
    if args.installed:
        found += faults_of_installed()
    elif not args.wheels:
        parser.error("no wheel is given, and no --installed")
    print("\n".join(found) if found else f"{len(args.wheels) or 'the installed'} as it should be")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
