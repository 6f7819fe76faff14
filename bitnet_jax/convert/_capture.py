"""``capture``: what a network computes on the way, handed out beside its result.

While the function is traced, modules put names on their outputs: those of linen by an interceptor,
those of NNX by a class of their own, derived from theirs, in the copy of the model that the trace
has. ``_transform/hoist.py`` then runs the traced program and hands out what is named.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._context import Ambient
from bitnet_jax._transform import hoist
from bitnet_jax._transform.derived_class import metaclass
from bitnet_jax._tree.select import match, names_of

WHO = "capture"

# What a captured function returns beside its result: path or name to a value for each call.
Values = dict[str, tuple[PyTree, ...]]


def capture(fn: Callable[..., PyTree], *patterns: str) -> Captured:
    """The same function, which also returns what some of its modules return, by their paths.

    The model is not edited. Modules are those of linen and NNX, by the paths of their parameters;
    in a function of another library, and for what no module returns, name values where they are
    computed, with ``jax.ad_checkpoint.checkpoint_name(x, "queries")``. Ternary functions and
    models are captured as float ones are. It works inside and outside of ``jax.jit``,
    ``jax.grad`` and ``jax.vmap``, and reaches into jitted, rematerialised and scanned code: a
    value that a scan computes comes out stacked, steps first, and one under a map inside the
    function has the mapped axis where JAX put it. A value that is rematerialised is kept.

    Args:
      fn: the function: ``model.apply`` of linen, an NNX model (or a function that takes one as
        an argument), plain JAX. Called outside of ``jax.jit``, it is traced each time.
      *patterns: names joined by ``/``, with ``*`` and ``?`` inside a name. A pattern matches what
        it is the end of: ``"attention"`` and ``"layers/*"`` are outputs of ``layers/0/attention``
        and of ``layers/0``. The output of ``__call__`` is meant, other methods have none.

    Returns:
      A :class:`Captured`: called as ``fn``, it returns ``(result, values)``, with ``values`` a
      dict of path or name to a tuple, one value for each call in the order of the program. A
      shared module has several.

    Raises:
      TypeError: ``fn`` cannot be called, or is a linen module. When it is called: a module whose
        output holds what is no array; abstract arguments.
      ValueError: no patterns, or other than names. When it is called: a pattern that matches
        nothing, with near paths; two NNX models.
      NotImplementedError: when it is called: a value in a ``while`` loop, in one branch of a
        conditional, in a ``shard_map`` or in a function with a derivative of its own, by its path.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import linen as nn
      >>> model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])
      >>> x = jax.random.normal(jax.random.key(0), (8, 64))
      >>> variables = model.init(jax.random.key(1), x)
      >>> run = bj.convert.capture(model.apply, "layers_0")
      >>> logits, values = jax.jit(run)(variables, x)
      >>> logits.shape, values["layers_0"][0].shape
      ((8, 10), (8, 32))
    """
    return Captured(fn, patterns)


class _Record(NamedTuple):
    """One array of a module's output."""

    path: str
    structure: Any
    leaf: int


