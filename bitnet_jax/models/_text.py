"""Text to tokens and back: a checkpoint's tokenizer, and pieces that are valid at every step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitnet_jax.models._template import render

TOKENIZER = "tokenizer.json"

# In the config.json of an export or a saved file: Text.pooling, which folders have elsewhere.
POOLING = "bitnet_jax_pooling"

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no UTF-8, or not yet


class Text:
    """A checkpoint's tokenizer and chat template, made when they are first asked for.

    Attributes:
      vocabulary: of the model; a larger tokenizer is refused.
      stops: the ids that end an answer.
      pooling: what an embedding model does in place of taking the last token; None: nothing else.
    """

    def __init__(
        self,
        vocabulary: int,
        stops: frozenset[int],
        tokenizer: Callable[[], Any] | None,
        template: str | None,
        tokens: Mapping[str, str],
        missing: str,
        pooling: str | None = None,
    ):
        self.vocabulary, self.stops = vocabulary, stops
        self._make, self._template, self._tokens = tokenizer, template, dict(tokens)
        self._missing, self.pooling = missing, pooling
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer``."""
        if self._tokenizer is None:
            if self._make is None:
                raise ValueError(
                    f"generate: there is no tokenizer ({self._missing}). Pass token ids, a list "
                    "of integers (at the command line, --ids): they come back as ids."
                )
            tokenizer = self._make()
            size = tokenizer.get_vocab_size(with_added_tokens=True)
            if size > self.vocabulary:
                raise ValueError(
                    f"generate: the tokenizer has {size} tokens, and the model {self.vocabulary}. "
                    "Check that both are of one checkpoint, or pass token ids."
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether the checkpoint came with a tokenizer that is read."""
        return self._make is not None

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint came with a chat template."""
        return self._template is not None

    def files(self) -> dict[str, str]:
        """What a folder holds of this: tokenizer.json and its config, by name."""
        if self._make is None:
            return {}
        stops = sorted(self.stops)
        says = dict(self._tokens) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self._template is not None:
            says["chat_template"] = self._template
        return {
            TOKENIZER: self.tokenizer.to_str(),
            "tokenizer_config.json": json.dumps(says, ensure_ascii=False, indent=2),
            "generation_config.json": json.dumps({"eos_token_id": stops} if stops else {}),
        }

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; ``special`` adds those that begin or end a text."""
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def special_id(self, text: str) -> int | None:
        """The id of the special token that a text is; None: it is none."""
        added = self.tokenizer.get_added_tokens_decoder()
        return next((i for i, t in added.items() if t.special and t.content == text), None)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, by the checkpoint's own template."""
        if self._template is None:
            raise ValueError(
                "generate: the checkpoint has no chat template. Pass the text of the "
                "conversation, or token ids."
            )
        return self.encode(render(self._template, messages, self._tokens), special=False)


def import_tokenizers() -> Any:
    """The ``tokenizers`` library, an extra."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "generate: the library tokenizers is missing. Install it with: pip install "
            "'bitnet_jax[models]', or pass token ids."
        ) from error
    return tokenizers


def tokenizer_from(file: str, content: str) -> Any:
    """The tokenizer of a ``tokenizer.json``; ``file`` is what an error names."""
    tokenizers = import_tokenizers()
    try:
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(
            f"generate: {file!r} is no tokenizer ({error}). Download it again, or pass token ids."
        ) from None


class Pieces:
    """Tokens of one answer to pieces of text, each valid UTF-8, cut before a stop string.

    A piece waits until its bytes are whole, and until it can no longer be the start of a
    stop string.
    """

    def __init__(self, text: Text, stops: Sequence[str] = ()):
        self._text, self._stops = text, tuple(stops)
        self._ids: list[int] = []
        self._from = self._read = 0  # tokens whose text is given out; tokens that were decoded
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be given out now that a token has come."""
        self._ids.append(token)
        # Decoding from a few tokens back: a token's text may depend on the one before it.
        before = self._text.decode(self._ids[self._from : self._read])
        now = self._text.decode(self._ids[self._from :])
        if now.endswith(_BROKEN) or len(now) <= len(before):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._released(now[len(before) :])

    def finish(self) -> str:
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        before = self._text.decode(self._ids[self._from : self._read])
        rest = self._released(self._text.decode(self._ids[self._from :])[len(before) :])
        if self.stopped:
            return rest
        held, self._held = self._held, ""
        return rest + held

    def _released(self, piece: str) -> str:
        held = self._held + piece
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop string."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )
