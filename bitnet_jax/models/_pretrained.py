"""What a loader hands over, and a decoder made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitnet_jax import _checks
from bitnet_jax._matmul import prepare
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._packed.stored import PackedTernary
from bitnet_jax._quantize.int8 import check_activations
from bitnet_jax._quantize.ternary import KernelConfig
from bitnet_jax.io import _memory
from bitnet_jax.models._decoder_config import DecoderConfig, require_quantiser
from bitnet_jax.models._keys import WHO
from bitnet_jax.models._parts import Blank
from bitnet_jax.models._report import LoadReport
from bitnet_jax.models._text import TOKENIZER, Text

DECLARED = "declared"

_WORTH_IT = 1 << 24  # bytes: to look for freed memory takes longer than to stack less


@dataclasses.dataclass(frozen=True)
class Options:
    """What a caller asks of a loader; the arguments of ``Decoder.from_pretrained``."""

    dtype: Any = np.float32
    packed: bool = True
    weights: KernelConfig | None = None
    head: KernelConfig | None = None
    activations: Any = DECLARED
    quantization_config: Mapping[str, Any] | None = None
    scan: bool | None = False
    prepared: bool = False
    progress: Callable[[float], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.activations != DECLARED:
            check_activations(WHO, self.activations)
        for name in ("weights", "head"):
            require_quantiser(WHO, name, getattr(self, name))
        for name in ("packed", "prepared"):
            _checks.require_instance(WHO, name, getattr(self, name), bool, "Use True or False.")
        kinds = (bool, type(None))
        _checks.require_instance(WHO, "scan", self.scan, kinds, "Use True, False or None.")


def dtype_of(dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype that floats are loaded in; refuses what is no floating-point dtype."""
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"{WHO}: `dtype` is {dtype!r}, which names no dtype. Use jnp.float32 or jnp.bfloat16."
        ) from None
    if not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(
            f"{WHO}: `dtype` must be a floating-point dtype, got {dtype!r}. For int8 kernels pass "
            "head=bj.Int8Config() and weights=bj.Int8Config()."
        )
    return kind


