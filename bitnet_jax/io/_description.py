"""Descriptions of trees for checkpoints: makes them, parses them, compares a tree with one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._packed.kernel import is_packed, is_stored
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._tree.leaves import is_box, unbox
from bitnet_jax.io import _chunks, _manifest, _safetensors, _tensors
from bitnet_jax.io._manifest import Leaf
from bitnet_jax.io._safetensors import FormatError

FORMAT, VERSIONS = "bitnet_jax.checkpoint", ("1", "2")

ANOTHER = "Restore another step, or save it again."

_KEYS = {"format", "version", "mappings", "leaves", _safetensors.DIGEST}

_OWN = {"sha256", "scale_shape"}  # keys of a leaf in a description but not in a file

_KINDS = {"array": "an array", "packed": "a PackedTernary", "int8": "a PackedInt8", "empty": "{}"}


class TreeLeaf(NamedTuple):
    """A leaf of a tree: its keys, the leaf with its box, and without."""

    path: list[str | int]
    boxed: Any
    value: Any

    @property
    def where(self) -> str:
        """The keys joined by ``/``."""
        return _tensors.name_of(self.path)

    @property
    def arrays(self) -> list[Any]:
        """Its arrays: codes and scale of a packed kernel, none of an empty mapping."""
        if is_stored(self.value):
            return [self.value.codes, self.value.scale]
        return [] if isinstance(self.value, Mapping) else [self.value]


def flatten(who: str, tree: PyTree) -> tuple[list[TreeLeaf], Any]:
    """The leaves of a pytree with their keys; packed kernels and empty mappings are leaves."""

    def whole(node: object) -> bool:
        empty = isinstance(node, Mapping) and not node
        return is_packed(node) or is_box(node) or empty

    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=whole)
    return [TreeLeaf(_keys(who, path), leaf, unbox(leaf)) for path, leaf in flat], treedef


def _keys(who: str, path: tuple[Any, ...]) -> list[str | int]:
    keys = []
    for part in path:
        key = next((getattr(part, k) for k in ("key", "idx", "name") if hasattr(part, k)), None)
        if not _manifest.is_key(key):
            raise TypeError(
                f"{who}: `tree` has the key {key!r} ({type(key).__name__}). Keys are ints and "
                "printable strings: rename it."
            )
        keys.append(key)
    if not keys:
        raise TypeError(f"{who}: `tree` is a leaf itself. Wrap it in a dict, {{'kernel': leaf}}.")
    return keys


def only_mappings(node: PyTree) -> bool:
    """Whether all nodes of a tree are mappings."""
    if isinstance(node, Mapping):
        return all(only_mappings(value) for value in node.values())
    leaf = is_packed(node) or is_box(node)
    return leaf or jax.tree_util.all_leaves([node])


def form_of(who: str, one: TreeLeaf) -> dict[str, Any]:
    """The description of a leaf without its digest; ``abstract`` allows ShapeDtypeStruct."""
    value, form = one.value, {"path": one.path}
    if isinstance(value, Prepared):
        _checks.raise_prepared(who, one.where, value.implementation)
    for array in one.arrays:
        _tensors.require_array(who, one.where, array, abstract=who == "abstract")
    if isinstance(value, Mapping):
        return {**form, "kind": "empty"}
    if not is_stored(value):
        return {**form, "kind": "array", "dtype": value.dtype.name, "shape": list(value.shape)}
    return {**form, **_manifest.static_of(value), "scale_shape": list(value.scale.shape)}


def form_fault(form: dict[str, Any], arrays: Sequence[Any]) -> str | None:
    """What is wrong with a packed kernel's static data, dtypes and shapes; None if nothing."""
    if form["kind"] not in ("packed", "int8"):
        return None
    return _manifest.packed_fault(form) or _manifest.form_fault(form, *arrays)


def leaf_of(form: dict[str, Any]) -> Leaf:
    """The leaf of a form that has no fault."""
    return Leaf(form, _tensors.parts_of(form, tuple(form.get("scale_shape", ()))))


