"""Which leaves of a tree are quantised, and how.

A selector is any function ``select(path, leaf)``, with ``path`` a tuple of
names, that returns True, a ``TernaryConfig`` or an ``Int8Config`` to quantise the
leaf, False or None to leave it. :func:`exclude` and :func:`only` build the common ones.
:class:`Kernels` is one that also knows the axes of every kernel.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._display import table
from bitnet_jax._quantize.int8 import Int8Config
from bitnet_jax._quantize.ternary import KernelConfig, TernaryConfig

Path = tuple[str, ...]

Select = Callable[[Path, Any], bool | KernelConfig | None]

AxesOf = Callable[[Path, Any], Mapping[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Patterns:
    """A selector made of patterns; see :func:`exclude` and :func:`only`."""

    patterns: tuple[str, ...]
    keep: bool

    def __call__(self, path: Path, leaf: object = None) -> bool:
        """Whether the leaf at ``path`` is to be quantised."""
        _require_path(path)
        if not self.keep:
            return is_kernel(path, leaf) and not any(match(p, path) for p in self.patterns)
        named = any(
            p.split("/")[-1] == names_of(path)[-1] and match(p, path) for p in self.patterns
        )
        return named or (is_kernel(path, leaf) and any(match(p, path) for p in self.patterns))


def exclude(*patterns: str) -> Patterns:
    """Selects every kernel but those under a matching name.

    A pattern is one or more names of a path joined by ``/``, with ``*`` and
    ``?`` inside a name; it matches wherever those names follow each other.

    Args:
      *patterns: what to leave in float, for example ``"head"``.

    Returns:
      A selector. A pattern of it that matches no path raises when it is used.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> params = {"body": {"kernel": jnp.ones((8, 8))}, "head": {"kernel": jnp.ones((8, 2))}}
      >>> packed, report = bj.pack_params(params, select=bj.exclude("head"))
      >>> [row.path for row in report.rows]
      ['body/kernel']
    """
    return Patterns(_nonempty("exclude", patterns), keep=False)


def only(*patterns: str) -> Patterns:
    """Selects the kernels under a matching name, and no others.

    Args:
      *patterns: as for :func:`exclude`. One whose last name is a leaf's own
        name selects that leaf whatever it is called, for example
        ``"linear/w"`` in a tree of another library.

    Returns:
      A selector. A pattern of it that matches no path raises when it is used.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> tree = {"linear": {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}}
      >>> packed, report = bj.pack_params(tree, select=bj.only("linear/w"))
      >>> packed["linear"]["w"]
      PackedTernary(shape=(8, 8), scale=(1, 1), 20 bytes)
    """
    return Patterns(_nonempty("only", patterns), keep=True)


class KernelUse(NamedTuple):
    """How a model uses one kernel.

    Attributes:
      shape: of the parameter, stacked axes included.
      config: the quantiser.
      axes: the keywords of ``bj.pack``: ``contracting_axes`` and ``batch_axes``.
    """

    shape: tuple[int, ...]
    config: KernelConfig
    axes: Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, repr=False)
class Kernels:
    """The kernels that a model uses as quantised: a selector that brings their axes.

    ``bj.linen.kernels`` and ``bj.nnx.kernels`` return it. Every function that
    takes ``select=`` takes it, and then needs no ``axes=``::

        kernels = bj.linen.kernels(model, params, x)  # or bj.nnx.kernels(model)
        bj.analysis.trit_stats(params, select=kernels)

    Attributes:
      uses: path to :class:`KernelUse`.
    """

    uses: dict[Path, KernelUse]

    def __call__(self, path: Path, leaf: object = None) -> KernelConfig | None:
        """The config of a kernel; None for a leaf that stays float."""
        del leaf
        _require_path(path)
        return self.uses[path].config if path in self.uses else None

    def axes(self, path: Path, leaf: object) -> Mapping[str, tuple[int, ...]] | None:
        """The axes of a kernel, as the keywords of ``bj.pack``; None for other leaves."""
        del leaf
        return self.uses[path].axes if path in self.uses else None

    @property
    def ternary(self) -> Kernels:
        """The same without int8 kernels, for ``trit_stats`` and ``watch_trits``."""
        uses = self.uses.items()
        return Kernels({k: use for k, use in uses if isinstance(use.config, TernaryConfig)})

    def __repr__(self) -> str:
        """A table, one row a kernel."""
        rows = [
            (
                "/".join(path),
                "x".join(map(str, use.shape)),
                str(use.axes["contracting_axes"]),
                str(use.axes["batch_axes"]),
                repr(use.config),
            )
            for path, use in self.uses.items()
        ]
        return table(("path", "shape", "contracting", "batch", "config"), rows)


def _require_path(path: object) -> None:
    """Raises where a selector is called as a schedule of the step."""
    if not isinstance(path, tuple):
        raise TypeError(
            f"select: a selector takes the path of a leaf, a tuple of names, got "
            f"{describe(path)}. optax.inject_hyperparams calls it as a schedule: name it in "
            "static_args=('select',)."
        )


def axes_for(select: Select | None, axes: AxesOf | None) -> AxesOf | None:
    """The ``axes`` that were given, or else those that :class:`Kernels` bring."""
    return select.axes if axes is None and isinstance(select, Kernels) else axes


def is_kernel(path: Path, leaf: object) -> bool:
    """Whether a leaf is a float array of rank 2 or more, named ``kernel`` as Flax names it."""
    dtype = getattr(leaf, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    named = names_of(path)[-1:] == ("kernel",)
    return named and floating and getattr(leaf, "ndim", 0) >= 2


def names_of(path: Path) -> Path:
    """The names of a path; a key such as Haiku's ``"mlp/~/linear_0"`` is several."""
    return tuple("/".join(path).split("/"))


