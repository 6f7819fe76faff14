"""`Decoder`: a causal language model in NNX that trains ternary and serves packed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32

from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.int8 import ActivationConfig
from bitnet_jax._quantize.ternary import KernelConfig
from bitnet_jax.io._huggingface import Published
from bitnet_jax.io._source import kind_to_load
from bitnet_jax.models import _generation, _load_folder, _load_gguf, _saved
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._network import Network
from bitnet_jax.models._parts import Blank
from bitnet_jax.models._pretrained import (
    DECLARED,
    Options,
    Origin,
    dtype_of,
    fill,
    laid_out,
    reads_stacks,
)
from bitnet_jax.models._publish import published
from bitnet_jax.models._report import LoadReport
from bitnet_jax.models._request import checked
from bitnet_jax.models._sampling import Sampling
from bitnet_jax.models._text import Text


class Decoder(Network):
    """A decoder of tokens: tokens in, logits of the next ones out.

    It is a plain NNX module: ``nnx.grad``, ``nnx.Optimizer``, ``bj.nnx.pack``,
    ``bj.prepare`` on its state and ``bj.lora`` take it as they take any other. The call
    is the one that tunix's samplers and trainers make.

    Args:
      config: the shape, and how each kernel is quantised.
      rngs: the key that initialises the parameters.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> from flax import nnx
      >>> config = bj.models.DecoderConfig(vocabulary=64, width=32, hidden=64, depth=2, heads=4)
      >>> model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
      >>> tokens = jnp.arange(6)[None]
      >>> logits, _ = model(tokens)
      >>> packed, report = bj.nnx.pack(model)
      >>> logits.shape, bool(jnp.allclose(packed(tokens)[0], logits, atol=1e-5))
      ((1, 6, 64), True)

    References:
      Ma et al., arXiv:2402.17764; Ma et al., arXiv:2504.12285.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.report: LoadReport | None = None
        self.text: Text | None = None
        self.origin = Origin()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: jax.typing.DTypeLike | None = None,
        packed: bool = True,
        weights: KernelConfig | None = None,
        head: KernelConfig | None = None,
        activations: ActivationConfig | Literal["declared"] | None = DECLARED,
        quantization_config: Mapping[str, Any] | None = None,
        scan: bool | None = False,
        prepared: bool = False,
        progress: Callable[[float], None] = lambda _: None,
    ) -> Decoder:
        """A decoder from a published checkpoint.

        Args:
          path: a folder with config.json and safetensors files; a GGUF file; or a file of
            :meth:`save`.
          dtype: of the computation, and of what is held as floats. None: as a file of
            :meth:`save` has both, and float32 for others.
          packed: whether quantised kernels are held packed; False: as floats, to train.
          weights: a quantiser for projections that the checkpoint holds as floats and runs
            as floats, such as ``bj.Int8Config()``; None leaves them.
          head: a quantiser for a float head (the embedding, where it is tied).
          activations: the quantiser of inputs of quantised kernels, such as
            ``bj.ActivationConfig(group=64)``; "declared": the checkpoint's; None: weight-only.
          quantization_config: in place of the one in config.json.
          scan: whether layers are stacked, and run by ``jax.lax.scan``. None: where it is the
            faster form, for layers that are alike and ``prepared`` for this machine.
          prepared: whether kernels are laid out for this machine as they come, as
            :meth:`prepare` does it to all of them: memory holds them once. Such a decoder
            generates; it is not saved or exported.
          progress: called with the part that is done, 0 to 1.

        Returns:
          The decoder. Its ``report`` says what became of each kernel.

        Raises:
          FileNotFoundError: a missing folder, file or shard.
          ValueError: a key, tensor or dtype that does not fit, by its name.
          TypeError: an argument of another type.
        """
        kind = kind_to_load(path)
        if dtype is None and kind != "saved":
            dtype = jnp.float32
        options = Options(
            None if dtype is None else dtype_of(dtype),
            packed,
            weights,
            head,
            activations,
            quantization_config,
            scan,
            prepared,
            progress,
        )
        readers = {"gguf": _load_gguf.load, "saved": _saved.load}
        loaded = readers.get(kind or "", _load_folder.load)(path, options)
        config = loaded.config
        if scan is None:
            config = dataclasses.replace(config, scan=reads_stacks(loaded))
        model = nnx.eval_shape(lambda: cls(config, rngs=Blank(0)))
        fill(model, config, loaded.leaves)
        model.report, model.text, model.origin = loaded.report, loaded.text, loaded.origin
        return model

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dense: bool = False,
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Writes the decoder to one file: parameters, config and tokenizer.

        :meth:`from_pretrained` gives back the same bits. The file is one of ``bj.io.save``: it
        appears whole or not at all, and a changed bit is refused. Stacked layers are written
        one by one.

        Args:
          path: the file; by convention ``*.bitnet.safetensors``.
          dense: whether two-bit kernels are stored at 1.6 bits a weight.
          progress: called with the part that is written, 0 to 1.

        Raises:
          TypeError: prepared kernels; another kind of path.
          OSError: from the disk.

        Example:
          >>> import os, tempfile, bitnet_jax as bj
          >>> from flax import nnx
          >>> config = bj.models.DecoderConfig(vocabulary=64, width=32, hidden=64, depth=1)
          >>> model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     file = os.path.join(folder, "model.bitnet.safetensors")
          ...     model.save(file)
          ...     again = bj.models.Decoder.from_pretrained(file)
          >>> again.config == model.config
          True
        """
        _saved.save(self, path, dense, progress)

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop: str | int | Sequence[str | int] = (),
        cache_size: int | None = None,
        cache_dtype: jax.typing.DTypeLike | None = None,
    ) -> Any:
        """What the model says after a prompt.

        Args:
          prompt: a text; token ids; messages, mappings with ``role`` and ``content``, that the
            checkpoint's chat template makes a text of; or a list of one of these.
          max_new_tokens: at most so many.
          temperature: 0 takes the most likely token; above, tokens are drawn.
          top_k: draws from so many of the likeliest.
          top_p: draws from the likeliest that have this probability together.
          min_p: draws from those that have this part of the likeliest one's probability.
          repetition_penalty: divides the logits of tokens that were there (above 0).
          seed: of the draws; one row's do not depend on the others.
          stop: strings, or ids, that end an answer, beside the checkpoint's own. A string is
            not part of the answer.
          cache_size: tokens the cache has room for; None: a power of two that is enough.
          cache_dtype: float32, bfloat16 or int8; None: the config's dtype.

        Returns:
          The new text; for token ids, the new ids, an id that ended them among them. A list of
          these for a list of prompts.

        Raises:
          ValueError: a number out of range; a prompt longer than the context; no tokenizer; a
            chat template that fails or is stopped; a cache that is too small.
          TypeError: another kind of prompt.

        Example:
          >>> import bitnet_jax as bj
          >>> from flax import nnx
          >>> config = bj.models.DecoderConfig(vocabulary=64, width=32, hidden=64, depth=1)
          >>> model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
          >>> len(model.generate([3, 1, 4], max_new_tokens=5))
          5
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        request = checked(self, prompt, max_new_tokens, sampling, stop, cache_size, cache_dtype)
        return _generation.generate(self, request)

    def stream(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop: str | int | Sequence[str | int] = (),
        cache_size: int | None = None,
        cache_dtype: jax.typing.DTypeLike | None = None,
    ) -> Iterator[Any]:
        """The same as :meth:`generate`, piece by piece, for one prompt.

        Args:
          prompt: as for :meth:`generate`, not a list of prompts.
          max_new_tokens: as there.
          temperature: as there.
          top_k: as there.
          top_p: as there.
          min_p: as there.
          repetition_penalty: as there.
          seed: as there.
          stop: as there.
          cache_size: as there.
          cache_dtype: as there.

        Returns:
          An iterator of texts, each valid UTF-8, or of ids. Joined they are what
          :meth:`generate` returns.

        Raises:
          ValueError: as :meth:`generate`; several prompts.
          TypeError: as :meth:`generate`.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        request = checked(self, prompt, max_new_tokens, sampling, stop, cache_size, cache_dtype)
        if not request.single:
            raise ValueError("stream: `prompt` must be one prompt. Use generate for several.")
        return _generation.stream(self, request)

    def encode(self, prompt: Any, *, normalize: bool = True) -> Float32[Array, "*b k"]:
        """A vector for each text, as embedding models have it: the last token's.

        Args:
          prompt: as for :meth:`generate`.
          normalize: whether vectors have length 1.

        Returns:
          (width,) for one prompt, (prompts, width) for a list of them.

        Raises:
          NotImplementedError: a checkpoint that makes its vectors in another way.
          ValueError: a prompt longer than the context; text without a tokenizer.
          TypeError: another kind of prompt.

        Example:
          >>> import bitnet_jax as bj
          >>> from flax import nnx
          >>> config = bj.models.DecoderConfig(vocabulary=64, width=32, hidden=64, depth=1)
          >>> model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
          >>> model.encode([[1, 2, 3], [4, 5]]).shape
          (2, 32)
        """
        return _generation.encode(self, prompt, normalize)

    def prepare(self) -> Decoder:
        """A decoder whose packed kernels are laid out for this machine, as ``bj.prepare`` does.

        Call it once, after loading, to generate; keep the stored decoder to save or export.

        Returns:
          A decoder that shares all other parameters with this one.

        Example:
          >>> import bitnet_jax as bj
          >>> from flax import nnx
          >>> config = bj.models.DecoderConfig(vocabulary=64, width=32, hidden=64, depth=1)
          >>> model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
          >>> packed, report = bj.nnx.pack(model)
          >>> fast = packed.prepare()
          >>> fast.generate([1, 2], max_new_tokens=3) == packed.generate([1, 2], max_new_tokens=3)
          True
        """
        graph, state = nnx.split(self)
        return nnx.merge(graph, jax.tree.map(laid_out, state, is_leaf=is_packed))

    def published(self, layout: Literal["bitlinear", "autobitlinear"] = "bitlinear") -> Published:
        """What ``bj.io.export_huggingface`` writes.

        Args:
          layout: how scales are stored.

        Returns:
          The config, and the tensors by their published names.

        Raises:
          NotImplementedError: flags that no architecture of transformers has.
          TypeError: prepared or int8 kernels.
          ValueError: outputs that are no multiple of four; a tensor with NaN or Inf, by its name.
        """
        return published(self, layout)
