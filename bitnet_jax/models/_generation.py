"""Tokens after tokens: prefill, then one step each, from a preallocated cache.

Prompts are padded on the left to a bucket, a power of two, and the cache to another, so
that a few shapes serve all lengths: one trace for each bucket, and one for all single
steps on caches of a length. The cache is donated: a step writes its keys and values where
they lie. A row that has ended keeps its place in the batch until all have.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitnet_jax.models._request import Request, require_tokens, rows_of, text_of
from bitnet_jax.models._sampling import Filters, choose
from bitnet_jax.models._text import Pieces

SMALLEST = 16  # tokens of the smallest bucket


def bucket(length: int) -> int:
    """The power of two that a length is padded to."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


class _Graph:
    """A model without its arrays, as a static argument that hashes once."""

    def __init__(self, graph: Any, tree: Any):
        self.graph, self.tree = graph, tree
        self._hash = hash((graph, tree))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        same = isinstance(other, _Graph)
        return same and self.graph == other.graph and self.tree == other.tree

    def model(self, leaves: list[jax.Array]) -> Any:
        """The model again."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


def run_step(
    graph: _Graph,
    filters: Filters,
    leaves: list[jax.Array],
    cache: Any,
    seen: jax.Array | None,
    tokens: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    values: dict[str, jax.Array],
) -> tuple[jax.Array, Any, jax.Array | None]:
    """Some tokens of every row in, the next one out: prefill, and every step after it."""
    model = graph.model(leaves)
    x, cache = model.hidden(tokens, None, cache, mask)
    # The head reads the last token alone: prompts end where their bucket does.
    logits = model.logits(jax.lax.slice_in_dim(x, x.shape[1] - 1, x.shape[1], axis=1))
    ids = choose(jnp.squeeze(logits, 1), seen, key, filters, values)
    if seen is not None:
        seen = seen.at[jnp.arange(len(ids)), ids].set(True)
    return ids, cache, seen


step = jax.jit(run_step, static_argnums=(0, 1), donate_argnums=(3, 4))


def tokens_of(model: Any, request: Request) -> Iterator[list[int | None]]:
    """The next token of every row, again and again; None where a row has ended."""
    rows = request.rows
    longest = max(map(len, rows))
    length = bucket(longest)
    slots = _slots(length, request)
    tokens, mask = _padded(rows, length, slots)
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    sampling, filters = request.sampling, request.sampling.filters
    cache = model.init_cache(len(rows), slots, request.cache_dtype)
    seen = _seen(rows, model.config.vocabulary) if filters.penalty else None
    now, seeing = jnp.asarray(tokens), jnp.asarray(mask)
    key, still = jax.random.key(sampling.seed), [True] * len(rows)
    frozen, values = _Graph(graph, tree), sampling.values

    def run(n: int, now: jax.Array) -> jax.Array:
        nonlocal cache, seen
        ids, cache, seen = step(
            frozen, filters, leaves, cache, seen, now, seeing, jax.random.fold_in(key, n), values
        )
        return ids

    ids, last = run(0, now), request.most - 1
    for n in range(request.most):
        # The next step runs while this token is looked at: if no row goes on, for nothing. The
        # first token does not wait for the compilation of single steps.
        ahead = run(n + 1, ids[:, None]) if 0 < n < last else None
        out = [int(i) if alive else None for i, alive in zip(np.asarray(ids), still, strict=True)]
        still = [i is not None and i not in request.stop_ids for i in out]
        yield out
        if n == last or not any(still):
            return
        ids = run(n + 1, ids[:, None]) if ahead is None else ahead


def _seen(rows: Sequence[Sequence[int]], vocabulary: int) -> jax.Array:
    seen = np.zeros((len(rows), vocabulary), bool)
    for r, row in enumerate(rows):
        seen[r, row] = True
    return jnp.asarray(seen)


def _slots(length: int, request: Request) -> int:
    """Slots of the cache: a bucket, or what was asked for if it is enough."""
    needed = length + request.most - 1  # the last token is not looked at again
    if request.cache_size is None:
        return bucket(needed)
    if request.cache_size < needed:
        raise ValueError(
            f"generate: `cache_size` is {request.cache_size}, and {needed} slots are needed: the "
            f"longest prompt takes {length}, and max_new_tokens={request.most}. Leave it out, or "
            "ask for fewer tokens."
        )
    return request.cache_size


def generate(model: Any, request: Request) -> Any:
    """All tokens of every row: text or ids, of one prompt or of several."""
    made: list[list[int]] = [[] for _ in request.rows]
    pieces = [_pieces(model, request) for _ in request.rows]
    texts = ["" for _ in request.rows]
    ended = [False] * len(made)
    for out in tokens_of(model, request):
        for r, token in enumerate(out):
            if token is None or ended[r]:
                continue
            made[r].append(token)
            decoder = pieces[r]
            if decoder is not None and token not in request.stop_ids:
                texts[r] += decoder.push(token)
                ended[r] = decoder.stopped
        if all(ended[r] or token is None for r, token in enumerate(out)):
            break
    if request.as_text:
        texts = [t + p.finish() for t, p in zip(texts, pieces, strict=True) if p is not None]
    answers: list[Any] = texts if request.as_text else made
    return answers[0] if request.single else answers


def stream(
    model: Any, request: Request, clock: Callable[[float], None] = lambda _: None
) -> Iterator[Any]:
    """Pieces of one answer as they come: text that is valid UTF-8, or ids.

    ``clock`` gets the time at which each token came.
    """
    decoder = _pieces(model, request)
    for (token,) in tokens_of(model, request):
        clock(time.perf_counter())
        if token is None:
            break
        if not request.as_text:
            yield token
        if decoder is None or token in request.stop_ids:
            continue
        piece = decoder.push(token)
        if piece and request.as_text:
            yield piece
        if decoder.stopped:
            return
    rest = decoder.finish() if decoder is not None and request.as_text else ""
    if rest:
        yield rest


def _pieces(model: Any, request: Request) -> Pieces | None:
    """A decoder of one row, where text goes back or is looked for."""
    if not (request.as_text or request.stop_texts):
        return None
    text = text_of(model)
    _ = text.tokenizer  # that there is none is said before the first token
    return Pieces(text, request.stop_texts)


def encode(model: Any, prompt: Any, normalize: bool) -> jax.Array:
    """One vector for each prompt: what the last token has after the final norm."""
    pooling = None if model.text is None else model.text.pooling
    if pooling is not None:
        raise NotImplementedError(
            f"encode: the checkpoint makes its vectors by {pooling}, and encode takes the last "
            "token's. Make them from what model.hidden returns for every token."
        )
    rows, _, single = rows_of(model, prompt)
    require_tokens(rows, model.config.vocabulary)
    longest, context = max(map(len, rows)), model.config.context
    if longest > context:
        raise ValueError(
            f"encode: a prompt has {longest} tokens, and the model's context is {context}. "
            "Shorten it."
        )
    tokens, mask = _padded(rows, bucket(longest), bucket(longest))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    vectors = _last(_Graph(graph, tree), leaves, jnp.asarray(tokens), jnp.asarray(mask), normalize)
    return vectors[0] if single else vectors


@functools.partial(jax.jit, static_argnums=(0, 4))
def _last(graph: _Graph, leaves: list[jax.Array], tokens, mask, normalize: bool) -> jax.Array:
    x, _ = graph.model(leaves).hidden(tokens, None, None, mask)
    last = jax.lax.index_in_dim(x, x.shape[1] - 1, axis=1, keepdims=False).astype(jnp.float32)
    if not normalize:
        return last
    length = jnp.sqrt(jnp.sum(last * last, axis=-1, keepdims=True))
    return last / jnp.maximum(length, np.float32(1e-12))


def _padded(
    rows: Sequence[Sequence[int]], length: int, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (rows, length), padded on the left, and which of the slots may be looked at."""
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.ones((len(rows), slots), bool)
    for r, row in enumerate(rows):
        tokens[r, length - len(row) :] = row
        mask[r, : length - len(row)] = False
    return tokens, mask
