"""What a description of a tree says, how it is read, and how a tree is held against it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from bitnet_jax import _checks
from bitnet_jax._packed.kernel import Prepared, is_packed, is_stored
from bitnet_jax._tree.leaves import is_box, unbox
from bitnet_jax.io import _chunks, _manifest, _safetensors, _tensors
from bitnet_jax.io._manifest import Leaf
from bitnet_jax.io._safetensors import FormatError

FORMAT, VERSION = "bitnet_jax.checkpoint", "1"

ANOTHER = "Restore another step, or save it again."

_KEYS = {"format", "version", "mappings", "leaves", _safetensors.DIGEST}

_OWN = {"sha256", "scale_shape"}  # what a leaf has here and has not in a file

_KINDS = {"array": "an array", "packed": "a PackedTernary", "int8": "a PackedInt8", "empty": "{}"}


class Found(NamedTuple):
    """A leaf of a tree: its keys, as it stood there, and out of its box."""

    path: list[str | int]
    boxed: Any
    value: Any

    @property
    def where(self) -> str:
        """The keys joined by ``/``."""
        return _tensors.name_of(self.path)

    @property
    def arrays(self) -> list[Any]:
        """The array, the codes and the scale, or nothing that it is made of."""
        if is_stored(self.value):
            return [self.value.codes, self.value.scale]
        return [] if isinstance(self.value, Mapping) else [self.value]


def flatten(who: str, tree: Any) -> tuple[list[Found], Any]:
    """The leaves of any pytree, packed kernels and empty mappings whole, with their keys."""

    def whole(node: Any) -> bool:
        empty = isinstance(node, Mapping) and not node
        return is_packed(node) or is_box(node) or empty

    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=whole)
    return [Found(_keys(who, path), leaf, unbox(leaf)) for path, leaf in flat], treedef


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


def of_mappings(node: Any) -> bool:
    """Whether a tree is made of mappings alone."""
    if isinstance(node, Mapping):
        return all(of_mappings(value) for value in node.values())
    leaf = is_packed(node) or is_box(node)
    return leaf or jax.tree_util.all_leaves([node])


def form_of(who: str, one: Found) -> dict[str, Any]:
    """What a leaf is without its numbers; of arrays, for ``abstract`` of ShapeDtypeStruct too."""
    value, form = one.value, {"path": one.path}
    if isinstance(value, Prepared):
        _checks.raise_prepared(who, one.where, value.implementation)
    for array in one.arrays:
        _refuse_no_array(who, one.where, array)
    if isinstance(value, Mapping):
        return {**form, "kind": "empty"}
    if not is_stored(value):
        return {**form, "kind": "array", "dtype": value.dtype.name, "shape": list(value.shape)}
    return {**form, **_manifest.static_of(value), "scale_shape": list(value.scale.shape)}


def _refuse_no_array(who: str, where: str, value: Any) -> None:
    kinds = (np.ndarray, np.generic, jax.Array)
    kinds += (jax.ShapeDtypeStruct,) if who == "abstract" else ()
    if isinstance(value, core.Tracer):
        raise TypeError(f"{who}: {where} is a tracer. Call {who} outside jit, grad and vmap.")
    if not isinstance(value, kinds):
        raise TypeError(
            f"{who}: {where} must be an array or a packed kernel, got a "
            f"{type(value).__name__}. Wrap a number in jnp.asarray."
        )
    if value.dtype.name not in _tensors.DTYPES:
        raise TypeError(
            f"{who}: {where} is {value.dtype} of shape {tuple(value.shape)}, which has no bytes of "
            "its own. Cast it; of a random key pass jax.random.key_data(key)."
        )


def form_fault(form: dict[str, Any], arrays: Sequence[Any]) -> str | None:
    """What is wrong with a packed kernel's static data, dtypes and shapes, if anything is."""
    if form["kind"] not in ("packed", "int8"):
        return None
    return _manifest.packed_fault(form) or _manifest.form_fault(form, *arrays)


def leaf_of(form: dict[str, Any]) -> Leaf:
    """A leaf whose form has no fault."""
    return Leaf(form, _tensors.parts_of(form, tuple(form.get("scale_shape", ()))))


def refuse_weak(one: Found) -> None:
    """A checkpointer gives it back strong: then its product with bfloat16 is float32."""
    weak = getattr(one.value, "weak_type", False)
    if weak and jnp.issubdtype(dtype := one.value.dtype, jnp.inexact):
        raise TypeError(
            f"describe: {one.where} is a weak-typed {dtype}, and would come back as a strong "
            f"one. Give it a dtype, jnp.asarray(x, jnp.{dtype})."
        )


def refuse_one_name(leaves: Sequence[Leaf]) -> None:
    """Orbax joins keys by dots, and keeps one of two arrays whose names are then the same."""
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


