"""``ternarize``: any function of parameters made ternary, in the manner of ``jax.grad``.

The function is traced to a jaxpr, once for each shape of its arguments, as ``jax.jit`` does;
``analysis`` reads what becomes of each leaf of its parameters, ``decide`` chooses, and
``interpret`` traces the program again with the chosen leaves quantised where they are
multiplied. Both traces are kept in JAX's own caches, by the function, the shapes and the
contexts that they were made in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from bitnet_jax import _checks, _mesh
from bitnet_jax._checks import describe
from bitnet_jax._layers.forward import LayerConfig, layer_config
from bitnet_jax._packed.adapted import Adapted
from bitnet_jax._packed.kernel import Prepared, is_packed, is_stored
from bitnet_jax._quantize.config import B158, INT8, ActivationConfig, KernelConfig
from bitnet_jax._transform import decide, mapped
from bitnet_jax._transform.explain import ProgramCoverage, coverage
from bitnet_jax._transform.interpret import Interpreter
from bitnet_jax._transform.kinds import AnyJaxpr, Value
from bitnet_jax._transform.marks import KNOWN, LIVE, Found, Mark
from bitnet_jax._transform.products import Chosen
from bitnet_jax._transform.reach import Analysis
from bitnet_jax._transform.tracked import Tracked, shown
from bitnet_jax._transform.view import of_leaf
from bitnet_jax._tree.leaves import Leaf, flatten, rebox
from bitnet_jax._tree.pack_report import PackReport
from bitnet_jax._tree.params import pack_params
from bitnet_jax._tree.select import Kernels, KernelUse, Select


def ternarize(
    fn: Callable[..., Any],
    *,
    select: Select | None = None,
    weights: KernelConfig = B158,
    activations: ActivationConfig | None = INT8,
    norm: bool = False,
    backward_dtype: Any = None,
    argnums: int = 0,
) -> Ternarized:
    """The same function, with the kernels among its parameters quantised where it multiplies them.

    ``fn(params, *args, **kwargs)`` may be of any library: ``model.apply`` of linen, a haiku
    ``apply``, equinox modules, plain JAX. A leaf of ``params`` is a kernel where it reaches a
    product, seen through casts, transposes, reshapes, broadcasts and slices along stacked axes,
    in jitted, scanned, rematerialised, mapped and sharded code. It is quantised as it is stored,
    over the axes that the product contracts. What is computed with it first (a division, a mask,
    a concatenation) makes it float, and :meth:`Ternarized.explain` says so.

    Float params train, packed and prepared ones serve, with the same bits.

    Args:
      fn: the function. Arguments that are not arrays are static.
      select: which leaves; see ``bj.exclude`` and ``bj.only``. Called with a path and a leaf's
        shape and dtype, it may return a config for each, ``Int8Config`` included. By default
        every float leaf of two axes and more that an input is multiplied with, whatever its
        name; tables in which rows are looked up stay float.
      weights: the quantiser of the selected leaves.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters before each quantised product.
      backward_dtype: of the backward products' operands; None: float32.
      argnums: which positional argument holds the parameters.

    Returns:
      A :class:`Ternarized`: call it as ``fn``.

    Raises:
      TypeError: ``fn`` cannot be called, or another argument is of another kind. When it is
        called: params that are not where ``argnums`` says, or abstract.
      ValueError: when it is called: a selector that matches nothing, a kernel that is used over
        two sets of axes or meets itself, a packed tree of another function.
      NotImplementedError: when it is called: a kernel that ``bj.only`` names and that has no
        quantised form; a primitive that the interpreter has no rule for.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> def fn(params, x):
      ...     h = jax.nn.relu(jnp.einsum("bd,dhk->bhk", x, params["in"]))
      ...     return jnp.einsum("bhk,hkd->bd", h, params["out"])
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {
      ...     "in": jax.random.normal(keys[0], (16, 4, 8)),
      ...     "out": jax.random.normal(keys[1], (4, 8, 16)),
      ... }
      >>> x = jax.random.normal(keys[2], (5, 16))
      >>> ternary = bj.ternarize(fn)
      >>> print(ternary.explain(params, x))
      path  product       shape  dtype    over  share  kernel   why
      in    dot_general  16x4x8  float32     0  50.0%  ternary  selected
      out   dot_general  4x8x16  float32   0,1  50.0%  ternary  selected
      100 % ternary of 10.2 kFLOP
      >>> packed, report = ternary.pack(params, x)
      >>> bool((ternary(packed, x) == ternary(params, x)).all())
      True
    """
    if not callable(fn):
        raise TypeError(
            f"{decide.WHO}: `fn` must be a function of parameters, got {describe(fn)}. Pass for "
            "example model.apply, or lambda params, x: ..."
        )
    layer = layer_config(decide.WHO, weights, activations, norm, backward_dtype)
    _checks.require_selector(decide.WHO, select)
    if not isinstance(argnums, int) or isinstance(argnums, bool):
        raise TypeError(
            f"{decide.WHO}: `argnums` must be the number of one positional argument, got "
            f"{describe(argnums)}. Put all parameters into one tree."
        )
    return Ternarized(fn, layer, select, argnums)


# Structures of arguments that one function remembers; a flag or two make as many as are used.
_MOST_PROGRAMS = 64


class Ternarized:
    """A function whose kernels are quantised where it multiplies them; from :func:`ternarize`."""

    def __init__(
        self, fn: Callable[..., Any], layer: LayerConfig, select: Select | None, argnums: int
    ):
        self._fn, self._layer, self._select, self._argnums = fn, layer, select, argnums
        self._programs: dict[Any, _Program] = {}
        functools.update_wrapper(self, fn, updated=())

    def __reduce__(self) -> Any:
        return Ternarized, (self._fn, self._layer, self._select, self._argnums)

    def __repr__(self) -> str:
        return f"Ternarized({getattr(self._fn, '__qualname__', repr(self._fn))})"

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        """What ``fn`` returns, from quantised kernels."""
        bound = self._bind(decide.WHO, args, kwargs)
        _require_values(bound.values, bound.rest)
        traced, result = jax.make_jaxpr(bound.program.run, return_shape=True)(
            bound.values, bound.rest
        )
        outs = jaxpr_as_fun(traced)(*jax.tree.leaves((bound.values, bound.rest)))
        return jax.tree.unflatten(jax.tree.structure(result), outs)

    def explain(self, *args: PyTree, **kwargs: PyTree) -> ProgramCoverage:
        """Which leaves are quantised, over which axes, and why others are not.

        Args:
          *args: as for the function; ``jax.ShapeDtypeStruct`` will do.
          **kwargs: as for the function.

        Returns:
          A table. Nothing is computed.
        """
        bound = self._bind("explain", args, kwargs)
        plan = bound.program.plan(bound.values, bound.rest)
        return coverage(plan.candidates, plan.decisions, plan.found)

    def kernels(self, *args: PyTree, **kwargs: PyTree) -> Kernels:
        """The quantised leaves with their configs and axes: what ``select=`` takes elsewhere.

        Args:
          *args: as for the function; ``jax.ShapeDtypeStruct`` will do.
          **kwargs: as for the function.

        Returns:
          A selector that brings its axes.

        Raises:
          ValueError: as a call does.
        """
        return self._kernels(self._bind("kernels", args, kwargs), packing=False)

    def pack(self, *args: PyTree, **kwargs: PyTree) -> tuple[Any, PackReport]:
        """The packed params, and what packing did; the function runs from them with the same bits.

        Args:
          *args: as for the function; all but the params may be ``jax.ShapeDtypeStruct``.
          **kwargs: as for the function.

        Returns:
          As :func:`bitnet_jax.pack_params`.

        Raises:
          ValueError: as a call does; a kernel that is also read as float, or that is stacked
            along another axis than its first.
        """
        bound = self._bind("pack", args, kwargs)
        kernels = self._kernels(bound, packing=True)
        return pack_params(args[self._argnums], select=kernels)

    def _kernels(self, bound: _Bound, *, packing: bool) -> Kernels:
        plan = bound.program.plan(bound.values, bound.rest)
        decide.check_decisions(plan.candidates, plan.decisions, self._select)
        if packing:
            decide.require_packable(plan.candidates, plan.decisions, plan.found)
        found = {}
        for i, (one, decision) in enumerate(zip(plan.candidates, plan.decisions, strict=True)):
            if one is not None and decision is not None and decision.config is not None:
                use = next(use for use in plan.found.uses if use.leaf == i)
                axes = {"contracting_axes": use.contracting, "batch_axes": use.batch}
                found[one.path] = KernelUse(tuple(one.leaf.shape), decision.config, axes)
        return Kernels(found)

    def _bind(self, who: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bound:
        """The leaves of a call, and the program for calls of its structure."""
        _require_params(who, self._argnums, len(args))
        params = args[self._argnums]
        leaves, treedef = flatten(who, "params", params, is_leaf=_is_adapted)
        others = args[: self._argnums] + args[self._argnums + 1 :]
        flat, structure = jax.tree.flatten((others, kwargs))
        values = [leaf.value for leaf in leaves]
        static = _static([*values, *flat])
        key = jax.tree.structure((params, others, kwargs)), static
        try:
            program = self._programs.get(key)
        except TypeError:  # a static argument that cannot be hashed: traced each time
            key, program = None, None
        if program is None:
            program = _Program(self, leaves, treedef, structure, dict((i, v) for i, _, v in static))
            if key is not None:
                while len(self._programs) >= _MOST_PROGRAMS:
                    del self._programs[next(iter(self._programs))]
                self._programs[key] = program
        count = len(values)
        arrays = [v for i, v in enumerate(values) if i not in program.static]
        rest = [v for i, v in enumerate(flat) if i + count not in program.static]
        return _Bound(program, arrays, rest)


class _Bound(NamedTuple):
    """One call: the program for its structure, the arrays of its params, and all other arrays."""

    program: _Program
    values: list[Any]
    rest: list[Any]


class _Plan(NamedTuple):
    """A traced program and what becomes of its leaves."""

    jaxpr: AnyJaxpr
    result: Any
    candidates: list[decide.Candidate | None]
    found: Found
    decisions: list[decide.Decision | None]


class _Program:
    """The function for arguments of one structure.

    ``run`` and ``float_fn`` are made once, so that JAX's caches of traces know them again.
    """

    def __init__(
        self,
        owner: Ternarized,
        leaves: Sequence[Leaf],
        treedef: Any,
        structure: Any,
        static: dict[int, Any],
    ):
        self._owner, self._treedef, self._structure = owner, treedef, structure
        self.static = static
        # Boxes without their values, which would be kept alive.
        self._boxes = [
            None if leaf.boxed is leaf.value else rebox(leaf.boxed, None) for leaf in leaves
        ]
        self._paths = [leaf.path for leaf in leaves]
        self.run, self.float_fn = self._run, self._float_fn

    def _float_fn(self, values: list[Any], rest: list[Any]) -> Any:
        count = len(self._boxes)
        arrays, others = iter(values), iter(rest)
        given = [self.static[i] if i in self.static else next(arrays) for i in range(count)]
        boxed = [v if b is None else rebox(b, v) for b, v in zip(self._boxes, given, strict=True)]
        params = jax.tree.unflatten(self._treedef, boxed)
        places = range(count, count + self._structure.num_leaves)
        flat = [self.static[i] if i in self.static else next(others) for i in places]
        args, kwargs = jax.tree.unflatten(self._structure, flat)
        at = self._owner._argnums
        return self._owner._fn(*args[:at], params, *args[at:], **kwargs)

    def plan(self, values: list[Any], rest: list[Any]) -> _Plan:
        """The traced function, and what becomes of its leaves."""
        floats = [_placeholder(v) for v in values]
        with mapped.noted():
            jaxpr, result = jax.make_jaxpr(self.float_fn, return_shape=True)(floats, rest)
        paths = [path for i, path in enumerate(self._paths) if i not in self.static]
        candidates = [
            _candidate(path, v) if _is_kernel(v) else None
            for path, v in zip(paths, floats, strict=True)
        ]
        marks: list[Mark] = [
            KNOWN if c is None else Mark(of_leaf(i, c.leaf.shape), live=False)
            for i, c in enumerate(candidates)
        ]
        analysis = Analysis()
        outs = analysis.walk(jaxpr, [*marks, *[LIVE] * len(rest)], 1.0)
        for mark in outs:
            analysis.read(mark, "return")
        layer, select = self._owner._layer, self._owner._select
        decisions = decide.decide_all(candidates, analysis.found, layer.weights, select)
        return _Plan(jaxpr, result, candidates, analysis.found, decisions)

    def _run(self, values: list[Any], rest: list[Any]) -> Any:
        plan = self.plan(values, rest)
        decide.check_decisions(plan.candidates, plan.decisions, self._owner._select)
        boxes = [box for i, box in enumerate(self._boxes) if i not in self.static]
        chosen: dict[int, Chosen] = {}
        operands: list[Any] = []
        for i, (value, one, decision) in enumerate(
            zip(values, plan.candidates, plan.decisions, strict=True)
        ):
            if one is not None and decision is not None and decision.config is not None:
                layer = self._owner._layer._replace(weights=decision.config)
                chosen[i] = Chosen(one.where, layer, boxes[i])
                value = Tracked(of_leaf(i, one.leaf.shape), value)
            elif one is not None and decision is not None and not _is_array(value):
                _raise_packed_but_float(one.where, decision.why)
            operands.append(value)
        outs = Interpreter(chosen).body(plan.jaxpr, [*operands, *rest])
        outs = [_returned(out, chosen) for out in outs]
        return jax.tree.unflatten(jax.tree.structure(plan.result), outs)


def _candidate(path: tuple[str, ...], value: Value) -> decide.Candidate:
    return decide.Candidate(path, jax.ShapeDtypeStruct(value.shape, value.dtype))


def _returned(out: Any, chosen: dict[int, Chosen]) -> Any:
    """A result of the program; a leaf that comes back as it went in is that leaf, packed or not."""
    if not isinstance(out, Tracked):
        return out
    if out.view == of_leaf(out.view.leaf, out.view.shape):
        return out.value
    return shown(out, chosen[out.view.leaf].where, "return")


def _static(leaves: Sequence[Any]) -> tuple[tuple[int, type, Any], ...]:
    """What among leaves is no array, with its place and its type: 1 is not True."""
    packed = [is_packed(v) or _is_adapted(v) for v in leaves]
    pairs = enumerate(zip(leaves, packed, strict=True))
    return tuple((i, type(v), v) for i, (v, p) in pairs if not p and not _is_array(v))


def _is_array(leaf: Any) -> bool:
    own = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return own and not isinstance(leaf, type) and not is_packed(leaf) and not _is_adapted(leaf)


def _is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, Adapted)


def _is_kernel(leaf: Any) -> bool:
    """Whether a leaf, or what stands for it, may be a kernel."""
    return jnp.issubdtype(leaf.dtype, jnp.floating) and len(leaf.shape) >= 2 and 0 not in leaf.shape


def _placeholder(value: Value) -> Any:
    """The float kernel that a packed one stands for; any other value as it is."""
    packed = value.base if isinstance(value, Adapted) else value
    if not is_packed(packed):
        return value
    shape = packed.kernel_shape if isinstance(packed, Prepared) else packed.shape
    if isinstance(packed.codes, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, packed.dtype)
    kind, sharding = jax.typeof(packed.codes), None
    if is_stored(packed) and _mesh.is_typed(packed.codes):
        sharding = NamedSharding(kind.sharding.mesh, kind.sharding.spec)
    how = {"sharding": sharding, "manual_axis_type": kind.manual_axis_type}
    return jax.ShapeDtypeStruct(shape, packed.dtype, **how)


def _require_params(who: str, argnums: int, count: int) -> None:
    """Refuses a call without the argument that holds the parameters."""
    if not 0 <= argnums < count:
        raise TypeError(
            f"{who}: the parameters are positional argument {argnums} (argnums=), and the call has "
            f"{count}. Pass them by position, or set argnums= to where they are."
        )


def _require_values(values: Sequence[Any], rest: Sequence[Any]) -> None:
    """Refuses abstract arrays where the function is to be computed."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((values, rest))):
        raise TypeError(
            f"{decide.WHO}: the arguments hold jax.ShapeDtypeStruct, and a call needs arrays. Use "
            "jax.eval_shape(ternary, ...), or ternary.explain(...)."
        )


def _raise_packed_but_float(path: str, why: str) -> NoReturn:
    """Refuses a packed leaf that the function uses in float."""
    raise ValueError(
        f"{decide.WHO}: the kernel at {path} is packed, and this function leaves it in float "
        f"({why}). Ternarise it with the `select` that the kernels were packed with, and pass "
        "params of this function."
    )
