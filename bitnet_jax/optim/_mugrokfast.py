"""MuGrokfast: a Grokfast filter, then Muon for the kernels and Adam for the rest.

Muon replaces a kernel's momentum, as a matrix (contraction, outputs), by the
nearest semi-orthogonal one, which five quintic Newton-Schulz steps approximate.
A kernel's shape does not tell its contraction, so routing takes the selectors and
the axes of the rest of the library. Uniform gain is lost in the orthogonalisation:
in front of Muon the filter changes directions only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from optax import contrib

from bitnet_jax import _checks
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.ternary import B158
from bitnet_jax._tree.leaves import Leaf, flatten
from bitnet_jax._tree.params import named_axes
from bitnet_jax._tree.select import AxesOf, Select, axes_for, decide, matched
from bitnet_jax.optim import _gradients
from bitnet_jax.optim._gradients import require_hyperparameter, require_params
from bitnet_jax.optim._grokfast_ema import grokfast_ema
from bitnet_jax.optim._qk_clip import clip_by_max_logits


@dataclasses.dataclass(frozen=True)
class MuGrokfastPhase:
    """The settings of one phase of training.

    Attributes:
      learning_rate: of Muon and of Adam.
      lamb: weight of the slow part of the gradient.
      qk_tau: bound of the attention logits, for :func:`clip_by_max_logits`.
      kl: weight of a KL term towards the network before this phase; it belongs
        into the loss, an optimizer does not see it. 0: none.
      ternary: whether this phase trains through the straight-through estimator.
      alpha: decay of the filter's average.
      momentum: of Muon.
      nesterov: of Muon.
      ns_steps: Newton-Schulz steps.
      weight_decay: of the kernels.
    """

    learning_rate: float
    lamb: float
    qk_tau: float
    kl: float = 0.0
    ternary: bool = False
    alpha: float = 0.98
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    weight_decay: float = 0.0


PHASES = {
    "pretrain": MuGrokfastPhase(1e-3, lamb=0.3, qk_tau=30.0),
    "rl": MuGrokfastPhase(5e-4, lamb=0.1, qk_tau=25.0, kl=0.1),
    "curriculum": MuGrokfastPhase(1e-3, lamb=2.0, qk_tau=30.0, ternary=True),
    "baking": MuGrokfastPhase(1e-4, lamb=0.2, qk_tau=30.0),
    "svf": MuGrokfastPhase(5e-4, lamb=0.15, qk_tau=28.0, kl=0.05),
}


def mugrokfast(
    learning_rate: _gradients.ScalarOrSchedule | None = None,
    phase: str | None = None,
    *,
    alpha: _gradients.ScalarOrSchedule | None = None,
    lamb: _gradients.ScalarOrSchedule | None = None,
    momentum: float | jax.Array | None = None,
    nesterov: bool | None = None,
    ns_steps: int | jax.Array | None = None,
    weight_decay: float | jax.Array | None = None,
    qk_tau: float | None = None,
    adam_learning_rate: Any = None,
    adam_b1: float | jax.Array = 0.9,
    adam_b2: float | jax.Array = 0.999,
    mu_dtype: Any = None,
    select: Select | None = None,
    axes: AxesOf | None = None,
) -> optax.GradientTransformationExtraArgs:
    """:func:`grokfast_ema`, then ``optax.contrib.muon``: Muon for kernels, Adam for the rest.

    An argument that is None is taken from the phase, without a phase from alpha
    0.98, lamb 2, momentum 0.95 with Nesterov, 5 Newton-Schulz steps, no decay.

    Through ternary layers the filter sees the straight-through gradients: those
    with respect to the latent float kernels, taken at the quantised ones. Codes
    have no gradient; a latent weight gathers slow gradient for many steps before
    its code flips once. Nothing has to be switched on for it.

    On the task of ``examples/grokking.py`` the filter in front of Muon makes ternary
    kernels generalise where Muon alone does not, and slows float ones down a little;
    ``lamb=0`` is plain Muon, routed.

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
      qk_tau: bounds the attention logits where ``update`` is given
        ``max_logits=``, as :func:`clip_by_max_logits` does; without it, it is
        not used.
      adam_learning_rate: by default that of Muon.
      adam_b1: of Adam.
      adam_b2: of Adam.
      mu_dtype: of the momentum.
      select: which leaves go to Muon, as for :func:`bitnet_jax.pack_params`:
        by default those named ``kernel``, so that embeddings, scales and biases
        go to Adam. A head is a kernel too: ``select=bj.exclude("head")``.
      axes: as for :func:`bitnet_jax.pack_params`: what a kernel of another rank
        than 2 contracts over. A ``select`` from ``bj.linen.kernels`` or
        ``bj.nnx.kernels`` brings them.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its ``update`` needs ``params``.
      Under ``optax.inject_hyperparams``, ``static_args=("select", "axes")``.

    Raises:
      ValueError: no learning rate and no phase, an unknown phase, a number out of
        range; in ``init``: a selector that matches nothing, a kernel whose axes are
        not known; in ``update``: as :func:`grokfast_ema`, ``max_logits`` without
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
        _checks.require_one_of(who, "phase", phase, tuple(PHASES))
    _require_learning_rate(who, learning_rate, phase)
    preset = PHASES[phase] if phase else MuGrokfastPhase(0.0, lamb=2.0, qk_tau=0.0)

    def chosen(name: str, value: Any) -> Any:
        return getattr(preset, name) if value is None else value

    rate: Any = chosen("learning_rate", learning_rate)
    decay = chosen("weight_decay", weight_decay)
    beta: Any = chosen("momentum", momentum)
    require_hyperparameter(who, "learning_rate", rate, "Try 1e-3.")
    require_hyperparameter(who, "momentum", beta, "Muon uses 0.95.", below=1.0)
    require_hyperparameter(who, "weight_decay", decay, "0 is none.")
    tau = chosen("qk_tau", qk_tau)
    if qk_tau is not None:
        _checks.require_positive(who, "qk_tau", qk_tau)
    slow = grokfast_ema(chosen("alpha", alpha), chosen("lamb", lamb))
    muon = contrib.muon(
        rate,
        ns_steps=chosen("ns_steps", ns_steps),
        beta=beta,
        weight_decay=decay,
        mu_dtype=mu_dtype,
        nesterov=chosen("nesterov", nesterov),
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_learning_rate=rate if adam_learning_rate is None else adam_learning_rate,
        muon_weight_dimension_numbers=lambda params: muon_dimensions(
            params, select=select, axes=axes
        ),
    )
    both = optax.chain(slow, muon)
    clip = clip_by_max_logits(tau) if tau else None

    def update(
        updates: Any, state: Any, params: Any = None, *, max_logits: Any = None, **extra: Any
    ) -> Any:
        del extra
        require_params(who, params)
        updates, state = both.update(updates, state, params)
        if max_logits is not None:
            if clip is None:
                _raise_tau_missing(who)
            else:
                updates, _ = clip.update(updates, optax.EmptyState(), params, max_logits=max_logits)
        return updates, state

    return optax.GradientTransformationExtraArgs(both.init, update)


