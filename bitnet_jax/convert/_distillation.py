"""Losses of a student beside its teacher: logits, hidden states, relations of attention.

Each is a function of arrays, a mean over tokens, float32 inside and out, whatever comes in.
Nothing flows to the teacher. A token that ``where`` leaves out does not count and gets a gradient
of exactly 0, whatever it holds, NaN included; if all are left out, the loss is 0.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._quantize.arrays import AnyArray
from bitnet_jax.optim._hyperparameters import POSITIVE, Scalar, require_number

Direction = Literal["forward", "reverse"]

Distance = Literal["mse", "cosine"]

# Which tokens count, or how much.
Where = Bool[AnyArray, "*tokens"] | Float[AnyArray, "*tokens"] | Int[AnyArray, "*tokens"]

# A state of a length below this has no direction.
_SHORTEST = 1e-6


def logit_distillation(
    student: Float[AnyArray, "*b v"],
    teacher: Float[AnyArray, "*b v"],
    *,
    temperature: Scalar = 1.0,
    direction: Direction = "forward",
    where: Where | None = None,
) -> Float32[Array, ""]:
    """The divergence between the answers of a student and of its teacher, in nats a token.

    With ``p = softmax(teacher / T)`` and ``q = softmax(student / T)``, the mean over tokens of
    ``T**2 KL(p || q)`` (forward: the student covers what the teacher finds likely) or of
    ``T**2 KL(q || p)`` (reverse: it avoids what the teacher finds unlikely). The factor keeps the
    size of the gradient: as T grows, ``T**2 KL`` tends to half of the variance over the answers of
    ``student - teacher``, and its gradient to ``(d - mean(d)) / v`` with ``d`` that difference.

    Args:
      student: logits (\\*b, v). -inf excludes an answer.
      teacher: logits of the same shape.
      temperature: T, a number > 0; may be traced.
      direction: ``"forward"`` or ``"reverse"``.
      where: (\\*b), which tokens count: booleans, or weights >= 0. None: all.

    Returns:
      A float32 scalar, the mean weighted by ``where``; 0 if no token counts. Inf where one of the
      two excludes what the other one answers.

    Raises:
      TypeError: logits that are no floating-point arrays.
      ValueError: shapes that differ, a temperature or a direction that is none.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> teacher = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
      >>> student = jnp.array([[1.0, 0.0, -1.0], [5.0, 0.0, 0.0]])
      >>> real = jnp.array([True, False])  # the second token is padding
      >>> loss = bj.convert.logit_distillation(student, teacher, temperature=2.0, where=real)
      >>> round(float(loss), 3)
      0.121

    References:
      Hinton et al., Distilling the knowledge in a neural network, arXiv:1503.02531, section 2; Gu
      et al., MiniLLM, arXiv:2306.08543, for the reverse direction; Wu et al., BitNet
      Distillation, arXiv:2510.13998, equations 8 and 9.
    """
    who = "logit_distillation"
    _require_alike(who, student, teacher, 1)
    require_number(who, "temperature", temperature, POSITIVE, "1 leaves the logits as they are.")
    _checks.require_one_of(who, "direction", direction, get_args(Direction))
    weight = _weights(who, where, student.shape[:-1], "tokens")
    t = jnp.asarray(temperature, jnp.float32)
    q = jax.nn.log_softmax(_counted(student, weight) / t)
    p = jax.nn.log_softmax(jax.lax.stop_gradient(_counted(teacher, weight)) / t)
    each = _divergence(p, q) if direction == "forward" else _divergence(q, p)
    return t**2 * _mean(each, weight)


def hidden_distillation(
    student: Float[AnyArray, "*b k"],
    teacher: Float[AnyArray, "*b k"],
    *,
    distance: Distance = "mse",
    where: Where | None = None,
) -> Float32[Array, ""]:
    """How far the hidden states of a student are from those of its teacher.

    ``"mse"``: the squared error, relative: ``mean |s - t|^2 / mean |t|^2`` over the tokens, so
    that layers of large and of small states weigh alike. ``"cosine"``: the mean of
    ``1 - s.t / (|s| |t|)``, blind to the size of a state.

    Args:
      student: states (\\*b, k). Of another width than the teacher's: project them first, with a
        kernel that is trained along.
      teacher: states of the same shape.
      distance: ``"mse"`` or ``"cosine"``.
      where: (\\*b), which tokens count: booleans, or weights >= 0. None: all.

    Returns:
      A float32 scalar; 0 if no token counts. States shorter than 1e-6 have no direction: their
      cosine is taken for their length over 1e-6.

    Raises:
      TypeError: states that are no floating-point arrays.
      ValueError: shapes that differ, a distance that is none.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> teacher = jnp.array([[3.0, 4.0], [0.0, 2.0]])
      >>> round(float(bj.convert.hidden_distillation(0.9 * teacher, teacher)), 3)
      0.01
      >>> loss = bj.convert.hidden_distillation(0.9 * teacher, teacher, distance="cosine")
      >>> round(float(loss), 3)
      0.0

    References:
      Romero et al., FitNets, arXiv:1412.6550, equation 3, and Jiao et al., TinyBERT,
      arXiv:1909.10351, equation 8, for the squared error (the division is ours); Sanh et al.,
      DistilBERT, arXiv:1910.01108, for the cosine.
    """
    who = "hidden_distillation"
    remedy = " Project the student's states to the teacher's width first."
    _require_alike(who, student, teacher, 1, remedy)
    _checks.require_one_of(who, "distance", distance, get_args(Distance))
    weight = _weights(who, where, student.shape[:-1], "tokens")
    s, t = _counted(student, weight), jax.lax.stop_gradient(_counted(teacher, weight))
    if distance == "cosine":
        return _mean(1.0 - jnp.sum(_direction(s) * _direction(t), axis=-1), weight)
    error, size = (_mean(jnp.square(x).sum(axis=-1), weight) for x in (s - t, t))
    return error / jnp.maximum(size, _SHORTEST**2)


def attention_relation(
    student: Float[AnyArray, "*b t k"],
    teacher: Float[AnyArray, "*b t m"],
    *,
    heads: int,
    where: Where | None = None,
) -> Float32[Array, ""]:
    """How differently the tokens of a student relate to each other, of one kind of state.

    The states A of one layer (its queries, keys or values, all heads side by side) are cut into
    ``heads`` relation heads of width d, and each head relates the tokens to each other by
    ``R = softmax(A A^T / sqrt(d))``. The loss is ``KL(R_teacher || R_student)``, the mean over
    heads and tokens. The heads of relations are not those of attention: student and teacher may
    have other heads and other widths. Add the losses of queries, keys and values; one late layer
    is enough by both papers.

    Args:
      student: states (\\*b, t, k) of t tokens. States with heads on an axis of their own,
        (\\*b, t, h, d), are reshaped first: ``q.reshape(*q.shape[:-2], -1)``.
      teacher: states (\\*b, t, m) of the same tokens.
      heads: how many relation heads; divides k and m.
      where: (\\*b, t), which tokens count, as queries by their weight, and as keys if it is not 0:
        booleans, or weights >= 0. None: all.

    Returns:
      A float32 scalar; 0 if no token counts.

    Raises:
      TypeError: states that are no floating-point arrays.
      ValueError: other tokens in the one than in the other, heads that do not divide a width.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> keys = jax.random.split(jax.random.key(0))
      >>> student = jax.random.normal(keys[0], (2, 5, 32))  # 4 heads of 8
      >>> teacher = jax.random.normal(keys[1], (2, 5, 48))  # 6 heads of 8
      >>> loss = bj.convert.attention_relation(student, teacher, heads=2)
      >>> bool(loss > 0), float(bj.convert.attention_relation(teacher, teacher, heads=2))
      (True, 0.0)

    References:
      Wang et al., MiniLMv2, arXiv:2012.15828, section 3, for the relations and their heads; Wu et
      al., BitNet Distillation, arXiv:2510.13998, equation 11.
    """
    who = "attention_relation"
    for name, states in (("student", student), ("teacher", teacher)):
        _require_states(who, name, states, 2)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{who}: `student` and `teacher` must be of the same tokens, got shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}. Only the last axis may differ."
        )
    _require_heads(who, heads, student.shape[-1], teacher.shape[-1])
    weight = _weights(who, where, student.shape[:-1], "tokens")
    q = _relations(_counted(student, weight), heads, weight)
    p = _relations(jax.lax.stop_gradient(_counted(teacher, weight)), heads, weight)
    return _mean(_divergence(p, q).mean(axis=-2), weight)


def _relations(
    states: Float32[Array, "*b t k"], heads: int, weight: Float32[Array, "*b t"]
) -> Float32[Array, "*b h t t"]:
    """Log-probabilities of the relations; keys that do not count have none."""
    cut = states.reshape(*states.shape[:-1], heads, -1)
    scaled = cut * jnp.float32(cut.shape[-1] ** -0.5)
    dots = jnp.einsum("...ihd,...jhd->...hij", scaled, cut, precision=jax.lax.Precision.HIGHEST)
    counts = (weight != 0)[..., None, None, :]
    # Where no key counts, no query does: any finite number will do.
    return jax.nn.log_softmax(jnp.where(counts | ~counts.any(-1, keepdims=True), dots, -jnp.inf))


def _divergence(p: Float32[Array, "*b v"], q: Float32[Array, "*b v"]) -> Float32[Array, "*b"]:
    """KL(p || q) of log-probabilities; what p excludes adds nothing, and gets no gradient."""
    there = p > -jnp.inf
    log_p, log_q = jnp.where(there, p, 0.0), jnp.where(there, q, 0.0)
    return jnp.sum(jnp.where(there, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)


def _direction(x: Float32[Array, "*b k"]) -> Float32[Array, "*b k"]:
    """States divided by their lengths."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _SHORTEST**2))


