"""``budget``: which kernel is kept how, so that all of them fit into so many bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from bitnet_jax import _checks, _display
from bitnet_jax._quantize.config import Int8Config, KernelConfig
from bitnet_jax._tree.pack_report import kind
from bitnet_jax._tree.select import Path
from bitnet_jax.convert._calibration import CalibratedKernel, Calibration
from bitnet_jax.convert._knapsack import cheapest

WHO = "budget"


@dataclasses.dataclass(frozen=True)
class BudgetedKernel:
    """How one kernel is to be kept.

    Attributes:
      path: names joined by ``/``.
      shape: of the float kernel.
      config: the quantiser; None: float.
      bytes: of the kernel kept so.
      change: as of a :class:`CalibratedKernel`.
    """

    path: str
    shape: tuple[int, ...]
    config: KernelConfig | None
    bytes: int
    change: float


@dataclasses.dataclass(frozen=True)
class Budget:
    """How each kernel is to be kept; see :func:`budget`. A selector: pass it as ``select=``.

    Attributes:
      rows: one :class:`BudgetedKernel` for each kernel of the report.
      limit: the bytes that the kernels were allowed.
      predicts: what ``change`` is, as of a :class:`Calibration`.
    """

    rows: tuple[BudgetedKernel, ...]
    limit: int
    predicts: Literal["loss", "error"]

    @property
    def bytes(self) -> int:
        """Bytes of all kernels."""
        return sum(row.bytes for row in self.rows)

    @property
    def change(self) -> float:
        """The sum of the predicted changes. They do not quite add up: measure what comes out."""
        return math.fsum(row.change for row in self.rows)

    def __call__(self, path: Path, leaf: object = None) -> KernelConfig | None:
        """The config of a kernel; None for one in float, and for what is not in the report."""
        del leaf
        where = "/".join(path)
        return next((row.config for row in self.rows if row.path == where), None)

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, ready for ``json.dumps``."""

        def row(one: BudgetedKernel) -> dict[str, Any]:
            named = {"config": repr(one.config), "kind": kind(one.config)}
            return dataclasses.asdict(one) | {"shape": list(one.shape)} | named

        totals = {"bytes": self.bytes, "limit": self.limit, "change": self.change}
        return {"rows": list(map(row, self.rows)), **totals, "predicts": self.predicts}

    def __str__(self) -> str:
        """A table, one row a kernel, then all of them."""
        rows = [
            (row.path, "x".join(map(str, row.shape)), _named(row.config), row.bytes, row.change)
            for row in self.rows
        ]
        rows.append(("all kernels", "", "", self.bytes, self.change))
        paths, shapes, configs, sizes, changes = zip(*rows, strict=True)
        columns = (
            ["path", *paths],
            _display.right("shape", shapes),
            ["kernel", *configs],
            _display.right("bytes", [_display.size_text(size) for size in sizes]),
            _display.right(
                "change" if self.predicts == "loss" else "error", [f"{x:.3g}" for x in changes]
            ),
        )
        header, *body = zip(*columns, strict=True)
        return _display.table(header, body)


def budget(report: Calibration, *, bytes: int) -> Budget:
    """The configs of least predicted change whose kernels fit into so many bytes.

    One option for each kernel, of those that the report compares: a multiple-choice knapsack,
    solved exactly (beyond 2**17 trade-offs, bytes are counted in units of 2**-17 of the
    budget, rounded up). The predicted changes are taken to add up.

    Args:
      report: of ``calibrate(..., candidates=...)``. With ``loss=`` as well, changes of different
        kernels can be compared; without it, relative errors are, which says little.
      bytes: of all kernels of the report together, packed: codes and scales, and float ones as
        they are. Whatever else the model holds is not counted.

    Returns:
      A :class:`Budget`: print it, and ternarise and calibrate again with it as ``select=``.

    Raises:
      TypeError: ``report`` is none, or ``bytes`` is no integer.
      ValueError: a report without candidates, or with a change that is not finite; fewer bytes
        than the kernels take at the least, which is named.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
      >>> params, batches = {"a": normal(0, 64, 64), "b": normal(1, 64, 8)}, [normal(2, 32, 64)]
      >>> fn = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> _, report = bj.convert.calibrate(
      ...     bj.ternarize(fn), params, batches, method="weighted",
      ...     loss=lambda y, x: y, candidates=[bj.Int8Config()],
      ... )
      >>> choice = bj.convert.budget(report, bytes=2000)
      >>> [(row.path, row.bytes) for row in choice.rows], choice(("b",))
      ([('a', 1028), ('b', 544)], Int8Config(eps=1e-08))
      >>> ternary = bj.ternarize(fn, select=choice)
      >>> packed, report = bj.convert.calibrate(ternary, params, batches, method="weighted")

    References:
      Dong et al., HAWQ-V2, arXiv:1911.03852, for configs from second-order sensitivities;
      Nemhauser and Ullmann, Management Science 15 (1969), for the lists of trade-offs.
    """
    _checks.require_instance(
        WHO, "report", report, Calibration, "Pass the report of bj.convert.calibrate."
    )
    _require_options(report.rows)
    if not _checks.is_integer(bytes):
        raise TypeError(
            f"{WHO}: `bytes` must be an integer, got {_checks.describe(bytes)}. Pass for example "
            "int(0.1 * size)."
        )
    items = [
        ([o.bytes for o in row.options], [o.change for o in row.options]) for row in report.rows
    ]
    picked = cheapest(items, int(bytes))
    if picked is None:
        _raise_too_few(int(bytes), sum(min(sizes) for sizes, _ in items))
    rows = tuple(_row(row, at) for row, at in zip(report.rows, picked, strict=True))
    return Budget(rows, int(bytes), report.predicts)


def _row(row: CalibratedKernel, at: int) -> BudgetedKernel:
    option = row.options[at]
    return BudgetedKernel(row.path, row.shape, option.config, option.bytes, option.change)


def _named(config: KernelConfig | None) -> str:
    """A config in a few words: the kind, what shares a scale, and a rotation."""
    if config is None or isinstance(config, Int8Config):
        return kind(config)
    shared = config.granularity
    planes = "ternary" if config.planes == 1 else f"{config.planes} planes"
    rotation = "" if config.rotation is None else ", rotated"
    return f"{planes}, {shared if isinstance(shared, str) else f'groups of {shared}'}{rotation}"


def _require_options(rows: Sequence[CalibratedKernel]) -> None:
    """Raises unless a report compares options, each with a finite change."""
    for row in rows:
        if not row.options:
            raise ValueError(
                f"{WHO}: `report` compares no configs of {row.path}. Calibrate with "
                "candidates=bj.convert.CANDIDATES, or with a list of your own configs."
            )
        for option in row.options:
            if not math.isfinite(option.change):
                raise ValueError(
                    f"{WHO}: the predicted change of {row.path} as {_named(option.config)} is "
                    f"{option.change}. Look at this kernel's row of the report: its weights or "
                    "its outputs may all be 0. Leave it out of the selection."
                )


def _raise_too_few(bytes: int, least: int) -> NoReturn:
    """Reports a budget that cannot be met."""
    raise ValueError(
        f"{WHO}: `bytes`={bytes} is less than the kernels take at the least, {least} with the "
        f"report's candidates. Pass bytes={least} or more, or calibrate with coarser candidates."
    )
