"""A function for arguments of one structure: traced, surveyed, and traced again quantised.

Leaves that are no arrays (flags, names, functions) are part of the structure. Both traces are kept
in JAX's own caches, by the function, the shapes and the contexts that they were made in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from bitnet_jax import _mesh
from bitnet_jax._layers.forward import LayerConfig
from bitnet_jax._layers.stated import reading
from bitnet_jax._packed.adapted import Adapted, is_adapted
from bitnet_jax._packed.kernel import is_packed, is_stored
from bitnet_jax._packed.stored import without_planes
from bitnet_jax._quantize.arrays import AnyArray
from bitnet_jax._quantize.strength import phase_in, phased
from bitnet_jax._transform import channels, decide, jaxprs, results
from bitnet_jax._transform.interpret import Interpreter
from bitnet_jax._transform.jaxprs import Jaxpr
from bitnet_jax._transform.layout import Value
from bitnet_jax._transform.marks import KNOWN, LIVE, Channels, Found, Mark
from bitnet_jax._transform.norms import Norms, NormSurvey
from bitnet_jax._transform.probe import Probe, Probed, Wanted
from bitnet_jax._transform.site import Chosen
from bitnet_jax._transform.slopes import Losses, Slopes, slopes
from bitnet_jax._transform.survey import Survey
from bitnet_jax._transform.tracked import Operand, Tracked, shown
from bitnet_jax._transform.view import of_leaf
from bitnet_jax._transform.walk import Start, Walk
from bitnet_jax._tree.leaves import Leaf, rebox
from bitnet_jax._tree.select import Select

# A leaf, or what stands for it while the function is traced.
Like = AnyArray | jax.ShapeDtypeStruct


class Spec(NamedTuple):
    """What ``ternarize`` was asked for.

    Attributes:
      fn: the function.
      layer: how its kernels are quantised.
      select: which.
      argnums: which argument holds them.
      extent: what a call runs of the function's kernels.
      tables: embeddings, whatever a call does with them: float unless they are selected.
      watch: is told what was decided, whenever a call is traced; it may refuse.
    """

    fn: Callable[..., PyTree]
    layer: LayerConfig
    select: Select | None
    argnums: int
    extent: decide.Extent = "whole"
    tables: frozenset[tuple[str, ...]] = frozenset()
    watch: Callable[[Plan], None] | None = None


class Bound(NamedTuple):
    """One call: the program for its structure, the arrays of its params, and all other arrays."""

    program: Program
    values: list[Any]
    rest: list[Any]


class Plan(NamedTuple):
    """A traced program and what becomes of its leaves."""

    jaxpr: Jaxpr
    result: Any
    candidates: list[decide.Candidate | None]
    found: Found
    decisions: list[decide.Decision | None]


class Program:
    """The function for arguments of one structure.

    ``run`` and ``float_fn`` are made once, so that JAX's caches of traces know them again.
    """

    def __init__(
        self,
        spec: Spec,
        leaves: Sequence[Leaf],
        treedef: Any,
        structure: Any,
        static: dict[int, Any],
    ):
        self._spec, self._treedef, self._structure = spec, treedef, structure
        self.static = static
        # Boxes without their values, which would be kept alive.
        self._boxes = [
            None if leaf.boxed is leaf.value else rebox(leaf.boxed, None) for leaf in leaves
        ]
        self._paths = [leaf.path for leaf in leaves]
        self.run, self.float_fn = self._run, self._float_fn
        self._phased = False

    def _float_fn(self, values: list[Any], rest: list[Any]) -> Any:
        params, args, kwargs = self._arguments(values, rest)
        at = self._spec.argnums
        result = self._spec.fn(*args[:at], params, *args[at:], **kwargs)
        return results.kept(result, self.static.values())

    def _arguments(
        self, values: list[Any], rest: list[Any]
    ) -> tuple[PyTree, tuple[Any, ...], dict[str, Any]]:
        """The params, all other positional arguments and the keywords of a call."""
        count = len(self._boxes)
        arrays, others = iter(values), iter(rest)
        given = [self.static[i] if i in self.static else next(arrays) for i in range(count)]
        boxed = [v if b is None else rebox(b, v) for b, v in zip(self._boxes, given, strict=True)]
        params = jax.tree.unflatten(self._treedef, boxed)
        places = range(count, count + self._structure.num_leaves)
        flat = [self.static[i] if i in self.static else next(others) for i in places]
        args, kwargs = jax.tree.unflatten(self._structure, flat)
        return params, args, kwargs

    def plan(self, values: list[Any], rest: list[Any]) -> Plan:
        """The traced function, and what becomes of its leaves."""
        floats = [_placeholder(v) for v in values]
        with reading.set(True, True), phased() as inside:
            jaxpr, result = jax.make_jaxpr(self.float_fn, return_shape=True)(floats, rest)
        self._phased |= bool(inside)  # not seen again where JAX has the trace in its cache
        candidates = [
            _candidate(path, v) if _is_kernel(v) else None
            for path, v in zip(self._array_paths(), floats, strict=True)
        ]
        survey = Survey(_constants(rest))
        outs = survey.walk(jaxpr, [*_marks(candidates), *[LIVE] * len(rest)], 1.0)
        for mark in outs:
            if mark.view is not None and mark.view != of_leaf(mark.view.leaf, mark.view.shape):
                survey.read(mark, "return")
        spec = self._spec
        decisions = decide.decide_all(
            candidates, survey.found, spec.layer, spec.select, spec.tables
        )
        if self._phased:
            _require_own(candidates, decisions)
        return Plan(jaxpr, result, candidates, survey.found, decisions)

    def norms(self, plan: Plan, rest: list[Any]) -> Norms:
        """The norms whose scales the quantised kernels of a plan can take up."""
        survey = NormSurvey(_constants(rest))
        marks = _marks(plan.candidates)
        inner, _ = jaxprs.opened(plan.jaxpr)
        for i, leaf in enumerate(inner.invars[: len(marks)]):
            axis = channels.axis_of_vector(jaxprs.shape_of(leaf))
            if axis is not None and jnp.issubdtype(jaxprs.dtype_of(leaf), jnp.floating):
                marks[i] = dataclasses.replace(marks[i], channels=Channels(i, axis))
        survey.returned(survey.walk(plan.jaxpr, [*marks, *[LIVE] * len(rest)], 1.0))
        return survey.norms(self._array_paths(), plan.decisions, self._spec.layer)

    def _array_paths(self) -> list[tuple[str, ...]]:
        """The paths of the leaves that are arrays."""
        return [path for i, path in enumerate(self._paths) if i not in self.static]

    @functools.cached_property
    def moments(self) -> Callable[..., dict[int, Probe]]:
        """(what is wanted of which leaves, values, rest) -> statistics of one call in float."""
        return jax.jit(self._moments, static_argnums=0)

    def _moments(
        self, wanted: tuple[tuple[int, Wanted], ...], values: list[Any], rest: list[Any]
    ) -> dict[int, Probe]:
        probes = {i: one.probe() for i, one in wanted}
        return jax.grad(self._toll)(probes, values, rest)

    def _toll(self, probes: dict[int, Probe], values: list[Any], rest: list[Any]) -> jax.Array:
        """What the products of the probed kernels owe; see ``probe``."""
        plan = self.plan(values, rest)
        chosen, operands = self._tracked(plan, values)
        for i, probe in probes.items():
            if i in chosen:  # it is met in this call
                operands[i] = operands[i]._replace(value=Probed(values[i], probe))
        _, tolls = Interpreter(chosen, probing=True).closed(plan.jaxpr, [*operands, *rest])
        return tolls[0]

    def walk(self, plan: Plan, values: list[Any], rest: list[Any]) -> Walk:
        """A call, ready to be run step by step."""
        chosen, operands = self._tracked(plan, values)
        starts = {}
        for i, one in enumerate(plan.candidates):
            uses = [use for use in plan.found.uses if use.leaf == i]
            if i not in chosen or one is None or not uses:
                continue
            shape = one.leaf.shape
            batch = tuple(shape[a] for a in uses[0].batch)
            often = sum(use.times / math.prod(shape[a] for a in use.taken) for use in uses)
            several = often > 1 + 1e-6 or any(use.primitive == "gather" for use in uses)
            starts[i] = Start(one.path, batch, values[i], several)
        return Walk(plan.jaxpr, [*operands, *rest], starts, chosen)

    @functools.cached_property
    def slopes(self) -> Callable[..., Slopes]:
        """(leaves and their batch axes, losses, key, values, rest) -> of one call in float."""
        return jax.jit(self._slopes, static_argnums=(0, 1))

    def _slopes(
        self,
        asked: tuple[tuple[int, int], ...],
        losses_of: Losses,
        key: jax.Array,
        values: list[Any],
        rest: list[Any],
    ) -> Slopes:
        def losses(kernels: dict[int, Any]) -> Any:
            given = [kernels.get(i, value) for i, value in enumerate(values)]
            with phase_in(0.0):
                result = results.given_back(self._run(given, rest))
            return losses_of(result, *self._arguments(given, rest))

        return slopes(losses, {i: values[i] for i, _ in asked}, dict(asked), key)

    def _run(self, values: list[Any], rest: list[Any]) -> Any:
        plan = self.plan(values, rest)
        decide.check_decisions(
            plan.candidates, plan.decisions, self._spec.select, self._spec.extent
        )
        if self._spec.watch is not None:
            self._spec.watch(plan)
        chosen, operands = self._tracked(plan, values)
        outs = Interpreter(chosen).body(plan.jaxpr, [*operands, *rest])
        outs = [_returned(out, chosen) for out in outs]
        return jax.tree.unflatten(jax.tree.structure(plan.result), outs)

    def _tracked(self, plan: Plan, values: list[Any]) -> tuple[dict[int, Chosen], list[Any]]:
        """The quantised leaves by their number, and all leaves, those among them as kernels."""
        boxes = [box for i, box in enumerate(self._boxes) if i not in self.static]
        chosen: dict[int, Chosen] = {}
        operands: list[Any] = []
        for i, (value, one, decision) in enumerate(
            zip(values, plan.candidates, plan.decisions, strict=True)
        ):
            if one is not None and decision is not None and decision.config is not None:
                layer = self._spec.layer._replace(weights=decision.config)
                chosen[i] = Chosen(one.where, layer, boxes[i])
                value = Tracked(of_leaf(i, one.leaf.shape), value)
            elif one is not None and decision is not None and not _is_array(value):
                if i in plan.found.changed or any(use.leaf == i for use in plan.found.uses):
                    _raise_packed_but_float(one.where, decision.why)
                # Nothing multiplies it in this call: it may come back as it is.
                chosen[i] = Chosen(one.where, self._spec.layer, boxes[i])
                value = Tracked(of_leaf(i, one.leaf.shape), value)
            operands.append(value)
        return chosen, operands


def _constants(rest: Sequence[Any]) -> Mark:
    """What a program's constants are: inputs, where it has no others."""
    return KNOWN if any(map(_is_input, rest)) else LIVE