def _counted(x: Float[AnyArray, "*b k"], weight: Float32[Array, "*b"]) -> Float32[Array, "*b k"]:
    """In float32, with zeros for tokens that do not count: no NaN of theirs reaches a gradient."""
    return jnp.where(weight[..., None] != 0, jnp.asarray(x).astype(jnp.float32), 0.0)


def _mean(values: Float32[Array, "*b"], weight: Float32[Array, "*b"]) -> Float32[Array, ""]:
    """The weighted mean; 0 without weight."""
    total = weight.sum()
    kept = jnp.where(weight != 0, weight * values, 0.0)
    return kept.sum() / jnp.where(total == 0, 1.0, total)


def cross_entropy(
    who: str,
    logits: Float[AnyArray, "*b v"],
    labels: Int[AnyArray, "*b"],
    where: Where | None,
) -> Float32[Array, ""]:
    """The mean negative log-likelihood of the labels, nats a token; labels of padding may be any.

    Args:
      who: for errors.
      logits: (\\*b, v).
      labels: (\\*b).
      where: (\\*b), which tokens count; None: all.
    """
    weight = _weights(who, where, logits.shape[:-1], "tokens")
    log_q = jax.nn.log_softmax(_counted(logits, weight))
    index = jnp.where(weight != 0, jnp.asarray(labels), 0)[..., None]
    return _mean(-jnp.take_along_axis(log_q, index, axis=-1)[..., 0], weight)


