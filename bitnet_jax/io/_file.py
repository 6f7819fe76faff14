"""The file format of :func:`save` and :func:`load`: a parameter tree in one safetensors file.

An array is one tensor, named by its keys joined with ``/``. A packed kernel is
two, ``<name>.codes`` and ``<name>.scale``, in storage layout; in a dense file the
codes are ``<name>.trits`` (_dense). The names are for people and for other tools.
The metadata describes the tree; every value in it is a string::

    format    "bitnet_jax"
    version   "2", or "3" where a kernel has planes or a rotation; "1", whose digest is over
              bytes and not over chunks, is read too
    leaves    canonical JSON, one object per leaf: its kind (array, packed, int8, empty), its
              path as a list of str and int keys, its dtype and logical shape, and for a packed
              kernel all of its static data, with "stored": "trits" if it is dense
    sha256    over everything else (_safetensors)

A file of ``Decoder.save`` has one key more, ``decoder``: the config, as JSON.

Nothing in a file is executed, unpickled or trusted: ``leaves`` and the tensors must
agree, and a packed kernel must keep the invariants of ``PackedTernary`` or
``PackedInt8``. Left out: boxes. linen's ``Partitioned`` and ``nnx.Variable`` are removed
when a tree is saved, because sharding belongs to the mesh of a run, not to the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._tree.leaves import is_box, unbox
from bitnet_jax.io import _chunks, _dense, _manifest, _safetensors, _shardings, _tensors
from bitnet_jax.io._manifest import Leaf
from bitnet_jax.io._safetensors import FormatError, Header, raise_damaged
from bitnet_jax.io._tensors import DTYPES, Part, name_of

FORMAT, VERSIONS = "bitnet_jax", ("1", "2", "3")


def save(path: str | os.PathLike[str], tree: PyTree, *, dense: bool = False) -> None:
    """Writes a parameter tree, packed kernels included, to one safetensors file.

    The file is written under a temporary name, flushed to the disk and renamed: a save
    that fails changes nothing. One whose process is killed may leave a
    ``.bitnet_jax-*.tmp`` file, which nothing reads and you may delete. The same tree
    always gives the same bytes. Besides the tree, memory holds one of its arrays at a
    time. Boxes (linen's ``Partitioned``, ``nnx.Variable``) are not stored;
    ``FrozenDict`` and ``nnx.State`` are loaded as dicts.

    Args:
      path: the file; by convention ``*.bitnet.safetensors``.
      tree: nested mappings with str or int keys. Leaves are arrays of any dtype
        or packed kernels. Empty mappings are kept.
      dense: whether two-bit kernels are stored at 1.6 bits a weight, five codes to a
        byte, a fifth less than in memory. :func:`load` returns the same bits.

    Raises:
      TypeError: a list, tuple, None, Python number, tracer, random key or
        prepared kernel in the tree; a key that is not a str or int; a ``path``,
        ``tree`` or ``dense`` of another type. Nothing is written.
      ValueError: no arrays; two leaves of one name; a packed kernel that breaks
        its invariants (a scale that is not finite and > 0, say); an array that was
        deleted, or of which other processes hold a part; a leaf under more than 100
        keys. Nothing is written.
      OSError: from the disk.

    Example:
      >>> import os, tempfile, jax, bitnet_jax as bj
      >>> packed = {"head": {"kernel": bj.pack(jax.random.normal(jax.random.key(0), (64, 16)))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     bj.io.save(os.path.join(folder, "model.bitnet.safetensors"), packed)
      ...     os.listdir(folder)
      ['model.bitnet.safetensors']
    """
    _checks.require_instance("save", "path", path, (str, os.PathLike), "Name a file.")
    remedy = (
        "Wrap a leaf in a dict, {'kernel': leaf}; of an nnx model pass nnx.state(model), of "
        "adapters adapters.to_dict()."
    )
    _checks.require_no_report("save", "tree", tree)
    if not isinstance(tree, Mapping):
        raise TypeError(f"save: `tree` must be a Mapping, got {type(tree).__name__}. {remedy}")
    write(path, tree, dense=dense)


def write(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    dense: bool,
    notes: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """As :func:`save`, with more metadata beside its own, and word of what is written."""
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
    version = VERSIONS[-1] if _manifest.is_younger(described) else VERSIONS[-2]
    metadata = {**notes, "format": FORMAT, "version": version, "leaves": leaves}
    _chunks.write(
        os.fspath(path), tensors, metadata, lambda name: _content(*contents[name]), progress
    )


def _describe(
    tree: PyTree, dense: bool
) -> tuple[list[dict[str, Any]], dict[str, tuple[Part, _tensors.AnyArray]]]:
    """The description of every leaf, and every array by the name of its tensor."""
    described: list[dict[str, Any]] = []
    contents: dict[str, tuple[Part, _tensors.AnyArray]] = {}
    for where, value in _walk((), tree):
        leaf, arrays = _manifest.describe(where, value, dense=dense)
        described.append(leaf.described)
        for part, array in zip(leaf.parts, arrays, strict=True):
            if part.name in contents or part.name == _safetensors.METADATA:
                raise ValueError(
                    f"save: `tree` has two leaves whose name in a file is {part.name!r}, or one "
                    "whose name safetensors reserves. Rename one."
                )
            contents[part.name] = part, array
    _checks.require_leaves("save", "tree", len(contents))
    return described, contents


def _walk(path: _tensors.Path, node: PyTree) -> Iterator[tuple[_tensors.Path, Any]]:
    """The unboxed leaves of a tree with their paths, sorted by key."""
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
            # Python refuses to print an int of thousands of digits.
            shown = f"of {key.bit_length()} bits" if type(key) is int else repr(key)
            raise TypeError(
                f"save: {where} the key {shown} ({type(key).__name__}). Keys are ints of 64 bits "
                "and printable strings: rename it."
            )
    for key in sorted(node, key=lambda k: (isinstance(k, str), k)):
        yield from _walk((*path, key), node[key])


def _content(part: Part, array: _tensors.AnyArray) -> Callable[[slice], np.ndarray]:
    """A function from a chunk to its bytes in the file."""
    raw = _tensors.host_bytes(array)
    if part.dense:
        return lambda chunk: _dense.encode(raw[_dense.packed_slice(chunk, raw.size)])
    return raw.__getitem__


def load(
    path: str | os.PathLike[str], *, mmap: bool = False, sharding: PyTree = None
) -> dict[str | int, Any]:
    """The tree in a file, bit-identical to what was saved; anything else raises FormatError.

    Besides the tree, memory holds one of its arrays at a time. On CPUs ``jax.Array``
    uses the memory that was read, without a copy.

    Args:
      path: the file.
      mmap: whether arrays stay in the file, mapped into memory. The file is still read
        and checked once. On CPUs, arrays whose sizes are multiples of 64 bytes are then
        not copied: the system may drop their pages and read them again, and processes
        that load the same file share them. Do not change the file meanwhile: writing to
        it in place changes the arrays, and truncating it crashes the process.
        :func:`save` does neither; it replaces the file.
      sharding: where arrays go; each goes straight to its devices. One
        ``jax.sharding.Sharding`` for all; or a tree of them with the file's structure,
        where one may also be in the place of a subtree or of a packed kernel, and a
        packed kernel may also have two, for ``codes`` and ``scale``; or a function to
        such a tree from the tree of ``jax.ShapeDtypeStruct`` in the file. None: the
        default device.

    Returns:
      Nested dicts with ``jax.Array`` and packed leaves, which have the static data that
      was saved. A 64-bit array is a ``numpy.ndarray`` where jax_enable_x64 is off,
      because JAX would make it 32 bits.

    Raises:
      FormatError: the file was not written by :func:`save`, or by a later version; it
        is truncated or has extra bytes; its digest is missing or does not match its
        content; its parts contradict each other.
      FileNotFoundError: no such file.
      TypeError: ``path`` is not a path, or ``sharding`` contains other things.
      ValueError: ``sharding`` has another structure than the file, does not divide an
        array, or places a 64-bit array that JAX would make 32 bits. No data was read.
      OSError: from the disk.

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
    with _chunks.open_source("load", os.fspath(path), mapped=mmap) as source:
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


def load_each(
    who: str, path: str, each: Callable[[_tensors.Path, Any], Any]
) -> dict[_tensors.Path, Any]:
    """The leaves in a file by path, each replaced as soon as it is read, the digest checked last.

    So memory need not hold all leaves in both forms. What ``each`` returned is thrown away
    where the file is refused.
    """
    made: dict[_tensors.Path, Any] = {}
    with _chunks.open_source(who, path) as source:
        leaves = declared(source.header)
        build(leaves, lambda part: part)  # raises if two leaves have one path
        parts = {part.name: part for leaf in leaves for part in leaf.parts}
        owners = {part.name: leaf for leaf in leaves for part in leaf.parts}
        waiting: dict[_tensors.Path, dict[str, Any]] = {}

        def take(part: Part, array: np.ndarray) -> None:
            leaf = owners[part.name]
            have = waiting.setdefault(leaf.path, {})
            have[part.name] = _shardings.place(array, None)
            if len(have) == len(leaf.parts):
                arrays = [have.pop(one.name) for one in leaf.parts]
                made[leaf.path] = each(leaf.path, _manifest.value(leaf.described, arrays))

        _chunks.read(source, parts, take)
    return made


def declared(header: Header) -> list[Leaf]:
    """The leaves that a header declares; makes every check that needs no data."""
    metadata, tensors = header.metadata, header.tensors
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"was not written by bj.io.save: its metadata gives the format "
            f"{metadata.get('format')!r:.100}, and load reads {FORMAT!r}. If it is of a "
            "published checkpoint, name its folder (bj.models.Decoder.from_pretrained); if not, "
            "open it with the library that wrote it."
        )
    if metadata.get("version") not in VERSIONS:
        raise FormatError(
            f"is of version {metadata.get('version')!r:.100}, and this bitnet_jax reads "
            f"{', '.join(map(repr, VERSIONS))}. Update bitnet_jax."
        )
    if _safetensors.DIGEST not in metadata:
        raise_damaged("has no sha256 in its metadata")
    described = _manifest.descriptions(metadata.get("leaves", ""))
    leaves = [_manifest.found(one, tensors) for one in described]
    names = [part.name for leaf in leaves for part in leaf.parts]
    if sorted(names) != sorted(tensors):
        unknown = sorted(set(tensors) - set(names))
        raise_damaged(f"has tensors that no leaf declares, or several do: {unknown or names}")
    return leaves


def _abstract(part: Part) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(part.shape, DTYPES[part.dtype])


def build(leaves: list[Leaf], array_of: Callable[[Part], Any]) -> dict[str | int, Any]:
    """The tree of the leaves, with the result of ``array_of`` for each of their arrays."""
    tree: dict[str | int, Any] = {}
    for leaf in leaves:
        *folders, last = leaf.path
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise_damaged(f"has a leaf inside another, {list(leaf.path)!r}")
        if last in node:
            raise_damaged(f"has two leaves at {list(leaf.path)!r}")
        node[last] = _manifest.value(leaf.described, [array_of(part) for part in leaf.parts])
    return tree
