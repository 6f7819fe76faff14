"""Checkpoints of other libraries: what a tree is, as data to store beside it.

Orbax saves and restores the arrays of any tree, and nothing else. It restores a
packed kernel into whatever config, length, axes or type the target names; it casts
to the target's dtype; two leaves that it spells alike (``{"a": {"b": x}}`` and
``{"a.b": y}``) overwrite each other; it has no digest of the data. None of these
raises. So a checkpoint holds two items, the tree and its description, plain JSON::

    format    "bitnet_jax.checkpoint"
    version   "1"
    mappings  whether the tree is made of mappings alone: then the description can rebuild it
    leaves    one object a leaf, as in a file of bj.io.save (_format), with the shape of a
              packed kernel's scale, and a sha256: over the bytes of each of its arrays, as
              their number and the sha256 of every MiB (_described)
    sha256    over the canonical JSON of all other keys

Nothing here imports Orbax: any checkpointer does that stores arrays and JSON.
Left out: the classes of nodes. A description names none and imports none, so an
optimizer's state needs a template, ``jax.eval_shape(tx.init, params)``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, Sharding

from bitnet_jax import _checks
from bitnet_jax._tree.leaves import rebox
from bitnet_jax.io import _chunks, _description, _file, _manifest, _shardings, _tensors
from bitnet_jax.io._description import Found
from bitnet_jax.io._safetensors import FormatError
from bitnet_jax.io._tensors import Part


def describe(tree: Any, *, digest: bool = True) -> dict[str, Any]:
    """What a tree is and what its arrays hold, as plain JSON to store beside it.

    Args:
      tree: parameters, packed or not, an optimizer's state or any other pytree of
        arrays. Boxes (linen's ``Partitioned``, ``nnx.Variable``) are opened: a tree
        in boxes and one without have the same description.
      digest: whether to take a SHA-256 of every leaf, for which its bytes are
        fetched to the host and read once. Without it :func:`check` still refuses
        another config, shape, layout, dtype or version, and codes that are none,
        but not changed numbers.

    Returns:
      A dict of strings, numbers, lists and dicts, which ``json`` returns as it is.

    Raises:
      TypeError: a Python number, random key, tracer or prepared kernel in the tree; a
        weak-typed float, which no checkpointer gives back weak.
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
            _description.refuse_weak(one)
            _refuse_fault(one, _description.form_fault(form, one.arrays))
            leaf = _description.leaf_of(form)
            fault, sha256 = _description.look_at("describe", one, leaf, digest, threads)
            _refuse_fault(one, fault)
            if sha256:
                form["sha256"] = sha256
            leaves.append(leaf)
    _checks.require_leaves("describe", "tree", sum(len(leaf.parts) for leaf in leaves))
    _description.refuse_one_name(leaves)
    return _description.sealed(_description.of_mappings(tree), [leaf.described for leaf in leaves])


def _refuse_fault(one: Found, fault: str | None) -> None:
    if fault:
        raise ValueError(f"describe: {one.where} {fault}. Make packed kernels with bj.pack.")


def abstract(description: Any, *, like: Any = None, sharding: Any = None) -> Any:
    """The typed target into which a checkpointer restores what :func:`describe` described.

    Args:
      description: what :func:`describe` returned.
      like: a tree of the saved one's structure, of arrays or ``jax.ShapeDtypeStruct``,
        whose containers and boxes are taken: ``jax.eval_shape(tx.init, params)`` for an
        optimizer's state, which no description can rebuild. A leaf of another config,
        shape, layout or dtype than was saved is refused before a byte is read.
      sharding: where arrays go, as for :func:`load`: one ``jax.sharding.Sharding``, a tree
        of them, or a function that makes either of the abstract tree. None: the shardings
        of ``like``, or else the default device, wherever the arrays were saved.

    Returns:
      Without ``like``, nested dicts (of a ``FrozenDict`` or an ``nnx.State`` too); with
      it, a tree of its structure. Leaves are ``jax.ShapeDtypeStruct`` with shardings, and
      packed kernels made of them, with all their static data. A 64-bit array is a
      ``numpy.ndarray`` where jax_enable_x64 is off, for JAX would make it 32 bits.

    Raises:
      FormatError: the description was changed, contradicts itself, is of another version;
        or ``like`` is not what it describes.
      TypeError: ``like`` holds something else than arrays and packed kernels; ``sharding``
        something else than shardings.
      ValueError: no ``like`` for a tree with other nodes than mappings; ``sharding`` has
        another structure, does not divide an array, or meets a 64-bit one that JAX would cut.

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
            _description.refuse_another("abstract", one, was)
            parts = zip(was.parts, one.arrays, strict=True)
            arrays = [_struct(part, getattr(array, "sharding", None)) for part, array in parts]
            boxed.append(rebox(one.boxed, _manifest.value(was.described, arrays)))
        return _placed(jax.tree.unflatten(treedef, boxed), sharding)
    if not description["mappings"]:
        raise ValueError(
            "abstract: what was described has other nodes than mappings (tuples, lists, None), "
            "whose classes are code and not data. Pass like=, for an optimizer's state "
            "jax.eval_shape(tx.init, params)."
        )
    with _description.reading("abstract"):
        tree = _file.build(saved, _struct)
    return _placed(tree, sharding)


def check(tree: Any, description: Any) -> Any:
    """The tree, if it is what :func:`describe` described, to the bit; an error otherwise.

    Args:
      tree: what a checkpointer restored.
      description: what :func:`describe` returned when it was saved.

    Returns:
      ``tree`` itself.

    Raises:
      FormatError: the description was changed, contradicts itself, is of another version;
        a leaf is missing or new; its type, config, shape, axes, length or dtype is
        another than was saved; its codes are none; its bytes changed. The leaf is named.
      TypeError: the tree holds something else than arrays and packed kernels: a prepared
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
    for one, was in pairs:  # all that needs no data first
        _description.refuse_another("check", one, was)
    with _chunks.pool() as threads:
        for one, was in pairs:
            wanted = was.described.get("sha256")
            fault, sha256 = _description.look_at("check", one, was, wanted is not None, threads)
            if not fault and sha256 != wanted:
                fault = f"holds other bytes than were saved: sha256 {sha256}, and it was {wanted}"
            if fault:
                raise FormatError(f"check: {one.where} {fault}. {_description.ANOTHER}")
    return tree


def _struct(part: Part, sharding: Sharding | None = None) -> Any:
    """What stands for an array that is to be restored."""
    dtype = _tensors.DTYPES[part.dtype]
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return np.broadcast_to(np.zeros((), dtype), part.shape)  # NumPy's, of no size in memory
    default = jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(part.shape, dtype, sharding=sharding or default)


def _placed(tree: Any, sharding: Any) -> Any:
    """The abstract tree with the shardings that were asked for."""
    if sharding is None:
        return tree
    if callable(sharding) and not isinstance(sharding, Sharding):
        sharding = sharding(tree)

    def one(where: Any) -> bool:
        return isinstance(where, (Sharding, PartitionSpec))

    try:  # a sharding stands for all that is below it
        places = jax.tree.leaves(jax.tree.broadcast(sharding, tree, is_leaf=one), is_leaf=one)
    except ValueError as error:
        raise ValueError(
            "abstract: `sharding` has another structure than the tree: "
            f"{str(error).strip().splitlines()[0]:.300} Make it from the tree: "
            "sharding=lambda tree: jax.tree.map(..., tree)."
        ) from None
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    structs = [_put(path, struct, at) for (path, struct), at in zip(flat, places, strict=True)]
    return jax.tree.unflatten(treedef, structs)


def _put(path: Any, struct: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """One array of the abstract tree in its place, if it can be there."""
    where = jax.tree_util.keystr(path, simple=True, separator="/")
    if not isinstance(sharding, Sharding):
        raise TypeError(
            f"abstract: `sharding` must have a jax.sharding.Sharding at {where}, got "
            f"{sharding!r:.200}. Put a mesh to a spec: jax.sharding.NamedSharding(mesh, spec)."
        )
    shape, dtype = struct.shape, np.dtype(struct.dtype)
    _shardings.check_fit("abstract", where, dtype, shape, sharding, packed=True)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)