def look_at(
    who: str, one: Found, leaf: Leaf, digest: bool, threads: ThreadPoolExecutor
) -> tuple[str | None, str | None]:
    """What is wrong with the bytes of a leaf's arrays, and their SHA-256; None where nothing is.

    The digest is over the size of each array and the digests of its chunks: several
    threads take those, each of a chunk that it has just looked at.
    """
    sha = hashlib.sha256()
    arrays = _on_host(who, one, digest)
    for part, raw in zip(leaf.parts, arrays, strict=bool(arrays)):

        def look(chunk: slice, part: _tensors.Part = part, raw: np.ndarray = raw) -> Any:
            data = raw[chunk]
            hashed = _safetensors.hash_chunk(data) if digest else b""
            return part.count_wrong(data, chunk.start), hashed

        sha.update(raw.nbytes.to_bytes(8, "little"))
        wrong = 0
        for count, hashed in _chunks.in_order(threads, look, _safetensors.chunks_of(raw.size)):
            wrong += count
            sha.update(hashed)
        if wrong:
            return part.fault(wrong), None
    return None, sha.hexdigest() if arrays and digest else None


def _on_host(who: str, one: Found, digest: bool) -> list[np.ndarray]:
    """The bytes of a leaf's arrays, if they are to be looked at."""
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


def _is_here(array: Any) -> bool:
    """Whether this process can read all of an array."""
    local = not isinstance(array, jax.Array) or array.is_fully_addressable
    return local or array.is_fully_replicated


def _local(array: Any) -> Any:
    """One copy of an array of which every process has one."""
    elsewhere = isinstance(array, jax.Array) and not array.is_fully_addressable
    return array.addressable_data(0) if elsewhere else array


def sealed(mappings: bool, leaves: list[dict[str, Any]]) -> dict[str, Any]:
    """A description with its digest."""
    about = {"format": FORMAT, "version": VERSION, "mappings": mappings, "leaves": leaves}
    return {**about, _safetensors.DIGEST: digest_of(about)}


def digest_of(description: Mapping[str, Any]) -> str:
    """SHA-256 over what a description says, but for the digest itself."""
    about = {key: description[key] for key in description if key != _safetensors.DIGEST}
    text = _safetensors.canonical_json(about)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def parse(who: str, description: Any) -> list[Leaf]:
    """The leaves of a description; all that can be wrong with it is refused here."""
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        refuse(who, f"is none: its format must be {FORMAT!r}")
    if description.get("version") != VERSION:
        raise FormatError(
            f"{who}: the description is of version {description.get('version')!r:.100}, and this "
            f"bitnet_jax reads {VERSION!r}. Update bitnet_jax."
        )
    try:
        actual = digest_of(description)
    except (TypeError, ValueError, RecursionError) as error:
        refuse(who, f"is no JSON ({error})")
    if description.get(_safetensors.DIGEST) != actual:
        refuse(who, "was changed after it was made: its sha256 is another")
    if set(description) != _KEYS or type(description["mappings"]) is not bool:
        refuse(who, f"must have the keys {sorted(_KEYS)}")
    leaves = description["leaves"]
    if not isinstance(leaves, list) or not all(isinstance(leaf, dict) for leaf in leaves):
        refuse(who, "has no list of leaves")
    bare = [{key: leaf[key] for key in leaf if key not in _OWN} for leaf in leaves]
    with reading(who):
        _manifest.descriptions(_safetensors.canonical_json(bare))
    for leaf in leaves:
        _check_own(who, leaf)
    return [leaf_of(leaf) for leaf in leaves]


def _check_own(who: str, leaf: dict[str, Any]) -> None:
    """What a description has and a file has not, and the other way round."""
    where, packed = _tensors.name_of(leaf["path"]), leaf["kind"] in ("packed", "int8")
    sound = ("scale_shape" in leaf) == packed and "stored" not in leaf
    if type(leaf.get("sha256", "")) is not str or not sound:
        refuse(who, f"has a leaf that it describes wrongly, {where!r}")
    if packed:
        shape: Any = leaf["scale_shape"]
        fault = f"has a scale of shape {shape!r}"
        if _safetensors.is_shape(shape, 1):
            fault = _manifest.scale_fault(leaf, "float32", tuple(shape))
        if fault:
            refuse(who, f"declares a kernel wrongly: {where!r} {fault}")


@contextlib.contextmanager
def reading(who: str) -> Iterator[None]:
    """Tells of a description what is told of a file."""
    try:
        yield
    except FormatError as error:
        refuse(who, str(error).removesuffix(f". {_safetensors.REMEDY}"))


def refuse(who: str, what: str) -> NoReturn:
    """Refuses a description that is not as it was made."""
    raise FormatError(f"{who}: the description {what}. {ANOTHER}") from None


def pairs(who: str, found: list[Found], saved: list[Leaf]) -> list[tuple[Found, Leaf]]:
    """Each leaf of a tree with what was saved; refuses leaves that have no counterpart."""
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
        refuse(who, "has two leaves of one path")
    return [(one, by_path[tuple(one.path)]) for one in found]


def refuse_another(who: str, one: Found, was: Leaf) -> None:
    """Refuses a leaf of another type, static data, shape or dtype than was saved."""
    form, saved = form_of(who, one), was.described
    remedy = "Restore it into bj.io.abstract(description)."
    if who == "abstract":
        remedy = "Make `like` what was saved, or leave it out and convert what comes back."
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
