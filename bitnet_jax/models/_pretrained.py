"""What a loader hands over, and a decoder made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.ternary import KernelConfig
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._report import LoadReport
from bitnet_jax.models._text import Text

DECLARED = "declared"


@dataclasses.dataclass(frozen=True)
class Options:
    """What a caller asks of a loader; the arguments of ``Decoder.from_pretrained``."""

    dtype: Any = np.float32
    packed: bool = True
    weights: KernelConfig | None = None
    head: KernelConfig | None = None
    activations: Any = DECLARED
    quantization_config: Mapping[str, Any] | None = None
    scan: bool = False
    progress: Callable[[float], None] = lambda _: None


_PASSED = (
    "tokenizer.json",
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
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: str | None = None

    def files(self, text: Any) -> dict[str, Any]:
        """Tokenizer files: by name, a path to copy or the text itself."""
        if self.folder is not None:
            return {name: (self.folder, name) for name in _PASSED}
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


def fill(model: nnx.Module, loaded: Pretrained) -> None:
    """Puts leaves into a decoder that ``nnx.eval_shape`` made, without arrays of its own."""
    state = nnx.state(model, nnx.Param)
    wanted = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    leaves = _stacked(loaded) if loaded.config.scan else loaded.leaves
    assert set(wanted) == set(leaves), sorted(set(wanted) ^ set(leaves))
    for path, variable in wanted.items():
        value = leaves[path]
        assert tuple(value.shape) == tuple(variable.shape), path
        if not is_packed(value):
            value = value.astype(variable.dtype)
        variable.set_value(value)
    nnx.update(model, state)


def _stacked(loaded: Pretrained) -> dict[str, Any]:
    """The leaves of all layers as one, ``layers/3/mlp/...`` as ``layers/mlp/...``."""
    single = {p: v for p, v in loaded.leaves.items() if not p.startswith("layers/")}
    rest = sorted({p.split("/", 2)[2] for p in loaded.leaves if p.startswith("layers/")})
    for path in rest:
        parts = [loaded.leaves[f"layers/{i}/{path}"] for i in range(loaded.config.depth)]
        single[f"layers/{path}"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    return single
