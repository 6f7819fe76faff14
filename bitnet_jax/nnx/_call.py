"""One call into a ternarised model, as a function of its parameters that ``bj.ternarize`` takes.

Outside, the module and its arguments are split into parameters by path, all other arrays, and
the graph. Inside, they are merged, the method runs, and everything is split again. What the
method left as it was does not leave the function, so parameters are read by products alone. What
it changed is written back: values where the graph is the same, else the whole graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import flax.errors
import jax
import numpy as np
from flax import nnx, traverse_util
from flax.nnx import extract
from jax import core

from bitnet_jax._checks import describe, raise_used_two_ways
from bitnet_jax._layers.forward import LayerConfig
from bitnet_jax._packed.adapted import Adapted
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._transform import EMBEDDING, ProgramPlan, Spec, Ternarized
from bitnet_jax._transform.slopes import Losses, losses_of_batch
from bitnet_jax._tree.select import Path, Select
from bitnet_jax.nnx._bit_linear import TernaryLayer

_TAG = "bitnet_jax.nnx.ternarize"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a ternarised model does.

    Attributes:
      select: which kernels.
      layer: how they are quantised.
      tables: the paths of its embeddings, float unless they are selected.
      graph: equal for models of one class and equal fields.
      extent: what ``__call__`` of the model is of it; see ``bitnet_jax._transform.Spec``.
      uses: path to whether calls look rows up in it, float, or multiply by it, quantised.
    """

    select: Select | None
    layer: LayerConfig
    tables: frozenset[Path]
    graph: Hashable
    extent: Literal["call", "part"]
    uses: dict[Path, str] = dataclasses.field(default_factory=dict, compare=False)

    def watch(self, program: ProgramPlan) -> None:
        """Refuses a call that quantises a table in which another looks rows up in float."""
        for one, decision in zip(program.candidates, program.decisions, strict=True):
            if one is None or decision is None:
                continue
            use = "as a kernel" if decision.config is not None else "as an embedding"
            if decision.config is not None or decision.why == EMBEDDING:
                other = self.uses.setdefault(one.path, use)
                if other != use:
                    how = f"{use} in this call and {other} in another"
                    raise_used_two_ways("ternarize", one.where, how)


class Place(NamedTuple):
    """Where a module stands: the plan of its model, and its path from there."""

    plan: Plan
    path: Path


# The plan whose call is being traced. JAX keeps traces made under different plans apart.
_current = jax.make_user_context(None)


def place_of(module: object) -> Place | None:
    """The place of a module of a ternarised model; None: it is none."""
    return getattr(type(module), "_bitnet_place", None)


