"""``ternarize`` of an NNX model in place, and what its calls say of its kernels.

Every module of the model gets a class derived from its own. A method that is called from outside
runs through ``bj.ternarize``; what it calls inside runs as it was written. The graph, the
parameters, and whoever holds a reference to a module stay.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import uuid
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._layers.forward import LayerConfig, layer_config
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.int8 import INT8, ActivationConfig
from bitnet_jax._quantize.ternary import B158, KernelConfig
from bitnet_jax._transform import ProgramCoverage
from bitnet_jax._transform.decide import NOT_SELECTED, UNREACHED
from bitnet_jax._transform.probe import Probe, Wanted
from bitnet_jax._transform.slopes import Losses
from bitnet_jax._transform.walk import Walk
from bitnet_jax._tree.pack_report import PackReport
from bitnet_jax._tree.params import pack_params
from bitnet_jax._tree.select import Kernels, KernelUse, Path, Patterns, Select, decide, matched
from bitnet_jax.nnx import _coverage, _sites
from bitnet_jax.nnx._bit_linear import TernaryLayer
from bitnet_jax.nnx._call import Place, Plan, Split, is_container, place_of, splitting
from bitnet_jax.nnx._derived import derived
from bitnet_jax.nnx._sites import Site

Model = TypeVar("Model", bound=nnx.Module)


def ternarize(
    model: nnx.Module,
    select: Select | None = None,
    *,
    weights: KernelConfig = B158,
    activations: ActivationConfig | None = INT8,
    norm: bool = False,
    backward_dtype: DTypeLike | None = None,
) -> _coverage.Coverage:
    """Makes a model ternary, in place, and says what is known of its kernels.

    Every module of the model gets a class derived from its own, of the same name; parameters
    and references stay. Calling one of its public methods runs it through ``bj.ternarize``: the
    selected parameters are quantised where the method multiplies them, in layers and in a
    module's own products alike. Layers of this package and modules that were ternarised
    before keep their own configs. A method that JAX cannot trace (it reads values, returns an
    object that is no pytree, or yields) runs as it was written, and the modules that it calls are
    ternary; one that cannot and holds kernels itself is refused.

    Call methods on the model: ``nnx.jit(type(model).loss)(model, x)``, not
    ``nnx.jit(Model.loss)(model, x)``. The functions of the class as it was written, and private
    methods and operators called from outside, multiply their module's own parameters in float;
    the modules that they call are ternary.

    Args:
      model: any NNX module; it is changed.
      select: which kernels; see ``bj.exclude`` and ``bj.only``. A function of path
        and array may return a config of its own for each, ``Int8Config`` included.
        By default every parameter that an input is multiplied with, embeddings left out.
      weights: the quantiser of the selected kernels.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters before each quantised product.
      backward_dtype: of the backward products' operands; None: float32.

    Returns:
      A table, one row for each parameter of rank 2 or more. What other modules than ``Linear``,
      ``LinearGeneral``, ``Conv``, ``Einsum`` and ``Embed`` do with theirs, a call says:
      :func:`explain` with an example.

    Raises:
      TypeError: ``model`` is not an NNX module; a packed one.
      ValueError: a selector that matches nothing, or only kernels without a ternary form, or
        one of two names of a parameter; a model that is ternarised already.
      NotImplementedError: a layer that :func:`only` asks for by name and that
        has no ternary form. In all of these, nothing is changed. What a call alone can
        tell, the first call raises.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import nnx
      >>> model = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
      >>> print(bj.nnx.ternarize(model, select=bj.exclude("out")))
      path          layer           shape  kernel   why
      key/kernel    LinearGeneral  32x4x8  ternary  selected
      out/kernel    LinearGeneral  4x8x32  float    not selected
      query/kernel  LinearGeneral  32x4x8  ternary  selected
      value/kernel  LinearGeneral  32x4x8  ternary  selected
    """
    who = "ternarize"
    _checks.require_instance(
        who, "model", model, nnx.Module, "Pass an NNX module; linen models have bj.linen."
    )
    _checks.require_selector(who, select)
    layer = layer_config(who, weights, activations, norm, backward_dtype)
    sites = _sites.sites(model)
    _require_sites(who, type(model).__name__, len(sites))
    plan = Plan(_hashable(select), layer, _tables(sites), _graph(model), "part")
    _require_one_choice(who, sites, plan)
    decided = [(site, *_sites.settled(who, site, plan)) for site in sites]
    _check_selection(who, type(model).__name__, decided, plan)
    if any(_takes_part(site.owner) and (c or why == _coverage.BY_CALL) for site, c, why in decided):
        plan = dataclasses.replace(plan, extent="call")
    rows = tuple(site.row(config, why) for site, config, why in decided)
    for path, module in list(nnx.iter_modules(model)):
        place = Place(plan, tuple(map(str, path)))
        if _takes_part(module) and any(s.path[: len(path)] == place.path for s in sites):
            object.__setattr__(module, "__class__", derived(type(module), place))
    return _coverage.Coverage(rows)


def _hashable(select: Select | None) -> Select | None:
    """A selector that classes can be kept by."""
    try:
        hash(select)
    except TypeError:
        assert select is not None  # None has a hash
        return functools.partial(select)
    return select


def _graph(model: nnx.Module) -> Hashable:
    """Equal for models of one class and equal fields."""
    try:
        return hash(nnx.graphdef(model))
    except TypeError:  # a field that cannot be hashed: equal to no other
        return uuid.uuid4().hex


def _takes_part(module: nnx.Module) -> bool:
    """Whether a module gets a class of the model that is ternarised."""
    other = isinstance(module, (TernaryLayer, nnx.bridge.ToNNX)) or is_container(module)
    return not other and place_of(module) is None


def _tables(sites: Sequence[Site]) -> frozenset[Path]:
    """All paths of the tables of embeddings."""
    tables = {id(s.variable) for s in sites if _sites.is_table(s)}
    return frozenset(site.path for site in sites if id(site.variable) in tables)


def _require_one_choice(who: str, sites: Sequence[Site], plan: Plan) -> None:
    """Raises where a selector takes a parameter by one of its paths and not by another."""
    chosen: dict[int, tuple[Path, Any]] = {}
    for site in sites:
        choice: Any = _sites.named(plan.select, site.path)
        if plan.select is not None and not isinstance(plan.select, Patterns):
            choice = decide(who, site.path, site.value, plan.layer.weights, plan.select)
        first, other = chosen.setdefault(id(site.variable), (site.path, choice))
        if other != choice:
            raise ValueError(
                f"{who}: {'/'.join(first)} and {'/'.join(site.path)} are one parameter, and "
                "`select` takes one of them. Select both, or neither."
            )


def _check_selection(who: str, name: str, decided: Sequence[Any], plan: Plan) -> None:
    """Raises for a selection that chose nothing, a packed model, and a ternarised one."""
    chosen = [site for site, config, why in decided if config or why == _coverage.BY_CALL]
    reasons = {"/".join(s.path): why for s, c, why in decided if not c and why != NOT_SELECTED}
    paths = [site.path for site, _, _ in decided]
    matched(who, paths, bool(chosen or reasons), plan.select)
    for site in chosen:
        if is_packed(site.value) and not site.is_layer:
            _checks.raise_already_packed(who, "/".join(site.path))
    if not chosen:
        _coverage.raise_none_ternary(who, reasons)
    if all(place_of(site.owner) or site.is_layer for site in chosen) and any(
        place_of(site.owner) for site in chosen
    ):
        raise ValueError(
            f"{who}: `model` ({name}) is ternarised already. Ternarise the float model; a "
            "`select` that returns configs does in one call what two would."
        )


def pack(
    model: Model,
    *args: PyTree,
    method: str | None = None,
    calls: Sequence[tuple[Any, ...]] = (),
    **kwargs: PyTree,
) -> tuple[Model, PackReport | Any]:
    """A model that runs from packed kernels, and the report of what packing did.

    Args:
      model: an NNX module with ternary layers; it is not changed.
      *args: an example of a call, needed where other modules than layers hold kernels: the
        axes are those of the products that it runs. ``jax.ShapeDtypeStruct`` will do.
      method: which method the example calls; None: ``__call__``.
      calls: more examples, each ``(method, *args)``, for kernels that the first does not reach.
      **kwargs: keyword arguments of the example.

    Returns:
      A copy of the model in which every kernel used as ternary is packed, and the report of
      :func:`bitnet_jax.pack_params`. The copy answers with the same bits; all that is
      not packed it shares with the model until one of them is updated.
      ``nnx.state(packed, nnx.Param)`` is the tree for ``bj.io.save``. Stacked layers
      (``nnx.vmap``, ``nnx.scan`` over axis 0) are packed slice by slice.

    Raises:
      ValueError: a model without ternary layers; a kernel of another shape than
        its layer's; one that is used in two ways; one of which a call alone can tell the axes,
        without an example.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import nnx
      >>> model = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
      >>> table = bj.nnx.ternarize(model)
      >>> packed, report = bj.nnx.pack(model)
      >>> packed.out.kernel.get_value()
      PackedTernary(shape=(4, 8, 32), scale=(1, 1, 1), 260 bytes)
      >>> x = jax.random.normal(jax.random.key(0), (2, 7, 32))
      >>> bool((packed(x) == model(x)).all())
      True
    """
    uses = _kernels("pack", model, _examples(method, calls, args, kwargs))
    state, report = pack_params(nnx.state(model, nnx.Param), select=uses)
    return with_params(model, state), report


def with_params(model: Model, state: PyTree) -> Model:
    """A copy of a model with other values of its parameters; the rest it shares."""
    copied = nnx.clone(model)
    nnx.update(copied, state)
    return copied


def kernels(
    model: nnx.Module,
    *args: PyTree,
    method: str | None = None,
    calls: Sequence[tuple[Any, ...]] = (),
    **kwargs: PyTree,
) -> Kernels:
    """The kernels that a model uses as quantised: a selector that brings their axes.

    Args:
      model: an NNX module with ternary layers.
      *args: an example of a call, as for :func:`pack`.
      method: as for :func:`pack`.
      calls: as for :func:`pack`.
      **kwargs: keyword arguments of the example.

    Returns:
      What every ``select=`` takes, without ``axes=``, for trees of the model's
      ``nnx.Param``: ``bj.pack_params``, ``bj.analysis.sensitivity``,
      ``bj.analysis.trit_stats``, ``bj.optim.mugrokfast``, ``bj.optim.watch_trits``.
      Printed, a table.

    Raises:
      ValueError: as :func:`pack`.

    Example:
      >>> import bitnet_jax as bj
      >>> from flax import nnx
      >>> model = bj.nnx.BitConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
      >>> stats = bj.analysis.trit_stats(nnx.state(model, nnx.Param), select=bj.nnx.kernels(model))
      >>> [row.path for row in stats.rows]
      ['kernel']
    """
    return _kernels("kernels", model, _examples(method, calls, args, kwargs))


def explain(
    model: nnx.Module, *args: PyTree, method: str | None = None, **kwargs: PyTree
) -> _coverage.Coverage | ProgramCoverage:
    """Which kernels of a model are ternary, and why the others are not.

    Args:
      model: an NNX module with ternary layers, or after :func:`ternarize`.
      *args: an example of a call; ``jax.ShapeDtypeStruct`` will do.
      method: which method the example calls; None: ``__call__``.
      **kwargs: keyword arguments of the example.

    Returns:
      With an example, what the call does with every parameter: its product, over which axes, its
      share, as ``bj.ternarize(fn).explain``. Without, a table of what is known of each parameter
      of rank 2 or more that is no bias or scale, as ``bj.linen.explain`` returns it.

    Raises:
      TypeError: ``model`` is not an NNX module.
      ValueError: an example for a model that is not ternarised, or a method that it lacks.

    Example:
      >>> import bitnet_jax as bj
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> body, head = bj.nnx.BitLinear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)
      >>> print(bj.nnx.explain(nnx.Sequential(body, head)))
      path             layer      shape  kernel   why
      layers/0/kernel  BitLinear  64x32  ternary  selected
      layers/1/kernel  Linear     32x10  float    not selected
    """
    who = "explain"
    _checks.require_instance(
        who, "model", model, nnx.Module, "Pass an NNX module; linen models have bj.linen."
    )
    for example in _examples(method, (), args, kwargs):
        with _split(who, model, example) as split:
            return split.function.explain(*split.operands)
    rows = (site.row(*_sites.settled(who, site)) for site in _sites.sites(model))
    return _coverage.Coverage(tuple(rows))


# A method's name, and the arguments of an example of a call.
Example = tuple[str, tuple[Any, ...], dict[str, Any]]


def _examples(
    method: str | None,
    calls: Sequence[tuple[Any, ...]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Example]:
    first = [(method or "__call__", args, kwargs)] if method or args or kwargs else []
    return [*first, *((name, tuple(rest), {}) for name, *rest in calls)]


def _nothing(path: Path, leaf: object) -> bool:
    """A selector for models in which only the layers of this package are quantised."""
    del path, leaf
    return False


_STATED = Plan(_nothing, LayerConfig(), frozenset(), None, "part")


def _split(
    who: str, model: nnx.Module, example: Example, *, layers: bool = False
) -> AbstractContextManager[Split]:
    """A call of an example, split for the transformation.

    ``layers``: as of :func:`splitting`; a model of such layers alone need not be ternarised.
    """
    name, args, kwargs = example
    remedy = "Write a method into the model's class, and name it."
    _checks.require_instance(who, "method", name, str, remedy)
    place = place_of(model)
    run = inspect.getattr_static(type(model), name, None)
    own = layers and any(isinstance(m, TernaryLayer) for _, m in nnx.iter_modules(model))
    if place is None and own and inspect.isfunction(run):
        return splitting(_STATED, model, run, args, kwargs, layers=True)
    if place is None or not hasattr(run, "__wrapped__"):
        without = "" if who in ("calibrate", "smooth") else ", or leave the example out"
        raise ValueError(
            f"{who}: {type(model).__name__}.{name} is no method of a ternarised model. Call "
            f"bj.nnx.ternarize(model) first{without}."
        )
    return splitting(place.plan, model, run.__wrapped__, args, kwargs, layers=layers)


def _kernels(who: str, model: nnx.Module, examples: Sequence[Example]) -> Kernels:
    _checks.require_instance(
        who, "model", model, nnx.Module, "Pass an NNX module; linen models have bj.linen."
    )
    uses: dict[Path, KernelUse] = {}
    shared: dict[int, KernelUse | None] = {}  # by variable: one may stand in several layers
    own = place_of(model) if examples else None
    for site in _sites.sites(model):
        place = place_of(site.owner)
        if own is not None and place is not None and place.plan == own.plan:
            continue  # the examples say it
        where, use = "/".join(site.path), None
        config, why = _sites.settled(who, site)
        if why == _coverage.BY_CALL:
            _raise_needs_example(who, where, site.kind.__name__)
        if config is not None:
            use = uses[site.path] = _sites.use_of(who, site, config)
        first = shared.setdefault(id(site.variable), use)
        if first != use:
            one_float = first is None or use is None
            how = "as ternary and as float" if one_float else "in another way"
            _checks.raise_used_two_ways(who, where, f"{how} where it is shared")
    uses.update(_traced(who, model, examples))
    if not uses:
        _checks.raise_no_ternary_layer(who, type(model).__name__)
    return Kernels(uses)


def _traced(who: str, model: nnx.Module, examples: Sequence[Example]) -> dict[Path, KernelUse]:
    """The kernels that examples of calls quantise."""
    paths = {id(v): path for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    found: dict[Path, KernelUse | None] = {}
    for example in examples:
        with _split(who, model, example) as split:
            if not split.has_kernels:
                continue
            read = split.function.packable if who == "pack" else split.function.kernels
            uses = read(*split.operands).uses
            rows = split.function.explain(*split.operands).rows
        met = {row.path for row in rows if row.primitive != "-"}
        for path, variable in split.params.items():
            where = tuple(map(str, paths[id(variable)])) if id(variable) in paths else None
            if where is None or "/".join(path) not in met:
                continue
            use = uses.get(path)
            if found.setdefault(where, use) != use:
                how = "in one way here and in another, or in float, in another of the calls"
                _checks.raise_used_two_ways(who, "/".join(where), how)
    return {path: use for path, use in found.items() if use is not None}


def packable(model: nnx.Module, example: Example) -> Kernels:
    """The kernels that a calibration packs: those that one example quantises.

    A model that is not ternarised has those of this package's layers.
    """
    unmet = {row.path for row in coverage(model, example).rows if row.primitive == "-"}
    examples = [example] if place_of(model) is not None else []
    uses = _kernels("pack", model, examples).uses
    return Kernels({path: use for path, use in uses.items() if "/".join(path) not in unmet})


def coverage(model: nnx.Module, example: Example) -> ProgramCoverage:
    """What one call does with every parameter of a model to calibrate."""
    with _split("calibrate", model, example, layers=True) as split:
        table = split.function.explain(*split.operands)
    own = {"/".join(site.path) for site in _sites.sites(model) if site.is_layer}
    rows = (  # layers of this package need no selector
        dataclasses.replace(row, why=UNREACHED) if row.primitive == "-" and row.path in own else row
        for row in table.rows
    )
    return dataclasses.replace(table, rows=tuple(rows))


def moments(
    model: nnx.Module, wanted: Mapping[Path, Wanted], example: Example
) -> dict[Path, Probe]:
    """What kernels meet in one call of the float model, by their paths in the model."""
    with _split("calibrate", model, example, layers=True) as split:
        own = _paths_in_model(model, split)
        inside = {path: wanted[where] for path, where in own.items() if where in wanted}
        found = split.function.moments(inside, *split.operands)
    return {own[path]: probe for path, probe in found.items()}


def walk(model: nnx.Module, example: Example) -> Walk:
    """One call of the float model, to be run step by step, with the model's paths."""
    with _split("calibrate", model, example, layers=True) as split:
        return split.function.walk(*split.operands).renamed(_paths_in_model(model, split))