def require_strong_type(one: TreeLeaf) -> None:
    """Raises on a weak-typed float.

    A checkpointer restores it as a strong type, and its product with bfloat16 would then
    be float32.
    """
    weak = getattr(one.value, "weak_type", False)
    if weak and jnp.issubdtype(dtype := one.value.dtype, jnp.inexact):
        raise TypeError(
            f"describe: {one.where} is a weak-typed {dtype}, and would be restored as a strong "
            f"one. Give it a dtype, jnp.asarray(x, jnp.{dtype})."
        )


def require_distinct_names(leaves: Sequence[Leaf]) -> None:
    """Raises if Orbax, which joins keys by dots, would give two arrays the same name."""
    seen: set[str] = set()
    for leaf in leaves:
        for part in leaf.parts:
            name = ".".join(map(str, leaf.path)) + part.end
            if name in seen:
                raise ValueError(
                    f"describe: `tree` has two leaves that Orbax would store as {name!r}, one "
                    "over the other. Rename one."
                )
            seen.add(name)


def fault_and_digest(
    who: str, one: TreeLeaf, leaf: Leaf, digest: bool, threads: ThreadPoolExecutor
) -> tuple[str | None, str | None]:
    """What is wrong with the bytes of a leaf's arrays, and their SHA-256; or None.

    The digest is over the size of each array and the hashes of its chunks, which several
    threads check and hash.
    """
    sha = hashlib.sha256()
    arrays = _on_host(who, one, digest)
    for part, raw in zip(leaf.parts, arrays, strict=bool(arrays)):

        def look(chunk: slice, part: _tensors.Part = part, raw: np.ndarray = raw) -> Any:
            data = raw[chunk]
            hashed = _safetensors.hash_chunk(data.data) if digest else b""
            return part.count_wrong(data, chunk.start), hashed

        sha.update(raw.nbytes.to_bytes(8, "little"))
        wrong = 0
        for count, hashed in _chunks.in_order(threads, look, _safetensors.chunks_of(raw.size)):
            wrong += count
            sha.update(hashed)
        if wrong:
            return part.fault(wrong), None
    return None, sha.hexdigest() if arrays and digest else None


def _on_host(who: str, one: TreeLeaf, digest: bool) -> list[np.ndarray]:
    """The bytes of a leaf's arrays on the host; empty if they need not be read."""
    if not (digest or is_stored(one.value)):
        return []
    if all(map(_is_here, one.arrays)):
        return [_tensors.host_bytes(_local(array)) for array in one.arrays]
    if digest:
        raise ValueError(
            f"{who}: {one.where} is spread over several processes, and none can take its digest. "
            "Describe it with digest=False, or gather it "
            "(jax.experimental.multihost_utils.process_allgather)."
        )
    return []


def _is_here(array: _tensors.AnyArray) -> bool:
    """Whether this process can read all of an array."""
    if not isinstance(array, jax.Array):
        return True
    return array.is_fully_addressable or array.is_fully_replicated