def _weights(
    who: str, where: Where | None, shape: tuple[int, ...], of: str
) -> Float32[Array, "*b"]:
    """How much each token counts."""
    if where is None:
        return jnp.ones(shape, jnp.float32)
    dtype, given = getattr(where, "dtype", None), getattr(where, "shape", None)
    if dtype is None or given is None or jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{who}: `where` must be an array of booleans or weights, got {describe(where)}. Pass "
            "for example ids != padding."
        )
    if tuple(given) != shape:
        raise ValueError(
            f"{who}: `where` must have the shape of the {of}, {shape}, got {tuple(given)}. "
            "Broadcast it with jnp.broadcast_to, or index the mask as the logits are."
        )
    return jax.lax.stop_gradient(jnp.asarray(where).astype(jnp.float32))


def _require_states(who: str, name: str, x: object, least: int) -> None:
    """Raises unless an argument is a floating-point array of so many axes, none of them empty."""
    _checks.require_float_array(who, name, x)
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) < least or 0 in shape[len(shape) - least :]:
        axes = "(..., tokens, width)" if least == 2 else "(..., width)"
        raise ValueError(f"{who}: `{name}` must have axes {axes} of length >= 1, got {shape}.")


def _require_alike(who: str, student: object, teacher: object, least: int, more: str = "") -> None:
    """Raises unless both are floating-point arrays of one shape."""
    _require_states(who, "student", student, least)
    _require_states(who, "teacher", teacher, least)
    shapes = [tuple(getattr(x, "shape", ())) for x in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{who}: `student` and `teacher` must have one shape, got {shapes[0]} and "
            f"{shapes[1]}.{more}"
        )


def _require_heads(who: str, heads: object, *widths: int) -> None:
    """Raises unless so many heads divide each width."""
    _checks.require_count(who, "heads", heads)
    assert isinstance(heads, int) or hasattr(heads, "__index__")
    for width in widths:
        if width % int(heads):  # pyright: ignore[reportArgumentType]
            raise ValueError(
                f"{who}: `heads` must divide the widths of `student` and `teacher`, "
                f"{' and '.join(map(str, widths))}, got {heads}. Take a common divisor."
            )
