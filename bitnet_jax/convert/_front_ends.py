"""A network to calibrate: a function, a linen model or an NNX model, asked the same questions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax import linen, nnx
from jax import core
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._packed.adapted import is_adapted
from bitnet_jax._transform import ProgramCoverage, Ternarized
from bitnet_jax._transform.probe import Probe, Wanted
from bitnet_jax._transform.slopes import Losses, losses_of_batch
from bitnet_jax._transform.walk import Walk
from bitnet_jax._tree.leaves import flatten
from bitnet_jax._tree.select import Kernels, Path
from bitnet_jax.linen._examples import Asked, Example, example_losses
from bitnet_jax.nnx import _conversion
from bitnet_jax.nnx._call import call_losses

Args = tuple[Any, ...]


@runtime_checkable
class FrontEnd(Protocol):
    """What is asked of a network.

    Attributes:
      params: its float parameters.
    """

    params: PyTree

    def packable(self, args: Args) -> Kernels:
        """The kernels that a call quantises, with their axes."""
        ...

    def coverage(self, args: Args) -> ProgramCoverage:
        """What a call does with every parameter."""
        ...

    def moments(self, wanted: Mapping[Path, Wanted], args: Args) -> dict[Path, Probe]:
        """What they meet in a call."""
        ...

    def walk(self, args: Args) -> Walk:
        """A call, to be run step by step."""
        ...

    def losses(self, loss: Callable[..., Any]) -> Losses:
        """A user's loss of an output and a batch, for :meth:`slopes`; make it once."""
        ...

    def slopes(
        self, batch_axes: Mapping[Path, int], losses: Losses, key: jax.Array, args: Args
    ) -> tuple[dict[Path, jax.Array], jax.Array]:
        """Their squared gradients in a call, and how many losses it has."""
        ...

    def result(self, packed: PyTree) -> Any:
        """What the caller gets for the packed parameters."""
        ...


class _Function:
    """A function from ``bj.ternarize``."""

    def __init__(self, ternary: Ternarized, params: PyTree, call: Mapping[str, Any]):
        self._ternary, self.params, self._call = ternary, params, call

    def _arguments(self, args: Args) -> Args:
        at = self._ternary.argnums
        return (*args[:at], self.params, *args[at:])

    def packable(self, args: Args) -> Kernels:
        return self._ternary.packable(*self._arguments(args), **self._call)

    def coverage(self, args: Args) -> ProgramCoverage:
        return self._ternary.explain(*self._arguments(args), **self._call)

    def moments(self, wanted: Mapping[Path, Wanted], args: Args) -> dict[Path, Probe]:
        return self._ternary.moments(wanted, *self._arguments(args), **self._call)

    def walk(self, args: Args) -> Walk:
        return self._ternary.walk(*self._arguments(args), **self._call)

    def losses(self, loss: Callable[..., Any]) -> Losses:
        def losses(result: Any, params: Any, others: Args, kwargs: dict[str, Any]) -> Any:
            del params, kwargs
            return losses_of_batch(loss, result, others)

        return losses

    def slopes(
        self, batch_axes: Mapping[Path, int], losses: Losses, key: jax.Array, args: Args
    ) -> tuple[dict[Path, jax.Array], jax.Array]:
        arguments = self._arguments(args)
        return self._ternary.slopes(batch_axes, losses, key, *arguments, **self._call)

    def result(self, packed: PyTree) -> PyTree:
        return packed


class _Linen:
    """A linen model with ternary layers, or from ``bj.linen.ternarize``."""

    def __init__(self, who: str, model: linen.Module, params: PyTree, call: Mapping[str, Any]):
        self._who, self._model, self.params = who, model, params
        self._kwargs = dict(call)
        self._method, self._rngs, self._variables = (
            self._kwargs.pop(name, None) for name in ("method", "rngs", "variables")
        )

    def packable(self, args: Args) -> Kernels:
        example = Example(self._method, args, self._kwargs)
        # One for all batches: it keeps what is compiled.
        self._asked = Asked(self._who, self._model, [example], self._rngs)
        return self._asked.packable(self.params, self._variables)

    def coverage(self, args: Args) -> ProgramCoverage:
        del args  # the example's own
        return self._asked.coverage(self.params, self._variables)

    def moments(self, wanted: Mapping[Path, Wanted], args: Args) -> dict[Path, Probe]:
        return self._asked.moments(wanted, self.params, self._variables, args, self._kwargs)

    def walk(self, args: Args) -> Walk:
        return self._asked.walk(self.params, self._variables, args, self._kwargs)

    def losses(self, loss: Callable[..., Any]) -> Losses:
        return example_losses(loss)

    def slopes(
        self, batch_axes: Mapping[Path, int], losses: Losses, key: jax.Array, args: Args
    ) -> tuple[dict[Path, jax.Array], jax.Array]:
        given = self.params, self._variables, args, self._kwargs
        return self._asked.slopes(batch_axes, losses, key, *given)

    def result(self, packed: PyTree) -> PyTree:
        return packed


