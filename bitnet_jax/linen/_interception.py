"""``ternarize`` of a linen model, which is not edited and keeps its parameters.

:func:`ternarize` gives a model a class of its own, derived from the one it had.
While a method of that class runs, an interceptor replaces the ``__call__`` of
every layer that has a ternary form by the functional core, in the layer's own
scope: same parameter paths, same initialisers, same random keys. Flax
calls every method through ``_call_wrapped_method``. Overriding that covers
``method="encode"`` and a model inside another model, which overriding ``apply`` or
``__call__`` would miss.
"""

from __future__ import annotations

import contextlib
import contextvars
import copyreg
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import unfreeze
from flax.linen.module import InterceptorContext
from jax.typing import DTypeLike
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._layers import coverage
from bitnet_jax._layers.forward import LayerConfig, layer_config
from bitnet_jax._quantize.int8 import INT8, ActivationConfig, Int8Config
from bitnet_jax._quantize.ternary import B158, KernelConfig
from bitnet_jax._tree.leaves import unbox
from bitnet_jax._tree.select import Path, Select, decide, is_kernel, matched
from bitnet_jax.linen import _in_scope
from bitnet_jax.linen._in_scope import Layer, LinenLayer

Args = tuple[PyTree, ...]

Kwargs = Mapping[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a ternarised class does; two equal plans share one class."""

    select: Select | None
    layer: LayerConfig

    def config(self, weights: KernelConfig) -> LayerConfig:
        """The layer's config with the kernel's own quantiser."""
        return self.layer._replace(weights=weights)


def ternarize(
    model: nn.Module,
    select: Select | None = None,
    *,
    weights: KernelConfig = B158,
    activations: ActivationConfig | None = INT8,
    norm: bool = False,
    backward_dtype: DTypeLike | None = None,
) -> nn.Module:
    """A model with ternary layers and the parameters of the given one.

    ``Dense``, ``DenseGeneral`` (so attention), ``Conv`` and ``Einsum`` compute as
    ``BitDense`` and its kin do, wherever they are: in submodules, shared, under
    ``nn.scan``, ``nn.remat``, ``nn.vmap`` and ``nn.jit``. Checkpoints of the float model
    fit, and packed trees (:func:`pack`) run under the same ``apply``. ``Embed`` can
    be given an ``Int8Config``. Every other owner of a kernel stays float, and
    :func:`explain` names it. A model inside that was ternarised on its own keeps
    its own configs.

    Args:
      model: any linen module, not bound. It is not changed.
      select: which kernels; see ``bj.exclude`` and ``bj.only``. Called with the
        path of the kernel and its shape and dtype; may return a config of its
        own for each, ``Int8Config`` included. By default every ``kernel``.
      weights: the quantiser of the selected kernels.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters before each quantised layer.
      backward_dtype: of the backward products' operands; None: float32.

    Returns:
      A module of a class derived from the model's, of the same name; equal
      arguments give the same class, and it pickles as its model does.

    Raises:
      TypeError: ``model`` is not a linen module.
      ValueError: a bound or ternarised model. When it is initialised or called: a selector
        that matches nothing, or only kernels without a ternary form.
      NotImplementedError: when it is called: a layer that :func:`only` asks for
        by name and that has no ternary form.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import linen as nn
      >>> model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])
      >>> x = jax.random.normal(jax.random.key(0), (8, 64))
      >>> params = model.init(jax.random.key(1), x)["params"]  # of the float model
      >>> ternary = bj.linen.ternarize(model, select=bj.exclude("layers_2"))
      >>> print(bj.linen.explain(ternary, x))
      path             layer  shape  kernel   why
      layers_0/kernel  Dense  64x32  ternary  selected
      layers_2/kernel  Dense  32x10  float    not selected
      >>> packed, report = bj.linen.pack(ternary, params, x)
      >>> y = ternary.apply({"params": packed}, x)
      >>> bool((y == ternary.apply({"params": params}, x)).all())
      True
    """
    who = "ternarize"
    _checks.require_instance(
        who, "model", model, nn.Module, "Pass an instance, for example Model()."
    )
    _require_not_ternarized(who, isinstance(type(model), _Meta), type(model).__name__)
    _require_unbound(who, model.scope is not None or model.name is not None, type(model).__name__)
    layer = layer_config(who, weights, activations, norm, backward_dtype)
    _checks.require_selector(who, select)
    plan = Plan(select, layer)
    return _rebuild(type(model), plan, _fields(model))


def _fields(model: nn.Module) -> dict[str, Any]:
    own = (f.name for f in dataclasses.fields(model) if f.init and f.name not in ("parent", "name"))
    return {name: getattr(model, name) for name in own}


def _rebuild(kind: type[nn.Module], plan: Plan, fields: dict[str, Any]) -> nn.Module:
    return ternarized_class(kind, plan)(**fields)


class _Meta(type(nn.Module)):
    """The metaclass of ternarised classes, by which they pickle."""


def _reduce_class(kind: type[nn.Module]) -> str | tuple[Any, ...]:
    if "_bitnet_plan" in vars(kind):
        return ternarized_class, (kind.__base__, vars(kind)["_bitnet_plan"])
    return kind.__qualname__  # a class that a user derived: by its name


copyreg.pickle(_Meta, _reduce_class)  # pyright: ignore[reportArgumentType]


@functools.cache
def ternarized_class(kind: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The class derived from ``kind`` whose methods run under ``plan``."""

    @nn.nowrap
    def _call_wrapped_method(
        self: nn.Module, fun: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        run = functools.partial(super(made, self)._call_wrapped_method, fun, args, kwargs)
        return run() if _current.get() is plan else _run(self, plan, run, fun)

    @nn.nowrap
    def __reduce__(self: nn.Module) -> tuple[Any, ...]:
        return _rebuild, (kind, plan, _fields(self))

    body = {
        "_call_wrapped_method": _call_wrapped_method,
        "__reduce__": __reduce__,
        "_bitnet_plan": plan,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    made: Any = _Meta(kind.__name__, (kind,), body)  # the name: Flax names submodules by it
    return made


_current: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("plan", default=None)

# Why the layers inside a module stay float, where it changes their kernels on the way.
_refused: contextvars.ContextVar[str | None] = contextvars.ContextVar("refused", default=None)

_jit_key = jax.make_user_context(None)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[Any], value: object) -> Iterator[None]:
    """Sets a context variable for a block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class JitKeys(contextlib.ExitStack):
    """Has every instance of a block under ``nn.jit`` traced on its own.

    ``nn.jit`` keeps one trace for all instances of equal fields, so a path would not
    matter inside it. Flax touches an instance once, before its first call; from
    there on JAX's caches are told another key, until the stack is closed.
    """

    def __init__(self, name: Plan | None = None):
        super().__init__()
        self._name, self._count = name, 0

    def meet(self, context: InterceptorContext) -> None:
        """To be called with the context of every intercepted method."""
        if context.method_name != "__call__" and _is_jitted(type(context.module)):
            self._count += 1
            watched = self._name is None or _in_scope.observer.get() is not None
            one = object() if watched else (self._name, self._count)
            self.enter_context(_jit_key(one))


def _run(model: nn.Module, plan: Plan, run: Callable[[], Any], fun: Callable[..., Any]) -> Any:
    """Runs a method of a ternarised model; raises if the plan selects nothing in it."""
    chosen: dict[Path, str] = {}
    keys = JitKeys(plan)
    with keys, _set(_current, plan), nn.intercept_methods(_interceptor(plan, chosen, keys)):
        y = run()
    if model.scope is not None:
        _check_chosen(model, plan, chosen, fun.__name__ == "__call__")
    return y


def _check_chosen(model: nn.Module, plan: Plan, chosen: Mapping[Path, str], whole: bool) -> None:
    """Raises if nothing became ternary, and at init, when all is there, for unmatched patterns.

    ``chosen`` has the kernels that were met: why each is ternary (``"selected"``) or float.
    """
    who, some = "ternarize", "selected" in chosen.values()
    if not (model.is_initializing() or (whole and not some)):
        return
    own = traverse_util.flatten_dict(unfreeze(dict(model.variables.get("params", {}))))
    leaves = {(*model.path, *map(str, path)): unbox(leaf) for path, leaf in own.items()}
    if whole and not some:
        # Kernels that were selected and met, and selected ones that no such layer met.
        reasons = {path: why for path, why in chosen.items() if why != "not selected"}
        for path, leaf in leaves.items():
            unmet = is_kernel(path, leaf) and path not in chosen
            if unmet and decide(who, path, leaf, plan.layer.weights, plan.select):
                reasons[path] = "used by no layer with a ternary form"
        if reasons:
            coverage.raise_none_ternary(who, {"/".join(p): why for p, why in reasons.items()})
    matched(who, list(leaves), some or not whole, plan.select)


def _interceptor(plan: Plan, chosen: dict[Path, str], keys: JitKeys) -> Callable[..., Any]:
    def intercept(
        next_fun: Callable[..., Any], args: Args, kwargs: Kwargs, context: InterceptorContext
    ) -> Any:
        module: Any = context.module
        bound: Any = context.orig_method
        method = bound.func
        if _current.get() is not plan:  # inside a model that was ternarised on its own
            return next_fun(*args, **kwargs)
        if isinstance(module, (nn.WeightNorm, nn.SpectralNorm)):
            why = f"{type(module).__name__} changes the kernel before it is used"
            with _set(_refused, why):
                return next_fun(*args, **kwargs)
        if method is _EMBED_SETUP and _in_scope.take_packed_table(module):
            return None
        keys.meet(context)
        layer = _in_scope.LAYERS.get(method)
        if layer is None and method not in _EMBED:
            return next_fun(*args, **kwargs)
        name = "embedding" if layer is None else "kernel"
        weights, why = _decide(plan, module, layer, name, args, kwargs)
        chosen[(*module.path, name)] = why
        if weights is None:
            _in_scope.left_float(module, name, why)
            return next_fun(*args, **kwargs)
        config = plan.config(weights)
        if layer is None:
            return _EMBED[method](module, config, *args, **kwargs)
        return _in_scope.forward(module, layer, config, *args, **kwargs)

    return intercept


def _decide(
    plan: Plan,
    module: LinenLayer | nn.Embed,
    layer: Layer | None,
    name: str,
    args: Args,
    kwargs: Kwargs,
) -> tuple[KernelConfig | None, str]:
    """A kernel's config, or None and the reason."""
    path = (*module.path, name)
    if layer is None:
        shape = (module.num_embeddings, module.features)
    else:
        given = {k: v for k, v in kwargs.items() if k != "inputs"}
        inputs = args[0] if args else kwargs["inputs"]
        shape = layer.call(module, jnp.asarray(inputs), *args[1:], **given).kernel_shape
    leaf = jax.ShapeDtypeStruct(shape, module.param_dtype)
    weights = decide("ternarize", path, leaf, plan.layer.weights, plan.select)
    if weights is None:
        return None, "not selected"
    why = _refused.get() or _why_not(module, layer, weights)
    return coverage.settle("ternarize", path, type(module).__name__, weights, why, plan.select)


def _why_not(module: nn.Module, layer: Layer | None, weights: KernelConfig) -> str | None:
    """Why a selected kernel has no ternary form; None if it has one."""
    if layer is None:
        return None if isinstance(weights, Int8Config) else "Embed takes an Int8Config"
    if isinstance(module, nn.ConvLocal):
        return "ConvLocal has a kernel for each place"
    field = _in_scope.replaced_field(module, layer)
    return None if field is None else f"its field `{field}` is set"


@functools.cache
def _is_jitted(kind: type[nn.Module]) -> bool:
    """Whether ``nn.jit`` made a class or one of its methods: the transform is in a closure."""
    return any(_made_by_jit(method) for method in vars(kind).values() if callable(method))


def _made_by_jit(method: Callable[..., Any] | None) -> bool:
    while method is not None:
        code = getattr(method, "__code__", None)
        if code is not None and "transform" in code.co_freevars:
            cells: Any = method.__closure__
            cell = cells[code.co_freevars.index("transform")]
            return getattr(cell.cell_contents, "__name__", None) == "jit"
        method = getattr(method, "__wrapped__", None)
    return False


_EMBED_SETUP = _in_scope.raw(nn.Embed.setup)

_EMBED = {
    _in_scope.raw(nn.Embed.__call__): _in_scope.embed,
    _in_scope.raw(nn.Embed.attend): _in_scope.attend,
}


def _require_unbound(who: str, bound: bool, name: str) -> None:
    """Raises if a module belongs to a scope or a parent already."""
    if bound:
        raise ValueError(
            f"{who}: `model` ({name}) is bound to a parent or a scope. Pass the whole model, or "
            "a module that was made on its own: outside a compact method, before bind()."
        )


def _require_not_ternarized(who: str, already: bool, name: str) -> None:
    """Raises if a model is ternarised already."""
    if already:
        raise ValueError(
            f"{who}: `model` ({name}) is ternarised already. Pass the model it was made from; a "
            "`select` that returns configs does in one call what two would."
        )
