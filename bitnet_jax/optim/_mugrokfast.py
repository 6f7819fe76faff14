"""MuGrokfast: a Grokfast filter, then Muon for the kernels and Adam for the rest.

Muon reshapes a kernel's momentum to a matrix (contraction, outputs) and replaces it by
the nearest semi-orthogonal one, which five quintic Newton-Schulz steps approximate. A
shape alone does not say which axes are contracted, so ``select=`` and ``axes=`` choose
the kernels and their axes, as everywhere in this library. Orthogonalisation removes a
uniform gain: in front of Muon the filter only changes the direction of a gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NoReturn, TypeVar, get_args

import jax
import optax
from jaxtyping import PyTree
from optax import contrib

from bitnet_jax import _checks
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.ternary import B158
from bitnet_jax._tree.leaves import Leaf, flatten
from bitnet_jax._tree.params import named_axes
from bitnet_jax._tree.select import AxesOf, Select, axes_for, decide, matched
from bitnet_jax.optim._gradients import require_params
from bitnet_jax.optim._grokfast_ema import grokfast_ema
from bitnet_jax.optim._hyperparameters import (
    DECAY,
    NONNEGATIVE,
    POSITIVE,
    Scalar,
    ScalarOrSchedule,
    float_dtype,
    require_number,
    require_number_or_schedule,
)
from bitnet_jax.optim._qk_clip import clip_by_max_logits

Phase = Literal["pretrain", "rl", "curriculum", "baking", "svf"]

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class MuGrokfastPhase:
    """The settings of one phase of training.

    Attributes:
      learning_rate: of Muon and of Adam.
      lamb: weight of the slow part of the gradient.
      qk_tau: bound of the attention logits, for :func:`clip_by_max_logits`; None: none.
      kl: weight of a KL term towards the network before this phase, 0: none. The
        optimizer does not use it; add the term to the loss.
      ternary: whether this phase trains through the straight-through estimator.
      alpha: decay of the filter's average.
      momentum: of Muon.
      nesterov: of Muon.
      ns_steps: Newton-Schulz steps.
      weight_decay: of the kernels.
    """

    learning_rate: float
    lamb: float
    qk_tau: float | None
    kl: float = 0.0
    ternary: bool = False
    alpha: float = 0.98
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    weight_decay: float = 0.0


PHASES: dict[Phase, MuGrokfastPhase] = {
    "pretrain": MuGrokfastPhase(1e-3, lamb=0.3, qk_tau=30.0),
    "rl": MuGrokfastPhase(5e-4, lamb=0.1, qk_tau=25.0, kl=0.1),
    "curriculum": MuGrokfastPhase(1e-3, lamb=2.0, qk_tau=30.0, ternary=True),
    "baking": MuGrokfastPhase(1e-4, lamb=0.2, qk_tau=30.0),
    "svf": MuGrokfastPhase(5e-4, lamb=0.15, qk_tau=28.0, kl=0.05),
}


def mugrokfast(
    learning_rate: ScalarOrSchedule | None = None,
    phase: Phase | None = None,
    *,
    alpha: ScalarOrSchedule | None = None,
    lamb: ScalarOrSchedule | None = None,
    momentum: Scalar | None = None,
    nesterov: bool | None = None,
    ns_steps: Scalar | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    qk_tau: Scalar | None = None,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    mu_dtype: jax.typing.DTypeLike | None = None,
    select: Select | None = None,
    axes: AxesOf | None = None,
) -> optax.GradientTransformationExtraArgs:
    """:func:`grokfast_ema`, then ``optax.contrib.muon``: Muon for kernels, Adam for the rest.

    Arguments that are None take their values from ``phase``. Without a phase they are
    alpha 0.98, lamb 2, momentum 0.95 with Nesterov, 5 Newton-Schulz steps, no decay.

    Ternary layers need no setting: the filter sees their straight-through gradients,
    with respect to the latent float kernels. A latent weight accumulates slow gradient
    over many steps before its code flips once.

    On the task of ``examples/grokking.py`` the filter in front of Muon makes ternary
    kernels generalise where Muon alone does not, and slows float ones down a little.
    ``lamb=0`` is plain Muon on the selected kernels.

    Args:
      learning_rate: of Muon; a number or a schedule.
      phase: ``"pretrain"``, ``"rl"``, ``"curriculum"``, ``"baking"`` or ``"svf"``;
        :data:`PHASES` holds their settings.
      alpha: as for :func:`grokfast_ema`.
      lamb: as for :func:`grokfast_ema`.
      momentum: of Muon, in [0, 1).
      nesterov: of Muon and Adam.
      ns_steps: Newton-Schulz steps.
      weight_decay: decoupled, of the kernels.
      qk_tau: bound of the attention logits, applied as by :func:`clip_by_max_logits`
        whenever ``update`` is called with ``max_logits=``.
      adam_learning_rate: by default that of Muon.
      adam_b1: of Adam.
      adam_b2: of Adam.
      mu_dtype: of the momentum.
      select: which leaves go to Muon, as for :func:`bitnet_jax.pack_params`:
        by default those named ``kernel``, so that embeddings, scales and biases
        go to Adam. A head is a kernel too: ``select=bj.exclude("head")``.
      axes: as for :func:`bitnet_jax.pack_params`: the contracting axes of kernels that
        are not 2-D. A ``select`` from ``bj.linen.kernels`` or ``bj.nnx.kernels`` brings
        them.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its ``update`` needs ``params``.
      Under ``optax.inject_hyperparams``, ``static_args=("select", "axes")``.

    Raises:
      ValueError: neither a learning rate nor a phase, an unknown phase, a number out
        of range. In ``init``: a selector that matches nothing, a kernel whose axes are
        not known. In ``update``: as :func:`grokfast_ema`; ``max_logits`` without
        ``qk_tau``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bitnet_jax as bj
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> tx = bj.optim.mugrokfast(1e-3, phase="curriculum")
      >>> updates, state = tx.update(params, tx.init(params), params)

    References:
      Jordan et al., Muon (2024), https://kellerjordan.github.io/posts/muon; Lee
      et al., Grokfast (2024), arXiv:2405.20233; for qk_tau, Kimi K2 (2025),
      arXiv:2507.20534, section 2.1.
    """
    who = "mugrokfast"
    if phase is not None:
        _checks.require_one_of(who, "phase", phase, get_args(Phase))
    _require_learning_rate(who, learning_rate, phase)
    preset = PHASES[phase] if phase else MuGrokfastPhase(0.0, lamb=2.0, qk_tau=None)
    # Any: optax's own annotations leave NumPy's scalars out, and optax takes them.
    rate: Any = _given(learning_rate, preset.learning_rate)
    adam_rate: Any = _given(adam_learning_rate, rate)
    decay = _given(weight_decay, preset.weight_decay)
    beta = _given(momentum, preset.momentum)
    tau = _given(qk_tau, preset.qk_tau)
    require_number_or_schedule(who, "learning_rate", rate, NONNEGATIVE, "Try 1e-3.")
    require_number(who, "momentum", beta, DECAY, "Muon uses 0.95.")
    require_number_or_schedule(who, "weight_decay", decay, NONNEGATIVE, "0 is none.")
    if tau is not None:
        require_number(who, "qk_tau", tau, POSITIVE)
    slow = grokfast_ema(_given(alpha, preset.alpha), _given(lamb, preset.lamb))
    muon = contrib.muon(
        rate,
        ns_steps=_given(ns_steps, preset.ns_steps),
        beta=beta,
        weight_decay=decay,  # pyright: ignore[reportArgumentType] - optax takes schedules here
        mu_dtype=float_dtype(who, "mu_dtype", mu_dtype),
        nesterov=_given(nesterov, preset.nesterov),
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_learning_rate=adam_rate,
        muon_weight_dimension_numbers=lambda params: muon_dimensions(
            params, select=select, axes=axes
        ),
    )
    both = optax.chain(slow, muon)
    clip = None if tau is None else clip_by_max_logits(tau)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        max_logits: PyTree = None,
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        del extra
        require_params(who, params)
        updates, state = both.update(updates, state, params)
        if max_logits is not None:
            if clip is None:
                _raise_tau_missing(who)
            updates, _ = clip.update(updates, optax.EmptyState(), params, max_logits=max_logits)
        return updates, state

    return optax.GradientTransformationExtraArgs(both.init, update)


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def muon_dimensions(
    params: PyTree, *, select: Select | None = None, axes: AxesOf | None = None
) -> PyTree:
    """The leaves that Muon orthogonalises, and their axes, for ``optax.contrib.muon``.

    By its own defaults ``optax.contrib.muon`` orthogonalises every 2-D leaf, embeddings
    and heads too, and leaves attention and convolution kernels to Adam.

    Args:
      params: the parameters.
      select: as for :func:`mugrokfast`.
      axes: as for :func:`mugrokfast`.

    Returns:
      A tree of ``optax.contrib.MuonDimensionNumbers`` for the leaves of Muon and
      None for the rest, for ``muon_weight_dimension_numbers=``.

    Raises:
      ValueError: a selector that matches nothing; a selected kernel that is not 2-D and
        has no axes.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}}
      >>> axes = lambda path, leaf: {"contracting_axes": (0, 1, 2)}
      >>> bj.optim.muon_dimensions(params, axes=axes)["conv"]["kernel"]
      MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))
    """
    who = "muon_dimensions"

    def is_masked(node: object) -> bool:
        return isinstance(node, optax.MaskedNode)

    if not jax.tree.leaves(params):
        return jax.tree.map(lambda _: None, params, is_leaf=is_masked)
    leaves, treedef = flatten(who, "params", params, is_leaf=is_masked)
    there = [leaf for leaf in leaves if not is_masked(leaf.boxed)]
    routed = [
        leaf for leaf in there if decide(who, leaf.path, leaf.value, B158, select) is not None
    ]
    # optax calls this again with Adam's leaves masked; then patterns for those match nothing.
    if len(there) == len(leaves):
        matched(who, [leaf.path for leaf in there], bool(routed), select)
    axes = axes_for(select, axes)
    found = {leaf.path: _dimensions(who, leaf, axes) for leaf in routed}
    return jax.tree.unflatten(treedef, [found.get(leaf.path) for leaf in leaves])


def _dimensions(who: str, leaf: Leaf, axes: AxesOf | None) -> contrib.MuonDimensionNumbers:
    """The axes of one kernel for Muon: reduced ones and outputs; batch axes stay out."""
    contracting, batch = named_axes(who, leaf, axes)
    found = kernel_axes.resolve(f"{who}: {leaf.where}", leaf.value, contracting, batch)
    return contrib.MuonDimensionNumbers(found.contracting, found.outputs)


def _require_learning_rate(who: str, learning_rate: object, phase: object) -> None:
    """Raises unless a learning rate or a phase was given."""
    if learning_rate is None and phase is None:
        raise ValueError(
            f"{who}: `learning_rate` is missing, and there is no `phase` to take it from. Pass "
            "learning_rate=1e-3, or a phase such as 'pretrain'."
        )


def _raise_tau_missing(who: str) -> NoReturn:
    """Raises where ``update`` got logits and there is no ``qk_tau``."""
    raise ValueError(
        f"{who}: `max_logits` was given to update, and there is no bound. Pass qk_tau=30.0 (or a "
        "phase), or leave max_logits out."
    )