def muon_dimensions(
    params: Any, *, select: Select | None = None, axes: AxesOf | None = None
) -> Any:
    """Which leaves are matrices for Muon, and of which axes; for ``optax.contrib.muon``.

    Left alone, ``optax.contrib.muon`` orthogonalises every 2-D leaf, embeddings and
    heads too, and sends attention and convolution kernels to Adam.

    Args:
      params: the parameters.
      select: as for :func:`mugrokfast`.
      axes: as for :func:`mugrokfast`.

    Returns:
      A tree of ``optax.contrib.MuonDimensionNumbers`` for the leaves of Muon and
      None for the rest, for ``muon_weight_dimension_numbers=``.

    Raises:
      ValueError: a selector that matches nothing, a kernel of another rank than 2
        for which there are no axes.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}}
      >>> axes = lambda path, leaf: {"contracting_axes": (0, 1, 2)}
      >>> bj.optim.muon_dimensions(params, axes=axes)["conv"]["kernel"]
      MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))
    """
    who = "muon_dimensions"

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    if not jax.tree.leaves(params):
        return jax.tree.map(lambda _: None, params, is_leaf=is_masked)
    leaves, treedef = flatten(who, "params", params, is_leaf=is_masked)
    there = [leaf for leaf in leaves if not is_masked(leaf.boxed)]
    routed = [
        leaf for leaf in there if decide(who, leaf.path, leaf.value, B158, select) is not None
    ]
    if len(there) == len(leaves):  # optax asks again with the leaves of Adam masked
        matched(who, [leaf.path for leaf in there], bool(routed), select)
    axes = axes_for(select, axes)
    found = {leaf.path: _dimensions(who, leaf, axes) for leaf in routed}
    return jax.tree.unflatten(treedef, [found.get(leaf.path) for leaf in leaves])


def _dimensions(who: str, leaf: Leaf, axes: AxesOf | None) -> Any:
    """The axes of one kernel, in Muon's words."""
    contracting, batch = named_axes(who, leaf, axes)
    found = kernel_axes.resolve(f"{who}: {leaf.where}", leaf.value, contracting, batch)
    return contrib.MuonDimensionNumbers(found.contracting, found.outputs)


def _require_learning_rate(who: str, learning_rate: Any, phase: Any) -> None:
    """Refuses an optimizer without a learning rate."""
    if learning_rate is None and phase is None:
        raise ValueError(
            f"{who}: `learning_rate` is missing, and there is no `phase` to take it from. Pass "
            "learning_rate=1e-3, or a phase such as 'pretrain'."
        )


def _raise_tau_missing(who: str) -> None:
    """Reports logits for which there is no bound."""
    raise ValueError(
        f"{who}: `max_logits` was given to update, and there is no bound. Pass qk_tau=30.0 (or a "
        "phase), or leave max_logits out."
    )