PASSED = (
    TOKENIZER,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where a decoder was loaded from, for what is passed through to an export.

    Attributes:
      config: the content of config.json; empty where there was none.
      folder: the folder; None: there was none.
      texts: in its place, the content of its files by name.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: str | None = None
    texts: Mapping[str, bytes] | None = None

    def files(self, text: Any) -> dict[str, Any]:
        """Tokenizer files: by name, a path to copy or the text itself."""
        if self.folder is not None:
            return {name: (self.folder, name) for name in PASSED}
        if self.texts is not None:
            return dict(self.texts)
        return {} if text is None else text.files()


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint, read.

    Attributes:
      config: of the decoder.
      leaves: its parameters by path, names joined by ``/``.
      report: what was decided of each kernel.
      text: the tokenizer and chat template.
      origin: the folder, for an export.
    """

    config: DecoderConfig
    leaves: dict[str, Any]
    report: LoadReport
    text: Text
    origin: Origin


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a checkpoint says without its weights; enough to check a request.

    Attributes:
      config: of the decoder; how kernels are quantised is not decided.
      text: the tokenizer and chat template.
    """

    config: DecoderConfig
    text: Text


def fill(model: nnx.Module, config: DecoderConfig, leaves: dict[str, Any]) -> None:
    """Puts leaves into a decoder that ``nnx.eval_shape`` made, without arrays of its own.

    Args:
      model: of the config.
      config: where it stacks layers, so are the leaves here.
      leaves: by path, layer by layer; emptied, so that memory holds those of one kind twice.
    """
    state = nnx.state(model, nnx.Param)
    wanted = flat(state)
    leaves = dict(_stacked(config, leaves)) if config.scan else leaves
    for path in sorted(set(wanted) ^ set(leaves)):
        refuse_leaf(path, "is missing" if path in wanted else "has no place")
    for path, variable in wanted.items():
        value = leaves.pop(path)
        shape = tuple(value.shape)
        if shape != tuple(variable.shape):
            refuse_leaf(path, f"has shape {shape}, not {tuple(variable.shape)}")
        variable.set_value(value)
    nnx.update(model, state)


def held(path: str, leaf: Any, options: Options) -> Any:
    """A parameter as a decoder holds it: norms in float32, other floats in the asked dtype."""
    if not is_packed(leaf):
        floats = leaf.astype(np.float32 if path.endswith("/scale") else options.dtype)
        if options.dtype == np.float16 and not np.isfinite(np.asarray(floats)).all():
            refuse_leaf(path, "has values that float16 cannot hold; use bfloat16 or float32")
        return floats
    return jax.block_until_ready(laid_out(leaf)) if options.prepared else leaf


def laid_out(leaf: Any) -> Any:
    """A packed kernel, prepared; a ternary table is read by rows, which its stored form serves."""
    table = isinstance(leaf, PackedTernary) and leaf.contracting_axes == (-1,)
    return prepare(leaf) if is_packed(leaf) and not table else leaf


def flat(state: Any) -> dict[str, Any]:
    """The variables of a state by path, names joined by ``/``."""
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def refuse_leaf(path: str, what: str) -> NoReturn:
    """Reports a parameter that does not fit a decoder's config."""
    raise ValueError(
        f"{WHO}: {path!r} {what} in a decoder of the file's config. Write the file again with "
        "Decoder.save."
    )


def _stacked(config: DecoderConfig, leaves: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of all layers as one, ``layers/3/mlp/...`` as ``layers/mlp/...``."""
    rest = sorted({p.split("/", 2)[2] for p in leaves if p.startswith("layers/")})
    for path in rest:
        parts = [leaves.pop(f"layers/{i}/{path}") for i in range(config.depth)]
        yield f"layers/{path}", _stack(path, parts)
    yield from leaves.items()


def _stack(path: str, parts: list[Any]) -> Any:
    """Parameters of all layers as one, in memory of its own; ``parts`` is emptied on the way."""
    leaves, treedef = jax.tree.flatten(parts[0])
    kinds = [(leaf.shape, leaf.dtype) for leaf in leaves]
    stacks = [_memory.empty((len(parts), *shape), dtype) for shape, dtype in kinds]
    large = sum(stack.nbytes for stack in stacks) > _WORTH_IT
    for i in range(len(parts)):
        leaves, own = jax.tree.flatten(parts[i])
        if own != treedef or [(leaf.shape, leaf.dtype) for leaf in leaves] != kinds:
            refuse_leaf(f"layers/{i}/{path}", "is not as in layer 0, and scan=True stacks layers")
        for stack, leaf in zip(stacks, leaves, strict=True):
            stack[i] = leaf
        parts[i] = leaves = leaf = None
        if large:
            _memory.give_back()
    return treedef.unflatten(jax.device_put(stack) for stack in stacks)


def reads_stacks(loaded: Pretrained) -> bool:
    """Whether layers are alike, and their kernels run from a stack without being cut out of it."""
    kernels = [
        leaf
        for path, leaf in loaded.leaves.items()
        if path.startswith("layers/") and path.endswith("/kernel")
    ]
    native = all(isinstance(leaf, Prepared) and leaf.implementation == "cpu" for leaf in kernels)
    return native and not loaded.config.overrides and loaded.config.activations is not None


def unstacked(model: Any) -> dict[str, Any]:
    """The parameters of a decoder by path, layer by layer; undoes what stacks them."""
    values = {p: v.get_value() for p, v in flat(nnx.state(model, nnx.Param)).items()}
    if not model.config.scan:
        return values
    single = {p: v for p, v in values.items() if not p.startswith("layers/")}
    for path in set(values) - set(single):
        rest = path.removeprefix("layers/")
        for i in range(model.config.depth):
            single[f"layers/{i}/{rest}"] = jax.tree.map(lambda a, i=i: a[i], values[path])
    return single


def apart(model: Any) -> Any:
    """The same decoder with layers one by one; itself where they are."""
    if not model.config.scan:
        return model
    config = dataclasses.replace(model.config, scan=False)
    result: Any = nnx.eval_shape(lambda: type(model)(config, rngs=Blank(0)))
    fill(result, config, unstacked(model))
    result.report, result.text, result.origin = model.report, model.text, model.origin
    return result
