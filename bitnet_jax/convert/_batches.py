"""The batches of a calibration: the arguments of each call, and errors that name a batch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from bitnet_jax._checks import describe
from bitnet_jax.convert._front_ends import Args


@contextlib.contextmanager
def fitting(who: str, number: int) -> Iterator[None]:
    """Names the batch in whose call the network fails."""
    try:
        yield
    except Exception as failure:
        if str(failure).startswith((f"{who}:", "calibrate:", "ternarize:", "pack:")):
            raise
        text = " ".join(str(failure).split()).rstrip(".")
        text = text if len(text) <= 500 else f"{text[:497]}..."
        raise ValueError(
            f"{who}: the network does not run on batch {number}: {type(failure).__name__}: {text}. "
            "A batch is a tuple of all positional arguments but the params, or the one argument; "
            "keywords go into call=."
        ) from failure


def _examples(who: str, batches: Iterable[Any]) -> Iterator[Args]:
    """The positional arguments of each call."""
    single = hasattr(batches, "shape") or isinstance(batches, (str, bytes, Mapping))
    if single or not isinstance(batches, Iterable):
        raise TypeError(
            f"{who}: `batches` must be an iterable of batches, got {describe(batches)}. Pass "
            "[batch] for a single one."
        )
    # A named tuple is one argument with fields.
    return (batch if type(batch) is tuple else (batch,) for batch in batches)


class Opened(NamedTuple):
    """Batches of which the first was looked at.

    Attributes:
      first: the arguments of the first call.
      every: those of all calls, the first among them.
      length: how many there are; None: it is not known.
    """

    first: Args
    every: Iterator[Args]
    length: int | None


def opened(who: str, batches: Iterable[Any]) -> Opened:
    """The batches with the first at hand; raises where there is none."""
    rest = _examples(who, batches)
    first = next(rest, None)
    if first is None:
        raise ValueError(
            f"{who}: `batches` is empty. Pass at least one batch; an iterator that was read before "
            "has none left."
        )
    length = len(batches) if hasattr(batches, "__len__") else None  # pyright: ignore[reportArgumentType]
    return Opened(first, itertools.chain([first], rest), length)


def require_callback(who: str, progress: object) -> None:
    """Raises unless ``progress`` can be called."""
    if not callable(progress):
        raise TypeError(
            f"{who}: `progress` must be a function of the part that is done, got "
            f"{describe(progress)}."
        )