def slopes(
    model: nnx.Module,
    batch_axes: Mapping[Path, int],
    losses: Losses,
    key: jax.Array,
    example: Example,
) -> tuple[dict[Path, jax.Array], jax.Array]:
    """Squared gradients of losses of one call of the float model, by paths in the model."""
    with _split("calibrate", model, example, layers=True) as split:
        own = _paths_in_model(model, split)
        inside = {path: batch_axes[where] for path, where in own.items() if where in batch_axes}
        found, count = split.function.slopes(inside, losses, key, *split.operands)
    return {own[path]: square for path, square in found.items()}, count


def _paths_in_model(model: nnx.Module, split: Split) -> dict[Path, Path]:
    """The parameters of a split call: their paths there, and in the model."""
    paths = {id(v): path for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    return {
        path: tuple(map(str, paths[id(variable)]))
        for path, variable in split.params.items()
        if id(variable) in paths
    }


def _raise_needs_example(who: str, path: str, owner: str) -> NoReturn:
    """Asks for an example of a call, which alone tells the axes of a kernel."""
    raise ValueError(
        f"{who}: how {owner} uses {path} is decided where it is multiplied. Pass an example of a "
        f"call, {who}(model, *args), or leave it out (select=)."
    )


def _require_sites(who: str, name: str, count: int) -> None:
    """Raises if no module of a model holds a parameter that could be a kernel."""
    if count == 0:
        raise ValueError(
            f"{who}: {name} holds no nnx.Param of rank 2 or more in an attribute of a module. "
            "Initialise the model first. A linen model inside nnx.bridge.ToNNX is made ternary "
            "before it is wrapped: nnx.bridge.ToNNX(bj.linen.ternarize(model), ...)."
        )