def _marks(candidates: Sequence[decide.Candidate | None]) -> list[Mark]:
    """What is known of the leaves before the program has run."""
    return [
        KNOWN if c is None else Mark(of_leaf(i, c.leaf.shape), live=False)
        for i, c in enumerate(candidates)
    ]


def _candidate(path: tuple[str, ...], value: Like) -> decide.Candidate:
    return decide.Candidate(path, jax.ShapeDtypeStruct(value.shape, value.dtype))


def _returned(out: Operand, chosen: dict[int, Chosen]) -> Any:
    """A result of the program; a leaf that comes back as it went in is that leaf, packed or not."""
    if not isinstance(out, Tracked):
        return out
    if out.view == of_leaf(out.view.leaf, out.view.shape):
        return out.value
    return shown(out, chosen[out.view.leaf].where, "return")


def static_leaves(leaves: Sequence[Any]) -> tuple[tuple[int, type, Any], ...]:
    """What among leaves is no array, with its place and its type: 1 is not True."""
    packed = [is_packed(v) or is_adapted(v) for v in leaves]
    pairs = enumerate(zip(leaves, packed, strict=True))
    return tuple((i, type(v), v) for i, (v, p) in pairs if not p and not _is_array(v))


def _is_array(leaf: object) -> bool:
    own = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return own and not isinstance(leaf, type) and not is_packed(leaf) and not is_adapted(leaf)