class Captured:
    """A function that returns what it computes on the way too; from :func:`capture`."""

    def __init__(self, fn: Callable[..., PyTree], patterns: Sequence[str]):
        _require_function(fn)
        _require_patterns(patterns)
        self._fn, self._patterns = fn, tuple(patterns)
        # JAX keeps traces made for one of us apart from all others: what was recorded while it
        # was traced is here when it is used again.
        self._records: dict[str, _Record] = {}
        self._seen: dict[str, None] = {}

    def __repr__(self) -> str:
        name = getattr(self._fn, "__qualname__", type(self._fn).__name__)
        return f"Captured({name}, {', '.join(map(repr, self._patterns))})"

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> tuple[Any, Values]:
        """``(result, values)``; see :func:`capture`."""
        given = ((self._fn, *args) if isinstance(self._fn, nnx.Module) else args), kwargs
        leaves, treedef = jax.tree.flatten(given, is_leaf=_is_model)
        _require_no_structs(leaves)
        model = _only_model(leaves)
        at = [i for i, v in enumerate(leaves) if _is_array(v)]
        graph, state = (None, None) if model is None else nnx.split(model)

        def function(arrays: list[Any], state: Any) -> tuple[PyTree, Any]:
            filled = dict(enumerate(leaves)) | dict(zip(at, arrays, strict=True))
            inner = None if model is None else _watched_model(graph, state)
            before = _held(inner)
            parts = [inner if _is_model(v) else v for v in filled.values()]
            args, kwargs = jax.tree.unflatten(treedef, parts)
            with self._watching():
                result = self._function()(*args, **kwargs)
            return result, _changed(inner, before)

        operands = [leaves[i] for i in at], state
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*operands)
        outs, found = hoist.run(traced, jax.tree.leaves(operands), self._wanted)
        result, changed = jax.tree.unflatten(jax.tree.structure(shapes), outs)
        if changed:
            nnx.update(model, nnx.from_flat_state(list(changed.items())))
        self._require_matched(hoist.names(traced), found)
        return result, self._values(found)

    def _function(self) -> Callable[..., PyTree]:
        """What is called; a model that was given comes in as the first argument."""
        return _call if isinstance(self._fn, nnx.Module) else self._fn

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Has modules name their outputs."""
        asking = (*_asking.get(), self)
        with _asking.set(asking, asking), linen.intercept_methods(self._intercept):
            yield

    def _intercept(self, run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = run(*args, **kwargs)
        if context.method_name != "__call__":
            return output
        return self.named("/".join(context.module.path), output)

    def named(self, path: str, output: PyTree) -> PyTree:
        """A module's output, its arrays named if they are asked for."""
        self._seen[path] = None
        if not path or not self._matches(path):
            return output
        leaves, structure = jax.tree.flatten(output)
        _require_arrays(path, output, leaves)
        names = [self._name(_Record(path, structure, i)) for i in range(len(leaves))]
        return jax.tree.unflatten(structure, map(checkpoint_name, leaves, names))

    def _name(self, record: _Record) -> str:
        """A name in the program for a record."""
        name = f"bitnet_jax.capture/{id(self)}/{record.path}/{record.leaf}/{record.structure}"
        self._records[name] = record
        return name

    def _matches(self, path: str) -> bool:
        return any(_ends(pattern, path) for pattern in self._patterns)

    def _wanted(self, name: str) -> str | None:
        """The path of a value that is asked for, by its name in the program."""
        if name in self._records:
            return self._records[name].path
        return name if not name.startswith("bitnet_jax.") and self._matches(name) else None

    def _values(self, found: Sequence[hoist.Named]) -> Values:
        """The values by path; a module's output has its structure again."""
        values: dict[str, list[PyTree]] = {}
        parts: dict[str, list[jax.Array]] = {}
        for name, value in found:
            record = self._records.get(name, _Record(name, _LEAF, 0))
            leaves = parts.setdefault(record.path, [])
            leaves.append(value)
            if len(leaves) == record.structure.num_leaves:
                output = jax.tree.unflatten(record.structure, parts.pop(record.path))
                values.setdefault(record.path, []).append(output)
        return {path: tuple(each) for path, each in values.items()}

    def _require_matched(self, names: Sequence[str], found: Sequence[hoist.Named]) -> None:
        """Raises if a pattern matches nothing."""
        had = [path for path in (self._wanted(each.name) for each in found) if path]
        own = [name for name in names if not name.startswith("bitnet_jax.")]
        known = [path for path in dict.fromkeys([*self._seen, *own]) if path]
        for pattern in self._patterns:
            if any(_ends(pattern, path) for path in had):
                continue
            if not known:
                _raise_nothing_named(pattern)
            _checks.raise_selector_matches_nothing(
                WHO, f"the pattern {pattern!r}", known, [pattern], _ENDS
            )


_LEAF = jax.tree.structure(0)

_ENDS = " A pattern matches the end of a path: 'attention', 'layers/*', '*/mlp'."

# Whose outputs are asked for where a module is called.
_asking: Ambient[tuple[Captured, ...]] = Ambient("asking", ())


def _call(model: Any, *args: PyTree, **kwargs: PyTree) -> PyTree:
    return model(*args, **kwargs)


def _ends(pattern: str, path: str) -> bool:
    """Whether a pattern matches the last names of a path."""
    last = names_of((path,))[-len(pattern.split("/")) :]
    return match(pattern, last)


def _watched_model(graph: Any, state: Any) -> nnx.Module:
    """A copy of an NNX model whose submodules name their outputs."""
    model = nnx.merge(graph, state)
    for path, module in list(nnx.iter_modules(model)):
        if path and callable(module):
            watched = _watched(type(module), "/".join(map(str, path)))
            object.__setattr__(module, "__class__", watched)
    return model


