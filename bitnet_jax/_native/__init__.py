"""Loads the compiled product and registers it with XLA, or gives the reason why not.

The library is built when the package is installed (``CMakeLists.txt`` beside this
file) and loaded with ctypes, so one wheel serves every Python. XLA stops the whole
CPU backend when a library was compiled against a newer FFI than its own. So the
versions are compared before anything is registered.

From the layout up::

    layout                       of a prepared kernel
    path                         what an instruction set has to offer
    interleave, plain, unpack,   what paths are compiled from
    kernels, ymm, avx512.h,
    neon.h, dotprod.h
    amx, avx512, ..., portable   a path each
    threads                      work shared out over a pool
    product                      whole arrays of codes
    quantize                     kernels of floats to codes, by quantize_kernel
    attend                       attention over a cache, by attend_kernels
    limits                       what a product is measured against
    sha256                       digests of files, by sha256_lanes, a .cc for each set
    ffi                          XLA's door, and that of ctypes

``by_platform`` decides which programs call it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
import pathlib
import re
from typing import NamedTuple

import jax

OFF = "BITNET_JAX_NATIVE"
# Custom calls: the name of each in the library and in XLA.
QUANTIZE = "bitnet_quantize"
QUANTIZE_KERNEL = "bitnet_quantize_kernel"
MULTIPLY = "bitnet_multiply"
MULTIPLY_CODES = "bitnet_multiply_codes"
SUMS = "bitnet_sums"
LAY_OUT = "bitnet_lay_out"
ATTEND = "bitnet_attend"
READ = "bitnet_read"
BUSY = "bitnet_busy"
TARGETS = (QUANTIZE, QUANTIZE_KERNEL, MULTIPLY, MULTIPLY_CODES, SUMS, LAY_OUT, ATTEND, READ, BUSY)
_FUNCTIONS = (
    "bitnet_path_supported",
    "bitnet_chosen_path",
    "bitnet_choose_path",
    "bitnet_hasher_streams",
    "bitnet_sha256",
)
# Constants of a path that may be changed while it runs, in the order of ``Tuning`` in path.h.
CONSTANTS = ("direct rows", "slab", "step rows")
# No suffix of a Python extension: it is none, and nothing should try to import it.
_FILE = "product.native"
_log = logging.getLogger(__name__)


class Native(NamedTuple):
    """The library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str | None

    def built(self) -> list[str]:
        """Instruction sets that it has a path for, fastest first."""
        if self.library is None:
            return []
        names = itertools.takewhile(bool, map(self.library.bitnet_path, itertools.count()))
        return [name.decode() for name in names]

    def paths(self) -> list[str]:
        """Those of :meth:`built` that this processor runs."""
        if self.library is None:
            return []
        supported = self.library.bitnet_path_supported
        return [name for i, name in enumerate(self.built()) if supported(i)]

    def chosen(self) -> str | None:
        """The one that serves; None without a library."""
        return None if self.library is None else self.built()[self.library.bitnet_chosen_path()]

    def choose(self, path: str | None) -> None:
        """Takes one of :meth:`paths` from now on, in every thread; None: the fastest."""
        paths = self.paths()
        path = path or next(iter(paths), None)
        if self.library is None or path not in paths:
            raise ValueError(f"path: no {path!r} here, got one of {paths}")
        self.library.bitnet_choose_path(self.built().index(path))

    def tuning(self, path: str) -> dict[str, int]:
        """Those of ``CONSTANTS`` that a path of :meth:`built` has a use for."""
        if self.library is None:
            return {}
        index = self.built().index(path)
        values = (self.library.bitnet_constant(index, i) for i in range(len(CONSTANTS)))
        return {name: value for name, value in zip(CONSTANTS, values, strict=True) if value}

    def tune(self, path: str, constant: str, value: int) -> bool:
        """Sets one, in every thread; False where the path cannot take the value."""
        if self.library is None:
            return False
        index = self.built().index(path)
        return bool(self.library.bitnet_tune(index, CONSTANTS.index(constant), value))


@functools.cache
def load() -> Native:
    """The registered library; asked once a process."""
    if os.environ.get(OFF) == "0":
        return Native(None, f"{OFF}=0 turns it off")
    # An editable install has two folders, that of the sources and that of what was built.
    files = (pathlib.Path(folder, _FILE) for folder in __path__)
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return _without("it was not built: no GCC or Clang when bitnet_jax was installed")
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return _without(f"it does not load: {error}")
    built, runs = library.bitnet_ffi_version(), _runtime_version()
    if built // 1000 != runs // 1000 or built > runs:
        return _without(
            f"it was built for XLA FFI {_dotted(built)}, and this jaxlib has {_dotted(runs)}. "
            "Install bitnet_jax again"
        )
    try:
        library.bitnet_path.restype = library.bitnet_hasher.restype = ctypes.c_char_p
        handlers = {target: getattr(library, target) for target in TARGETS}
        library.bitnet_constant.restype = ctypes.c_int64
        library.bitnet_tune.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64)
        for name in _FUNCTIONS:
            getattr(library, name)
    except AttributeError as error:
        return _without(f"it was built from other sources: {error}. Install bitnet_jax again")
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return Native(library, None)


def preferred() -> bool:
    """Whether it is there and the fastest: the portable path is there for its bits alone.

    Elsewhere than on a CPU plain JAX would run, and a program need not name what it leaves out.
    """
    return jax.default_backend() == "cpu" and _is_fast(load())


@functools.cache  # asked for every quantiser that is traced
def _is_fast(native: Native) -> bool:
    paths = native.paths()
    return bool(paths) and paths != ["portable"]


def _without(reason: str) -> Native:
    _log.info("The native CPU product is not used, 'xla' serves instead: %s.", reason)
    return Native(None, reason)


def _runtime_version() -> int:
    """1000 * major + minor of the FFI that this jaxlib runs, from the header it ships."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    major, minor = (
        int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0])
        for part in ("MAJOR", "MINOR")
    )
    return 1000 * major + minor


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000}"
