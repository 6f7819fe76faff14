"""A model's losses and logits, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bitnet_jax._checks._values import describe


def loss_scalar(who: str, value: Any) -> None:
    """Refuses a loss that is not one real number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    array = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and shape == ()
    if not number and not array:
        raise TypeError(
            f"{who}: `loss_fn` must return one real number, got {describe(value)}. Take the mean "
            "over the examples, and return the loss without auxiliary values."
        )


def loss_finite(who: str, value: float) -> None:
    """Refuses a float loss that nothing can be compared with."""
    if not math.isfinite(value):
        raise ValueError(
            f"{who}: `loss_fn` of the float params is {value!r}. Check the params and the data "
            "first: no kernel has been quantised yet."
        )


def linen_model(who: str, model: Any) -> None:
    """Refuses a model that does not say how to run it."""
    if not callable(getattr(model, "apply", None)):
        raise TypeError(
            f"{who}: `model` must have linen's apply(variables, x), got {type(model).__name__}. "
            "Pass apply=, a function of params and x; for nnx: graphdef, params = nnx.split(model) "
            "and apply=lambda p, x: nnx.merge(graphdef, p)(x)."
        )


def float_side(who: str, path: str) -> None:
    """Refuses a packed kernel on the float side of a comparison."""
    raise ValueError(
        f"{who}: `float_params` must be the float tree, and {path} is packed. Pass the params as "
        "they were before bj.pack_params: unpacked ones are as ternary as the packed ones."
    )


def batches(who: str, value: Any) -> None:
    """Refuses one array, or one dict, where batches are to be iterated."""
    if hasattr(value, "dtype") or isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise TypeError(
            f"{who}: `batches` must be an iterable of x or of (x, labels), got "
            f"{type(value).__name__}. Put a single batch into a list: [x] or [(x, labels)]."
        )


def labelled_batch(who: str, batch: Any) -> tuple[Any, Any]:
    """The x and the labels, or None, of a batch; refuses tuples of another length."""
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if len(batch) != 2:
        raise ValueError(
            f"{who}: `batches` must yield x or (x, labels), got a {type(batch).__name__} of "
            f"{len(batch)}. Put several inputs into a dict, and pass apply=."
        )
    x, given = batch
    return x, None if given is None else np.asarray(given)


def labels_everywhere(who: str, first: bool, now: bool) -> None:
    """Refuses batches of which some have labels and some have none."""
    if first != now:
        raise ValueError(
            f"{who}: `batches` must have labels in every batch or in none, got both. Leave the "
            "batches without labels out, or drop the labels."
        )


def logits(who: str, a: Any, b: Any) -> None:
    """Refuses outputs that are not two arrays of the same shape, classes last."""
    for side, value in (("float_params", a), ("packed", b)):
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise TypeError(
                f"{who}: the model must return logits (..., classes), got "
                f"{type(value).__name__} for `{side}`. Pass apply=, a function of params and x "
                "that returns the logits alone."
            )
    if a.shape != b.shape or a.ndim < 1 or a.shape[-1] < 1:
        raise ValueError(
            f"{who}: the logits must be (..., classes) of one shape, got {tuple(a.shape)} for "
            f"`float_params` and {tuple(b.shape)} for `packed`. Check that both trees belong to "
            "this model."
        )


def labels(who: str, value: Any, shape: Sequence[int]) -> None:
    """Refuses labels that are no class indices, one for each row of logits."""
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{who}: `batches` must yield integer labels, got {describe(value)}. Pass class "
            "indices; of one-hot labels take argmax(-1)."
        )
    if tuple(value.shape) != tuple(shape[:-1]):
        raise ValueError(
            f"{who}: `batches` must yield labels of shape {tuple(shape[:-1])} for logits "
            f"{tuple(shape)}, got {tuple(value.shape)}. Pass a class index for each row of logits."
        )


def labels_inside(who: str, count: int, classes: int) -> None:
    """Reports labels that name no class; ``count`` was read from the values."""
    if count:
        raise ValueError(
            f"{who}: `batches` has {count} labels outside 0 to {classes - 1}. If they mark "
            "padding, let apply= return only the rows that count, and drop their labels."
        )


def examples_found(who: str, count: int) -> None:
    """Refuses to average over nothing."""
    if count == 0:
        raise ValueError(
            f"{who}: `batches` yielded no examples. Pass at least one batch; a generator that was "
            "iterated before is empty."
        )