class _Nnx:
    """An NNX model, after ``bj.nnx.ternarize`` or with layers of this package."""

    def __init__(self, model: nnx.Module, call: Mapping[str, Any]):
        self._model, self._kwargs = model, dict(call)
        self._method = self._kwargs.pop("method", None) or "__call__"
        self.params = nnx.state(model, nnx.Param)

    def packable(self, args: Args) -> Kernels:
        return _conversion.packable(self._model, (self._method, args, self._kwargs))

    def coverage(self, args: Args) -> ProgramCoverage:
        return _conversion.coverage(self._model, (self._method, args, self._kwargs))

    def moments(self, wanted: Mapping[Path, Wanted], args: Args) -> dict[Path, Probe]:
        return _conversion.moments(self._model, wanted, (self._method, args, self._kwargs))

    def walk(self, args: Args) -> Walk:
        return _conversion.walk(self._model, (self._method, args, self._kwargs))

    def losses(self, loss: Callable[..., Any]) -> Losses:
        return call_losses(loss)

    def slopes(
        self, batch_axes: Mapping[Path, int], losses: Losses, key: jax.Array, args: Args
    ) -> tuple[dict[Path, jax.Array], jax.Array]:
        example = self._method, args, self._kwargs
        return _conversion.slopes(self._model, batch_axes, losses, key, example)

    def result(self, packed: PyTree) -> nnx.Module:
        return _conversion.with_params(self._model, packed)


def front_end(who: str, ternary: Any, params: PyTree, call: Mapping[str, Any] | None) -> FrontEnd:
    """The network that ``ternary`` is; raises for anything else."""
    if call is not None and not isinstance(call, Mapping):
        raise TypeError(
            f"{who}: `call` must be a dict of keyword arguments of every call, got "
            f"{describe(call)}."
        )
    how = call or {}
    if isinstance(ternary, nnx.Module):
        _require_no_params(who, params)
        return _Nnx(ternary, how)
    _require_params(who, params)
    if isinstance(ternary, linen.Module):
        return _Linen(who, ternary, params, how)
    if isinstance(ternary, Ternarized):
        return _Function(ternary, params, how)
    kind = "a class" if inspect.isclass(ternary) else describe(ternary)
    raise TypeError(
        f"{who}: `ternary` must be a function from bj.ternarize, or a model after "
        f"bj.linen.ternarize or bj.nnx.ternarize, got {kind}. Call one of them on the float "
        "network first: its selector and configs say what becomes ternary."
    )


def _require_params(who: str, params: PyTree) -> None:
    """Raises where the parameters of a function or a linen model are missing."""
    if params is None:
        raise TypeError(
            f"{who}: `params` is None. Pass the float parameters; only an NNX model holds its own."
        )
    _checks.require_no_report(who, "params", params)


def _require_no_params(who: str, params: PyTree) -> None:
    """Raises for parameters beside those that an NNX model holds."""
    if params is not None:
        raise TypeError(
            f"{who}: `params` must be None for an NNX model, which holds its own, got "
            f"{describe(params)}. Update the model with them first: nnx.update(model, params)."
        )


def require_values(who: str, params: PyTree) -> None:
    """Raises for params whose float values cannot be read: traced, or packed with an adapter."""
    for leaf in flatten(who, "params", params, is_leaf=is_adapted)[0]:
        if isinstance(leaf.value, core.Tracer):
            raise TypeError(
                f"{who}: `params` hold traced arrays ({leaf.where}), and calibration reads values. "
                "Call it outside of jax.jit, jax.grad and jax.vmap."
            )
        if is_adapted(leaf.value):
            raise TypeError(
                f"{who}: {leaf.where} is packed already, and has an adapter. Pass float params."
            )
