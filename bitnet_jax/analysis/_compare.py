"""Compares a model's outputs from float parameters with those from packed ones."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn
from jaxtyping import Array, PyTree, Shaped

from bitnet_jax import _checks, _display
from bitnet_jax._checks import describe
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.strength import phase_in
from bitnet_jax._tree.leaves import flatten


class ComparisonRow(NamedTuple):
    """One line of a comparison; ``of_float`` is None where a number is of both models."""

    name: str
    of_float: float | None
    of_packed: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A float model against its packed self, means over examples; see :func:`compare`.

    Attributes:
      examples: how many rows of logits.
      loss_float: mean cross entropy in nats; NaN without labels.
      loss_packed: the same of the packed model.
      accuracy_float: the share of labels met, 0 to 1; NaN without labels.
      accuracy_packed: the same of the packed model.
      kl: mean ``KL(float || packed)`` of the two softmaxes, in nats.
      agreement: the share of examples with the same top class, 0 to 1.
      max_difference: the largest difference of two logits.
    """

    examples: int
    loss_float: float
    loss_packed: float
    accuracy_float: float
    accuracy_packed: float
    kl: float
    agreement: float
    max_difference: float

    @property
    def rows(self) -> tuple[ComparisonRow, ...]:
        """The lines of the table; loss and accuracy where there were labels."""
        scores = (
            ComparisonRow("loss", self.loss_float, self.loss_packed),
            ComparisonRow("accuracy", self.accuracy_float, self.accuracy_packed),
        )
        return (
            *(() if math.isnan(self.accuracy_float) else scores),
            ComparisonRow("KL(float || packed)", None, self.kl),
            ComparisonRow("top-1 agreement", None, self.agreement),
            ComparisonRow("max logit difference", None, self.max_difference),
        )

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, ready for ``json.dumps``; NaN and Inf are None."""
        return _display.plain(dataclasses.asdict(self))

    def __str__(self) -> str:
        """The rows as a small table."""
        formats = {"loss": ".4f", "accuracy": ".2%", "top-1 agreement": ".2%"}

        def cell(row: ComparisonRow, value: float | None) -> str:
            return "" if value is None else format(value, formats.get(row.name, ".3g"))

        cells = [(row.name, cell(row, row.of_float), cell(row, row.of_packed)) for row in self.rows]
        names, floats, packed = zip(*cells, strict=True)
        columns = (
            [f"over {self.examples} examples", *names],
            _display.right("float", floats),
            _display.right("packed", packed),
        )
        header, *body = zip(*columns, strict=True)
        return _display.table(header, body)


def compare(
    model: object,
    float_params: PyTree,
    packed: PyTree,
    batches: Iterable[PyTree],
    *,
    apply: Callable[[PyTree, PyTree], Any] | None = None,
) -> Comparison:
    """What packing changed in a model's answers: loss, accuracy, KL, agreement.

    ``kl = mean_i sum_c p[i, c] * (log p[i, c] - log q[i, c])`` with p the softmax
    of the float logits and q that of the packed ones, in float32. The float side
    is called at strength 0 (:func:`phase_in`), where ternary layers are float
    ones; the packed side at strength 1. A layer's own ``strength=`` goes before
    both.

    Args:
      model: a linen module, called as ``model.apply({"params": p}, x)``, or a function of
        parameters and x, from :func:`bitnet_jax.ternarize` for example; not used, and may be
        None, where ``apply`` is given.
      float_params: the float tree.
      packed: the tree to judge: packed, prepared, or float again
        (``unpack_params(packed, dequantize=True)``) for a model without ternary layers.
      batches: of ``x``, or of ``(x, labels)`` with integer labels of the shape
        of the logits without their last axis. Consumed once. Batches of one
        shape share a compilation; an uneven last one makes another.
      apply: a function of parameters and x that returns the logits
        (..., classes), for nnx ``lambda p, x: nnx.merge(graphdef, p)(x)``. It is
        traced.

    Returns:
      A :class:`Comparison`. Every row of logits is an example and counts the
      same, whatever batch it is in.

    Raises:
      TypeError: no way to call the model, batches that are one array, logits
        that are no array, labels that are not integers.
      ValueError: no examples, float params that are packed, logits of two
        shapes, labels that do not fit them or are not in every batch.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> model = bj.linen.BitDense(10)
      >>> x = jax.random.normal(jax.random.key(0), (32, 64))
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> packed, _ = bj.pack_params(params)
      >>> labels = model.apply({"params": packed}, x).argmax(-1)
      >>> result = bj.analysis.compare(model, params, packed, [(x, labels)])
      >>> result.examples, result.accuracy_packed
      (32, 1.0)
      >>> 0.0 < result.kl < 1.0
      True

    References:
      Kullback and Leibler, On Information and Sufficiency, 1951, eq. 2.4.
    """
    who = "compare"
    if apply is None:
        apply = _apply_of(who, model)
    _require_batches(who, batches)
    _checks.require_no_report(who, "packed", packed)
    for leaf in flatten(who, "float_params", float_params)[0]:
        if is_packed(leaf.value):
            _raise_float_params_packed(who, leaf.where)
        _checks.require_values(who, leaf.where, leaf.value)
    step = jax.jit(functools.partial(_step, who, apply))
    sums, largest, labelled = {}, 0.0, None
    for batch in batches:
        x, labels = _split_batch(who, batch)
        labelled = labels is not None if labelled is None else labelled
        _require_labels_in_all(who, labelled, labels is not None)
        values = jax.device_get(step(float_params, packed, x, labels))
        _require_labels_in_range(who, int(values.pop("outside")), int(values.pop("classes")))
        # np.maximum keeps a NaN.
        largest = float(np.maximum(largest, values.pop("difference").max(initial=0.0)))
        for name, rows in values.items():
            sums[name] = sums.get(name, 0.0) + float(rows.sum(dtype=np.float64))
    examples = int(sums.pop("examples", 0))
    _require_examples(who, examples)
    names = ("loss_float", "loss_packed", "accuracy_float", "accuracy_packed", "kl", "agreement")
    means = {name: sums[name] / examples if name in sums else math.nan for name in names}
    return Comparison(examples=examples, max_difference=largest, **means)


def _apply_of(who: str, model: Any) -> Callable[[PyTree, PyTree], Any]:
    """A model as a function of parameters and x."""
    if callable(getattr(model, "apply", None)):
        return lambda params, x: model.apply({"params": params}, x)
    _require_function(who, model)
    return model


def _step(
    who: str,
    apply: Callable[[PyTree, PyTree], Any],
    float_params: PyTree,
    packed: PyTree,
    x: PyTree,
    labels: Shaped[Array, "..."] | None,
) -> dict[str, jax.Array]:
    """The numbers of one batch, a row an example; runs inside jit."""
    with phase_in(0.0):
        a = apply(float_params, x)
    with phase_in(1.0):
        b = apply(packed, x)
    _require_same_logits(who, a, b)
    wide = [logits.astype(jnp.float32).reshape(-1, a.shape[-1]) for logits in (a, b)]
    p, q = (nn.log_softmax(logits) for logits in wide)
    tops = [jnp.argmax(logits, axis=-1) for logits in wide]
    mass = jnp.exp(p)
    # A class without mass adds nothing; equal logits differ by nothing, infinite ones too.
    terms = jnp.where(mass == 0.0, 0.0, mass * jnp.where(p == q, 0.0, p - q))
    values = {
        "examples": jnp.ones(p.shape[0], jnp.int32),
        "classes": jnp.int32(p.shape[1]),
        "outside": jnp.int32(0),
        "kl": jnp.maximum(terms.sum(axis=-1), 0.0),  # below 0 only by rounding
        "agreement": tops[0] == tops[1],
        "difference": jnp.where(wide[0] == wide[1], 0.0, jnp.abs(wide[0] - wide[1])).max(axis=-1),
    }
    if labels is None:
        return values
    _require_class_indices(who, labels, a.shape)
    target = labels.astype(jnp.int32).reshape(-1)
    values["outside"] = ((target < 0) | (target >= p.shape[1])).sum(dtype=jnp.int32)
    for name, logp, top in (("float", p, tops[0]), ("packed", q, tops[1])):
        at = jnp.take_along_axis(logp, target[:, None], axis=-1, mode="clip")
        values[f"loss_{name}"] = -at[:, 0]
        values[f"accuracy_{name}"] = top == target
    return values


def _require_function(who: str, model: object) -> None:
    """Raises unless a model is a function; an NNX module is one of x alone."""
    if not callable(model) or _checks.is_flax_module(model):
        raise TypeError(
            f"{who}: `model` must have linen's apply(variables, x), or be a function of params and "
            f"x, got {type(model).__name__}. Pass apply=; for nnx: graphdef, params = "
            "nnx.split(model) and apply=lambda p, x: nnx.merge(graphdef, p)(x); the packed params "
            "are nnx.split(packed_model)[1]."
        )


def _raise_float_params_packed(who: str, path: str) -> NoReturn:
    """Reports a packed kernel on the float side of a comparison."""
    raise ValueError(
        f"{who}: `float_params` must be the float tree, and {path} is packed. Pass the params as "
        "they were before bj.pack_params: unpacked ones are as ternary as the packed ones."
    )


def _require_batches(who: str, value: object) -> None:
    """Raises for one array or one dict instead of an iterable of batches."""
    if hasattr(value, "dtype") or isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise TypeError(
            f"{who}: `batches` must be an iterable of x or of (x, labels), got "
            f"{type(value).__name__}. Put a single batch into a list: [x] or [(x, labels)]."
        )


def _split_batch(who: str, batch: PyTree) -> tuple[PyTree, np.ndarray | None]:
    """The x and the labels (or None) of a batch; raises for tuples of another length."""
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if len(batch) != 2:
        raise ValueError(
            f"{who}: `batches` must yield x or (x, labels), got a {type(batch).__name__} of "
            f"{len(batch)}. Put several inputs into a dict, and pass apply=."
        )
    x, given = batch
    return x, None if given is None else np.asarray(given)


def _require_labels_in_all(who: str, first: bool, now: bool) -> None:
    """Raises if some batches have labels and some have none."""
    if first != now:
        raise ValueError(
            f"{who}: `batches` must have labels in every batch or in none, got both. Leave the "
            "batches without labels out, or drop the labels."
        )


def _require_same_logits(who: str, a: object, b: object) -> None:
    """Raises unless both outputs are arrays of one shape (..., classes)."""
    for side, value in (("float_params", a), ("packed", b)):
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise TypeError(
                f"{who}: the model must return logits (..., classes), got "
                f"{type(value).__name__} for `{side}`. Pass apply=, a function of params and x "
                "that returns the logits alone."
            )
    shapes = [tuple(getattr(logits, "shape", ())) for logits in (a, b)]
    if shapes[0] != shapes[1] or not shapes[0] or shapes[0][-1] < 1:
        raise ValueError(
            f"{who}: the logits must be (..., classes) of one shape, got {shapes[0]} for "
            f"`float_params` and {shapes[1]} for `packed`. Check that both trees belong to "
            "this model."
        )


def _require_class_indices(who: str, value: Shaped[Array, "..."], shape: Sequence[int]) -> None:
    """Raises unless there is one integer label for each row of logits."""
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{who}: `batches` must yield integer labels, got {describe(value)}. Pass class "
            "indices; of one-hot labels take argmax(-1). Of a regression leave the labels out, and "
            "read the largest difference."
        )
    if tuple(value.shape) != tuple(shape[:-1]):
        raise ValueError(
            f"{who}: `batches` must yield labels of shape {tuple(shape[:-1])} for logits "
            f"{tuple(shape)}, got {tuple(value.shape)}. Pass a class index for each row of logits."
        )


def _require_labels_in_range(who: str, count: int, classes: int) -> None:
    """Raises if labels are out of range; ``count`` was read from the values."""
    if count:
        raise ValueError(
            f"{who}: `batches` has {count} labels outside 0 to {classes - 1}. If they mark "
            "padding, let apply= return only the rows that count, and drop their labels."
        )


def _require_examples(who: str, count: int) -> None:
    """Raises if there were no examples."""
    if count == 0:
        raise ValueError(
            f"{who}: `batches` yielded no examples. Pass at least one batch; a generator that was "
            "iterated before is empty."
        )