def _is_kernel(leaf: Like) -> bool:
    """Whether a leaf, or what stands for it, may be a kernel."""
    return jnp.issubdtype(leaf.dtype, jnp.floating) and len(leaf.shape) >= 2 and 0 not in leaf.shape


def _is_input(value: Any) -> bool:
    """Whether an argument may be data: an array of one axis and more that is no random key."""
    key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype == jnp.uint32
    return not key and len(value.shape) > 0


def _placeholder(value: Value | Like) -> Any:
    """The float kernel that a packed one stands for; any other value as it is."""
    packed = value.base if isinstance(value, Adapted) else value
    if not is_packed(packed):
        return value
    shape = packed.shape
    if isinstance(packed.codes, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, packed.dtype)
    kind, sharding = jax.typeof(packed.codes), None
    if is_stored(packed) and _mesh.is_typed(packed.codes):
        spec = without_planes(_mesh.spec_of(packed.codes), packed.plane_axis)
        sharding = NamedSharding(kind.sharding.mesh, PartitionSpec(*spec))
    how = {"sharding": sharding, "manual_axis_type": kind.manual_axis_type}
    return jax.ShapeDtypeStruct(shape, packed.dtype, **how)


def _require_own(
    candidates: Sequence[decide.Candidate | None], decisions: Sequence[decide.Decision | None]
) -> None:
    """Refuses a strength that is set inside the function: its products are run outside of it."""
    for one, decision in zip(candidates, decisions, strict=True):
        if one is not None and decision is not None and decision.config and not decision.own:
            raise ValueError(
                f"{decide.WHO}: bj.phase_in is entered inside the function, where it would not "
                f"reach the kernel at {one.where}. Enter it around the ternarised call."
            )


def _raise_packed_but_float(path: str, why: str) -> NoReturn:
    """Refuses a packed leaf that the function uses in float."""
    raise ValueError(
        f"{decide.WHO}: the kernel at {path} is packed, and this function leaves it in float "
        f"({why}). Ternarise it with the `select` that the kernels were packed with, and pass "
        "params of this function."
    )
