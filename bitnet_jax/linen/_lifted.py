"""``ternarize`` of a linen model, which is not edited and keeps its parameters.

The model gets a class of its own, derived from the one it had. What is called of it from outside
runs as a function of its variables, lifted as ``nn.remat`` lifts one and transformed by
``bj.ternarize``; what that calls inside runs as it is. Flax calls every method through
``_call_wrapped_method``: overriding that covers ``method="encode"`` and a model inside another
model, which overriding ``apply`` or ``__call__`` would miss.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flax import linen as nn
from flax.core import Scope, lift, unfreeze
from flax.linen.transforms import lift_direct_transform
from jax.typing import DTypeLike
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._layers.forward import LayerConfig, layer_config
from bitnet_jax._packed.adapted import is_adapted
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.config import B158, INT8, ActivationConfig, KernelConfig
from bitnet_jax._transform.decide import Extent
from bitnet_jax._transform.derived_class import metaclass
from bitnet_jax._transform.program import Spec
from bitnet_jax._transform.ternarize import Ternarized
from bitnet_jax._tree.leaves import unbox
from bitnet_jax._tree.select import Path, Select

Args = tuple[PyTree, ...]

Kwargs = Mapping[str, PyTree]

# Of flax: collections of variables by their names.
Collections = Mapping[str, Any]


class Plan(NamedTuple):
    """What a ternarised class does; two equal plans share one class.

    Attributes:
      select: which kernels.
      layer: how they are quantised.
      whole: whether the class is of the model that was ternarised, and not of a part of it.
    """

    select: Select | None
    layer: LayerConfig
    whole: bool = True

    def spec(self, fn: Callable[..., PyTree], extent: Extent) -> Spec:
        """What ``bj.ternarize`` is asked for."""
        return Spec(fn, self.layer, self.select, 0, extent)


def ternarize(
    model: nn.Module,
    select: Select | None = None,
    *,
    weights: KernelConfig = B158,
    activations: ActivationConfig | None = INT8,
    norm: bool = False,
    backward_dtype: DTypeLike | None = None,
) -> nn.Module:
    """A model with ternary kernels and the parameters of the given one.

    :func:`bitnet_jax.ternarize` of what the model computes, whichever layers it is made of: every
    parameter that an input is multiplied with, in submodules, shared, under ``nn.scan``,
    ``nn.remat``, ``nn.vmap`` and ``nn.jit``, in ``method=``, ``bind`` and inside another model.
    Checkpoints of the float model fit, and packed trees (:func:`pack`) run under the same
    ``apply``. Tables of embeddings can be given an ``Int8Config``. What is computed with a kernel
    before it is multiplied makes it float, and :func:`explain` says so. Layers of this package and
    a model inside that was ternarised on its own keep their own configs.

    Args:
      model: any linen module, not bound. It is not changed.
      select: which parameters; see ``bj.exclude`` and ``bj.only``. Called with the path of a
        parameter and its shape and dtype; may return a config of its own for each, ``Int8Config``
        included. By default all that an input is multiplied with.
      weights: the quantiser of the selected kernels.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters before each quantised product.
      backward_dtype: of the backward products' operands; None: float32.

    Returns:
      A module of a class derived from the model's, of the same name; equal
      arguments give the same class, and it pickles as its model does.

    Raises:
      TypeError: ``model`` is not a linen module.
      ValueError: a bound or ternarised model. When it is initialised or called: as
        :func:`bitnet_jax.ternarize`.
      NotImplementedError: as :func:`bitnet_jax.ternarize`.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import linen as nn
      >>> model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])
      >>> x = jax.random.normal(jax.random.key(0), (8, 64))
      >>> params = model.init(jax.random.key(1), x)["params"]  # of the float model
      >>> ternary = bj.linen.ternarize(model, select=bj.exclude("layers_2"))
      >>> print(bj.linen.explain(ternary, x))
      path             product      shape  dtype    over  share  kernel   why
      layers_0/kernel  dot_general  64x32  float32     0  86.5%  ternary  selected
      layers_2/kernel  dot_general  32x10  float32     0  13.5%  float    not selected
      86 % ternary of 37.9 kFLOP
      >>> packed, report = bj.linen.pack(ternary, params, x)
      >>> y = ternary.apply({"params": packed}, x)
      >>> bool((y == ternary.apply({"params": params}, x)).all())
      True
    """
    who = "ternarize"
    _checks.require_instance(
        who,
        "model",
        model,
        nn.Module,
        "Pass an instance, for example Model(); NNX models have bj.nnx.",
    )
    kind = type(model)
    _require_not_ternarized(who, plan_of(kind) is not None, kind.__name__)
    _require_unbound(who, model.scope is not None or model.name is not None, kind.__name__)
    layer = layer_config(who, weights, activations, norm, backward_dtype)
    _checks.require_selector(who, select)
    return _of_class(ternarized_class(kind, Plan(select, layer)), _state(model))


def plan_of(kind: type[nn.Module]) -> Plan | None:
    """The plan of a ternarised class, or of one derived from it; None of any other."""
    return getattr(kind, "_bitnet_plan", None)


def _state(model: nn.Module) -> dict[str, Any]:
    """The attributes of an unbound module: its fields, and what a decorator of its class added."""
    return {k: v for k, v in vars(model).items() if k not in ("_state", "_id")}


class _Blank(nn.Module):
    """A module with nothing but what Flax keeps of each."""


def _of_class(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """A module with the attributes of another one, whose ``__init__`` is not run again."""
    made = object.__new__(kind)
    for name, value in (vars(_Blank()) | state).items():
        object.__setattr__(made, name, value)
    return made


def _rebuild(kind: type[nn.Module], plan: Plan, state: dict[str, Any]) -> nn.Module:
    return _of_class(ternarized_class(kind, plan), state)


@functools.cache
def ternarized_class(kind: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The class derived from ``kind`` whose methods run by ``plan``."""

    @nn.nowrap
    def _call_wrapped_method(
        self: nn.Module, fun: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        if self.scope is None or fun.__name__ == "setup" or is_inside(plan):
            return super(made, self)._call_wrapped_method(fun, args, kwargs)
        return _run(self, plan, fun, args, kwargs)

    @nn.nowrap
    def _try_setup(self: nn.Module, shallow: bool = False) -> None:
        super(made, self)._try_setup(shallow)
        if self.scope is not None and not shallow and not is_inside(plan):
            _claim_children(self, plan)

    @nn.nowrap
    def _register_submodules(self: nn.Module, name: str, val: Any) -> None:
        super(made, self)._register_submodules(name, val)
        if not is_inside(plan):  # bound: the modules in a field can be called from outside
            _claim_children(self, plan)

    @nn.nowrap
    def _validate_setup(self: nn.Module) -> None:
        with inside(plan):  # Flax calls a method of a clone, of which nothing comes
            super(made, self)._validate_setup()

    @nn.nowrap
    def apply(
        self: nn.Module,
        variables: Collections,
        *args: PyTree,
        method: str | Callable[..., Any] | None = None,
        **kwargs: PyTree,
    ) -> Any:
        run = super(made, self).apply
        past = _past_the_hook(type(self), method)
        if past is None or is_inside(plan):
            return run(variables, *args, method=method, **kwargs)

        def function(module: nn.Module, *args: PyTree, **kwargs: PyTree) -> Any:
            return _run(module, plan._replace(whole=False), past, args, kwargs)

        return run(variables, *args, method=function, **kwargs)

    @nn.nowrap
    def param(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.scope is not None and not is_inside(plan) and self.has_variable("params", name):
            leaf = unbox(self.get_variable("params", name))
            if is_packed(leaf) or is_adapted(leaf):
                return leaf  # of a setup: what multiplies it runs its own
        return super(made, self).param(name, *args, **kwargs)

    @nn.nowrap
    def clone(self: nn.Module, *, parent: Any = None, **updates: Any) -> nn.Module:
        copied = super(made, self).clone(parent=parent, **updates)
        if is_inside(plan) and isinstance(parent, Scope):
            # The model itself, in its transformed scope: a __post_init__ has changed it already.
            for name in {f.name for f in dataclasses.fields(self)} & set(updates):
                object.__setattr__(copied, name, updates[name])
        return copied

    @nn.nowrap
    def __reduce__(self: nn.Module) -> tuple[Any, ...]:
        return _rebuild, (kind, plan, _state(self))

    body = {
        **{name: _transformed_method(fun, plan) for name, fun in _lifted_methods(kind).items()},
        "_call_wrapped_method": _call_wrapped_method,
        "_try_setup": _try_setup,
        "_register_submodules": _register_submodules,
        "_validate_setup": _validate_setup,
        "apply": apply,
        "param": param,
        "clone": clone,
        "__reduce__": __reduce__,
        "_bitnet_plan": plan,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    # The name: Flax names submodules by it.
    meta = metaclass(type(kind), ternarized_class, "_bitnet_plan")
    made: Any = meta(kind.__name__, (kind,), body)
    del made.__init__  # Flax made one of the fields alone; the model's may be a decorator's
    return made


def _past_the_hook(
    kind: type[nn.Module], method: str | Callable[..., Any] | None
) -> Callable[..., Any] | None:
    """The function of a module that ``method=`` has Flax call as it is; None: it calls a method."""
    fun: Any = inspect.getattr_static(kind, method, None) if isinstance(method, str) else method
    if hasattr(fun, "__self__"):
        fun = fun.__func__
    elif callable(method) and not hasattr(method, "__name__"):  # a partial, or another object
        return lambda module, *args, **kwargs: method(module, *args, **kwargs)
    elif callable(method):
        return method
    is_past = inspect.isfunction(fun) and not hasattr(fun, "method_handler_wrapped")
    return fun if is_past else None


def _goes_past(fun: object) -> bool:
    """Whether a method is one that ``nn.remat``, ``nn.scan``, ... made of another.

    Flax calls such a one as it is, and in it the method of the class that was transformed.
    """
    return hasattr(getattr(fun, "__wrapped__", None), "method_handler_wrapped")


def _lifted_methods(kind: type[nn.Module]) -> dict[str, Any]:
    found = {name: inspect.getattr_static(kind, name, None) for name in dir(kind)}
    return {name: fun for name, fun in found.items() if _goes_past(fun)}


def _transformed_method(fun: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    @functools.wraps(fun)
    def run(self: nn.Module, *args: PyTree, **kwargs: PyTree) -> Any:
        if self.scope is None or is_inside(plan):
            return fun(self, *args, **kwargs)
        return _run(self, plan, fun, args, kwargs)

    return run


def _claim_children(module: nn.Module, plan: Plan) -> None:
    """Makes the submodules of fields and ``setup`` ternary, for who calls them from outside."""
    for child in module._state.children.values():
        if isinstance(child, nn.Module) and plan_of(type(child)) is None:
            kind = ternarized_class(type(child), plan._replace(whole=False))
            object.__setattr__(child, "__class__", kind)
            _claim_children(child, plan)


_plans: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("plans", default=None)


def is_inside(plan: Plan) -> bool:
    """Whether a call runs inside one that is transformed by the same plan."""
    current = _plans.get()
    return current is not None and current[:2] == plan[:2]


@contextlib.contextmanager
def inside(plan: Plan | None) -> Iterator[None]:
    """Has the methods of a plan's model run as they are."""
    token = _plans.set(plan)
    try:
        yield
    finally:
        _plans.reset(token)


def _run(module: nn.Module, plan: Plan, fun: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Runs a method, or a function, of a module from outside."""
    if not module.is_initializing():
        whole = plan.whole and fun.__name__ == "__call__"
        over = functools.partial(_transformed, plan, "call" if whole else "part")
        return _run_lifted(plan, over, fun, module, args, kwargs)
    # Parameters are made by the float model; then all of them are there, to check the selection.
    scope: Any = module.scope
    before = {k: v for k, v in unfreeze(scope.variables()).items() if k != "params"}
    counters = dict(scope.rng_counters)
    with inside(plan):
        if _goes_past(fun):
            y = fun(module, *args, **kwargs)
        else:
            y = module._call_wrapped_method(fun, args, kwargs)
    after = dict(scope.rng_counters)
    scope.rng_counters.update(counters)
    _run_lifted(plan, functools.partial(_checked, plan, before), fun, module, args, kwargs)
    scope.rng_counters.update(after)
    return y


def is_refusal(error: Exception, who: str = "ternarize") -> bool:
    """Whether an error is a refusal of this package."""
    kinds = (NotImplementedError, ValueError, TypeError)
    return isinstance(error, kinds) and str(error).startswith((f"{who}:", "ternarize:"))


def _transformed(plan: Plan, extent: Extent, call: _Lifted, args: Args, kwargs: Kwargs) -> Any:
    """``bj.ternarize`` of a function of scopes."""
    ternary = Ternarized(plan.spec(call.run, extent))
    return ternary(call.params, call.others, call.rngs, args, kwargs)


def _checked(plan: Plan, others: Collections, call: _Lifted, args: Args, kwargs: Kwargs) -> Any:
    """Raises if a selection chose nothing; runs nothing, and changes no variable."""
    ternary = Ternarized(plan.spec(call.run, "whole"))
    before = (*call.others[:-1], others)  # a module's own scope comes last
    # A cache that is there may take other inputs than those that made it.
    for collections in (call.others, before):
        try:
            ternary.check(call.params, collections, call.rngs, args, kwargs)
            break
        except Exception as error:
            if is_refusal(error):
                raise
    return None, call.unchanged


class _Lifted(NamedTuple):
    """A function of scopes as one of variables.

    Attributes:
      params: those of all scopes, by their paths from the root.
      others: the other collections of each scope.
      rngs: the streams of random keys of each scope.
      run: (params, others, rngs, args, kwargs) -> (result, changed variables).
      unchanged: what ``run`` returns beside the result where it changes nothing.
    """

    params: dict[str, Any]
    others: tuple[Collections, ...]
    rngs: PyTree
    run: Callable[..., Any]
    unchanged: PyTree


def _run_lifted(
    plan: Plan,
    over: Callable[[_Lifted, Args, Kwargs], Any],
    fun: Callable[..., Any],
    module: nn.Module,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    """Runs a method by way of ``over``, which sees it as a function of variables."""
    return lift_direct_transform(
        functools.partial(_lift, plan, over), (fun,), module, *args, **kwargs
    )


def _lift(
    plan: Plan,
    over: Callable[[_Lifted, Args, Kwargs], Any],
    core: Callable[..., Any],
    scopes: Sequence[Any],
    *args: PyTree,
    **kwargs: PyTree,
) -> Any:
    """Runs a function of scopes by way of ``over``."""
    paths = [scope.path for scope in _outermost(scopes)]

    def inner(
        scope_fn: Callable[..., Any],
        repack: Callable[..., Any],
        groups: tuple[tuple[Collections, ...], ...],
        rngs: PyTree,
    ) -> Any:
        (collections,) = groups
        params: dict[str, Any] = {}
        for path, one in zip(paths, collections, strict=True):
            _put(params, path, one)
        others = tuple({k: v for k, v in c.items() if k != "params"} for c in collections)

        def run(params: PyTree, others: PyTree, rngs: PyTree, args: Args, kwargs: Kwargs) -> Any:
            whole = tuple(
                {**other, "params": _at(params, path)} if "params" in one else other
                for path, other, one in zip(paths, others, collections, strict=True)
            )
            with inside(plan):
                scopes = scope_fn((whole,), rngs)
                for scope in scopes:
                    scope.flags = {**scope.flags, "initializing": False}
                y = core(scopes, *args, **kwargs)
            return y, repack(scopes)

        return over(_Lifted(params, others, rngs, run, groups), args, kwargs)

    return lift.pack(inner, (True,), (True,), (True,))(scopes)


def _outermost(scopes: Sequence[Any]) -> list[Any]:
    """The scopes that lie in no other of them, in order: those that ``lift.pack`` keeps."""
    there = list(dict.fromkeys(scopes))

    def lies_inside(scope: Any) -> bool:
        while scope.parent is not None:
            scope = scope.parent
            if scope in there:
                return True
        return False

    return [scope for scope in there if not lies_inside(scope)]


def _put(tree: dict[str, Any], path: Path, collections: Collections) -> None:
    """Puts the params of a scope where its path says."""
    if "params" not in collections:
        return
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    own = unfreeze(collections["params"])
    if path:
        tree[path[-1]] = own
    else:
        tree.update(own)


def _at(tree: PyTree, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


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
