"""Checkpoints of other libraries: a description of the tree, to store beside it.

Orbax saves and restores the arrays of any tree, and nothing else. It restores a
packed kernel into whatever config, length, axes or type the target names; it casts
to the target's dtype; two leaves that it gives the same name (``{"a": {"b": x}}`` and
``{"a.b": y}``) overwrite each other; it has no digest of the data. None of these
raises. So a checkpoint has two items, the tree and its description, plain JSON::

    format    "bitnet_jax.checkpoint"
    version   "1", or "2" where a kernel has planes or a rotation
    mappings  whether the tree has only mappings: then the description alone can rebuild it
    leaves    one object per leaf, as in a file of bj.io.save (_file), with the shape of a
              packed kernel's scale, and a sha256: over the bytes of each of its arrays, as
              their number and the sha256 of every MiB (_description)
    sha256    over the canonical JSON of all other keys

Orbax is not imported: any checkpointer works that stores arrays and JSON.
Left out: the classes of nodes. A description names no class, so an optimizer's state
needs a template, ``jax.eval_shape(tx.init, params)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._tree.leaves import rebox
from bitnet_jax.io import _chunks, _description, _file, _manifest, _shardings, _tensors
from bitnet_jax.io._description import TreeLeaf
from bitnet_jax.io._safetensors import FormatError
from bitnet_jax.io._tensors import Part


def describe(tree: PyTree, *, digest: bool = True) -> dict[str, Any]:
    """The structure, static data and digests of a tree, as JSON to store beside it.

    Args:
      tree: parameters, packed or not, an optimizer's state or any other pytree of
        arrays. Boxes (linen's ``Partitioned``, ``nnx.Variable``) are removed: a tree
        with boxes and one without have the same description.
      digest: whether to take a SHA-256 of every leaf. Its bytes are fetched to the host
        and read once. Without it :func:`check` refuses another config, shape, layout,
        dtype or version, and invalid codes, but does not see other changed values.

    Returns:
      A dict of strings, numbers, lists and dicts, which survives ``json`` unchanged.

    Raises:
      TypeError: a Python number, random key, tracer or prepared kernel in the tree; a
        weak-typed float: checkpointers restore it as a strong one.
      ValueError: no arrays; a packed kernel that breaks its invariants; two leaves that
        Orbax would store under one name; an array spread over several processes.

    Example:
      >>> import pathlib, tempfile, jax, orbax.checkpoint as ocp, bitnet_jax as bj
      >>> params = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (64, 16))}}
      >>> packed, report = bj.pack_params(params)
      >>> about = bj.io.describe(packed)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with ocp.CheckpointManager(pathlib.Path(folder)) as manager:
      ...         items = {"params": ocp.args.StandardSave(packed)}
      ...         items["about"] = ocp.args.JsonSave(about)
      ...         saved = manager.save(0, args=ocp.args.Composite(**items))
      ...         manager.wait_until_finished()
      ...         items = {"about": ocp.args.JsonRestore()}
      ...         about = manager.restore(0, args=ocp.args.Composite(**items))["about"]
      ...         target = bj.io.abstract(about)  # typed, without a template
      ...         items = {"params": ocp.args.StandardRestore(target)}
      ...         packed = manager.restore(0, args=ocp.args.Composite(**items))["params"]
      >>> bj.io.check(packed, about)
      {'layer': {'kernel': PackedTernary(shape=(64, 16), scale=(1, 1), 260 bytes)}}
    """
    found, _ = _description.flatten("describe", tree)
    leaves = []
    with _chunks.pool() as threads:
        for one in found:
            form = _description.form_of("describe", one)
            _description.require_strong_type(one)
            _require_no_fault(one, _description.form_fault(form, one.arrays))
            leaf = _description.leaf_of(form)
            fault, sha256 = _description.fault_and_digest("describe", one, leaf, digest, threads)
            _require_no_fault(one, fault)
            if sha256:
                form["sha256"] = sha256
            leaves.append(leaf)
    _checks.require_leaves("describe", "tree", sum(len(leaf.parts) for leaf in leaves))
    _description.require_distinct_names(leaves)
    return _description.with_digest(
        _description.only_mappings(tree), [leaf.described for leaf in leaves]
    )


def _require_no_fault(one: TreeLeaf, fault: str | None) -> None:
    """Raises if a leaf to describe has a fault."""
    if fault:
        raise ValueError(f"describe: {one.where} {fault}. Make packed kernels with bj.pack.")


def abstract(
    description: Mapping[str, Any], *, like: PyTree = None, sharding: PyTree = None
) -> PyTree:
    """The abstract tree to restore a checkpoint into, from its :func:`describe` description.

    Args:
      description: the result of :func:`describe`.
      like: a tree with the structure of the saved one, of arrays or
        ``jax.ShapeDtypeStruct``, for its containers and boxes. An optimizer's state
        needs it: ``jax.eval_shape(tx.init, params)``. A leaf whose config, shape, layout
        or dtype is not the saved one is refused before a byte is read.
      sharding: where arrays go, as for :func:`load`: one ``jax.sharding.Sharding``, a tree
        of them, or a function from the abstract tree to either. None: the shardings of
        ``like``, or else the default device, wherever the arrays were when saved.

    Returns:
      Without ``like``, nested dicts (also for a ``FrozenDict`` or an ``nnx.State``); with
      it, a tree of its structure. Leaves are ``jax.ShapeDtypeStruct`` with shardings, and
      packed kernels made of them, with all their static data. A 64-bit array is a
      ``numpy.ndarray`` where jax_enable_x64 is off, because JAX would make it 32 bits.

    Raises:
      FormatError: the description was changed, contradicts itself or has another
        version; or ``like`` is not what it describes.
      TypeError: ``like`` contains other things than arrays and packed kernels;
        ``sharding`` contains other things than shardings.
      ValueError: no ``like`` for a tree with other nodes than mappings; ``sharding`` has
        another structure, does not divide an array, or places a 64-bit array that JAX
        would make 32 bits.

    Example:
      >>> import jax, optax, bitnet_jax as bj
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 16))}
      >>> packed, report = bj.pack_params(params)
      >>> bj.io.abstract(bj.io.describe(packed))
      {'kernel': PackedTernary(shape=(64, 16), scale=(1, 1), 260 bytes)}
      >>> tx = optax.adamw(1e-3)
      >>> about = bj.io.describe(tx.init(params))
      >>> bj.io.abstract(about, like=jax.eval_shape(tx.init, params))[0].mu["kernel"].shape
      (64, 16)
    """
    saved = _description.parse("abstract", description)
    if like is not None:
        found, treedef = _description.flatten("abstract", like)
        boxed = []
        for one, was in _description.pairs("abstract", found, saved):
            _description.require_same_leaf("abstract", one, was)
            parts = zip(was.parts, one.arrays, strict=True)
            arrays = [_struct(part, getattr(array, "sharding", None)) for part, array in parts]
            boxed.append(rebox(one.boxed, _manifest.value(was.described, arrays)))
        return _placed(jax.tree.unflatten(treedef, boxed), sharding)
    if not description["mappings"]:
        raise ValueError(
            "abstract: the described tree has other nodes than mappings (tuples, lists, None), "
            "and a description does not store their classes. Pass like=, for an optimizer's state "
            "jax.eval_shape(tx.init, params)."
        )
    with _description.reading("abstract"):
        tree = _file.build(saved, _struct)
    return _placed(tree, sharding)


def check(tree: PyTree, description: Mapping[str, Any]) -> PyTree:
    """The restored tree, if it is bit-identical to the described one; else FormatError.

    Args:
      tree: the tree that a checkpointer restored.
      description: the result of :func:`describe` when it was saved.

    Returns:
      ``tree`` itself.

    Raises:
      FormatError: the description was changed, contradicts itself or has another
        version; a leaf is missing or new; its type, config, shape, axes, length or dtype
        differs; its codes are invalid; its bytes changed. The error names the leaf.
      TypeError: the tree contains other things than arrays and packed kernels: a prepared
        kernel, a ``jax.ShapeDtypeStruct``.
      ValueError: no arrays; an array spread over several processes whose digest was taken.

    Example:
      >>> import dataclasses, jax, bitnet_jax as bj
      >>> packed = {"kernel": bj.pack(jax.random.normal(jax.random.key(0), (64, 16)))}
      >>> about = bj.io.describe(packed)
      >>> wrong = {"kernel": dataclasses.replace(packed["kernel"], length=63)}
      >>> try:
      ...     bj.io.check(wrong, about)
      ... except bj.io.FormatError as error:
      ...     print(error)
      check: kernel has the shape (63, 16), and was saved with (64, 16). Restore it into \
