"""``ternarize`` of an NNX model in place, and ``pack`` over the axes of its layers.

An NNX layer is an object that holds its parameters, so :func:`ternarize` changes
its class and leaves everything else: the graph, the parameters, whoever holds a
reference to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from flax import nnx
from jax.typing import DTypeLike

from bitnet_jax import _checks
from bitnet_jax._layers import coverage, dimensions
from bitnet_jax._layers.forward import LayerConfig, layer_config
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.int8 import INT8, ActivationConfig, Int8Config
from bitnet_jax._quantize.ternary import B158, KernelConfig
from bitnet_jax._tree.pack_report import PackReport
from bitnet_jax._tree.params import pack_params
from bitnet_jax._tree.select import Kernels, KernelUse, Path, Select, choose
from bitnet_jax.nnx import _bit_linear

Model = TypeVar("Model", bound=nnx.Module)

_TERNARY: dict[type, type] = {
    nnx.Linear: _bit_linear.BitLinear,
    nnx.LinearGeneral: _bit_linear.BitLinearGeneral,
    nnx.Conv: _bit_linear.BitConv,
    nnx.Einsum: _bit_linear.BitEinsum,
}

_KERNEL = {kind: "kernel" for kind in (*_TERNARY, *_TERNARY.values())}

_KERNEL |= {nnx.Embed: "embedding", _bit_linear.Int8Embed: "embedding"}


class _Site(NamedTuple):
    """One parameter of rank 2 or more, and the module that holds it."""

    path: Path
    module: Any
    variable: Any
    inside: str | None  # the module that changes the kernel on its way to the layer


def ternarize(
    model: nnx.Module,
    select: Select | None = None,
    *,
    weights: KernelConfig = B158,
    activations: ActivationConfig | None = INT8,
    norm: bool = False,
    backward_dtype: DTypeLike | None = None,
) -> coverage.Coverage:
    """Makes the layers of a model ternary, in place, and says which.

    ``Linear``, ``LinearGeneral`` (so attention), ``Conv`` and ``Einsum`` become
    ``BitLinear`` and its kin, parameters and references kept. ``Embed`` can be given
    an ``Int8Config``. Every other owner of a kernel stays float and is named.

    Args:
      model: any NNX module; it is changed.
      select: which kernels; see ``bj.exclude`` and ``bj.only``. A function of path
        and array may return a config of its own for each, ``Int8Config`` included.
        By default every ``kernel``.
      weights: the quantiser of the selected kernels.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters before each quantised layer.
      backward_dtype: of the backward products' operands; None: float32.

    Returns:
      A table, one row for each parameter of rank 2 or more.

    Raises:
      TypeError: ``model`` is not an NNX module.
      ValueError: a selector that matches nothing, or only kernels without a ternary form.
      NotImplementedError: a layer that :func:`only` asks for by name and that
        has no ternary form. In all of these, nothing is changed.

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
    _checks.require_instance(who, "model", model, nnx.Module, "Pass an NNX module.")
    layer = layer_config(who, weights, activations, norm, backward_dtype)
    sites = _sorted_sites(model)
    _require_sites(who, type(model).__name__, len(sites))
    leaves = [(site.path, site.variable.get_value()) for site in sites]
    chosen = choose(who, leaves, weights, select)
    decided = [_decide(who, s, c, select) for s, c in zip(sites, chosen, strict=True)]
    if not any(config for config, _ in decided):
        both = zip(sites, chosen, decided, strict=True)
        coverage.raise_none_ternary(who, {"/".join(s.path): why for s, c, (_, why) in both if c})
    rows = []
    for site, (config, why) in zip(sites, decided, strict=True):
        rows.append(_covered(site, config, why))
        if config is not None:
            _change(site.module, layer._replace(weights=config))
    return coverage.Coverage(tuple(rows))