def _local(array: _tensors.AnyArray) -> _tensors.AnyArray:
    """This process's copy of an array that is replicated over processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array.addressable_data(0)
    return array


def with_digest(mappings: bool, leaves: list[dict[str, Any]]) -> dict[str, Any]:
    """A description with its digest."""
    version = VERSIONS[-1 if _manifest.is_younger(leaves) else 0]
    about = {"format": FORMAT, "version": version, "mappings": mappings, "leaves": leaves}
    return {**about, _safetensors.DIGEST: digest_of(about)}


def digest_of(description: Mapping[str, Any]) -> str:
    """SHA-256 over all keys of a description but the digest itself."""
    about = {key: description[key] for key in description if key != _safetensors.DIGEST}
    text = _safetensors.canonical_json(about)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def parse(who: str, description: object) -> list[Leaf]:
    """The leaves of a description; raises if anything in it is wrong."""
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise_bad_description(who, f"is not one of bj.io.describe: its format must be {FORMAT!r}")
    if description.get("version") not in VERSIONS:
        raise FormatError(
            f"{who}: the description is of version {description.get('version')!r:.100}, and this "
            f"bitnet_jax reads {' and '.join(map(repr, VERSIONS))}. Update bitnet_jax."
        )
    try:
        actual = digest_of(description)
    except (TypeError, ValueError, RecursionError) as error:
        raise_bad_description(who, f"is not JSON ({error})")
    if description.get(_safetensors.DIGEST) != actual:
        raise_bad_description(who, "was changed after it was made: its sha256 is another")
    if set(description) != _KEYS or type(description["mappings"]) is not bool:
        raise_bad_description(who, f"must have the keys {sorted(_KEYS)}")
    leaves = description["leaves"]
    if not isinstance(leaves, list) or not all(isinstance(leaf, dict) for leaf in leaves):
        raise_bad_description(who, "has no list of leaves")
    bare = [{key: leaf[key] for key in leaf if key not in _OWN} for leaf in leaves]
    with reading(who):
        _manifest.descriptions(_safetensors.canonical_json(bare))
    for leaf in leaves:
        _require_checkpoint_fields(who, leaf)
    return [leaf_of(leaf) for leaf in leaves]


def _require_checkpoint_fields(who: str, leaf: dict[str, Any]) -> None:
    """Raises unless a leaf has the keys of a description and not those of a file."""
    where, packed = _tensors.name_of(leaf["path"]), leaf["kind"] in ("packed", "int8")
    sound = ("scale_shape" in leaf) == packed and "stored" not in leaf
    if type(leaf.get("sha256", "")) is not str or not sound:
        raise_bad_description(who, f"has an invalid entry for the leaf {where!r}")
    if packed:
        shape: Any = leaf["scale_shape"]
        fault = f"has a scale of shape {shape!r}"
        if _safetensors.is_shape(shape, 1):
            fault = _manifest.scale_fault(leaf, "float32", tuple(shape))
        if fault:
            raise_bad_description(who, f"has an invalid entry for a kernel: {where!r} {fault}")


@contextlib.contextmanager
def reading(who: str) -> Iterator[None]:
    """Turns errors about a file into errors about a description."""
    try:
        yield
    except FormatError as error:
        raise_bad_description(who, str(error).removesuffix(f". {_safetensors.REMEDY}"))


def raise_bad_description(who: str, what: str) -> NoReturn:
    """Raises on an invalid or changed description."""
    raise FormatError(f"{who}: the description {what}. {ANOTHER}") from None


def pairs(who: str, found: list[TreeLeaf], saved: list[Leaf]) -> list[tuple[TreeLeaf, Leaf]]:
    """Each leaf of a tree with the saved one; raises if either has no counterpart."""
    by_path = {was.path: was for was in saved}
    mine = {tuple(one.path) for one in found}
    for verb, paths, other in (
        ("lacks", [path for path in by_path if path not in mine], "was saved"),
        ("has", [path for path in mine if path not in by_path], "was not saved"),
    ):
        if paths:
            raise FormatError(
                f"{who}: the tree {verb} {list(min(paths, key=str))}, which {other} "
                f"({len(paths)} such leaves). Restore into bj.io.abstract(description)."
            )
    if not len(saved) == len(by_path) == len(found):
        raise_bad_description(who, "has two leaves of one path")
    return [(one, by_path[tuple(one.path)]) for one in found]


def require_same_leaf(who: str, one: TreeLeaf, was: Leaf) -> None:
    """Raises unless a leaf has the type, static data, shape and dtype that were saved."""
    form, saved = form_of(who, one), was.described
    remedy = "Restore it into bj.io.abstract(description)."
    if who == "abstract":
        remedy = "Pass a `like` of the saved tree, or leave it out and convert the result."
    if form["kind"] != saved["kind"]:
        raise FormatError(
            f"{who}: {one.where} is {_KINDS[form['kind']]}, and was saved as "
            f"{_KINDS[saved['kind']]}. {remedy}"
        )
    for name in ("shape", *sorted(form)) if one.arrays else ():
        if form[name] != saved[name]:
            here, there = (tuple(v) if type(v) is list else v for v in (form[name], saved[name]))
            raise FormatError(
                f"{who}: {one.where} has the {name} {here}, and was saved with {there}. {remedy}"
            )
    fault = form_fault(form, one.arrays)
    if fault:
        raise FormatError(f"{who}: {one.where} {fault}. {remedy}")