bj.io.abstract(description).
    """
    saved = _description.parse("check", description)
    found, _ = _description.flatten("check", tree)
    pairs = _description.pairs("check", found, saved)
    for one, was in pairs:  # static data of every leaf first: that needs no bytes
        _description.require_same_leaf("check", one, was)
    with _chunks.pool() as threads:
        for one, was in pairs:
            wanted = was.described.get("sha256")
            fault, sha256 = _description.fault_and_digest(
                "check", one, was, wanted is not None, threads
            )
            if not fault and sha256 != wanted:
                fault = f"holds other bytes than were saved: sha256 {sha256}, and it was {wanted}"
            if fault:
                raise FormatError(f"check: {one.where} {fault}. {_description.ANOTHER}")
    return tree


def _struct(part: Part, sharding: Sharding | None = None) -> jax.ShapeDtypeStruct | np.ndarray:
    """The target for an array that is to be restored."""
    dtype = _tensors.DTYPES[part.dtype]
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        # JAX would make it 32 bits. This NumPy array takes no memory, whatever its shape.
        return np.broadcast_to(np.zeros((), dtype), part.shape)
    default = jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(part.shape, dtype, sharding=sharding or default)


def _placed(tree: PyTree, sharding: PyTree) -> PyTree:
    """The abstract tree with ``sharding`` in its leaves."""
    if sharding is None:
        return tree
    if callable(sharding) and not isinstance(sharding, Sharding):
        sharding = sharding(tree)

    def is_sharding(node: object) -> bool:
        return isinstance(node, (Sharding, PartitionSpec))

    try:  # one sharding in the place of a subtree is for all of its leaves
        spread = jax.tree.broadcast(sharding, tree, is_leaf=is_sharding)
        places = jax.tree.leaves(spread, is_leaf=is_sharding)
    except ValueError as error:
        raise ValueError(
            "abstract: `sharding` has another structure than the tree: "
            f"{str(error).strip().splitlines()[0]:.300} Make it from the tree: "
            "sharding=lambda tree: jax.tree.map(..., tree)."
        ) from None
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    structs = [_put(path, struct, at) for (path, struct), at in zip(flat, places, strict=True)]
    return jax.tree.unflatten(treedef, structs)


def _put(
    path: tuple[Any, ...], struct: jax.ShapeDtypeStruct | np.ndarray, sharding: object
) -> jax.ShapeDtypeStruct:
    """One array of the abstract tree with its sharding; raises if it does not fit."""
    where = jax.tree_util.keystr(path, simple=True, separator="/")
    if not isinstance(sharding, Sharding):
        raise TypeError(
            f"abstract: `sharding` must have a jax.sharding.Sharding at {where}, got "
            f"{sharding!r:.200}. Make one from a spec: jax.sharding.NamedSharding(mesh, spec)."
        )
    shape, dtype = struct.shape, np.dtype(struct.dtype)
    _shardings.require_fit("abstract", where, dtype, shape, sharding, packed=True)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)