def _sites(model: nnx.Module) -> Iterator[_Site]:
    modules = list(nnx.iter_modules(model))
    changed = {
        path: type(module).__name__
        for path, module in modules
        if isinstance(module, (nnx.WeightNorm, nnx.SpectralNorm))
    }
    for path, module in modules:
        around = (kind for outer, kind in changed.items() if outer == path[: len(outer)] != path)
        inside = next(around, None)
        for name, variable in vars(module).items():
            if not isinstance(variable, nnx.Param) or name in ("bias", "scale"):
                continue
            value = variable.get_value()
            if is_packed(value) or len(getattr(value, "shape", ())) >= 2:
                yield _Site((*map(str, path), name), module, variable, inside)


def _decide(
    who: str, site: _Site, config: KernelConfig | None, select: Select | None
) -> tuple[KernelConfig | None, str]:
    """A kernel's config, or None; and the reason."""
    if config is None:
        return None, "not selected"
    if is_packed(site.variable.get_value()):
        _checks.raise_already_packed(who, "/".join(site.path))
    name, why = type(site.module).__name__, _why_not(site, config)
    return coverage.settle(who, site.path, name, config, why, select)


def _why_not(site: _Site, config: KernelConfig) -> str | None:
    """Why a kernel has no ternary form; None if it has one."""
    kind = type(site.module)
    if site.inside is not None:
        return f"{site.inside} changes the kernel before it is used"
    if _KERNEL.get(kind) != site.path[-1]:
        return f"{kind.__name__} has no ternary form"
    if kind in (nnx.Embed, _bit_linear.Int8Embed):
        return None if isinstance(config, Int8Config) else "Embed takes an Int8Config"
    for name in _TERNARY[kind]._unused if kind in _TERNARY else ():
        if getattr(site.module, name) is not _bit_linear.default_of(kind, name):
            return f"its argument `{name}` is set"
    return None


def _change(layer: nnx.Module, config: LayerConfig) -> None:
    """Gives a float layer the class of its ternary form, and that class's fields."""
    module: Any = layer
    kind = type(module)
    if kind in (nnx.Embed, _bit_linear.Int8Embed):
        module.__class__ = _bit_linear.Int8Embed
    else:
        module.__class__ = _TERNARY.get(kind, kind)
        module.norm = config.norm
        module.backward_dtype = config.backward_dtype
    module.weights = config.weights
    module.activations = config.activations


def pack(model: Model) -> tuple[Model, PackReport | Any]:
    """A model that runs from packed kernels, and the report of what packing did.

    Args:
      model: an NNX module with ternary layers; it is not changed.

    Returns:
      A copy of the model in which every kernel used as ternary is packed, by the
      axes of its layer, and the report of :func:`bitnet_jax.pack_params`. The copy
      answers with the same bits; all that is not packed it shares with the model
      until one of them is updated. ``nnx.state(packed, nnx.Param)`` is the tree for
      ``bj.io.save``. Stacked layers (``nnx.vmap``, ``nnx.scan`` over axis 0) are
      packed slice by slice.

    Raises:
      ValueError: a model without ternary layers; a kernel of another shape than
        its layer's; one that two layers share and use in two ways.

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
    state, report = pack_params(nnx.state(model, nnx.Param), select=_kernels("pack", model))
    packed = nnx.clone(model)
    nnx.update(packed, state)
    return packed, report


def kernels(model: nnx.Module) -> Kernels:
    """The kernels that a model uses as quantised: a selector that brings their axes.

    Args:
      model: an NNX module with ternary layers.

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
    return _kernels("kernels", model)