def match(pattern: str, path: Path) -> bool:
    """Whether the names of a pattern follow each other somewhere in a path."""
    names, path = pattern.split("/"), names_of(path)
    runs = (path[i : i + len(names)] for i in range(len(path) - len(names) + 1))
    return any(all(map(fnmatch.fnmatchcase, run, names)) for run in runs)


def choose(
    who: str,
    leaves: Sequence[tuple[Path, object]],
    config: KernelConfig,
    select: Select | None,
) -> list[KernelConfig | None]:
    """The config of each leaf, or None; raises if the selection matches nothing."""
    chosen = [decide(who, path, leaf, config, select) for path, leaf in leaves]
    matched(who, [path for path, _ in leaves], any(chosen), select)
    return chosen


def decide(
    who: str, path: Path, leaf: object, config: KernelConfig, select: Select | None
) -> KernelConfig | None:
    """The config of one leaf, or None."""
    _checks.require_selector(who, select)
    decision = (is_kernel if select is None else select)(path, leaf)
    if isinstance(decision, (TernaryConfig, Int8Config)):
        return decision
    if not (decision is None or isinstance(decision, (bool, np.bool_))):
        _raise_not_a_selection(who, "/".join(path), decision)
    return config if decision else None


def matched(who: str, paths: Sequence[Path], some: bool, select: Select | None) -> None:
    """Raises if a selection chose nothing, or a pattern of it matches no path."""
    names = ["/".join(path) for path in paths]
    patterns = select.patterns if isinstance(select, Patterns) else ()
    for pattern in patterns:
        if not any(match(pattern, path) for path in paths):
            _checks.raise_selector_matches_nothing(
                who, f"the pattern {pattern!r}", names, [pattern]
            )
    if not some:
        by_name = select is None or bool(patterns)
        what = "the default selection (2-D leaves named 'kernel')" if select is None else "`select`"
        remedy = (
            " Patterns select 2-D leaves named 'kernel'; for others pass select=kernels, of "
            "bj.linen.kernels(model, params, x), bj.nnx.kernels(model), ternary.kernels(params, x)."
        )
        near_to = patterns or ("kernel",)
        _checks.raise_selector_matches_nothing(who, what, names, near_to, remedy if by_name else "")


def _nonempty(who: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(
            f"{who}: `patterns` must be one or more names, got {patterns!r}. "
            f"Write for example bj.{who}('head')."
        )
    return patterns


def _raise_not_a_selection(who: str, path: str, value: object) -> NoReturn:
    """Reports a selector that returned something else than a decision."""
    raise TypeError(
        f"{who}: `select` returned {describe(value)} for {path}. Return True or a "
        "TernaryConfig or an Int8Config to quantise the leaf, False or None to leave it."
    )
