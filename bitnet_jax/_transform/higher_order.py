"""Kernels that enter jitted, rematerialised, custom and sharded code.

Each rule says what comes out (``analyse``), and runs the primitive again around the interpreted
body (``run``), so that its policies, shardings and names stay. Kernels pass its boundary as
they are stored, packed or not, and are seen inside as they were outside.

A ``custom_jvp`` or ``custom_vjp`` that multiplies a kernel is run as what it computes: its own
derivative is that of the float product. One that hands a kernel on keeps its derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from bitnet_jax import _mesh
from bitnet_jax._transform import loops
from bitnet_jax._transform.jaxprs import Eqn, Jaxpr
from bitnet_jax._transform.layout import is_float
from bitnet_jax._transform.marks import Mark, Walker
from bitnet_jax._transform.probe import placed
from bitnet_jax._transform.tracked import Interpreter, Tracked, tracked, values_of, views_of
from bitnet_jax._transform.view import View


class Rule(NamedTuple):
    """What is to be done where a kernel meets a higher-order primitive.

    Attributes:
      analyse: (survey, equation, marks of the operands, times) -> marks of the results.
      run: (interpreter, equation, operands) -> results.
    """

    analyse: Callable[..., list[Mark]]
    run: Callable[..., list[Any]]


def body_of(params: dict[str, Any]) -> Any:
    """The jaxpr that a call runs."""
    return next(params[k] for k in ("jaxpr", "call_jaxpr", "call", "fun_jaxpr") if k in params)


def _analyse_call(survey: Walker, eqn: Eqn, marks: list[Mark], times: float) -> list[Mark]:
    return survey.walk(body_of(eqn.params), marks, times)


def _analyse_custom(survey: Walker, eqn: Eqn, marks: list[Mark], times: float) -> list[Mark]:
    outs = survey.walk(body_of(eqn.params), marks, times)
    plain = all(m.view is None or _as_stored(m.view) for m in (*marks, *outs))
    # A kernel that it hands on otherwise than as stored has lost the derivative given for it.
    return outs if plain else [_kept_or_changed(survey, eqn, mark) for mark in outs]


def _kept_or_changed(survey: Walker, eqn: Eqn, mark: Mark) -> Mark:
    return mark if mark.view is None else Mark(None, survey.sources(eqn, mark), mark.live)


def _as_stored(view: View) -> bool:
    return view.is_plain and not view.dtypes


def _inline(interpreter: Interpreter, eqn: Eqn, operands: list[Any]) -> list[Any]:
    return interpreter.body(body_of(eqn.params), operands)


class _Wrapped:
    """An interpreted body as a function of pytrees, which remembers how its results are seen."""

    def __init__(self, interpreter: Interpreter, jaxpr: Jaxpr, views: Sequence[View | None]):
        self._interpreter, self._jaxpr, self._views = interpreter, jaxpr, views
        self._seen: list[View | None] = []

    def __call__(self, *values: Any) -> tuple[list[Any], list[jax.Array]]:
        outs, tolls = self._interpreter.closed(self._jaxpr, tracked(values, self._views))
        self._seen = views_of(outs)
        return values_of(outs), tolls

    def results(
        self, made: tuple[Sequence[Any], list[jax.Array]], views: Sequence[View | None]
    ) -> list[Any]:
        """The results, their kernels seen as leaves of the operands of this call."""
        values, tolls = made
        self._interpreter.tolls += tolls
        pairs = zip(self._views, views, strict=True)
        leaf = {old.leaf: new.leaf for old, new in pairs if old is not None and new is not None}
        seen = [v if v is None else v._replace(leaf=leaf[v.leaf]) for v in self._seen]
        return tracked(values, seen)


def _jit(interpreter: Interpreter, eqn: Eqn, operands: list[Any]) -> list[Any]:
    params, views = eqn.params, views_of(operands)
    if getattr(params["inline"], "name", params["inline"]) in (True, "JAX_EARLY"):
        return _inline(interpreter, eqn, operands)
    # A block that is called again, with other kernels of the same kind, is traced once.
    key = id(eqn.params["jaxpr"]), interpreter.alike(views)
    if key not in interpreter.jitted:
        body = _Wrapped(interpreter, params["jaxpr"], views)
        run = jax.jit(_named(body, params["name"]), **jit_options(eqn, views))
        interpreter.jitted[key] = body, run
    body, run = interpreter.jitted[key]
    return body.results(run(*values_of(operands)), views)


def _named(body: _Wrapped, name: str) -> Callable[..., tuple[list[Any], list[jax.Array]]]:
    def run(*values: Any) -> tuple[list[Any], list[jax.Array]]:
        return body(*values)

    run.__name__ = run.__qualname__ = name
    return run


def jit_options(eqn: Eqn, views: Sequence[View | None]) -> dict[str, Any]:
    """The keywords of a jitted function with one more result; no shardings of its kernels."""
    params = eqn.params

    def given(sharding: object) -> Any:
        return None if type(sharding).__name__ == "UnspecifiedValue" else sharding

    how: dict[str, Any] = {"keep_unused": params["keep_unused"]}
    ins = [None if v is not None else given(s) for v, s in _paired(views, params["in_shardings"])]
    outs = [given(s) for s in params["out_shardings"]]
    if any(s is not None for s in ins):
        how["in_shardings"] = tuple(ins)
    if any(s is not None for s in outs):
        how["out_shardings"] = (outs, None)
    donated = [
        i for i, (v, d) in enumerate(_paired(views, params["donated_invars"])) if d and not v
    ]
    if donated:
        how["donate_argnums"] = tuple(donated)
    return how


def _paired(views: Sequence[View | None], other: Sequence[Any]) -> Any:
    return zip(views, other, strict=True)


def _remat(interpreter: Interpreter, eqn: Eqn, operands: list[Any]) -> list[Any]:
    views = views_of(operands)
    body = _Wrapped(interpreter, eqn.params["jaxpr"], views)
    how = {"policy": eqn.params["policy"], "prevent_cse": eqn.params["prevent_cse"]}
    return body.results(jax.checkpoint(_named(body, "body"), **how)(*values_of(operands)), views)


def _custom(interpreter: Interpreter, eqn: Eqn, operands: list[Any]) -> list[Any]:
    outs = _inline(interpreter, eqn, operands)
    kernels = [o for o in (*operands, *outs) if isinstance(o, Tracked)]
    if not any(isinstance(o, Tracked) for o in outs) or not all(
        _as_stored(o.view) and is_float(o.value) for o in kernels
    ):
        return outs
    # Handed on as it is: by the primitive itself, with its own derivative.
    params = eqn.primitive.get_bind_params(eqn.params)
    bound = eqn.primitive.bind(*values_of(operands), **params)
    return tracked(bound, views_of(outs))


def _shards(spec: PartitionSpec, view: View, mesh: AbstractMesh | Mesh) -> View | None:
    """A kernel as one device sees it; None where a split axis is not one of the leaf's own."""
    for at, entry in enumerate(spec):
        size = 1
        for name in _mesh.names(entry):
            size *= mesh.shape[name]
        if size == 1:
            continue
        narrow = view.narrow(at, view.shape[at] // size)
        if narrow is None:
            return None
        view = narrow
    return view


def _analyse_shard_map(survey: Walker, eqn: Eqn, marks: list[Mark], times: float) -> list[Mark]:
    params = eqn.params
    mesh, inner = params["mesh"], []
    for spec, mark in zip(params["in_specs"], marks, strict=True):
        view = None if mark.view is None else _shards(spec, mark.view, mesh)
        if mark.view is not None and view is None:
            mark = Mark(None, survey.sources(eqn, mark), mark.live)
        inner.append(Mark(view, mark.changed, mark.live))
    for name in params.get("newly_manual_axes", params.get("manual_axes", ())):
        times *= mesh.shape[name]
    outs = survey.walk(params["jaxpr"], inner, times)
    return [Mark(None, survey.sources(eqn, mark), mark.live) for mark in outs]


def _shard_map(interpreter: Interpreter, eqn: Eqn, operands: list[Any]) -> list[Any]:
    params = eqn.params
    seen, specs = [], []
    for operand, spec in zip(operands, params["in_specs"], strict=True):
        kernel = isinstance(operand, Tracked)
        seen.append(_shards(spec, operand.view, params["mesh"]) if kernel else None)
        specs.append(_stored_spec(spec, operand.view) if kernel else spec)
    body = _Wrapped(interpreter, params["jaxpr"], seen)
    manual = frozenset(params.get("newly_manual_axes", params.get("manual_axes", ())))
    if not params["check_vma"]:
        interpreter.require_collectable(operands, "a `shard_map` with check_vma=False")

    def run(*values: Any) -> tuple[list[Any], list[jax.Array]]:
        outer, interpreter.manual = interpreter.manual, (*interpreter.manual, *sorted(manual))
        try:
            outs, tolls = body(*values)
        finally:
            interpreter.manual = outer
        seen = interpreter.arrays(tracked(outs, body._seen), eqn)
        return seen, [toll.reshape(1) for toll in tolls]

    outs, tolls = jax.shard_map(
        run,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=(list(params["out_specs"]), PartitionSpec(tuple(sorted(manual)))),
        axis_names=manual,
        check_vma=params["check_vma"],
    )(*values_of(operands))
    interpreter.tolls += [toll.sum() for toll in tolls]
    return outs


def _stored_spec(spec: PartitionSpec, view: View) -> PartitionSpec:
    """The spec of a kernel as it is stored, from that of what the program sees."""
    entries: dict[int, Any] = {}
    for at, entry in enumerate(spec):
        axis = view.whole(at)
        if axis is not None and entry is not None:
            entries[axis] = entry
    return placed(PartitionSpec(*(entries.get(a) for a in view.kept)))


# What has a derivative of its own, which is not used where it multiplies a quantised kernel.
CUSTOM = ("custom_jvp_call", "custom_vjp_call")

_CALL = Rule(_analyse_call, _inline)

RULES: dict[str, Rule] = {
    "jit": Rule(_analyse_call, _jit),
    "pjit": Rule(_analyse_call, _jit),
    "remat2": Rule(_analyse_call, _remat),
    "checkpoint": Rule(_analyse_call, _remat),
    **dict.fromkeys(CUSTOM, Rule(_analyse_custom, _custom)),
    "custom_vmap_call": _CALL,
    "core_call": _CALL,
    "call": _CALL,
    "closed_call": _CALL,
    "core_closed_call": _CALL,
    "shard_map": Rule(_analyse_shard_map, _shard_map),
    "scan": Rule(loops.analyse_scan, loops.run_scan),
    "while": Rule(loops.analyse_while, loops.run_while),
    "cond": Rule(loops.analyse_cond, loops.run_cond),
}

# What runs one body once, on its operands: a mark goes in and comes out as it is.
CALLS = frozenset(
    k for k, rule in RULES.items() if rule.analyse in (_analyse_call, _analyse_custom)
)
