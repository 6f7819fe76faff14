"""``calibrate``: a float network to a packed ternary one, from batches of its inputs.

The network runs in float, once over the batches. What each kernel meets is summed by the probes
of ``_transform/probe.py``: they reach whatever ``bj.ternarize`` reaches, and change nothing in the
network. A method then chooses codes and scales of one kernel after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._quantize.config import B158, KernelConfig
from bitnet_jax._transform.decide import UNREACHED
from bitnet_jax._tree.leaves import Leaf, rebox
from bitnet_jax._tree.params import chosen_leaves, spec_of_leaf
from bitnet_jax._tree.select import Kernels, axes_for
from bitnet_jax.convert._batches import fitting, opened, require_callback
from bitnet_jax.convert._calibration import Calibration
from bitnet_jax.convert._chosen_methods import (
    WHO,
    AnyMethod,
    MethodOf,
    methods_of,
    require_methods,
    require_planes,
)
from bitnet_jax.convert._collect import collected
from bitnet_jax.convert._converted import FloatKernel, converted, possible
from bitnet_jax.convert._front_ends import front_end, require_values
from bitnet_jax.convert._options import require_candidates, require_fitting
from bitnet_jax.convert._sequential import in_sequence


def calibrate(
    ternary: Any,
    params: PyTree,
    batches: Iterable[Any],
    *,
    method: AnyMethod | Mapping[str, AnyMethod] | MethodOf = "gptq",
    equal_tokens: bool = False,
    sequential: bool = False,
    call: Mapping[str, Any] | None = None,
    loss: Callable[..., Any] | None = None,
    candidates: Sequence[KernelConfig] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[Any, Calibration]:
    """Packs a float network into a ternary one, its codes chosen by what its inputs are.

    The kernels, their configs and their axes are those that ``ternary.pack`` packs. The network
    runs over the batches in float and without gradients, and for each kernel W it sums what its
    method needs of the inputs x, over all tokens, uses and batches: nothing, ``sum x_i**2``, or
    ``H = sum x x^T``. The method then makes codes and scales that lose little of ``x W``, for
    ``"gptq"`` of ``tr((W - W_hat)^T H (W - W_hat))``.

    Sums are float32 within a batch, on the device and compiled once for each structure of
    batches, and float64 across batches, on the host. For a kernel with a contraction of K a
    ``"matrix"`` method takes 4 K**2 bytes there and 8 K**2 here, for each of its slices, of all
    kernels at once; a ``"diagonal"`` one takes K numbers. Rows of x that are all 0 (padding, an
    expert's empty places) are no tokens; a convolution's tokens are the places of its window.

    Args:
      ternary: a function from ``bj.ternarize``, a linen model from ``bj.linen.ternarize``, an NNX
        model after ``bj.nnx.ternarize``, or a model of either with layers of this package, such
        as a ``bj.models.Decoder``.
      params: its float parameters; None for an NNX model, which holds its own.
      batches: examples of calls, read once. A tuple holds all positional arguments but the
        params; anything else is the one argument.
      method: ``"absmean"`` (as ``bj.quantize``), ``"survivors"``, ``"weighted"``, ``"gptq"``,
        ``"gptq-act-order"``, ``"planes"`` (of a config with several), a :class:`Method`, a dict of
        patterns (as ``bj.only`` takes them; the last that matches holds) to these, or a function
        of path and shape that returns one. Kernels with an ``Int8Config`` keep their own
        quantiser. If no method needs statistics, the first batch alone is read, for the kernels'
        axes.
      equal_tokens: whether every token counts the same: in the sums each x is divided by its root
        mean square. For networks in which a few tokens have inputs many times as large as all
        others, as language models have: the sums, and so the codes, would be those tokens'. The
        errors of the report are then of such x, too.
      sequential: whether kernels are converted in the order of the program, each for what the
        converted ones before it give: their errors are among its inputs, and it makes up for
        what it can of them. With y its inputs then and x those in the float network, the method
        converts ``(H + damping)^-1 (C + damping) W`` for W, with ``H = sum y y^T``,
        ``C = sum y x^T`` and the mean of H's diagonal as damping; methods that need nothing
        convert W. Loops are stepped through, and each slice of a stack has its turn. A
        kernel that is met more than once (a shared layer, a recurrence) is converted first, from
        float inputs. It takes one pass more over the batches, in the packed network; passes are
        not compiled, and what all batches hold between two kernels is in memory at once, twice.
        The errors of the report are of y and of what was converted.
      call: keyword arguments of every call. For a linen model also ``method``, ``rngs`` and
        ``variables``, as ``bj.linen.pack`` takes them; for an NNX model ``method``.
      loss: a function of what the network returns and of the call's positional arguments, but
        the params, to losses in an array of any shape: one for each example or token.
        A linen model takes batches ``(x, labels)`` by
        ``call={"method": lambda model, x, labels: model(x)}``. With ``loss`` the report predicts
        what each kernel adds to the mean of the losses. It takes a forward and a backward pass
        more for each batch, and methods that need nothing take the ``"diagonal"``.
        ``lambda logits, *args: logits`` needs no labels; it predicts half the squared change of
        a logit, and orders kernels well where errors are large too.
      candidates: configs that the report is to compare for :func:`budget`, for example
        ``bj.convert.CANDIDATES``; those whose groups do not fit a kernel, and for ``"planes"``
        those of one plane, are left out for it. Each takes one more conversion of each kernel, by
        its method.
      progress: called with the part that is done, 0 to 1.

    Returns:
      The packed parameters (of an NNX model, a packed copy), which ``ternary`` runs from, and a
      :class:`Calibration`, which names what had to be handled, kernels that saw no token and
      kernels that the first batch does not reach (they stay float) among it.

    Raises:
      TypeError: ``ternary`` is none; ``batches`` is no iterable of examples; a kernel is packed
        already; a method, a candidate or the losses are none.
      ValueError: no batches; one that does not fit the network or that makes NaN or Inf
        statistics or gradients, by its number; the mean of a batch's losses; no tokens at all; a
        candidate that fits no kernel; a pattern that matches nothing, or a kernel that none
        matches; as ``ternary.pack``.
      NotImplementedError: statistics of a kernel in a ``while`` loop of unknown length, in a
        ``shard_map`` with ``check_vma=False``, or in a convolution with feature groups; with
        ``sequential``, a kernel in any ``shard_map``.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"w": jax.random.normal(keys[0], (16, 8))}
      >>> batches = [jax.random.normal(key, (32, 16)) for key in keys[1:]]
      >>> ternary = bj.ternarize(lambda params, x: x @ params["w"])
      >>> packed, report = bj.convert.calibrate(ternary, params, batches, method="survivors")
      >>> print(report)
      path  method     shape  tokens  error  absmean  notes
      w     survivors   16x8          0.173    0.218
      >>> ternary(packed, batches[0]).shape
      (32, 8)

    References:
      Frantar et al., GPTQ, arXiv:2210.17323, for the loss and ``"gptq"``; for the target of
      ``sequential`` Li et al., GPTAQ, arXiv:2504.02692.
    """
    _checks.require_instance(WHO, "equal_tokens", equal_tokens, bool, "Use True or False.")
    _checks.require_instance(WHO, "sequential", sequential, bool, "Use True or False.")
    net = front_end(WHO, ternary, params, call)
    require_callback(WHO, progress)
    _require_loss(loss)
    require_values(WHO, net.params)
    require_methods(method)
    configs = require_candidates(candidates)
    first, every, length = opened(WHO, batches)
    with fitting(WHO, 0):
        uses = net.packable(first)
        unreached = tuple(r.path for r in net.coverage(first).rows if r.why == UNREACHED)
    chosen, treedef = chosen_leaves(WHO, net.params, B158, uses, values=True)
    met = [leaf for leaf, config in chosen if config is not None]
    kernels = _kernels(uses, met, method, equal_tokens, probed=loss is not None)
    require_fitting(configs, [(k.spec, tuple(k.leaf.value.shape)) for k in kernels])
    if configs:
        each = (tuple(c for c in configs if possible(k, c)) for k in kernels)
        kernels = [k._replace(candidates=c) for k, c in zip(kernels, each, strict=True)]
    losses = None if loss is None else net.losses(loss)
    if sequential:
        done, rows = in_sequence(net, kernels, list(every), losses, progress)
    else:
        found, slopes = collected(net, kernels, every, losses, length, progress)
        done, rows = {}, []
        for number, kernel in enumerate(kernels, start=1):
            path = kernel.leaf.path
            done[path], row = converted(kernel, found.pop(path, None), slopes.get(path))
            rows.append(row)
            progress(0.5 + 0.5 * number / len(kernels))
    leaves = [rebox(leaf.boxed, done.get(leaf.path, leaf.value)) for leaf, _ in chosen]
    report = Calibration(tuple(rows), unreached, "error" if loss is None else "loss")
    return net.result(jax.tree.unflatten(treedef, leaves)), report


def _kernels(
    uses: Kernels, leaves: Sequence[Leaf], method: Any, equal_tokens: bool, *, probed: bool
) -> list[FloatKernel]:
    """The kernels to convert, checked, each with its method."""
    axes = axes_for(uses, None)
    methods = methods_of(uses.ternary, method)
    kernels = []
    for leaf in leaves:
        w = np.asarray(leaf.value, np.float32)
        if not np.isfinite(w).all():
            _checks.raise_not_finite(WHO, leaf.where, int((~np.isfinite(w)).sum()))
        spec = spec_of_leaf(WHO, leaf, uses.uses[leaf.path].config, axes)
        name, chosen = methods.get(leaf.path, ("int8", None))
        require_planes(leaf.where, chosen, spec.config)
        kernels.append(FloatKernel(leaf, spec, name, chosen, equal_tokens, probed))
    return kernels


def _require_loss(loss: object) -> None:
    """Raises unless ``loss`` is None or can be called."""
    if loss is not None and not callable(loss):
        raise TypeError(
            f"{WHO}: `loss` must be a function of the network's output and of a batch, got "
            f"{describe(loss)}. Write for example lambda logits, tokens: "
            "cross_entropy(logits[:, :-1], tokens[:, 1:])."
        )
