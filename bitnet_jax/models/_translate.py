"""``python -m bitnet_jax convert SRC DST``: a checkpoint in another form, with the same bits.

SRC is told by what is there: a folder, a GGUF file, or a file of this library. DST is told
by its name: one that ends in ``.safetensors`` is a file of this library, any other a
folder as Hugging Face has them. Either is written beside its place and renamed into it
when it is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from typing import NoReturn

import jax.numpy as jnp

import bitnet_jax.io as bitnet_io
from bitnet_jax._display import size_text
from bitnet_jax._quantize.int8 import Int8Config
from bitnet_jax.io import _chunks, _file
from bitnet_jax.io._gguf import Gguf
from bitnet_jax.io._huggingface import CONFIG, INDEX, WHOLE, Folder
from bitnet_jax.io._source import kind_of
from bitnet_jax.models import _saved
from bitnet_jax.models._command import Progress
from bitnet_jax.models._decoder import Decoder
from bitnet_jax.models._pretrained import PASSED

WHO = "convert"

_FILE = ".safetensors"

_OTHERS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".msgpack", ".h5", ".onnx", ".json")

_SHARD = r"model-\d{5}-of-\d{5}\.safetensors"

_GGUF_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_NO_FLOATS = re.compile(r"norm|weight_scale$|inv_freq$")

_DTYPES = ("float32", "bfloat16", "float16")


def run(parsed: argparse.Namespace) -> int:
    """Checks, reads, writes, and says what was written; returns the exit code."""
    source, target = parsed.source, parsed.target
    begin = time.perf_counter()
    kind = kind_of(source)
    if kind is None:
        raise FileNotFoundError(
            f"{WHO}: there is no {source!r}. Name a folder with config.json and *.safetensors, a "
            ".gguf file, or a file of bj.io.save."
        )
    to_file = target.lower().endswith(_FILE)
    _require_options(parsed, to_file)
    _require_target(source, target, to_file, parsed.overwrite)
    decoder = kind != "saved" or _holds_decoder(source)
    if not decoder and not to_file:
        _refuse(
            f"{source!r} holds parameters and no decoder's config, which a Hugging Face folder "
            f"needs. Name a DST that ends in {_FILE}, or write SRC with Decoder.save."
        )
    if decoder:
        _convert(parsed, kind, to_file, begin)
    else:
        _require_as_they_are(parsed)
        tree = bitnet_io.load(source)
        _file.write(target, tree, dense=parsed.dense, progress=_writing())
    taken = time.perf_counter() - begin
    print(f"wrote {target}, {size_text(_size(target))}, in {taken:.1f} s", file=sys.stderr)
    return 0


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"{WHO}: {what}")


def _require_options(parsed: argparse.Namespace, to_file: bool) -> None:
    """Refuses options of the other kind of DST."""
    if parsed.target.lower().endswith(_OTHERS):
        _refuse(
            f"DST {parsed.target!r} is of a kind that is not written. Name a file that ends in "
            f"{_FILE}, or a folder."
        )
    if not to_file and parsed.target.lower().rstrip(os.sep).endswith(_FILE):
        _refuse(f"DST {parsed.target!r} names a file and a folder. Leave out the {os.sep!r}.")
    if to_file and parsed.layout is not None:
        _refuse(f"--layout is of a folder, and DST {parsed.target!r} is a file. Leave it out.")
    for name in ("dense", "int8"):
        if not to_file and getattr(parsed, name):
            _refuse(
                f"--{name} is of a file, and DST {parsed.target!r} is a folder. Leave it out, or "
                f"name a DST that ends in {_FILE}."
            )


def _require_as_they_are(parsed: argparse.Namespace) -> None:
    """Refuses options that only a decoder's parameters can follow."""
    for name in ("dtype", "int8"):
        if getattr(parsed, name):
            _refuse(
                f"--{name} is for decoders, and {parsed.source!r} holds parameters without a "
                "decoder's config. Leave it out."
            )


def _require_target(source: str, target: str, to_file: bool, overwrite: bool) -> None:
    """Refuses a DST that is SRC, that cannot be written, or that is there."""
    a, b = os.path.realpath(source), os.path.realpath(target)
    if os.path.commonpath([a, b]) in (a, b):
        _refuse(f"DST {target!r} is SRC, or one is in the other. Name another place.")
    above = os.path.dirname(b)
    if not os.path.isdir(above):
        raise FileNotFoundError(f"{WHO}: there is no folder {above!r} for DST. Make it first.")
    if not os.path.exists(b):
        return
    if os.path.lexists(b) and to_file == os.path.isdir(b):
        what = "a folder" if to_file else "a file"
        _refuse(f"DST {target!r} is {what} already. Name another, or remove it.")
    if not to_file:
        there = sorted(os.listdir(b))
        strange = [name for name in there if not _is_ours(b, name)]
        if strange:
            _refuse(
                f"DST {target!r} holds {strange[0]!r}, which is no part of a checkpoint. Name "
                "another folder."
            )
        if b == os.getcwd():
            _refuse(f"DST {target!r} is the folder you are in, which is replaced. Name another.")
        if not there:
            return
        if CONFIG not in there:
            _refuse(f"DST {target!r} is no checkpoint: it has no {CONFIG}. Name another folder.")
    if not overwrite:
        raise FileExistsError(f"{WHO}: DST {target!r} is there. Pass --overwrite to replace it.")


def _is_ours(folder: str, name: str) -> bool:
    """Whether an export has a file of this name."""
    path = os.path.join(folder, name)
    known = name in (CONFIG, INDEX, WHOLE, *PASSED) or re.fullmatch(_SHARD, name)
    return bool(known) and os.path.isfile(path) and not os.path.islink(path)


def _holds_decoder(path: str) -> bool:
    with _chunks.open_source(WHO, path) as source:
        _file.declared(source.header)
        return _saved.described(source.header.metadata) is not None


def _convert(parsed: argparse.Namespace, kind: str, to_file: bool, begin: float) -> None:
    """Loads a decoder and writes it."""
    narrow = Int8Config() if parsed.int8 else None
    # A saved file says its own dtypes.
    stored = set() if kind == "saved" else stored_floats(parsed.source, kind)
    own = None if kind == "saved" else own_dtype(stored)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Decoder.from_pretrained(
            parsed.source,
            dtype=parsed.dtype or own,
            weights=narrow,
            head=narrow,
            progress=Progress(begin),
        )
    widened = sorted(stored - {*_DTYPES}) if kind == "gguf" and not parsed.int8 else []
    if widened:
        remedy = "--int8 writes int8" if to_file else "a file takes --int8"
        print(f"note: {', '.join(widened)} weights become floats; {remedy}", file=sys.stderr)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if to_file:
        model.save(parsed.target, dense=parsed.dense, progress=_writing())
        return
    says = model.origin.config.get("quantization_config") or {}
    same = "autobitlinear" if says.get("linear_class") == "autobitlinear" else "bitlinear"
    with _replacing(parsed.target) as folder:
        layout = parsed.layout or same
        bitnet_io.export_huggingface(model, folder, layout=layout, progress=_writing())


def _writing() -> Progress:
    return Progress(time.perf_counter(), "writing")


def stored_floats(path: str, kind: str) -> set[str]:
    """The types in which a folder or a GGUF file stores what is no trits: dtypes, or blocks.

    Norms, which stay in float32, and scales are left out.
    """
    if kind == "gguf":
        tensors = [t for n, t in Gguf(WHO, path).items() if "norm" not in n and "rope" not in n]
        names = [t.block.name for t in tensors if t.block.ternary is None]
        return {_GGUF_FLOATS.get(name, name) for name in names}
    arrays = {n: a for n, a in Folder(WHO, path).items() if not _NO_FLOATS.search(n)}
    return {a.dtype.name for a in arrays.values() if jnp.issubdtype(a.dtype, jnp.floating)}


def own_dtype(stored: set[str]) -> str:
    """The narrowest dtype that holds all of :func:`stored_floats`."""
    (one, *more) = stored or {"float32"}
    return one if not more and one in _DTYPES else "float32"


@contextlib.contextmanager
def _replacing(target: str) -> Iterator[str]:
    """A folder beside a target, renamed to it if the body does not raise."""
    target = os.path.realpath(target)
    base = os.path.join(os.path.dirname(target), f".bitnet_jax-{secrets.token_hex(8)}")
    new, old = f"{base}.tmp", f"{base}.old"
    try:
        yield new
        if os.path.exists(target):
            shutil.copymode(target, new)
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if os.path.exists(old) and not os.path.exists(target):
            os.rename(old, target)
        raise
    finally:
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


def _size(path: str) -> int:
    files = [entry.path for entry in os.scandir(path)] if os.path.isdir(path) else [path]
    return sum(map(os.path.getsize, files))