def call(module: nnx.Module, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a method of a ternarised module: transformed, unless it is inside such a call."""
    plain = functools.partial(_bound(module, method), *args, **kwargs)
    place = place_of(module)
    assert place is not None  # derived classes have one
    if _current.value == place.plan and not _is_captured(module):
        return plain()
    with splitting(place.plan, module, method, args, kwargs) as split:
        if not split.has_kernels:
            return plain()
        try:
            outcome = split.function(*split.operands)
        except _UNTRACEABLE as error:
            if split.holds_kernels:
                _raise_untraceable(f"{type(module).__name__}.{method.__name__}", error)
        else:
            return split.write_back(outcome)
    return plain()  # its calls of submodules are transformed one by one


@contextlib.contextmanager
def splitting(
    plan: Plan,
    module: nnx.Module,
    method: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    layers: bool = False,
) -> Iterator[Split]:
    """A call, split, while Flax remembers which node inside is which outside.

    ``layers``: whether the parameters of layers of this package are among those of the call, and
    of norms; such layers quantise by themselves, so a call that is to be computed leaves them out.
    """
    with nnx.update_context(_TAG):
        yield Split(plan, module, method, args, kwargs, layers)


def _bound(module: nnx.Module, method: Any) -> Callable[..., Any]:
    return method.__get__(module, type(module))


def _is_captured(module: nnx.Module) -> bool:
    """Whether a module came into a trace past its arguments: its parameters are values there."""
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    arrays = [leaf for leaf in leaves if isinstance(leaf, (jax.Array, np.ndarray))]
    return any(not isinstance(leaf, core.Tracer) for leaf in arrays)


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is static in a call: the method, the graph, and which leaves are parameters."""

    plan: Plan
    method: Any
    treedef: Any
    paths: tuple[Path | None, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Shape:
    """What is static in what a call leaves behind.

    Attributes:
      treedef: of (inputs, output).
      slots: for each leaf: the number of the input that it still is, ``_NEW``, or a
        :class:`_Constant`.
      same_graph: whether only values of variables changed.
    """

    treedef: Any
    slots: tuple[Any, ...]
    same_graph: bool


class _Constant(NamedTuple):
    """A part of an output that is no array."""

    value: Any


_NEW = object()


class Split:
    """A call, split: ``function(*operands)`` runs it, ``explain`` and ``kernels`` read it."""

    def __init__(
        self,
        plan: Plan,
        module: nnx.Module,
        method: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layers: bool = False,
    ):
        inputs = module, args, kwargs
        pure = extract.to_tree(inputs, ctxtag=_TAG)
        self._leaves, treedef = jax.tree.flatten(pure, is_leaf=_is_variable)
        owned = dict(_owned(plan, inputs, pure, layers))
        owners = [owned.get(id(leaf)) for leaf in self._leaves]
        form = _Form(plan, method, treedef, tuple(o and o[0] for o in owners))
        self.params = {path: v for path, v in zip(form.paths, self._leaves, strict=True) if path}
        _require_one_model(len(self.params), sum(path is not None for path in form.paths))
        kernels = [v for v in self.params.values() if _ndim(v) >= 2]
        self.has_kernels = bool(kernels)
        own = {id(v) for v, o in zip(self._leaves, owners, strict=True) if o and o[1] is module}
        self.holds_kernels = any(id(v) in own for v in kernels)
        rest = [v for path, v in zip(form.paths, self._leaves, strict=True) if path is None]
        self.operands = traverse_util.unflatten_dict(self.params), rest, form
        whole = place_of(module) == Place(plan, ()) and method.__name__ == "__call__"
        self.function = _function(plan, plan.extent if whole else "part", type(module), method)

    def write_back(self, outcome: tuple[list[Any], _Shape]) -> Any:
        """Updates what the call changed; returns its output."""
        made, shape = iter(outcome[0]), outcome[1]
        leaves = [_filled(slot, self._leaves, made) for slot in shape.slots]
        count = len(self._leaves) if shape.same_graph else 0
        pairs = zip(self._leaves, leaves[:count] or self._leaves, strict=True)
        for old, new in pairs:
            if isinstance(old, nnx.Variable) and not (shape.same_graph and new is old):
                old.set_raw_value(new.get_raw_value())  # raises where it belongs to another trace
        if shape.same_graph:
            _, output = shape.treedef.children()
            return jax.tree.unflatten(output, leaves[count:])
        tree = jax.tree.unflatten(shape.treedef, leaves)
        return extract.from_tree(tree, ctxtag=_TAG, is_inner=False)[1]


@functools.cache
def _function(plan: Plan, extent: Literal["call", "part"], *method: Any) -> Ternarized:
    """What runs one method of one class; it keeps the traces of its calls."""
    del method
    return Ternarized(Spec(_run, plan.layer, plan.select, 0, extent, plan.tables, plan.watch))


def call_losses(loss: Callable[..., Any]) -> Losses:
    """Losses of what a split call returns, and of its positional arguments."""

    def losses(
        result: tuple[list[Any], _Shape],
        params: dict[str, Any],
        others: tuple[list[Any], _Form],
        kwargs: dict[str, Any],
    ) -> Any:
        del kwargs
        (outcome, shape), (rest, form) = result, others
        given, made = _inputs(params, rest, form), iter(outcome)
        leaves = [_filled(slot, given, made) for slot in shape.slots]
        _, output = jax.tree.unflatten(shape.treedef, leaves)
        _, args, _ = jax.tree.unflatten(form.treedef, given)
        return losses_of_batch(loss, output, args)

    return losses


def _inputs(params: dict[str, Any], rest: list[Any], form: _Form) -> list[Any]:
    """The leaves of a call's inputs, in order."""
    flat, others = (
        traverse_util.flatten_dict(params, is_leaf=lambda _, v: _is_variable(v)),
        iter(rest),
    )
    return [next(others) if path is None else flat[path] for path in form.paths]


def _run(params: dict[str, Any], rest: list[Any], form: _Form) -> tuple[list[Any], _Shape]:
    """A call as a function of parameters."""
    given = _inputs(params, rest, form)
    with _current(form.plan):
        pure = jax.tree.unflatten(form.treedef, given)
        inputs = extract.from_tree(pure, ctxtag=_TAG, is_inner=True)
        nodes, containers = jax.tree.flatten(inputs, is_leaf=_is_node)
        module, args, kwargs = inputs
        output = _bound(module, form.method)(*args, **kwargs)
        inputs = jax.tree.unflatten(containers, nodes)  # whatever became of lists and dicts
        after = extract.to_tree((inputs, output), ctxtag=_TAG)
    return _outcome(given, pure, after)


def _outcome(given: list[Any], before: Any, after: Any) -> tuple[list[Any], _Shape]:
    """What a call made, and where in its inputs and outputs it belongs."""
    numbers = {_identity(leaf): i for i, leaf in enumerate(given)}
    leaves, treedef = jax.tree.flatten(after, is_leaf=_is_variable)
    slots = tuple(_slot(leaf, numbers) for leaf in leaves)
    defs = [graph.with_same_outer_index() for graph in _graphdefs(before)]
    same = defs == _graphdefs(after[0]) and not _graphdefs(after[1])
    if same:
        # An array that is an attribute is no variable: it is changed by changing its module.
        pairs = zip(given, leaves[: len(given)], strict=True)
        same = all(old is new for old, new in pairs if not isinstance(old, nnx.Variable))
    made = [leaf for leaf, slot in zip(leaves, slots, strict=True) if slot is _NEW]
    return made, _Shape(treedef, slots, same)


def _slot(leaf: Any, numbers: dict[Any, int]) -> Any:
    number = numbers.get(_identity(leaf))
    if number is not None:
        return number
    if isinstance(leaf, (nnx.Variable, jax.Array, np.ndarray, np.generic)):
        return _NEW
    if not isinstance(leaf, (str, bytes, int, float, complex, enum.Enum, type, np.dtype)):
        raise _NotATreeError(f"it returns {describe(leaf)}, which is no pytree")
    return _Constant(leaf)


def _filled(slot: Any, inputs: list[Any], made: Iterator[Any]) -> Any:
    if isinstance(slot, _Constant):
        return slot.value
    return next(made) if slot is _NEW else inputs[slot]


def _identity(leaf: Any) -> tuple[Any, ...]:
    """Equal for a leaf and the same leaf later, unless it was given other arrays."""
    if isinstance(leaf, nnx.Variable):
        value, structure = jax.tree.flatten(leaf.get_raw_value())
        return ("variable", structure, *map(id, value))
    return ("leaf", id(leaf))


def _split_nodes(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=extract.is_tree_node)
    return [leaf for leaf in leaves if extract.is_tree_node(leaf)]


def _graphdefs(tree: Any) -> list[Any]:
    return [node.graphdef for node in _split_nodes(tree)]


def _owned(
    plan: Plan, inputs: Any, pure: Any, layers: bool
) -> Iterator[tuple[int, tuple[Path, nnx.Module]]]:
    """The parameters of a plan: by identity, their paths and the modules that hold them.

    ``layers``: those of this package's layers in the called module, too, and what its norms have.
    """
    nodes = [n for n in jax.tree.leaves(inputs, is_leaf=_is_node) if _is_node(n)]
    states = [
        n for n in jax.tree.leaves(pure, is_leaf=extract.is_tree_node) if extract.is_tree_node(n)
    ]
    for node, split in zip(nodes, states, strict=True):
        if isinstance(node, nnx.Variable):
            continue
        modules = {path: m for path, m in nnx.iter_modules(node) if not is_container(m)}
        own = layers and node is inputs[0]
        for path, variable in nnx.to_flat_state(split.state):
            owner, names = owner_of(modules, path)
            place = place_of(owner)
            # Of a model that is not ternarised nothing is selected: all of it may be looked at.
            plain = place is None and place_of(node) is None
            if not isinstance(variable, nnx.Param):
                continue
            if place is not None and place.plan == plan:
                yield id(variable), ((*place.path, *names), owner)
            elif own and (isinstance(owner, TernaryLayer) or _ndim(variable) == 1 or plain):
                yield id(variable), (tuple(map(str, path)), owner)


def owner_of(modules: dict[Any, nnx.Module], path: Sequence[Any]) -> tuple[Any, Path]:
    """The module that holds what stands at a path, and its names from there."""
    for n in reversed(range(len(path))):
        if path[:n] in modules:
            return modules[path[:n]], tuple(map(str, path[n:]))
    return None, ()


def is_container(module: nnx.Module) -> bool:
    """Whether a module only holds others."""
    return isinstance(module, (nnx.List, nnx.Dict))


def _ndim(variable: nnx.Variable[Any]) -> int:
    """The rank of a parameter; 0 of what is no array."""
    value = variable.get_value()
    if is_packed(value) or isinstance(value, Adapted):
        return 2
    return len(getattr(value, "shape", ()))


def _is_variable(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)


def _is_node(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable) or nnx.graphlib.is_graph_node(leaf)


class _NotATreeError(TypeError):
    """A method that returns an object which JAX cannot look into."""


# A method that cannot be traced: its own computation is of no model, but of the host.
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
    flax.errors.TraceContextError,
    _NotATreeError,
)


def _raise_untraceable(name: str, error: Exception) -> NoReturn:
    """Refuses to run a method with float kernels where the others are ternary."""
    raise ValueError(
        f"ternarize: {name} cannot be traced ({str(error).splitlines()[0]}), and it multiplies "
        "parameters of its own, which would stay float. Move what needs values out of it, into "
        "the code that calls it."
    ) from error


def _require_one_model(known: int, found: int) -> None:
    """Raises where a call brings two models whose parameters have the same paths."""
    if known != found:
        raise ValueError(
            "ternarize: a call brings two ternarised models with parameters of the same paths. "
            "Call one of them outside, and pass its result."
        )
