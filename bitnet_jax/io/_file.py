"""Our own file format: a parameter tree in one safetensors file.

An array is one tensor, named by its keys joined with ``/``. A packed kernel is
two, ``<name>.codes`` and ``<name>.scale``, in storage layout; in a dense file the
codes are ``<name>.trits`` (_trits). The names are for people and for other tools;
what the file means is in its metadata, where every value is a string::

    format    "bitnet_jax"
    version   "2"; "1", whose digest is over bytes and not over chunks, is read too
    leaves    canonical JSON, one object a leaf: its kind (array, packed, int8, empty), its
              path as a list of str and int keys, its dtype and logical shape, and for a packed
              kernel all of its static data, with "stored": "trits" if it is dense
    sha256    over everything else (_container)

Nothing in a file is executed or unpickled, and nothing in it is trusted: what
``leaves`` declares and what the tensors are must agree, and a packed kernel must
keep the invariants of ``PackedTernary`` or ``PackedInt8``.
Left out: boxes. linen's ``Partitioned`` and ``nnx.Variable`` are opened when a
tree is saved: sharding belongs to the mesh of a run, not to its weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bitnet_jax import _checks
from bitnet_jax._tree.leaves import is_box, unbox
from bitnet_jax.io import _chunks, _dense, _manifest, _safetensors, _shardings, _tensors
from bitnet_jax.io._manifest import Leaf
from bitnet_jax.io._safetensors import FormatError, Header, damaged
from bitnet_jax.io._tensors import DTYPES, Part, name_of

FORMAT, VERSIONS = "bitnet_jax", ("1", "2")


def save(path: str | os.PathLike[str], tree: Any, *, dense: bool = False) -> None:
    """Writes a parameter tree, packed kernels included, to one safetensors file.

    The file is written aside, forced to the disk and moved into place: a save
    that fails leaves what was there before, and one whose process is killed also
    leaves a ``.bitnet_jax-*.tmp`` beside it, which nothing reads and you may
    delete. The same tree always gives the same bytes. Beside the tree, memory
    holds one of its arrays at a time. Boxes (linen's ``Partitioned``,
    ``nnx.Variable``) are opened and not stored; ``FrozenDict`` and ``nnx.State``
    come back as dicts.

    Args:
      path: the file; by custom ``*.bitnet.safetensors``.
      tree: nested mappings with str or int keys. Leaves are arrays of any dtype
        or packed kernels. An empty mapping in it is kept.
      dense: whether two-bit kernels take 1.6 bits a weight, five codes to a byte,
        a fifth less than in memory. :func:`load` gives back the same bits.

    Raises:
      TypeError: a list, tuple, None, Python number, tracer, random key or
        prepared kernel in the tree; a key that is no str or int; another type
        of ``path``, ``tree`` or ``dense``. Nothing is written.
      ValueError: no arrays; two leaves of one name; a packed kernel that breaks
        its invariants (a scale that is not finite and > 0, say); an array that
        was deleted, or that other processes hold a part of; more than 100 keys
        to a leaf. Nothing is written.
      OSError: the disk's own.

    Example:
      >>> import os, tempfile, jax, bitnet_jax as bj
      >>> packed = {"head": {"kernel": bj.pack(jax.random.normal(jax.random.key(0), (64, 16)))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     bj.io.save(os.path.join(folder, "model.bitnet.safetensors"), packed)
      ...     os.listdir(folder)
      ['model.bitnet.safetensors']
    """
    _checks.require_instance("save", "path", path, (str, os.PathLike), "Name a file.")
    remedy = "Wrap a leaf in a dict, {'kernel': leaf}; of an nnx model pass nnx.state(model)."
    _checks.require_instance("save", "tree", tree, Mapping, remedy)
    _checks.require_instance(
        "save", "dense", dense, bool, "True packs five codes to a byte in the file."
    )
    described, contents = _describe(tree, dense)
    for part, array in contents.values():
        wrong = part.count_all(array)
        if wrong:
            raise ValueError(
                f"save: {part.owner} {part.fault(wrong)}. Make packed kernels with bj.pack."
            )
    tensors = _safetensors.lay_out({name: part.stored for name, (part, _) in contents.items()})
    leaves = _safetensors.canonical_json(described)
    metadata = {"format": FORMAT, "version": VERSIONS[-1], "leaves": leaves}
    _chunks.write(os.fspath(path), tensors, metadata, lambda name: _content(*contents[name]))


def _describe(tree: Any, dense: bool) -> tuple[list[dict[str, Any]], dict[str, tuple[Part, Any]]]:
    """Every leaf's description, and every array by the name of its tensor."""
    described: list[dict[str, Any]] = []
    contents: dict[str, tuple[Part, Any]] = {}
    for where, value in _walk((), tree):
        leaf, arrays = _manifest.describe(where, value, dense=dense)
        described.append(leaf.described)
        for part, array in zip(leaf.parts, arrays, strict=True):
            if part.name in contents or part.name == _safetensors.METADATA:
                raise ValueError(
                    f"save: `tree` has two leaves that are {part.name!r} in a file, or a name "
                    "that safetensors keeps for itself. Rename one."
                )
            contents[part.name] = part, array
    _checks.require_leaves("save", "tree", len(contents))
    return described, contents


def _walk(path: _tensors.Path, node: Any) -> Iterator[tuple[_tensors.Path, Any]]:
    """The leaves of a tree out of their boxes, in an order that only the keys decide."""
    while is_box(node):
        node = unbox(node)
    if not isinstance(node, Mapping) or (path and not node):
        yield path, node
        return
    where = f"{name_of(path)!r} has" if path else "`tree` has"
    if len(path) == _manifest.MAX_DEPTH:
        raise ValueError(
            f"save: {where:.200} more than {_manifest.MAX_DEPTH} keys before it. Flatten the tree."
        )
    for key in node:
        if not _manifest.is_key(key):
            # Python does not spell an int of thousands of digits.
            shown = f"of {key.bit_length()} bits" if type(key) is int else repr(key)
            raise TypeError(
                f"save: {where} the key {shown} ({type(key).__name__}). Keys are ints of 64 bits "
                "and printable strings: rename it."
            )
    for key in sorted(node, key=lambda k: (isinstance(k, str), k)):
        yield from _walk((*path, key), node[key])


def _content(part: Part, array: Any) -> Callable[[slice], np.ndarray]:
    """What gives the bytes of a chunk, as a file holds them."""
    raw = _tensors.host_bytes(array)
    if part.dense:
        return lambda chunk: _dense.encode(raw[_dense.packed_slice(chunk, raw.size)])
    return raw.__getitem__


def load(path: str | os.PathLike[str], *, mmap: bool = False, sharding: Any = None) -> Any:
    """The tree that :func:`save` wrote, to the bit, or an error: never something else.

    Beside the tree, memory holds one of its arrays at a time; on CPUs ``jax.Array``
    takes what was read as it lies.

    Args:
      path: the file.
      mmap: whether arrays stay in the file, mapped into memory. It is still read
        and checked once, here. On CPUs arrays whose sizes are multiples of 64 bytes
        are then no copies: the system may drop their pages and read them again, and
        processes that load the same file share them. What becomes of a file under
        such arrays is your risk: written in place it changes them unnoticed, cut it
        crashes the process. :func:`save` does neither, it puts another file there.
      sharding: where arrays go, each straight onto its devices. One
        ``jax.sharding.Sharding`` for all; or a tree of them with the file's
        structure, where one may also stand for all that is below it and a packed
        kernel is one, or a packed kernel of two, ``codes`` and ``scale``; or a
        function that makes such a tree of the tree of ``jax.ShapeDtypeStruct`` that
        the file holds. None: the default device.

    Returns:
      Nested dicts with ``jax.Array`` and packed leaves, the latter
      with the static data that they had. A 64-bit array is a ``numpy.ndarray``
      where jax_enable_x64 is off, for JAX would make it 32 bits.

    Raises:
      FormatError: the file is not one of :func:`save`'s, or of a later version;
        it is truncated, or has one byte too many; its digest is missing or
        another than its content's; its parts contradict each other.
      FileNotFoundError: no such file.
      TypeError: ``path`` is no path, or ``sharding`` holds something else.
      ValueError: ``sharding`` has another structure than the file, does not divide
        an array, or meets a 64-bit one that JAX would cut. No data was read.
      OSError: the disk's own.

    Example:
      >>> import os, tempfile, jax, jax.numpy as jnp, bitnet_jax as bj
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.bitnet.safetensors")
      ...     bj.io.save(path, {"bias": jnp.arange(3.0)})
      ...     bj.io.load(path)
      {'bias': Array([0., 1., 2.], dtype=float32)}
    """
    _checks.require_instance("load", "path", path, (str, os.PathLike), "Name a file.")
    _checks.require_instance("load", "mmap", mmap, bool, "True maps the file.")
    with _chunks.unbox("load", os.fspath(path), mapped=mmap) as source:
        leaves = declared(source.header)
        parts = {leaf.path: leaf.parts for leaf in leaves}
        abstract = build(leaves, _abstract)
        places = _shardings.shardings(sharding, abstract, parts)
        arrays = _chunks.read(
            source,
            {part.name: part for leaf in leaves for part in leaf.parts},
            lambda part, array: _shardings.place(array, places.get(part.name)),
        )
    return build(leaves, lambda part: arrays[part.name])


def declared(header: Header) -> list[Leaf]:
    """The leaves that a header declares, after every check that needs no data."""
    metadata, tensors = header.metadata, header.tensors
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"was not written by bj.io.save: its metadata gives the format "
            f"{metadata.get('format')!r:.100}, and load reads {FORMAT!r}. Open it with the "
            "library that wrote it."
        )
    if metadata.get("version") not in VERSIONS:
        raise FormatError(
            f"is of version {metadata.get('version')!r:.100}, and this bitnet_jax reads "
            f"{' and '.join(map(repr, VERSIONS))}. Update bitnet_jax."
        )
    if _safetensors.DIGEST not in metadata:
        damaged("has no sha256 in its metadata")
    described = _manifest.descriptions(metadata.get("leaves", ""))
    leaves = [_manifest.found(one, tensors) for one in described]
    names = [part.name for leaf in leaves for part in leaf.parts]
    if sorted(names) != sorted(tensors):
        unknown = sorted(set(tensors) - set(names))
        damaged(f"holds tensors that no leaf declares, or several do: {unknown or names}")
    return leaves


def _abstract(part: Part) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(part.shape, DTYPES[part.dtype])


def build(leaves: list[Leaf], array_of: Callable[[Part], Any]) -> dict[str | int, Any]:
    """The tree of the leaves, with an array or what stands for it in the place of each part."""
    tree: dict[str | int, Any] = {}
    for leaf in leaves:
        *folders, last = leaf.path
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                damaged(f"has a leaf inside another, {list(leaf.path)!r}")
        if last in node:
            damaged(f"has two leaves at {list(leaf.path)!r}")
        node[last] = _manifest.value(leaf.described, [array_of(part) for part in leaf.parts])
    return tree
