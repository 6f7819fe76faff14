"""The tokenizer and chat template that a GGUF file carries in its metadata.

``tokenizer.ggml.model`` gpt2 is byte-pair encoding over bytes, and
``tokenizer.ggml.pre`` names how text is split before it. The splits are those that the
publishers' own tokenizers make. Left out: ``llama`` (SentencePiece) and others; token ids
serve there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bitnet_jax.io._gguf import Gguf
from bitnet_jax.models._text import Text, import_tokenizers

# Words with what stands before them, numbers of so many digits, marks, and spaces.
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_THREE_DIGITS = _MODERN.format(digits="{1,3}")

_ONE_DIGIT = _MODERN.format(digits="")

# A regular expression, or None for GPT-2's own; whether digits stand alone; whether a word
# that is a token is taken without merging.
_SPLITS: dict[str, tuple[str | None, bool, bool]] = {
    "gpt-2": (None, False, False),
    "smollm": (None, True, False),
    "llama-bpe": (_THREE_DIGITS, False, True),
    "llama3": (_THREE_DIGITS, False, True),
    "llama-v3": (_THREE_DIGITS, False, True),
    "falcon3": (_THREE_DIGITS, False, True),
    "qwen2": (_ONE_DIGIT, False, False),
}

_CONTROL, _USER = 3, 4  # kinds of tokens that text is cut at

_LAST = (0, 3)  # pooling_type: none is said, or the last token

_STOPS = ("eos", "eot", "eom")


def text_of(file: Gguf, vocabulary: int) -> Text:
    """The tokenizer, chat template and stop tokens; none of them has to be there."""
    metadata = file.metadata

    def ids(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int else None

    tokens = metadata.get("tokenizer.ggml.tokens")
    named = {}
    for name in ("bos", "eos", "unknown", "padding"):
        at = ids(name)
        if isinstance(tokens, list) and at is not None and at < len(tokens):
            named[f"{name}_token"] = tokens[at]
    make, missing = _maker(metadata)
    template = metadata.get("tokenizer.chat_template")
    stops = frozenset(at for at in map(ids, _STOPS) if at is not None)
    pooling = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
    return Text(
        vocabulary,
        stops,
        make,
        template if isinstance(template, str) else None,
        named,
        missing,
        None if pooling is None or pooling in _LAST else f"pooling_type {pooling!r:.50}",
    )


def _maker(metadata: dict[str, Any]) -> tuple[Callable[[], Any] | None, str]:
    """What makes the tokenizer, or why nothing does."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2":
        return None, f"the file's tokenizer.ggml.model is {model!r:.50}, and only gpt2 is read"
    if pre not in _SPLITS:
        return (
            None,
            f"the file's tokenizer.ggml.pre is {pre!r:.50}, and only {', '.join(_SPLITS)} are read",
        )
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if not _are_strings(tokens) or not _are_strings(merges):
        return None, "the file has no tokenizer.ggml.tokens and merges"
    return (lambda: _tokenizer(metadata, pre)), ""


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _tokenizer(metadata: dict[str, Any], pre: str) -> Any:
    tokenizers = import_tokenizers()
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    split, digits, whole = _SPLITS[pre]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(m.split(" ", 1)) for m in metadata["tokenizer.ggml.merges"]]
    try:
        model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole)
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(
            f"generate: the file's tokenizer is damaged ({error}). Pass token ids."
        ) from None
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[Any] = []
    if digits:
        steps.append(tokenizers.pre_tokenizers.Digits(individual_digits=True))
    if split is not None:
        steps.append(tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated"))
    space = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    steps.append(byte_level(add_prefix_space=space, use_regex=split is None))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    _add_special(tokenizers, tokenizer, tokens, metadata.get("tokenizer.ggml.token_type") or [])
    _enclose(tokenizers, tokenizer, metadata, pre)
    return tokenizer


def _add_special(tokenizers: Any, tokenizer: Any, tokens: Sequence[str], kinds: Sequence[int]):
    """Marks the tokens that text is cut at; control tokens are left out of what is decoded."""
    control = [t for t, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    user = [t for t, kind in zip(tokens, kinds, strict=False) if kind == _USER]
    added = tokenizers.AddedToken
    tokenizer.add_special_tokens([added(t, special=True, normalized=False) for t in control])
    tokenizer.add_tokens([added(t, special=False, normalized=False) for t in user])


def _enclose(tokenizers: Any, tokenizer: Any, metadata: dict[str, Any], pre: str) -> None:
    """Every text begins, or ends, with the token that the file names."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]

    def around(name: str, default: bool) -> list[tuple[str, int]]:
        at = metadata.get(f"tokenizer.ggml.{name}_token_id")
        wanted = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        if wanted and type(at) is int and 0 <= at < len(tokens):
            return [(tokens[at], at)]
        return []

    before = around("bos", pre in ("llama-bpe", "llama3", "llama-v3"))
    after = around("eos", False)
    if before or after:
        parts = [*(token for token, _ in before), "$A", *(token for token, _ in after)]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=" ".join(parts), special_tokens=[*{*before, *after}]
        )
