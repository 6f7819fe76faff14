"""Our own file format: a parameter tree in one safetensors file.

An array is one tensor, named by its keys joined with ``/``. A packed kernel is
two, ``<name>.codes`` and ``<name>.scale``, in storage layout. The names are for
people and for other tools; what the file means is in its metadata, where every
value is a string::

    format    "bitnet_jax"
    version   "1"
    leaves    canonical JSON, one object a leaf: its kind (array, packed, int8, empty), its
              path as a list of str and int keys, its dtype and logical shape, and for a packed
              kernel all of its static data
    sha256    over everything else (_container)

Nothing in a file is executed or unpickled, and nothing in it is trusted: what
``leaves`` declares and what the tensors are must agree, and a packed kernel must
keep the invariants of ``PackedTernary`` or ``PackedInt8``.
Left out: boxes. linen's ``Partitioned`` and ``nnx.Variable`` are opened when a
tree is saved: sharding belongs to the mesh of a run, not to its weights.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from typing import Any

from bitnet_jax import _boxes, _checks
from bitnet_jax.io import _container, _leaves
from bitnet_jax.io._container import FormatError, Tensor, damaged
from bitnet_jax.io._leaves import Leaf, name_of

FORMAT, VERSION = "bitnet_jax", "1"


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a parameter tree, packed kernels included, to one safetensors file.

    The file is written aside, forced to the disk and moved into place: a save
    that fails leaves what was there before. The same tree always gives the same
    bytes. Boxes (linen's ``Partitioned``, ``nnx.Variable``) are opened and not
    stored; ``FrozenDict`` and ``nnx.State`` come back as dicts.

    Args:
      path: the file; by custom ``*.bitnet.safetensors``.
      tree: nested mappings with str or int keys. Leaves are arrays of any dtype
        or packed kernels. An empty mapping in it is kept.

    Raises:
      TypeError: a list, tuple, None, Python number, tracer, random key or
        prepared kernel in the tree; a key that is no str or int; another type
        of ``path`` or ``tree``. Nothing is written.
      ValueError: no arrays; two leaves of one name; a packed kernel that breaks
        its invariants (a scale that is not finite and > 0, say); an array that
        other processes hold a part of. Nothing is written.
      OSError: the disk's own.

    Example:
      >>> import os, tempfile, jax, bitnet_jax as bj
      >>> packed = {"head": {"kernel": bj.pack(jax.random.normal(jax.random.key(0), (64, 16)))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     bj.io.save(os.path.join(folder, "model.bitnet.safetensors"), packed)
      ...     os.listdir(folder)
      ['model.bitnet.safetensors']
    """
    _checks.instance("save", "path", path, (str, os.PathLike), "Name a file.")
    remedy = "Wrap a leaf in a dict, {'kernel': leaf}; of an nnx model pass nnx.state(model)."
    _checks.instance("save", "tree", tree, Mapping, remedy)
    tensors: dict[str, Tensor] = {}
    described = []
    for where, value in _walk((), tree):
        leaf = _leaves.describe(where, value)
        described.append(leaf.described)
        for end, array in leaf.arrays.items():
            name = name_of(where) + end
            if name in tensors or name == _container.METADATA:
                raise ValueError(
                    f"save: `tree` has two leaves that are {name!r} in a file, or a name that "
                    "safetensors keeps for itself. Rename one."
                )
            tensors[name] = _leaves.tensor(array)
    _checks.tree_not_empty("save", "tree", len(tensors))
    leaves = _container.canonical_json(described)
    metadata = {"format": FORMAT, "version": VERSION, "leaves": leaves}
    _container.write(os.fspath(path), tensors, metadata)


def _walk(path: _leaves.Path, node: Any) -> Iterator[tuple[_leaves.Path, Any]]:
    """The leaves of a tree out of their boxes, in an order that only the keys decide."""
    while _boxes.is_box(node):
        node = _boxes.opened(node)
    if not isinstance(node, Mapping) or (path and not node):
        yield path, node
        return
    for key in node:
        # Control characters have two spellings in JSON, surrogates have none in UTF-8.
        if not (type(key) is str and key.isprintable()) and type(key) is not int:
            where = f"{name_of(path)!r} has" if path else "`tree` has"
            raise TypeError(
                f"save: {where} the key {key!r} ({type(key).__name__}). Keys are ints and "
                "printable strings: rename it."
            )
    for key in sorted(node, key=lambda k: (isinstance(k, str), k)):
        yield from _walk((*path, key), node[key])


def load(path: str | os.PathLike[str]) -> Any:
    """The tree that :func:`save` wrote, to the bit, or an error: never something else.

    Args:
      path: the file.

    Returns:
      Nested dicts with ``jax.Array`` and packed leaves, the latter
      with the static data that they had. A 64-bit array is a ``numpy.ndarray``
      where jax_enable_x64 is off, for JAX would make it 32 bits.

    Raises:
      FormatError: the file is not one of :func:`save`'s, or of a later version;
        it is truncated, or has one byte too many; its digest is missing or
        another than its content's; its parts contradict each other.
      FileNotFoundError: no such file.
      TypeError: ``path`` is no path.
      OSError: the disk's own.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, bitnet_jax as bj
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.bitnet.safetensors")
      ...     bj.io.save(path, {"layer": {"bias": jnp.array([0.5, -2.0], jnp.bfloat16)}})
      ...     bj.io.load(path)
      {'layer': {'bias': Array([0.5, -2], dtype=bfloat16)}}
    """
    _checks.instance("load", "path", path, (str, os.PathLike), "Name a file.")
    name = os.fspath(path)
    try:
        return _tree(*_container.read(name))
    except FileNotFoundError:
        text = "load: there is no such file. Check the path, or write it with bj.io.save"
        raise FileNotFoundError(errno.ENOENT, text, name) from None
    except FormatError as error:
        raise FormatError(f"load: {name!r} {error}") from None


def _tree(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Any:
    """Rebuilds a tree; all is checked before the first array is made."""
    _check_metadata(tensors, metadata)
    declared = _leaves.descriptions(metadata.get("leaves", ""))
    leaves = [Leaf(d, _leaves.arrays(d, tensors)) for d in declared]
    names = [name_of(leaf.described["path"]) + end for leaf in leaves for end in leaf.arrays]
    if sorted(names) != sorted(tensors):
        unknown = sorted(set(tensors) - set(names))
        damaged(f"holds tensors that no leaf declares, or several do: {unknown or names}")
    tree: dict[str | int, Any] = {}
    for leaf in leaves:
        *folders, last = leaf.described["path"]
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                damaged(f"has a leaf inside another, {leaf.described['path']!r}")
        if last in node:
            damaged(f"has two leaves at {leaf.described['path']!r}")
        node[last] = _leaves.value(leaf)
    return tree


def _check_metadata(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"was not written by bj.io.save: its metadata gives the format "
            f"{metadata.get('format')!r}, and load reads {FORMAT!r}. Open it with the library "
            "that wrote it."
        )
    if metadata.get("version") != VERSION:
        raise FormatError(
            f"is of version {metadata.get('version')!r}, and this bitnet_jax reads "
            f"{VERSION!r}. Update bitnet_jax."
        )
    if _container.DIGEST not in metadata:
        damaged("has no sha256 in its metadata")
    actual = _container.digest(tensors, metadata)
    if metadata[_container.DIGEST] != actual:
        damaged(
            "was changed after it was written: the sha256 of its content is "
            f"{actual[:16]}..., and it was {metadata[_container.DIGEST][:16]}..."
        )
