"""Which kernels of a model are quantised, over which axes, and why the others are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from bitnet_jax._display import table
from bitnet_jax._quantize.ternary import KernelConfig
from bitnet_jax._tree.pack_report import kind
from bitnet_jax._tree.select import Path, Patterns, Select

# Why a row says nothing yet.
BY_CALL = "decided where it is multiplied: explain(model, *args)"


def stacked_axes(
    stacks: int, contracting: tuple[int, ...], batch: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """A layer's axes as the keywords of ``bj.pack``, for a kernel with stacked axes in front."""
    return {
        "contracting_axes": tuple(a + stacks for a in contracting),
        "batch_axes": (*range(stacks), *(a + stacks for a in batch)),
    }


def settle(
    who: str, path: Path, layer: str, config: KernelConfig, why: str | None, select: Select | None
) -> tuple[KernelConfig | None, str]:
    """A selected kernel's config, or None where ``why`` says that its layer has no ternary form.

    A selector that asks for the kernel by name (``bj.only``) raises instead.
    """
    if why is None:
        return config, "selected"
    if isinstance(select, Patterns) and select.keep:
        _raise_cannot_ternarize(who, "/".join(path), layer, why)
    return None, why


def raise_none_ternary(who: str, reasons: Mapping[str, str]) -> NoReturn:
    """Reports a selection that matches kernels of which none has a ternary form.

    ``reasons`` maps the paths of the selected kernels to why each stays float.
    """
    paths: dict[str, list[str]] = {}
    for path, why in reasons.items():
        paths.setdefault(why, []).append(path)
    shown = "; ".join(
        ", ".join(those[:8])
        + (f" and {len(those) - 8} more" if len(those) > 8 else "")
        + f": {why}"
        for why, those in paths.items()
    )
    raise ValueError(
        f"{who}: `select` matches kernels, and none of them has a ternary form ({shown}). Dense, "
        "DenseGeneral, Conv and Einsum have one (nnx: Linear, LinearGeneral, Conv and Einsum), and "
        "Embed with a bj.Int8Config. Write the layer with BitDense and its kin, or leave the "
        "model in float."
    )


@dataclasses.dataclass(frozen=True)
class Covered:
    """One kernel of a model.

    Attributes:
      path: names joined by ``/``.
      layer: the class that owns it.
      shape: of the parameter, stacked axes included.
      config: the quantiser; None: the kernel stays float.
      why: ``"selected"``, or the reason that it stays float.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    config: KernelConfig | None
    why: str

    @property
    def kind(self) -> str:
        """``"ternary"``, ``"int8"``, ``"float"``; ``"by call"`` where a call decides."""
        return "by call" if self.why == BY_CALL else kind(self.config)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which kernels of a model are quantised; ``print`` it or read its rows.

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
        return tuple(row.path for row in self.rows if row.kind == "float")

    def to_dict(self) -> dict[str, Any]:
        """Every row as plain Python, ready for ``json.dumps``.

        Returns:
          ``{"rows": [{"path": ..., "layer": ..., "shape": ..., "config": ..., "kind":
          ..., "why": ...}, ...]}``; the config of a float kernel is None.
        """

        def plain(row: Covered) -> dict[str, Any]:
            more = {"shape": list(row.shape), "kind": row.kind}
            return dataclasses.asdict(row) | more

        return {"rows": [plain(row) for row in self.rows]}

    def __str__(self) -> str:
        """A table, one row a kernel."""
        rows = [
            (row.path, row.layer, "x".join(map(str, row.shape)), row.kind, row.why)
            for row in self.rows
        ]
        return table(("path", "layer", "shape", "kernel", "why"), rows)


def _raise_cannot_ternarize(who: str, path: str, kind: str, why: str) -> NoReturn:
    """Reports a layer that a selector names and that has no ternary form."""
    raise NotImplementedError(
        f"{who}: {path} ({kind}) cannot be ternarised: {why}. Leave it out of `select`, or write "
        "the layer with bj.linen.BitDense and its kin."
    )