def explain(model: nnx.Module) -> coverage.Coverage:
    """Which kernels of a model are ternary, and why the others are not.

    Args:
      model: an NNX module with ternary layers, or after :func:`ternarize`.

    Returns:
      A table, one row for each parameter of rank 2 or more that is no bias or
      scale, as ``bj.linen.explain`` returns it.

    Raises:
      TypeError: ``model`` is not an NNX module.

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
    _checks.require_instance("explain", "model", model, nnx.Module, "Pass an NNX module.")
    return coverage.Coverage(tuple(_row(site) for site in _sorted_sites(model)))


def _row(site: _Site) -> coverage.Covered:
    """What a kernel is at present."""
    if _is_quantised(site):
        config, why = site.module.weights, "selected"
    else:
        config, why = None, _why_not(site, B158) or "not selected"
    return _covered(site, config, why)


def _covered(site: _Site, config: KernelConfig | None, why: str) -> coverage.Covered:
    shape = tuple(site.variable.get_value().shape)
    return coverage.Covered("/".join(site.path), type(site.module).__name__, shape, config, why)


def _sorted_sites(model: nnx.Module) -> list[_Site]:
    return sorted(_sites(model), key=lambda site: site.path)


def _is_quantised(site: _Site) -> bool:
    return isinstance(site.module, (*_TERNARY.values(), _bit_linear.Int8Embed))


def _kernels(who: str, model: nnx.Module) -> Kernels:
    _checks.require_instance(who, "model", model, nnx.Module, "Pass an NNX module.")
    uses: dict[Path, KernelUse] = {}
    shared: dict[int, KernelUse | None] = {}  # by variable: one may stand in several layers
    for site in _sites(model):
        where, use = "/".join(site.path), None
        if _is_quantised(site):
            shape = tuple(site.variable.get_value().shape)
            use = KernelUse(shape, site.module.weights, _axes(who, where, site))
            uses[site.path] = use
        first = shared.setdefault(id(site.variable), use)
        if first != use:
            one_float = first is None or use is None
            how = "as ternary and as float" if one_float else "in another way"
            _checks.raise_used_two_ways(who, where, f"{how} where it is shared")
    if not uses:
        _checks.raise_no_ternary_layer(who, type(model).__name__)
    return Kernels(uses)


def _axes(who: str, where: str, site: _Site) -> dict[str, tuple[int, ...]]:
    """The keywords of ``pack`` for a layer's kernel, stacked axes counted."""
    module, got = site.module, tuple(site.variable.get_value().shape)
    shape, contracting, batch = _own_axes(module)
    n = len(got) - len(shape)
    if n < 0 or got[n:] != shape:
        _checks.require_param_shape(who, where, got, shape)
    return coverage.stacked_axes(n, contracting, batch)


def _own_axes(module: nnx.Module) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A kernel's shape, contracting and batch axes, from the layer's own fields."""
    if isinstance(module, _bit_linear.Int8Embed):
        call: dimensions.Call = dimensions.table((module.num_embeddings, module.features), 1)
    elif isinstance(module, nnx.LinearGeneral):
        lead, length = tuple(module.batch_axis.values()), len(module.in_features)
        x_shape = (*lead, *module.in_features)
        axis, batch = range(len(lead), len(lead) + length), range(len(lead))
        call = dimensions.general(x_shape, axis, batch, module.out_features)
    elif isinstance(module, nnx.Einsum):
        operand = module.einsum_str.replace(" ", "").split(",")[0].replace("...", "")
        call = _bit_linear.einsum_call(module, (1,) * len(operand))
    elif isinstance(module, nnx.Conv):
        call = _bit_linear.conv_call(module, (1,) * (len(module.kernel_size) + 2))
    else:
        assert isinstance(module, nnx.Linear)  # the last of _TERNARY
        call = _bit_linear.linear_call(module, (1,))
    return call.kernel_shape, call.contracting_axes, call.batch_axes


def _require_sites(who: str, name: str, count: int) -> None:
    """Raises if no module of a model holds a parameter that could be a kernel."""
    if count == 0:
        raise ValueError(
            f"{who}: {name} holds no nnx.Param of rank 2 or more in an attribute of a module. "
            "Initialise the model first. A linen model inside nnx.bridge.ToNNX is made ternary "
            "before it is wrapped: nnx.bridge.ToNNX(bj.linen.ternarize(model), ...)."
        )
