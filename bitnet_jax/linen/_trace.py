"""Which kernels of a linen model are quantised, and over which axes.

A kernel's shape does not tell a convolution from a stacked or an attention
kernel; the layer that uses it does. So the model runs once, abstractly
(``jax.eval_shape``), and every ternary layer reports its call. Where ``nn.scan`` and
``nn.vmap`` stack parameters, they tell a boxed leaf which axis they take off it:
each leaf goes in as a :class:`_Probe` that remembers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
from flax import linen as nn
from flax import struct
from flax.core import meta
from flax.linen.module import InterceptorContext
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._layers import coverage
from bitnet_jax._layers.dimensions import Call
from bitnet_jax._layers.forward import LayerConfig
from bitnet_jax._quantize.ternary import KernelConfig
from bitnet_jax._tree.leaves import Leaf, flatten
from bitnet_jax._tree.pack_report import PackReport
from bitnet_jax._tree.params import combine, pack_params
from bitnet_jax._tree.select import Kernels, KernelUse, Path
from bitnet_jax.linen import _in_scope, _interception
from bitnet_jax.linen._interception import Args, Kwargs

# As of model.apply: a name, a function of the module, or None for __call__.
Method = str | Callable[..., Any] | None


def pack(
    model: nn.Module,
    params: PyTree,
    *example_args: PyTree,
    method: Method = None,
    rngs: PyTree = None,
    variables: Mapping[str, PyTree] | None = None,
    calls: Sequence[Callable[[Any], Any]] = (),
    **example_kwargs: PyTree,
) -> tuple[PyTree, PackReport | Any]:
    """Packs every kernel that a model uses as ternary, over the axes of its layers.

    The example's shapes and dtypes are enough: the model is traced, nothing is computed.

    Args:
      model: a linen module with ternary layers, or from :func:`ternarize`.
      params: its parameters (the tree under ``"params"``), float; boxes are kept.
      *example_args: arguments of a call, arrays or ``jax.ShapeDtypeStruct``.
      method: as for ``model.apply``.
      rngs: as for ``model.apply``; by default one key for every stream.
      variables: other collections that the model reads (``batch_stats``, a
        cache). All may be written to; what is written is dropped.
      calls: more calls, each a function of the bound model, for kernels that
        the example does not reach: ``lambda m: m.decode(z)``.
      **example_kwargs: keyword arguments of the call.

    Returns:
      As :func:`bitnet_jax.pack_params`: the packed tree and its report. The
      same ``apply`` runs from it, with the same bits.

    Raises:
      TypeError: ``params`` is not a mapping, or a kernel is packed already.
      ValueError: a model without ternary layers, an example that does not fit
        the model, params of other shapes than the model's, a kernel that no
        call reaches, that is used over two sets of axes, or that is stacked
        along another axis than its first.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import linen as nn
      >>> model = bj.linen.ternarize(nn.MultiHeadDotProductAttention(num_heads=4))
      >>> x = jax.random.normal(jax.random.key(0), (2, 7, 32))
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> packed, report = bj.linen.pack(model, params, x)
      >>> packed["out"]["kernel"]
      PackedTernary(shape=(4, 8, 32), scale=(1, 1, 1), 260 bytes)
      >>> y = model.apply({"params": packed}, x)
      >>> bool((y == model.apply({"params": params}, x)).all())
      True
    """
    examples = _examples(example_args, example_kwargs, method, calls)
    return pack_params(params, select=_kernels("pack", model, params, examples, rngs, variables))


def kernels(
    model: nn.Module,
    params: PyTree,
    *example_args: PyTree,
    method: Method = None,
    rngs: PyTree = None,
    variables: Mapping[str, PyTree] | None = None,
    calls: Sequence[Callable[[Any], Any]] = (),
    **example_kwargs: PyTree,
) -> Kernels:
    """The kernels that a model uses as quantised: a selector that brings their axes.

    Args:
      model: as for :func:`pack`.
      params: as for :func:`pack`.
      *example_args: as for :func:`pack`.
      method: as for :func:`pack`.
      rngs: as for :func:`pack`.
      variables: as for :func:`pack`.
      calls: as for :func:`pack`.
      **example_kwargs: as for :func:`pack`.

    Returns:
      What every ``select=`` takes, without ``axes=``: ``bj.pack_params``,
      ``bj.analysis.sensitivity``, ``bj.analysis.trit_stats``, ``bj.optim.mugrokfast``,
      ``bj.optim.watch_trits``. Printed, a table.

    Raises:
      ValueError: as :func:`pack`.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> model = bj.linen.BitConv(features=8, kernel_size=(3, 3))
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> kernels = bj.linen.kernels(model, params, x)
      >>> packed, report = bj.pack_params(params, select=kernels)
      >>> packed["kernel"]
      PackedTernary(shape=(3, 3, 4, 8), scale=(1, 1, 1, 1), 76 bytes)
    """
    examples = _examples(example_args, example_kwargs, method, calls)
    return _kernels("kernels", model, params, examples, rngs, variables)


def _examples(
    args: Args, kwargs: Kwargs, method: Method, calls: Sequence[Callable[[Any], Any]]
) -> list[_Example]:
    """The calls that the model is traced with."""
    return [_Example(method, args, kwargs), *(_Example(call, (), {}) for call in calls)]


def _kernels(
    who: str,
    model: nn.Module,
    params: PyTree,
    examples: Sequence[_Example],
    rngs: PyTree,
    variables: Mapping[str, PyTree] | None,
) -> Kernels:
    _checks.require_instance(who, "model", model, nn.Module, "Pass a linen module.")
    _checks.require_instance(who, "params", params, Mapping, "Pass the tree under 'params'.")
    seen = _watch(who, model, params, examples, rngs, variables or {})
    shapes = {leaf.path: tuple(leaf.value.shape) for leaf in flatten(who, "params", params)[0]}
    uses = {
        path: KernelUse(shapes[path], use.config, use.axes(who, path))
        for path, use in seen.uses.items()
        if use.config is not None
    }
    if not uses:
        _checks.raise_no_ternary_layer(who, type(model).__name__)
    _check_reached(who, params, seen)
    return Kernels(uses)


def explain(
    model: nn.Module,
    *example_args: PyTree,
    method: Method = None,
    rngs: PyTree = None,
    **example_kwargs: PyTree,
) -> coverage.Coverage:
    """Which kernels of a model are ternary, and why the others are not.

    Args:
      model: a linen module with ternary layers, or from :func:`ternarize`.
      *example_args: arguments of ``model.init``, arrays or ``jax.ShapeDtypeStruct``.
      method: as for ``model.init``.
      rngs: as for ``model.init``; by default one key for every stream.
      **example_kwargs: keyword arguments of the call.

    Returns:
      A table, one row for each parameter of rank 2 or more that is no bias or
      scale. Nothing is computed.

    Raises:
      ValueError: an example that does not fit the model.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import linen as nn
      >>> layers = [nn.Conv(8, (3, 3)), nn.ConvTranspose(4, (2, 2))]
      >>> model = bj.linen.ternarize(nn.Sequential(layers))
      >>> print(bj.linen.explain(model, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")))
      path             layer            shape  kernel   why
      layers_0/kernel  Conv           3x3x3x8  ternary  selected
      layers_1/kernel  ConvTranspose  2x2x8x4  float    ConvTranspose has no ternary form
    """
    who = "explain"
    _checks.require_instance(who, "model", model, nn.Module, "Pass a linen module.")
    keys = {"params": jax.random.key(0)} if rngs is None else rngs

    def init(*args: PyTree, **kwargs: PyTree) -> Any:
        return model.init(keys, *args, method=method, **kwargs)

    params = _abstract(who, init, example_args, example_kwargs).get("params", {})

    example = _Example(method, example_args, example_kwargs)
    seen = _watch(who, model, params, [example], rngs, {})
    leaves = flatten(who, "params", params)[0]
    rows = (_row(leaf, seen) for leaf in leaves if _is_kernel(leaf, seen))
    return coverage.Coverage(tuple(rows))


def _is_kernel(leaf: Leaf, seen: _Seen) -> bool:
    small = leaf.path[-1] in ("bias", "scale")  # of several heads, or stacked
    return leaf.path in seen.uses or (len(leaf.value.shape) >= 2 and not small)


def _row(leaf: Leaf, seen: _Seen) -> coverage.Covered:
    path, module = leaf.path, seen.modules.get(leaf.path[:-1])
    layer = "-" if module is None else module
    use = seen.uses.get(path)
    if use is not None:
        config, why = use.config, use.why
    elif module is None:
        config, why = None, "not reached by the example"
    else:
        config, why = None, f"{layer} has no ternary form"
    return coverage.Covered(leaf.where, layer, tuple(leaf.value.shape), config, why)


class _Example(NamedTuple):
    """One call of a model."""

    method: Method
    args: Args
    kwargs: Kwargs


class _Use(NamedTuple):
    """How one kernel is used.

    Attributes:
      config: its quantiser; None: it stays float.
      why: ``"selected"``, or the reason that it stays float.
      call: the dimension numbers of the call; None: it stays float.
      stacked: the axes that were taken off the leaf on the way to its layer.
    """

    config: KernelConfig | None
    why: str
    call: Call | None
    stacked: tuple[int, ...]

    def axes(self, who: str, path: Path) -> dict[str, tuple[int, ...]]:
        """The keywords of ``pack``, counted in the whole, stacked leaf."""
        assert self.call is not None
        _require_stacked_first(who, "/".join(path), self.stacked)
        call = self.call
        return coverage.stacked_axes(len(self.stacked), call.contracting_axes, call.batch_axes)


class _Seen(NamedTuple):
    uses: dict[Path, _Use]
    modules: dict[Path, str]


class _Probe(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A leaf that remembers which axes are taken off it."""

    value: Any
    removed: tuple[int, ...] = struct.field(default=(), pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: PyTree) -> _Probe:
        return self.replace(value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> _Probe:
        del index, params
        return self.replace(removed=self.removed[:-1])

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> _Probe:
        del params
        return self.replace(removed=(*self.removed, index))


def _watch(
    who: str,
    model: nn.Module,
    params: PyTree,
    examples: Sequence[_Example],
    rngs: PyTree,
    variables: Mapping[str, PyTree],
) -> _Seen:
    """Runs every call abstractly and collects how each kernel is used.

    Twice where leaves are stacked: only those are boxed, for a box is a node that
    a layer may trip over (``nn.WeightNorm`` names its own parameters by their paths).
    """
    leaves, treedef = flatten(who, "params", params)

    def run(boxed: set[Path]) -> _Seen:
        values = (_Probe(x.value) if x.path in boxed else x.value for x in leaves)
        tree = jax.tree.unflatten(treedef, list(values))
        return _watch_once(who, model, {**variables, "params": tree}, examples, rngs, leaves)

    seen = run(set())
    ranks = {leaf.path: len(leaf.value.shape) for leaf in leaves}
    stacked = {
        path
        for path, use in seen.uses.items()
        if use.call is not None and ranks.get(path, 0) > len(use.call.kernel_shape)
    }
    return run(stacked) if stacked else seen


def _watch_once(
    who: str,
    model: nn.Module,
    everything: PyTree,
    examples: Sequence[_Example],
    rngs: PyTree,
    leaves: Sequence[Leaf],
) -> _Seen:
    seen = _Seen({}, {})

    def observe(
        module: nn.Module, name: str, call: Call | None, config: LayerConfig | str, leaf: PyTree
    ) -> None:
        stacked = leaf.removed if isinstance(leaf, _Probe) else ()
        if isinstance(config, LayerConfig):
            use = _Use(config.weights, "selected", call, stacked)
        else:
            use = _Use(None, config, None, stacked)
        path = (*module.path, name)
        seen.modules[module.path] = type(module).__name__
        _check_same(who, path, seen.uses.setdefault(path, use), use)

    def visit(
        next_fun: Callable[..., Any], args: Args, kwargs: Kwargs, context: InterceptorContext
    ) -> Any:
        seen.modules.setdefault(context.module.path, type(context.module).__name__)
        jit_keys.meet(context)
        return next_fun(*args, **kwargs)

    keys = {"params": jax.random.key(0)} if rngs is None else rngs
    mutable = nn.DenyList("params")  # pyright: ignore[reportCallIssue]
    token = _in_scope.observer.set(observe)
    try:
        with _interception.JitKeys() as jit_keys, nn.intercept_methods(visit):
            for method, args, kwargs in examples:
                apply = functools.partial(model.apply, method=method, mutable=mutable)
                try:
                    _abstract(who, apply, (everything, *args), {**kwargs, "rngs": keys})
                except ValueError:
                    _check_shapes(who, model, leaves, _Example(method, args, kwargs), keys)
                    raise
    finally:
        _in_scope.observer.reset(token)
    return seen


def _check_shapes(
    who: str, model: nn.Module, leaves: Sequence[Leaf], example: _Example, keys: PyTree
) -> None:
    """Raises if a parameter has another shape than the model makes, and names it."""
    init = functools.partial(model.init, keys, method=example.method)
    token = _in_scope.observer.set(None)
    try:
        made = _abstract(who, init, example.args, example.kwargs).get("params", {})
    except ValueError:
        return  # the example itself does not fit: the first error says so
    finally:
        _in_scope.observer.reset(token)
    found = flatten(who, "params", made)[0]
    wanted: dict[Path, Any] = {leaf.path: leaf.value.shape for leaf in found}
    for leaf in leaves:
        got = leaf.value.shape
        _checks.require_param_shape(who, leaf.where, got, wanted.get(leaf.path, got))


def _abstract(who: str, function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``jax.eval_shape``; errors of the model get this library's prefix and a remedy."""
    from_us = (NotImplementedError, ValueError, TypeError)

    def only(arrays: bool) -> PyTree:
        def kept(leaf: PyTree) -> PyTree:
            return leaf if (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) == arrays else None

        return jax.tree.map(kept, (args, kwargs))

    static = only(arrays=False)

    def call(arrays: PyTree) -> Any:
        args, kwargs = combine(arrays, static)
        return function(*args, **kwargs)

    try:
        return jax.eval_shape(call, only(arrays=True))
    except Exception as error:
        if isinstance(error, from_us) and str(error).startswith((f"{who}:", "ternarize:")):
            raise
        raise _example_refused(who, error) from error


def _check_same(who: str, path: Path, first: _Use, use: _Use) -> None:
    """Raises if two calls use a kernel over different axes or with different configs."""
    if first.call is None or use.call is None:
        if (first.config is None) != (use.config is None):
            _checks.raise_used_two_ways(who, "/".join(path), "as ternary and as float")
        return
    a, b = first.call, use.call
    same = a.contracting_axes == b.contracting_axes and a.batch_axes == b.batch_axes
    if not same or first.stacked != use.stacked or first.config != use.config:
        how = f"over axes {a.contracting_axes} and {b.contracting_axes}, or by two configs"
        _checks.raise_used_two_ways(who, "/".join(path), how)


def _check_reached(who: str, params: PyTree, seen: _Seen) -> None:
    """Raises if no example call uses a kernel."""
    missed = [
        leaf.where
        for leaf in flatten(who, "params", params)[0]
        if leaf.path[-1] == "kernel"
        and getattr(leaf.value, "ndim", 0) >= 2
        and leaf.path[:-1] not in seen.modules
    ]
    if missed:
        _raise_never_reached(who, missed)


def _example_refused(who: str, error: Exception) -> ValueError:
    """The error for a model that does not run on the example."""
    return ValueError(
        f"{who}: the model does not run on `example_args` with these params: "
        f"{type(error).__name__}: {error} Pass what model.apply takes (method=, rngs= and "
        "variables= where it needs them)."
    )


def _raise_never_reached(who: str, paths: Sequence[str]) -> NoReturn:
    """Reports kernels that no example call uses."""
    raise ValueError(
        f"{who}: no call reaches the kernels {', '.join(paths)}. Pass calls=[lambda m: ...] that "
        "use them, or take them out of `params`."
    )


def _require_stacked_first(who: str, path: str, removed: Sequence[int]) -> None:
    """Raises unless layers are stacked along their first axis."""
    if any(axis != 0 for axis in removed):
        raise ValueError(
            f"{who}: {path} is stacked along axes {tuple(removed)}; a packed kernel is stacked "
            "along the first. Use nn.scan or nn.vmap with variable_axes={'params': 0}."
        )
