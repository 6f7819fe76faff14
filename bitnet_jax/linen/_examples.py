"""Which kernels of a linen model are quantised, over which axes: asked with an example call.

The model is traced as the function of its parameters that ``ternarize`` transforms; nothing is
computed. Layers of this package in a model that is not ternarised state their own configs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
from flax import linen as nn
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._layers.forward import LayerConfig
from bitnet_jax._transform.decide import NOT_SELECTED, UNREACHED
from bitnet_jax._transform.explain import ProgramCoverage
from bitnet_jax._transform.probe import Probe, Wanted
from bitnet_jax._transform.slopes import Losses, losses_of_batch
from bitnet_jax._transform.ternarize import Ternarized
from bitnet_jax._transform.walk import Walk
from bitnet_jax._tree.leaves import flatten
from bitnet_jax._tree.pack_report import PackReport
from bitnet_jax._tree.params import combine, pack_params
from bitnet_jax._tree.select import Kernels, Path
from bitnet_jax.linen._lifted import Args, Kwargs, Plan, inside, is_refusal, plan_of

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
    asked = Asked("pack", model, _examples(example_args, example_kwargs, method, calls), rngs)
    return asked.pack(params, variables)


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
    asked = Asked("kernels", model, _examples(example_args, example_kwargs, method, calls), rngs)
    return asked.kernels(params, variables)


def explain(
    model: nn.Module,
    *example_args: PyTree,
    method: Method = None,
    rngs: PyTree = None,
    **example_kwargs: PyTree,
) -> ProgramCoverage:
    """Which kernels of a model are ternary, and why the others are not.

    Args:
      model: a linen module with ternary layers, or from :func:`ternarize`.
      *example_args: arguments of ``model.init``, arrays or ``jax.ShapeDtypeStruct``.
      method: as for ``model.init``.
      rngs: as for ``model.init``; by default one key for every stream.
      **example_kwargs: keyword arguments of the call.

    Returns:
      A table, one row for each parameter of two axes and more that is no bias or scale: what
      multiplies it, over which of its axes, and its share of the model's multiplications. Nothing
      is computed.

    Raises:
      ValueError: an example that does not fit the model; a pattern that matches nothing.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import linen as nn
      >>> layers = [nn.Conv(8, (3, 3)), nn.ConvTranspose(4, (2, 2))]
      >>> model = bj.linen.ternarize(nn.Sequential(layers), select=bj.exclude("layers_1"))
      >>> print(bj.linen.explain(model, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")))
      path             product                 shape  dtype     over  share  kernel   why
      layers_0/kernel  conv_general_dilated  3x3x3x8  float32  0,1,2  62.8%  ternary  selected
      layers_1/kernel  conv_general_dilated  2x2x8x4  float32  0,1,2  37.2%  float    not selected
      63 % ternary of 44 kFLOP
    """
    asked = Asked("explain", model, [Example(method, example_args, example_kwargs)], rngs)
    return asked.explain()


def _examples(
    args: Args, kwargs: Kwargs, method: Method, calls: Sequence[Callable[[Any], Any]]
) -> list[Example]:
    """The calls that the model is traced with."""
    return [Example(method, args, kwargs), *(Example(call, (), {}) for call in calls)]


class Example(NamedTuple):
    """One call of a model."""

    method: Method
    args: Args
    kwargs: Kwargs


def example_losses(loss: Callable[..., Any]) -> Losses:
    """Losses of the one example's output, and of its positional arguments."""

    def losses(result: PyTree, params: PyTree, others: Args, kwargs: Kwargs) -> Any:
        del params, kwargs
        ((output, _),), (_, [(args, _)]) = result, others
        return losses_of_batch(loss, output, args)

    return losses


def _nothing(path: Path, leaf: object) -> bool:
    """A selector for models in which only the layers of this package are quantised."""
    del path, leaf
    return False


class Asked:
    """What is asked of a model by example calls."""

    def __init__(self, who: str, model: nn.Module, examples: Sequence[Example], rngs: PyTree):
        remedy = "Pass a linen module; for an nnx model call the function of bj.nnx."
        _checks.require_instance(who, "model", model, nn.Module, remedy)
        self._who, self._model, self._examples = who, model, examples
        self._rngs = {"params": jax.random.key(0)} if rngs is None else rngs
        self._plan = plan_of(type(model))
        plan = self._plan or Plan(_nothing, LayerConfig())
        extent = "whole" if self._plan else "part"
        self._ternary = Ternarized(plan.spec(self._run, extent))

    def _run(self, params: PyTree, variables: PyTree, calls: PyTree) -> Any:
        """Every example, run as the function of its parameters."""
        everything = {**variables, "params": params}
        mutable = nn.DenyList("params")  # pyright: ignore[reportCallIssue]
        outs = []
        with inside(self._plan):
            for example, (args, kwargs) in zip(self._examples, calls, strict=True):
                how: dict[str, Any] = {"method": example.method, "mutable": mutable}
                outs.append(self._model.apply(everything, *args, rngs=self._rngs, **how, **kwargs))
        return jax.tree.map(_only_array, outs)

    def _arguments(self, params: PyTree, variables: Mapping[str, PyTree] | None) -> Args:
        return params, variables or {}, [(e.args, e.kwargs) for e in self._examples]

    def explain(self) -> ProgramCoverage:
        """The table, of the parameters that the model makes."""
        made = self._abstract(self._init, *self._arguments({}, {}))
        table = self._traced(self._ternary.explain, made.get("params", {}), {})
        # A stacked bias has two axes, and is no kernel that was missed.
        rows = [row for row in table.rows if row.primitive != "-" or not _is_small(row.path)]
        if self._plan is None:  # nothing was selected, because nobody was asked
            why = "a float layer; bj.linen.ternarize(model) makes it ternary"
            rows = [
                dataclasses.replace(row, why=why) if row.why == NOT_SELECTED else row
                for row in rows
            ]
        return dataclasses.replace(table, rows=tuple(rows))

    def kernels(self, params: PyTree, variables: Mapping[str, PyTree] | None) -> Kernels:
        """The quantised parameters, with their axes."""
        self._require_reached(params, variables)
        return self._traced(self._ternary.kernels, params, variables)

    def pack(
        self, params: PyTree, variables: Mapping[str, PyTree] | None
    ) -> tuple[PyTree, PackReport]:
        """The packed parameters, and the report."""
        return pack_params(params, select=self.packable(params, variables))

    def coverage(self, params: PyTree, variables: Mapping[str, PyTree] | None) -> ProgramCoverage:
        """What the examples do with every one of these parameters."""
        return self._traced(self._ternary.explain, params, variables)

    def packable(self, params: PyTree, variables: Mapping[str, PyTree] | None) -> Kernels:
        """The quantised parameters, where each can be packed."""
        self._require_reached(params, variables)
        return self._traced(self._ternary.packable, params, variables)

    def moments(
        self,
        wanted: Mapping[Path, Wanted],
        params: PyTree,
        variables: Mapping[str, PyTree] | None,
        args: Args,
        kwargs: Kwargs,
    ) -> dict[Path, Probe]:
        """What kernels meet in a call as the one example, of other arguments."""
        return self._ternary.moments(wanted, params, variables or {}, [(args, kwargs)])

    def walk(
        self,
        params: PyTree,
        variables: Mapping[str, PyTree] | None,
        args: Args,
        kwargs: Kwargs,
    ) -> Walk:
        """A call as the one example, of other arguments, to be run step by step."""
        return self._ternary.walk(params, variables or {}, [(args, kwargs)])

    def slopes(
        self,
        batch_axes: Mapping[Path, int],
        losses: Losses,
        key: jax.Array,
        params: PyTree,
        variables: Mapping[str, PyTree] | None,
        args: Args,
        kwargs: Kwargs,
    ) -> tuple[dict[Path, jax.Array], jax.Array]:
        """Squared gradients in a call as the one example, of other arguments."""
        given = params, variables or {}, [(args, kwargs)]
        return self._ternary.slopes(batch_axes, losses, key, *given)

    def _require_reached(self, params: PyTree, variables: Mapping[str, PyTree] | None) -> None:
        _checks.require_instance(
            self._who, "params", params, Mapping, "Pass the tree under 'params'."
        )
        table = self.coverage(params, variables)
        missed = [
            row.path
            for row in table.rows
            if row.why == UNREACHED and row.path.rpartition("/")[2] == "kernel"
        ]
        if missed:
            _raise_never_reached(self._who, missed)
        if self._plan is None and not table.ternary:
            _checks.raise_no_ternary_layer(self._who, type(self._model).__name__)

    def _traced(
        self,
        ask: Callable[..., Any],
        params: PyTree,
        variables: Mapping[str, PyTree] | None,
    ) -> Any:
        """An answer; an error of the model says that the example does not fit."""
        try:
            return ask(*self._arguments(params, variables))
        except Exception as error:
            if is_refusal(error, self._who):
                raise
            self._check_shapes(params)
            raise _example_refused(self._who, error) from error

    def _init(self, params: PyTree, variables: PyTree, calls: PyTree) -> Any:
        del params, variables
        (args, kwargs), method = calls[0], self._examples[0].method
        with inside(self._plan):
            return self._model.init(self._rngs, *args, method=method, **kwargs)

    def _check_shapes(self, params: PyTree) -> None:
        """Raises if a parameter has another shape than the model makes, and names it."""
        try:
            made = self._abstract(self._init, *self._arguments({}, {})).get("params", {})
        except ValueError:
            return  # the example itself does not fit: the first error says so
        wanted: dict[Path, Any] = {
            leaf.path: leaf.value.shape for leaf in flatten(self._who, "params", made)[0]
        }
        for leaf in flatten(self._who, "params", params)[0]:
            got = leaf.value.shape
            _checks.require_param_shape(self._who, leaf.where, got, wanted.get(leaf.path, got))

    def _abstract(self, function: Callable[..., Any], *args: PyTree) -> Any:
        """``jax.eval_shape``, where what is no array is static."""

        def only(arrays: bool) -> PyTree:
            def kept(leaf: PyTree) -> PyTree:
                return leaf if (_only_array(leaf) is not None) == arrays else None

            return jax.tree.map(kept, args)

        static = only(arrays=False)

        def call(arrays: PyTree) -> Any:
            return function(*combine(arrays, static))

        try:
            return jax.eval_shape(call, only(arrays=True))
        except Exception as error:
            if is_refusal(error, self._who):
                raise
            raise _example_refused(self._who, error) from error


def _is_small(path: str) -> bool:
    return path.rpartition("/")[2] in ("bias", "scale")


def _only_array(leaf: PyTree) -> PyTree:
    return leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else None


def _example_refused(who: str, error: Exception) -> ValueError:
    """The error for a model that does not run on the example."""
    given = "what model.apply takes after the params (method=, rngs= and variables= if needed)"
    if who == "explain":
        given = "what model.init takes after the keys, and no params (method= and rngs= if needed)"
    text = str(error).rstrip(".")
    if who in ("calibrate", "smooth"):
        return ValueError(
            f"{who}: the model does not run on batch 0 with these params: {type(error).__name__}: "
            f"{text}. A batch is a tuple of all positional arguments of model.apply but the "
            "variables, or the one argument; keywords, method=, rngs= and variables= go into call=."
        )
    return ValueError(
        f"{who}: the model does not run on `example_args`"
        f"{'' if who == 'explain' else ' with these params'}: {type(error).__name__}: {text}. Pass "
        f"{given}."
    )


def _raise_never_reached(who: str, paths: Sequence[str]) -> NoReturn:
    """Reports kernels that no example call uses."""
    one = who in ("calibrate", "smooth")
    how = "call={'method': lambda m, *args: ...}" if one else "calls=[lambda m: ...]"
    raise ValueError(
        f"{who}: no call reaches the kernels {', '.join(paths)}. Pass {how} that "
        "use them, or take them out of `params`."
    )
