"""Layers and models: fields, packed kernels that do not fit, what cannot be ternarised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def layer_config(who: str, path: str, trained: Any, packed: Any) -> None:
    """Refuses a packed kernel quantised by another rule than its layer trains with."""
    if trained != packed:
        raise ValueError(
            f"{who}: the kernel at {path} was packed with {packed}, and the layer trains with "
            f"{trained}: its outputs would not be the ones trained. Pack with the layer's own "
            "config, or set weights= to the packed one."
        )


def layer_shape(who: str, path: str, wanted: Sequence[int], packed: Sequence[int]) -> None:
    """Refuses a packed kernel of another shape than its layer's."""
    if tuple(wanted) != tuple(packed):
        raise ValueError(
            f"{who}: the packed kernel at {path} stands for shape {tuple(packed)}, and the layer "
            f"needs {tuple(wanted)}. Check that the params belong to this model."
        )


def layer_axes(who: str, path: str, wanted: Sequence[int], packed: Sequence[int]) -> None:
    """Refuses a packed kernel that contracts over other axes than its layer."""
    if tuple(wanted) != tuple(packed):
        raise ValueError(
            f"{who}: the packed kernel at {path} contracts over its axes {tuple(packed)}, and the "
            f"layer over {tuple(wanted)}. Pack with bj.linen.pack or bj.nnx.pack, which learn the "
            "axes from the model."
        )


def einsum_equation(equation: str) -> None:
    """Refuses an equation that is not of two operands and a result."""
    if equation.count(",") != 1 or equation.count("->") != 1:
        raise ValueError(
            f"Einsum: `einsum_str` must have two operands and a result, got {equation!r}. Write "
            "for example '...a,ab->...b'."
        )


def einsum_ranks(equation: str, named: Sequence[int], got: Sequence[int]) -> None:
    """Refuses operands of another rank than the equation's."""
    if tuple(named) != tuple(got):
        raise ValueError(
            f"Einsum: {equation!r} names {named[0]} axes of the input and {named[1]} of the "
            f"kernel, got arrays of rank {got[0]} and {got[1]}."
        )


def einsum_contracts(
    equation: str, contracted: Sequence[str], free: Sequence[str], x: str, w: str, out: str
) -> None:
    """Refuses an equation that is no contraction of the input with the kernel."""
    once = all(len(set(part)) == len(part) for part in (x, w, out))
    if not contracted or not once or any(c not in out for c in free):
        raise NotImplementedError(
            f"Einsum: {equation!r} is no contraction of an input with a kernel: an axis is "
            "repeated, or summed in one operand alone, or none is contracted. Leave this layer in "
            "float (select=bj.exclude(...))."
        )


def conv_input(x_shape: Sequence[int], rank: int, groups: int) -> None:
    """Refuses an input that a convolution cannot take."""
    if len(x_shape) < rank + 1:
        raise ValueError(
            f"Conv: the input needs {rank} axes of space and one of channels, got shape "
            f"{tuple(x_shape)}."
        )
    if x_shape[-1] % groups:
        raise ValueError(
            f"Conv: `feature_group_count`={groups} does not divide the {x_shape[-1]} channels of "
            "the input."
        )


def padding(value: Any, rank: int) -> None:
    """Reports a padding that no convolution knows."""
    raise ValueError(
        f"Conv: `padding` must be 'SAME', 'VALID', 'CIRCULAR', 'REFLECT', 'CAUSAL' (1-D), an "
        f"integer, or {rank} integers or pairs, got {value!r}."
    )


def packed_but_float(who: str, path: str, why: str) -> None:
    """Refuses a packed kernel in a layer that the model leaves in float."""
    raise ValueError(
        f"{who}: the kernel at {path} is packed, and this model leaves it in float ({why}). "
        "Ternarise the model with the `select` that the kernels were packed with."
    )


def unbound(who: str, bound: bool, name: str) -> None:
    """Refuses a module that belongs to a scope or a parent already."""
    if bound:
        raise ValueError(
            f"{who}: `model` ({name}) is bound to a parent or a scope. Pass the whole model, or "
            "a module that was made on its own: outside a compact method, before bind()."
        )


def not_ternarised(who: str, already: bool, name: str) -> None:
    """Refuses a model that is ternarised already."""
    if already:
        raise ValueError(
            f"{who}: `model` ({name}) is ternarised already. Pass the model it was made from; a "
            "`select` that returns configs does in one call what two would."
        )


def cannot_ternarize(who: str, path: str, kind: str, why: str) -> None:
    """Reports a layer that a selector names and that has no ternary form."""
    raise NotImplementedError(
        f"{who}: {path} ({kind}) cannot be ternarised: {why}. Leave it out of `select`, or write "
        "the layer with bj.linen.BitDense and its kin."
    )


def unsupported_field(who: str, name: str, value: Any, default: Any) -> None:
    """Refuses a field of a float layer that a ternary contraction has no use for."""
    if value is not default:
        raise ValueError(
            f"{who}: `{name}` cannot be used, got {value!r}: the contraction is int8 x int8 -> "
            f"int32 by this library. Leave it out, or use the float layer."
        )


def no_ternary_layer(who: str, name: str) -> None:
    """Reports a model without a single ternary layer."""
    raise ValueError(
        f"{who}: {name} uses no kernel as ternary. Pass bj.linen.ternarize(model) (nnx: call "
        "bj.nnx.ternarize(model) first), or write it with BitDense and its kin."
    )


def example_refused(who: str, error: Exception) -> ValueError:
    """What to raise where the model does not run on the example."""
    return ValueError(
        f"{who}: the model does not run on `example_args` with these params: "
        f"{type(error).__name__}: {error} Pass what model.apply takes (method=, rngs= and "
        "variables= where it needs them)."
    )


def param_shape(who: str, path: str, got: Sequence[int], wanted: Sequence[int]) -> None:
    """Refuses a parameter of another shape than the model makes."""
    if tuple(got) != tuple(wanted):
        raise ValueError(
            f"{who}: {path} has shape {tuple(got)}, and the model makes it {tuple(wanted)} (a "
            "scan's length is its first axis). Pass the params of this model."
        )


def never_reached(who: str, paths: Sequence[str]) -> None:
    """Reports kernels that no example call uses."""
    raise ValueError(
        f"{who}: no call reaches the kernels {', '.join(paths)}. Pass calls=[lambda m: ...] that "
        "use them, or take them out of `params`."
    )


def used_two_ways(who: str, path: str, how: str) -> None:
    """Reports a kernel that a model uses in two ways that no packed form serves."""
    raise ValueError(
        f"{who}: the kernel at {path} is used {how}. Give each use a kernel of its own, or leave "
        "it in float (select=)."
    )


def stacked_first(who: str, path: str, removed: Sequence[int]) -> None:
    """Refuses layers that are stacked along another axis than the first."""
    if any(axis != 0 for axis in removed):
        raise ValueError(
            f"{who}: {path} is stacked along axes {tuple(removed)}; a packed kernel is stacked "
            "along the first. Use nn.scan or nn.vmap with variable_axes={'params': 0}."
        )
