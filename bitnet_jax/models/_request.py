"""The arguments of ``generate``, checked and in one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from bitnet_jax import _checks
from bitnet_jax.models._cache import require_cache_dtype
from bitnet_jax.models._sampling import Sampling
from bitnet_jax.models._text import Text


@dataclasses.dataclass(frozen=True)
class Request:
    """What ``generate`` was asked, checked.

    Attributes:
      rows: token ids of each prompt.
      as_text: whether text goes back.
      single: whether one prompt was given, and not a list of them.
      most: how many tokens to make at most.
      sampling: how each is chosen.
      stop_ids: tokens that end a row.
      stop_texts: strings that end a row.
      cache_size: slots of the cache; None: as many as are needed.
      cache_dtype: of keys and values; None: the model's.
    """

    rows: list[list[int]]
    as_text: bool
    single: bool
    most: int
    sampling: Sampling
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    cache_size: int | None
    cache_dtype: Any


def text_of(model: Any) -> Text:
    if model.text is None:
        raise ValueError(
            "generate: this decoder has no tokenizer, for it was not loaded from a checkpoint. "
            "Pass token ids, a list of integers: they come back as ids."
        )
    return model.text


def checked(
    model: Any,
    prompt: Any,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Any,
    cache_size: int | None,
    cache_dtype: Any,
) -> Request:
    """The arguments of ``generate``, checked and in one form.

    Of the model only ``config`` and ``text`` are read: an :class:`Outline` will do.
    """
    given = stops_of(max_new_tokens, stop)
    _require_cache(cache_size, cache_dtype)
    rows, as_text, single = rows_of(model, prompt)
    require_tokens(rows, model.config.vocabulary)
    longest, context = max(map(len, rows)), model.config.context
    if longest + max_new_tokens > context:
        raise ValueError(
            f"generate: the prompt has {longest} tokens, max_new_tokens is {max_new_tokens}, and "
            f"the model's context {context}. Shorten the prompt, or ask for at most "
            f"{max(context - longest, 0)} tokens."
        )
    own = frozenset() if model.text is None else model.text.stops
    texts = tuple(one for one in given if isinstance(one, str))
    if texts and (model.text is None or not model.text.has_tokenizer):
        raise ValueError(
            f"generate: `stop` has the text {texts[0]!r}, and there is no tokenizer to make text "
            "of tokens. Stop at token ids, integers."
        )
    # Text goes back without special tokens: one that is to stop it is looked for by its id.
    special = [text_of(model).special_id(one) for one in texts]
    ids = [one for one in given if isinstance(one, int)]
    for one in ids:
        if not 0 <= one < model.config.vocabulary:
            raise ValueError(
                f"generate: `stop` has the token {one}, which is not in the model's vocabulary of "
                f"{model.config.vocabulary}. Leave it out, or pass a text."
            )
    return Request(
        rows,
        as_text,
        single,
        max_new_tokens,
        sampling,
        own | {*ids, *(at for at in special if at is not None)},
        texts,
        cache_size,
        cache_dtype,
    )


def _require_cache(size: int | None, dtype: jax.typing.DTypeLike | None) -> None:
    if size is not None:
        _checks.require_count("generate", "cache_size", size)
    if dtype is not None:
        require_cache_dtype("generate", "cache_dtype", dtype)


def stops_of(max_new_tokens: int, stop: Any) -> list[str | int]:
    """The stops as a list; refuses what is wrong of both whatever the model is."""
    who = "generate"
    _checks.require_count(who, "max_new_tokens", max_new_tokens)
    alone = isinstance(stop, (str, int, np.integer))
    given: list[Any] = [] if stop is None else [stop] if alone else [*stop]
    if not all(_checks.is_integer(one) or (isinstance(one, str) and one) for one in given):
        raise TypeError(f"{who}: `stop` must be strings or token ids, got {stop!r}.")
    return [one if isinstance(one, str) else int(one) for one in given]


def rows_of(model: Any, prompt: Any) -> tuple[list[list[int]], bool, bool]:
    """Token ids of every prompt, whether it was text, and whether it was one."""
    if isinstance(prompt, str):
        return [text_of(model).encode(prompt)], True, True
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or not prompt:
        _refuse_prompt(prompt)
    if isinstance(prompt, (bytes, bytearray)):  # of integers, which are no token ids
        _refuse_prompt(prompt)
    first = prompt[0]
    if isinstance(first, Mapping):
        return [text_of(model).chat(prompt)], True, True
    if _checks.is_integer(first):
        if not all(map(_checks.is_integer, prompt)):
            _refuse_prompt(prompt)
        return [[*map(int, prompt)]], False, True
    if not isinstance(first, (str, Sequence)) and not hasattr(first, "tolist"):
        _refuse_prompt(prompt)
    parts = [rows_of(model, one) for one in prompt]
    if any(not single for _, _, single in parts) or len({text for _, text, _ in parts}) != 1:
        _refuse_prompt(prompt)
    return [rows[0] for rows, _, _ in parts], parts[0][1], False


def _refuse_prompt(prompt: Any) -> NoReturn:
    raise TypeError(
        "generate: `prompt` must be a text, token ids, or messages with a role and a content; or a "
        f"list of one of these, got {_checks.describe(prompt):.200}."
    )


def require_tokens(rows: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Refuses empty prompts, and ids that the model has no row for."""
    for row in rows:
        if not row:
            raise ValueError("generate: a prompt has no tokens. Give at least one.")
        low, high = min(row), max(row)
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"generate: token {low if low < 0 else high} is not in the model's vocabulary of "
                f"{vocabulary}. Check that the tokenizer is this model's."
            )
