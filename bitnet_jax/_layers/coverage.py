"""What a model says about its kernels: how each is quantised and met, and why not."""

from __future__ import annotations

import dataclasses
from typing import Any

from bitnet_jax._display import table
from bitnet_jax._quantize.ternary import KernelConfig
from bitnet_jax._tree.pack_report import kind
from bitnet_jax._tree.select import Patterns

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Learned:
    """The kernels that a model uses as quantised, their configs and axes.

    For every function that takes ``select=`` and ``axes=``::

        how = bj.linen.learn(model, params, x)  # or bj.nnx.learn(model)
        bj.trit_stats(params, select=how.select, axes=how.axes)

    Attributes:
      kernels: path to config and the keywords of ``bj.pack``.
    """

    kernels: dict[Path, tuple[KernelConfig, dict[str, tuple[int, ...]]]]

    def select(self, path: Path, leaf: Any) -> KernelConfig | None:
        """The config of a kernel; None for what stays float."""
        del leaf
        return self.kernels[path][0] if path in self.kernels else None

    def axes(self, path: Path, leaf: Any) -> dict[str, tuple[int, ...]] | None:
        """The axes of a kernel, as the keywords of ``bj.pack``; None for other leaves."""
        del leaf
        return self.kernels[path][1] if path in self.kernels else None


def stacked_axes(
    stacks: int, contracting: tuple[int, ...], batch: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """A kernel's axes as the keywords of ``bj.pack``, counted under so many stacked axes."""
    return {
        "contracting_axes": tuple(a + stacks for a in contracting),
        "batch_axes": (*range(stacks), *(a + stacks for a in batch)),
    }


def settle(
    who: str, path: Path, layer: str, config: KernelConfig, why: str | None, select: Any
) -> tuple[KernelConfig | None, str]:
    """A selected kernel's config, or None where ``why`` says that its layer has no ternary form.

    A selector that asks for the kernel by name (``bj.only``) raises instead.
    """
    if why is None:
        return config, "selected"
    if isinstance(select, Patterns) and select.keep:
        _raise_cannot_ternarize(who, "/".join(path), layer, why)
    return None, why


@dataclasses.dataclass(frozen=True)
class Covered:
    """One kernel of a model.

    Attributes:
      path: names joined by ``/``.
      layer: the class that owns it.
      shape: of the parameter, stacked axes included.
      config: how it is quantised; None: it stays float.
      why: what decided it.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    config: KernelConfig | None
    why: str


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What of a model is ternary; ``print`` it or read its rows.

    Attributes:
      rows: one :class:`Covered` for each kernel of rank 2 or more.
    """

    rows: tuple[Covered, ...]

    @property
    def ternary(self) -> tuple[str, ...]:
        """The paths that are quantised."""
        return tuple(row.path for row in self.rows if row.config is not None)

    @property
    def left(self) -> tuple[str, ...]:
        """The paths that stay float."""
        return tuple(row.path for row in self.rows if row.config is None)

    def to_dict(self) -> dict[str, Any]:
        """Path to config (its repr, or None) and reason, as plain Python."""
        return {
            row.path: {
                "layer": row.layer,
                "shape": list(row.shape),
                "config": None if row.config is None else repr(row.config),
                "why": row.why,
            }
            for row in self.rows
        }

    def __str__(self) -> str:
        """A table, one row a kernel."""
        rows = [
            (row.path, row.layer, "x".join(map(str, row.shape)), kind(row.config), row.why)
            for row in self.rows
        ]
        return table(("path", "layer", "shape", "kernel", "why"), rows)


def _raise_cannot_ternarize(who: str, path: str, kind: str, why: str) -> None:
    """Reports a layer that a selector names and that has no ternary form."""
    raise NotImplementedError(
        f"{who}: {path} ({kind}) cannot be ternarised: {why}. Leave it out of `select`, or write "
        "the layer with bj.linen.BitDense and its kin."
    )
