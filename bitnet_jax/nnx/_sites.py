"""What can be said of a model's parameters without calling it: from known layers' own fields."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx

from bitnet_jax import _checks
from bitnet_jax._layers import dimensions
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.int8 import Int8Config
from bitnet_jax._quantize.ternary import B158, KernelConfig
from bitnet_jax._transform import EMBEDDING
from bitnet_jax._transform.decide import NOT_SELECTED
from bitnet_jax._tree.select import KernelUse, Path, Patterns, Select, decide, match
from bitnet_jax.nnx import _bit_linear, _coverage
from bitnet_jax.nnx._bit_linear import (
    BitConv,
    BitEinsum,
    BitLinear,
    BitLinearGeneral,
    TernaryLayer,
    default_of,
)
from bitnet_jax.nnx._call import Place, Plan, is_container, owner_of, place_of

# Layers whose fields say how they use their kernel, and the arguments that would replace that.
_KNOWN = {
    nnx.Linear: BitLinear.unused,
    nnx.LinearGeneral: BitLinearGeneral.unused,
    nnx.Conv: BitConv.unused,
    nnx.Einsum: BitEinsum.unused,
}


class Site(NamedTuple):
    """One parameter of rank 2 or more, and the module that holds it.

    Attributes:
      path: from the model that was given.
      owner: the module.
      names: from there.
      variable: the parameter.
      inside: the module that changes the kernel on its way to the layer.
    """

    path: Path
    owner: nnx.Module
    names: Path
    variable: Any
    inside: str | None

    @property
    def value(self) -> Any:
        """An array, or a packed kernel."""
        return self.variable.get_value()

    @property
    def kind(self) -> type[nnx.Module]:
        """The class of the owner before it was ternarised."""
        kind = type(self.owner)
        return kind if place_of(self.owner) is None else kind.__mro__[1]

    @property
    def is_known(self) -> bool:
        """Whether the owner's fields say how the parameter is used."""
        if self.kind is nnx.Embed:
            return self.names == ("embedding",)
        names = () if self.is_layer else _KNOWN.get(self.kind)
        if names is None or self.names != ("kernel",):
            return False
        return all(getattr(self.owner, n) is default_of(self.kind, n) for n in names)

    @property
    def is_layer(self) -> bool:
        """Whether the owner is a layer of this package, which has a config of its own."""
        return isinstance(self.owner, TernaryLayer)

    def row(self, config: KernelConfig | None, why: str) -> _coverage.Covered:
        """The row of a table."""
        shape = tuple(self.value.shape)
        return _coverage.Covered("/".join(self.path), self.kind.__name__, shape, config, why)


def sites(model: nnx.Module) -> list[Site]:
    """The parameters of a model, by path; one that several modules hold is there several times."""
    modules = {path: m for path, m in nnx.iter_modules(model) if not is_container(m)}
    norms = {p: m for p, m in modules.items() if isinstance(m, (nnx.WeightNorm, nnx.SpectralNorm))}
    found = []
    for path, variable in _parameters(model):
        owner, names = owner_of(modules, path)
        value = variable.get_value()
        if owner is None or isinstance(owner, nnx.bridge.ToNNX) or names[-1] in ("bias", "scale"):
            continue
        if is_packed(value) or len(getattr(value, "shape", ())) >= 2:
            around = [type(m).__name__ for p, m in norms.items() if p == path[: len(p)]]
            inside = around[0] if around and owner not in norms.values() else None
            found.append(Site(tuple(map(str, path)), owner, names, variable, inside))
    return sorted(found, key=lambda site: site.path)


def _parameters(model: nnx.Module) -> list[tuple[Any, Any]]:
    """The parameters of a model at all of their paths."""
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for first, *others in nnx.find_duplicates(model, only=nnx.Param):
        flat.update(dict.fromkeys(others, flat[first]))
    return list(flat.items())


def decided(who: str, site: Site, place: Place) -> tuple[KernelConfig | None, str]:
    """A parameter's config, or None, and the reason; for an owner at a place of its model."""
    plan, path = place.plan, (*place.path, *site.names)
    layer, select = plan.layer, plan.select
    by_default = select is None or (isinstance(select, Patterns) and not select.keep)
    meant = named(select, path)
    if by_default:
        config = None if meant else layer.weights
    else:
        config = decide(who, path, site.value, layer.weights, select)
        if config is None and meant and not site.is_known:
            return None, _coverage.BY_CALL
    if config is None:
        return None, NOT_SELECTED
    if by_default and path in plan.tables:
        return None, EMBEDDING
    why = why_not(site, config)
    if why is None and not site.is_known:
        return None, _coverage.BY_CALL
    return _coverage.settle(who, site.path, site.kind.__name__, config, why, select)


def is_table(site: Site) -> bool:
    """Whether a parameter is the table of an embedding."""
    return isinstance(site.owner, nnx.Embed) and site.names == ("embedding",)


def settled(who: str, site: Site, plan: Plan | None = None) -> tuple[KernelConfig | None, str]:
    """A parameter's config, or None, and the reason; ``plan``: of a model not yet ternarised."""
    if site.is_layer:
        owner: Any = site.owner
        return owner.weights, "selected"
    place = place_of(site.owner)
    if place is None and plan is not None:
        place = Place(plan, site.path[: len(site.path) - len(site.names)])
    if place is None:
        return None, why_not(site, B158) or NOT_SELECTED
    return decided(who, site, place)


def named(select: Select | None, path: Path) -> bool:
    """Whether a pattern of a selector matches a path."""
    return isinstance(select, Patterns) and any(match(p, path) for p in select.patterns)


def why_not(site: Site, config: KernelConfig) -> str | None:
    """Why a kernel has no ternary form, where that is known without a call; else None."""
    if site.inside is not None:
        return f"{site.inside} changes the kernel before it is used"
    if site.kind is nnx.Embed and not isinstance(config, Int8Config):
        return "Embed takes an Int8Config"
    return None


def use_of(who: str, site: Site, config: KernelConfig) -> KernelUse:
    """How a known layer uses its kernel, stacked axes counted."""
    got = tuple(site.value.shape)
    call = _call_of(site.owner)
    n = len(got) - len(call.kernel_shape)
    if n < 0 or got[n:] != call.kernel_shape:
        _checks.require_param_shape(who, "/".join(site.path), got, call.kernel_shape)
    axes = _coverage.stacked_axes(n, call.contracting_axes, call.batch_axes)
    return KernelUse(got, config, axes)


def _call_of(module: nnx.Module) -> dimensions.Call:
    """The dimension numbers of a known layer, from its own fields."""
    if isinstance(module, nnx.Embed):
        return dimensions.table((module.num_embeddings, module.features), 1)
    if isinstance(module, nnx.LinearGeneral):
        lead, length = tuple(module.batch_axis.values()), len(module.in_features)
        x_shape = (*lead, *module.in_features)
        axis, batch = range(len(lead), len(lead) + length), range(len(lead))
        return dimensions.general(x_shape, axis, batch, module.out_features)
    if isinstance(module, nnx.Einsum):
        operand = module.einsum_str.replace(" ", "").split(",")[0].replace("...", "")
        return _bit_linear.einsum_call(module, (1,) * len(operand))
    if isinstance(module, nnx.Conv):
        return _bit_linear.conv_call(module, (1,) * (len(module.kernel_size) + 2))
    assert isinstance(module, nnx.Linear)  # the last of the known ones
    return _bit_linear.linear_call(module, (1,))
