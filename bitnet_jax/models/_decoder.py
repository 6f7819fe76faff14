"""`Decoder`: a causal language model in NNX that trains ternary and serves packed.

One class for the published families: BitNet b1.58, Llama, Qwen3, MiniCPM. What they
differ in is a flag of :class:`DecoderConfig`::

    x = embedding[tokens]
    x = x + out(sub_norm(attention(rotate(query(n)), rotate(key(n)), value(n))))   n = norm(x)
    x = x + down(sub_norm(act(gate(m)) * up(m)))                                   m = norm(x)
    logits = head(norm(x))

Left out: mixture of experts, sliding windows, encoders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Float32, Int, PyTree

from bitnet_jax import _checks
from bitnet_jax._matmul import prepare
from bitnet_jax._packed.kernel import PackedTernary, is_packed
from bitnet_jax._quantize.int8 import ActivationConfig
from bitnet_jax._quantize.ternary import KernelConfig
from bitnet_jax.io._huggingface import Published
from bitnet_jax.models import _blocks, _generation, _load_folder, _load_gguf
from bitnet_jax.models._attention import empty_layer
from bitnet_jax.models._axes import MeshAxes, specs_of
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._parts import RMSNorm, embedding, linear
from bitnet_jax.models._pretrained import DECLARED, Options, Origin, fill
from bitnet_jax.models._publish import published
from bitnet_jax.models._report import LoadReport
from bitnet_jax.models._rope import rotation
from bitnet_jax.models._sampling import Sampling
from bitnet_jax.models._text import Text


class Decoder(nnx.Module):
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
        who = "Decoder"
        remedy = "Use bj.models.DecoderConfig(vocabulary=...)."
        _checks.require_instance(who, "config", config, DecoderConfig, remedy)
        self.config = config
        self.embed = embedding(config, rngs)
        self.layers = _blocks.make_layers(config, rngs)
        self.norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        kernel, activations = config.kernel("head"), config.head_activations
        sizes = config.width, config.vocabulary
        head = None if config.tied else linear(*sizes, False, kernel, activations, config, rngs)
        self.head = head
        self.report: LoadReport | None = None
        self.text: Text | None = None
        self.origin = Origin()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        packed: bool = True,
        weights: KernelConfig | None = None,
        head: KernelConfig | None = None,
        activations: ActivationConfig | Literal["declared"] | None = DECLARED,
        quantization_config: Mapping[str, Any] | None = None,
        scan: bool = False,
        progress: Callable[[float], None] = lambda _: None,
    ) -> Decoder:
        """A decoder from a published checkpoint.

        Args:
          path: a folder with config.json and safetensors files, or a ``.gguf`` file.
          dtype: of the computation, and of what is held as floats.
          packed: whether quantised kernels are held packed; False: as floats, to train.
          weights: a quantiser for projections that the checkpoint holds as floats and runs
            as floats, such as ``bj.Int8Config()``; None leaves them.
          head: a quantiser for a float head (the embedding, where it is tied).
          activations: what meets quantised kernels is quantised as the checkpoint
            declares, or as given here; None: weight-only.
          quantization_config: in place of the one in config.json.
          scan: whether layers are stacked.
          progress: called with the part that is done, 0 to 1.

        Returns:
          The decoder. Its ``report`` says what became of each kernel.

        Raises:
          FileNotFoundError: a missing folder, file or shard.
          ValueError: a key, tensor or dtype that does not fit, by its name.
        """
        dtype = jnp.dtype(dtype)
        options = Options(
            dtype, packed, weights, head, activations, quantization_config, scan, progress
        )
        of_file = os.fspath(path).endswith(".gguf")
        loaded = (_load_gguf if of_file else _load_folder).load(path, options)
        model = nnx.eval_shape(lambda: cls(loaded.config, rngs=nnx.Rngs(0)))
        fill(model, loaded)
        model.report, model.text, model.origin = loaded.report, loaded.text, loaded.origin
        return model

    def encode(self, prompt: Any, *, normalize: bool = True) -> Float32[Array, "*b k"]:
        """A vector for each text, as embedding models have it: the last token's.

        Args:
          prompt: as for :meth:`generate`.
          normalize: whether vectors have length 1.

        Returns:
          (width,) for one prompt, (prompts, width) for a list of them.

        Raises:
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
        # A ternary table is read by rows, which only the stored layout serves.
        table = self.embed.embedding.get_value()
        if any(map(is_packed, jax.tree.leaves(state, is_leaf=is_packed))):
            state = prepare(state)
        model = nnx.merge(graph, state)
        if isinstance(table, PackedTernary):
            model.embed.embedding.set_value(table)
        return model

    def partition_specs(
        self, rules: Mapping[str, MeshAxes], *, mesh: Mesh | AbstractMesh | None = None
    ) -> PyTree:
        """The ``PartitionSpec`` of every parameter, by the logical names of its axes.

        Args:
          rules: mesh axes by name: ``"vocabulary"``, ``"embed"``, ``"heads"``, ``"kv_heads"``,
            ``"mlp"``, ``"layers"`` (of stacked layers). Names without a rule are not divided.
          mesh: the mesh that the specs are checked against; by default that of
            ``jax.set_mesh``, if there is one.

        Returns:
          A tree like ``nnx.state(model, nnx.Param)`` with a spec for every array.

        Raises:
          ValueError: an unknown name; a spec that does not divide its parameter.

        Example:
          >>> import bitnet_jax as bj
          >>> from flax import nnx
          >>> config = bj.models.DecoderConfig(vocabulary=64, width=32, hidden=64, depth=1)
          >>> model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
          >>> specs = model.partition_specs({"mlp": "model"})
          >>> specs["layers"][0]["mlp"]["up"]["linear"]["kernel"].get_value()
          P(None, 'model')
        """
        return specs_of(nnx.state(self, nnx.Param), rules, mesh)

    def published(self, layout: Literal["bitlinear", "autobitlinear"] = "bitlinear") -> Published:
        """What ``bj.io.export_huggingface`` writes.

        Args:
          layout: how scales are stored.

        Returns:
          The config, and the tensors by their published names.

        Raises:
          NotImplementedError: flags that no architecture of transformers has.
          TypeError: prepared or int8 kernels.
          ValueError: outputs that are no multiple of four; a bias that this layout changes.
        """
        return published(self, layout)

    @property
    def num_embed(self) -> int:
        """How many tokens there are; tunix's name for it."""
        return self.config.vocabulary

    def __call__(
        self,
        tokens: Int[Array, "b l"],
        positions: Int[Array, "b l"] | None = None,
        cache: _blocks.Cache | None = None,
        attention_mask: Array | None = None,
    ) -> tuple[Float32[Array, "b l v"], Any]:
        """The logits of every next token.

        Args:
          tokens: integers.
          positions: of the tokens; None counts from the cache's end, or from the first
            token that a mask of rank 2 marks.
          cache: keys and values of earlier tokens, from :meth:`init_cache`; None: none.
          attention_mask: None; (batch, slots), true where a slot holds a token and not
            padding, with ``slots`` the cache's (without a cache, the tokens); or
            (batch, length, slots), true where a token may look.

        Returns:
          Logits, float32, and the cache with these tokens in it (None without one).

        Raises:
          TypeError: tokens that are no integers.
          ValueError: shapes that do not fit; more tokens than the cache has slots.
        """
        x, cache = self.hidden(tokens, positions, cache, attention_mask)
        return self.logits(x), cache

    def hidden(
        self,
        tokens: Int[Array, "b l"],
        positions: Int[Array, "b l"] | None = None,
        cache: _blocks.Cache | None = None,
        attention_mask: Array | None = None,
        *,
        states: list[jax.Array] | None = None,
    ) -> tuple[Float[Array, "b l k"], Any]:
        """What the head reads: the last layer's output after the norm.

        Args:
          tokens: as for the call itself.
          positions: as there.
          cache: as there.
          attention_mask: as there.
          states: a list that gets the embedding, every layer's output but the last, and the
            result: ``depth + 1`` arrays, in the order of transformers' ``hidden_states``.

        Returns:
          (batch, length, width) in the config's dtype, and the cache.

        Raises:
          TypeError: as the call itself.
          ValueError: as the call itself.
        """
        config = self.config
        tokens = jnp.asarray(tokens)
        start, slots = jnp.zeros((1,), jnp.int32), tokens.shape[-1]
        if cache is not None:
            start, slots = _blocks.slots_of(cache)
        _require_fitting(tokens, slots, attention_mask)
        batch, length = tokens.shape
        at, mask = _blocks.positions_and_mask(
            batch, length, start, slots, attention_mask, positions
        )
        x = self.embed(tokens)
        if config.embedding_multiplier != 1.0:
            x = x * jnp.asarray(config.embedding_multiplier, x.dtype)
        turned = rotation(config.rope, config.head_dim, at, config.dtype)
        each = None
        if states is not None:
            states.append(x)
            each = states.append
        x, cache = _blocks.run_layers(self.layers, config, x, turned, mask, cache, each)
        x = self.norm(x)
        if states is not None:
            states.append(x)
        return x, cache

    def logits(self, x: Float[Array, "*b k"]) -> Float32[Array, "*b v"]:
        """The head.

        Args:
          x: what :meth:`hidden` returned, or some rows of it.

        Returns:
          Logits, float32.
        """
        if self.config.logit_multiplier != 1.0:
            x = x * jnp.asarray(self.config.logit_multiplier, x.dtype)
        y = self.embed.attend(x) if self.head is None else self.head(x)
        return y.astype(jnp.float32)

    def init_cache(
        self, batch_size: int, cache_size: int, dtype: jax.typing.DTypeLike | None = None
    ) -> _blocks.Cache:
        """An empty cache of keys and values.

        Args:
          batch_size: rows.
          cache_size: tokens that each row has room for.
          dtype: float32, bfloat16, or int8 with one scale for each token and head;
            None: the config's.

        Returns:
          A plain tree, for ``cache``; see the module's head.

        Example:
          >>> import bitnet_jax as bj
          >>> from flax import nnx
          >>> config = bj.models.DecoderConfig(vocabulary=64, width=32, hidden=64, depth=1)
          >>> model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
          >>> model.init_cache(1, 16)["layer_0"]["k"].shape
          (1, 16, 4, 8)
        """
        config = self.config
        kind = jnp.dtype(config.dtype if dtype is None else dtype)
        layers = [empty_layer(config, batch_size, cache_size, kind) for _ in range(config.depth)]
        if config.scan:
            return {_blocks.STACKED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
        return {f"layer_{i}": layer for i, layer in enumerate(layers)}

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
        request = _generation.checked(
            self, prompt, max_new_tokens, sampling, stop, cache_size, cache_dtype
        )
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
        request = _generation.checked(
            self, prompt, max_new_tokens, sampling, stop, cache_size, cache_dtype
        )
        if not request.single:
            raise ValueError("stream: `prompt` must be one prompt. Use generate for several.")
        return _generation.stream(self, request)


def _require_fitting(tokens: Any, slots: int, mask: Any) -> None:
    """Refuses tokens or a mask that do not meet the cache."""
    who = "Decoder"
    if tokens.ndim != 2:
        raise ValueError(
            f"{who}: `tokens` must be (batch, length), got shape {tuple(tokens.shape)}. Pass "
            "tokens[None] for a single row."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{who}: `tokens` must be integers, got {_checks.describe(tokens)}.")
    batch, length = tokens.shape
    if length > slots:
        raise ValueError(
            f"{who}: `cache` has {slots} slots, and {length} tokens came. Make it with "
            f"init_cache(batch_size, cache_size), cache_size >= {length}."
        )
    fits = ((batch, slots), (batch, length, slots))
    if mask is not None and tuple(mask.shape) not in fits:
        raise ValueError(
            f"{who}: `attention_mask` must have shape {fits[0]} or {fits[1]} (batch, length, "
            f"slots), got {tuple(mask.shape)}."
        )