@functools.cache
def _watched(kind: type[nnx.Module], path: str) -> type[nnx.Module]:
    """The class derived from ``kind`` for the module at a path."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = super(made, self).__call__(*args, **kwargs)
        for asked in _asking.get():
            output = asked.named(path, output)
        return output

    body = {
        "__call__": functools.wraps(kind.__call__)(__call__),
        "_bitnet_watched": path,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__annotations__": {},
    }
    pytree = {} if kind._pytree__is_pytree else {"pytree": False}
    made: Any = metaclass(type(kind), _watched, "_bitnet_watched")(
        kind.__name__, (kind,), body, **pytree
    )
    return made


def _held(model: nnx.Module | None) -> dict[Any, list[Any]]:
    """The arrays of a model's variables, by path. Variables are changed in place."""
    flat = () if model is None else nnx.to_flat_state(nnx.state(model))
    return {path: jax.tree.leaves(variable) for path, variable in flat}


def _changed(model: nnx.Module | None, before: dict[Any, list[Any]]) -> dict[Any, Any]:
    """The variables that a call changed, by path."""
    after = _held(model)
    if after.keys() != before.keys():
        path = min(after.keys() ^ before.keys(), key=str)
        _raise_new_variables("/".join(map(str, path)))
    pairs = {path: zip(after[path], before[path], strict=True) for path in after}
    kept = {path for path, each in pairs.items() if all(a is b for a, b in each)}
    flat = () if model is None else nnx.to_flat_state(nnx.state(model))
    return {path: variable for path, variable in flat if path not in kept}


def _is_model(value: object) -> bool:
    return isinstance(value, nnx.Module)


def _is_array(value: object) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic))


def _only_model(leaves: Sequence[Any]) -> nnx.Module | None:
    """The NNX model among arguments; raises for two."""
    models = {id(v): v for v in leaves if _is_model(v)}
    if len(models) > 1:
        kinds = " and ".join(type(m).__name__ for m in models.values())
        raise ValueError(
            f"{WHO}: a call has one NNX model, got {kinds}, whose paths would be mixed up. Capture "
            "the function of each on its own."
        )
    return next(iter(models.values()), None)


def _require_no_structs(leaves: Sequence[object]) -> None:
    """Raises for abstract arrays: a call computes."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise TypeError(
            f"{WHO}: the arguments hold jax.ShapeDtypeStruct, and a call needs arrays. Use "
            "jax.eval_shape(captured, ...)."
        )


def _require_function(fn: object) -> None:
    """Raises unless ``fn`` is a function or an NNX model."""
    if isinstance(fn, linen.Module):
        raise TypeError(
            f"{WHO}: `fn` is a linen module ({type(fn).__name__}). Pass model.apply, or a function "
            "of variables that calls it."
        )
    if not callable(fn):
        raise TypeError(
            f"{WHO}: `fn` must be a function or an NNX model, got {describe(fn)}. Pass for example "
            "model.apply."
        )


def _require_patterns(patterns: Sequence[object]) -> None:
    """Raises unless there are patterns, and all are names."""
    if not patterns or not all(isinstance(p, str) and p.strip("/") == p != "" for p in patterns):
        raise ValueError(
            f"{WHO}: `patterns` must be one or more names, got {tuple(patterns)!r}. Write for "
            "example bj.convert.capture(model.apply, 'layers/*')."
        )


def _require_arrays(path: str, output: PyTree, leaves: Sequence[object]) -> None:
    """Raises unless a module's output is made of arrays."""
    if not leaves or not all(isinstance(v, (jax.Array, np.ndarray, np.generic)) for v in leaves):
        raise TypeError(
            f"{WHO}: {path} returns {describe(output)}, and only trees of arrays can be captured. "
            "Name one of its modules, or a value inside it with jax.ad_checkpoint.checkpoint_name."
        )


def _raise_nothing_named(pattern: str) -> NoReturn:
    """Reports a function in which there is nothing to capture."""
    raise ValueError(
        f"{WHO}: the pattern {pattern!r} matches nothing: the call runs no submodule of linen, or "
        "of an NNX model among its arguments, and names no value. Name it where it is computed, "
        "jax.ad_checkpoint.checkpoint_name(x, 'name')."
    )


def _raise_new_variables(path: str) -> NoReturn:
    """Refuses a call that adds variables to an NNX model or takes some away."""
    raise ValueError(
        f"{WHO}: the call adds or removes a variable of the model at {path}. "
        "Give the model that variable when it is made, and let the call set its value."
    )
