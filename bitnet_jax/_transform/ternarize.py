"""``ternarize``: any function of parameters made ternary, in the manner of ``jax.grad``.

The function is traced to a jaxpr, once for each shape of its arguments, as ``jax.jit`` does;
``survey`` reads what becomes of each leaf of its parameters, ``decide`` chooses, and
``interpret`` traces the program again with the chosen leaves quantised where they are
multiplied. Both traces are kept in JAX's own caches, by the function, the shapes and the
contexts that they were made in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._layers.forward import layer_config
from bitnet_jax._matmul import require_usable
from bitnet_jax._packed.adapted import is_adapted
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.arrays import DTypeLike
from bitnet_jax._quantize.config import B158, INT8, ActivationConfig, KernelConfig
from bitnet_jax._transform import decide
from bitnet_jax._transform.explain import ProgramCoverage, coverage
from bitnet_jax._transform.probe import Probe, Wanted
from bitnet_jax._transform.program import Bound, Plan, Program, Spec, static_leaves
from bitnet_jax._transform.results import given_back
from bitnet_jax._transform.slopes import Losses
from bitnet_jax._transform.walk import Walk
from bitnet_jax._tree.leaves import flatten
from bitnet_jax._tree.pack_report import PackReport
from bitnet_jax._tree.params import pack_params
from bitnet_jax._tree.select import Kernels, KernelUse, Path, Select


def ternarize(
    fn: Callable[..., PyTree],
    *,
    select: Select | None = None,
    weights: KernelConfig = B158,
    activations: ActivationConfig | None = INT8,
    norm: bool = False,
    backward_dtype: DTypeLike | None = None,
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
    if not callable(fn) or _checks.is_flax_module(fn):
        raise TypeError(
            f"{decide.WHO}: `fn` must be a function of parameters, got {describe(fn)}. Pass for "
            "example lambda params, x: ..., or a Flax model to bj.linen.ternarize or "
            "bj.nnx.ternarize."
        )
    layer = layer_config(decide.WHO, weights, activations, norm, backward_dtype)
    _checks.require_selector(decide.WHO, select)
    if not isinstance(argnums, int) or isinstance(argnums, bool):
        raise TypeError(
            f"{decide.WHO}: `argnums` must be the number of one positional argument, got "
            f"{describe(argnums)}. Put all parameters into one tree."
        )
    return Ternarized(Spec(fn, layer, select, argnums))


# Structures of arguments that one function remembers; a flag or two make as many as are used.
_MOST_PROGRAMS = 64


class Ternarized:
    """A function whose kernels are quantised where it multiplies them; from :func:`ternarize`."""

    def __init__(self, spec: Spec):
        self._spec = spec
        self._programs: dict[Any, Program] = {}
        functools.update_wrapper(self, spec.fn, updated=())

    @property
    def argnums(self) -> int:
        """Which positional argument holds the parameters."""
        return self._spec.argnums

    def __reduce__(self) -> Any:
        return Ternarized, (self._spec,)

    def __repr__(self) -> str:
        return f"Ternarized({getattr(self._spec.fn, '__qualname__', repr(self._spec.fn))})"

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """What ``fn`` returns, from quantised kernels."""
        bound = self._bind(decide.WHO, args, kwargs)
        _require_values(bound.values, bound.rest)
        traced, result = jax.make_jaxpr(bound.program.run, return_shape=True)(
            bound.values, bound.rest
        )
        outs = jaxpr_as_fun(traced)(*jax.tree.leaves((bound.values, bound.rest)))
        return given_back(jax.tree.unflatten(jax.tree.structure(result), outs))

    def explain(self, *args: PyTree, **kwargs: PyTree) -> ProgramCoverage:
        """Which leaves are quantised, over which axes, and why others are not.

        Args:
          *args: as for the function; ``jax.ShapeDtypeStruct`` will do.
          **kwargs: as for the function.

        Returns:
          A table. Nothing is computed.

        Raises:
          ValueError: a pattern of the selector that matches no path.
        """
        bound = self._bind("explain", args, kwargs)
        plan = bound.program.plan(bound.values, bound.rest)
        if self._spec.extent != "part":
            decide.check_patterns(plan.candidates, self._spec.select)
        norms = bound.program.norms(plan, bound.rest)
        return coverage(plan.candidates, plan.decisions, plan.found, norms)

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
        return _kernels(self._checked_plan(self._bind("kernels", args, kwargs)))

    def packable(self, *args: PyTree, **kwargs: PyTree) -> Kernels:
        """:meth:`kernels`, where each can be packed: nothing reads it as float besides.

        Args:
          *args: as for :meth:`kernels`.
          **kwargs: as for :meth:`kernels`.

        Returns:
          As :meth:`kernels`.

        Raises:
          ValueError: as :meth:`kernels`; a kernel that is also read as float.
        """
        plan = self._checked_plan(self._bind("pack", args, kwargs))
        decide.require_packable(plan.candidates, plan.decisions, plan.found)
        return _kernels(plan)

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
        kernels = self.packable(*args, **kwargs)
        return pack_params(args[self._spec.argnums], select=kernels)

    def moments(
        self, wanted: Mapping[Path, Wanted], *args: PyTree, **kwargs: PyTree
    ) -> dict[Path, Probe]:
        """What kernels meet in one call of the float function; see ``probe``.

        Args:
          wanted: path of a kernel to what is asked of it.
          *args: as for the function.
          **kwargs: as for the function.

        Returns:
          Path to sums over the tokens of this call, float32; 0 where it does not meet a kernel. In
          the order in which the program meets them.

        Raises:
          ValueError: as a call does; a kernel that this call uses over other axes.
          NotImplementedError: a kernel whose inputs cannot be collected.
        """
        bound = self._bind("calibrate", args, kwargs)
        _require_values(bound.values, bound.rest)
        plan = self._checked_plan(bound)
        paths = _numbered(plan, wanted)
        for path, use in _kernels(plan).uses.items():
            axes = wanted[path].axes if path in wanted else None
            if axes is not None and (axes.contracting, axes.batch) != (*use.axes.values(),):
                _checks.raise_used_two_ways(
                    "calibrate", "/".join(path), "over other axes in another call"
                )
        asked = tuple((i, wanted[path]) for i, path in paths.items())
        found = bound.program.moments(asked, bound.values, bound.rest)
        met = [use.leaf for use in plan.found.uses]
        order = sorted(found, key=lambda i: met.index(i) if i in met else len(met))
        return {paths[i]: found[i] for i in order}

    def walk(self, *args: PyTree, **kwargs: PyTree) -> Walk:
        """One call of the float function, ready to be run step by step; see ``walk``.

        Args:
          *args: as for the function.
          **kwargs: as for the function.

        Raises:
          ValueError: as a call does.
        """
        bound = self._bind("calibrate", args, kwargs)
        _require_values(bound.values, bound.rest)
        return bound.program.walk(self._checked_plan(bound), bound.values, bound.rest)

    def slopes(
        self,
        batch_axes: Mapping[Path, int],
        losses: Losses,
        key: jax.Array,
        *args: PyTree,
        **kwargs: PyTree,
    ) -> tuple[dict[Path, jax.Array], jax.Array]:
        """Squared gradients of losses of one call of the float function; see ``slopes``.

        Args:
          batch_axes: path of a kernel to how many of its leading axes carry slices.
          losses: what the losses are.
          key: of random signs.
          *args: as for the function.
          **kwargs: as for the function.

        Returns:
          Path to the sum over the kernel of each slice, float32; and how many losses there were.

        Raises:
          TypeError: losses that are none.
          ValueError: as a call does.
        """
        bound = self._bind("calibrate", args, kwargs)
        _require_values(bound.values, bound.rest)
        paths = _numbered(self._checked_plan(bound), batch_axes)
        asked = tuple((i, batch_axes[path]) for i, path in paths.items())
        found = bound.program.slopes(asked, losses, key, bound.values, bound.rest)
        return {paths[i]: square for i, square in found.squares.items()}, found.losses

    def check(self, *args: PyTree, **kwargs: PyTree) -> None:
        """Raises what a call raises of the selection; nothing is computed."""
        self._checked_plan(self._bind(decide.WHO, args, kwargs))

    def _checked_plan(self, bound: Bound) -> Plan:
        plan = bound.program.plan(bound.values, bound.rest)
        decide.check_decisions(
            plan.candidates, plan.decisions, self._spec.select, self._spec.extent
        )
        return plan

    def _bind(self, who: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """The leaves of a call, and the program for calls of its structure."""
        _require_params(who, self._spec.argnums, len(args))
        params = args[self._spec.argnums]
        leaves, treedef = flatten(who, "params", params, is_leaf=is_adapted)
        for leaf in leaves:
            if is_packed(leaf.value) or is_adapted(leaf.value):
                require_usable(who, f"the kernel at {leaf.where}", leaf.value)
        others = args[: self._spec.argnums] + args[self._spec.argnums + 1 :]
        flat, structure = jax.tree.flatten((others, kwargs))
        values = [leaf.value for leaf in leaves]
        static = static_leaves([*values, *flat])
        key = jax.tree.structure((params, others, kwargs)), static
        try:
            program = self._programs.get(key)
        except TypeError:  # a static argument that cannot be hashed: traced each time
            key, program = None, None
        if program is None:
            fixed = {i: v for i, _, v in static}
            program = Program(self._spec, leaves, treedef, structure, fixed)
            if key is not None:
                while len(self._programs) >= _MOST_PROGRAMS:
                    del self._programs[next(iter(self._programs))]
                self._programs[key] = program
        count = len(values)
        arrays = [v for i, v in enumerate(values) if i not in program.static]
        rest = [v for i, v in enumerate(flat) if i + count not in program.static]
        return Bound(program, arrays, rest)


def _kernels(plan: Plan) -> Kernels:
    """The quantised leaves of a plan."""
    found = {}
    for i, (one, decision) in enumerate(zip(plan.candidates, plan.decisions, strict=True)):
        if one is not None and decision is not None and decision.config is not None:
            use = next(use for use in plan.found.uses if use.leaf == i)
            axes = {"contracting_axes": use.contracting, "batch_axes": use.batch}
            found[one.path] = KernelUse(tuple(one.leaf.shape), decision.config, axes)
    return Kernels(found)


def _numbered(plan: Plan, asked: Mapping[Path, Any]) -> dict[int, Path]:
    """The numbers and the paths of those leaves of a plan that are asked for."""
    pairs = enumerate(plan.candidates)
    return {i: one.path for i, one in pairs if one is not None and one.path in asked}


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
