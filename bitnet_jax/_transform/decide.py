"""Which of a program's leaves are quantised, and why the others are not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

from bitnet_jax import _checks
from bitnet_jax._layers.forward import LayerConfig
from bitnet_jax._quantize.config import ActivationConfig, Int8Config, KernelConfig
from bitnet_jax._quantize.int8 import require_activation_groups, require_no_activation_groups
from bitnet_jax._quantize.kernel_spec import contraction_spec
from bitnet_jax._quantize.rotation import require_rotated_channels
from bitnet_jax._transform.lookups import raise_not_rows
from bitnet_jax._transform.marks import Found, Use
from bitnet_jax._tree.select import Patterns, Select, decide, is_kernel, match, matched

WHO = "ternarize"

UNREACHED = "no product reaches it"

NOT_SELECTED = "not selected"

EMBEDDING = "an embedding; select it with an Int8Config"

# What a program is of its function: all of it; one call, which may leave kernels for others; or a
# part, in which there need be none.
Extent = Literal["whole", "call", "part"]


class Candidate(NamedTuple):
    """A leaf of two and more axes.

    Attributes:
      path: its names.
      leaf: its shape and dtype.
    """

    path: tuple[str, ...]
    leaf: Any

    @property
    def where(self) -> str:
        """The names joined by ``/``; of params that are one array, ``params``."""
        return "/".join(self.path) or "params"


class Decision(NamedTuple):
    """What becomes of one leaf.

    Attributes:
      config: how it is quantised; None: it stays float.
      why: what decided it.
      refusal: the error that a call raises; None: it runs.
      own: whether its own layer quantises it, whatever is selected.
    """

    config: KernelConfig | None
    why: str
    refusal: Exception | None = None
    own: bool = False


def decide_all(
    candidates: Sequence[Candidate | None],
    found: Found,
    layer: LayerConfig,
    select: Any,
    tables: Collection[tuple[str, ...]] = (),
) -> list[Decision | None]:
    """The decision for each leaf; None in the place of what is no candidate."""
    uses: dict[int, list[Use]] = {}
    for use in found.uses:
        uses.setdefault(use.leaf, []).append(use)
    reaches = [
        None if one is None else _Reach(i, one, uses.get(i, []), found, candidates)
        for i, one in enumerate(candidates)
    ]
    weights = layer.weights
    defaults = [None if reach is None else reach.by_default(weights, tables) for reach in reaches]
    wanted = [
        None if one is None else _selected(one, weights, select, default is None)
        for one, default in zip(candidates, defaults, strict=True)
    ]
    return [
        None if reach is None else _decide(reach, default, wanted, select, layer.activations)
        for reach, default in zip(reaches, defaults, strict=True)
    ]


def _decide(
    reach: _Reach,
    default: str | None,
    wanted: Sequence[KernelConfig | None],
    select: Select | None,
    activations: ActivationConfig | None,
) -> Decision:
    config, where = wanted[reach.number], reach.one.where
    stated = reach.stated
    if stated is not None:
        refusal = reach.refusal()
        return Decision(None if refusal else stated, reach.beside("selected"), refusal, True)
    if config is None:
        given = select is not None and not (isinstance(select, Patterns) and not select.keep)
        left_out = given or default is None
        return Decision(None, NOT_SELECTED if left_out else str(default))
    refusal = reach.refusal()
    if refusal is not None:
        return Decision(None, "refused", refusal)
    why = reach.problem(config) or reach.meets_another(wanted)
    if why is None:
        refusal = reach.unfit(config, activations)
        return Decision(None if refusal else config, reach.beside("selected"), refusal)
    if isinstance(select, Patterns) and select.keep:
        return Decision(None, why, _cannot_ternarize(where, why))
    return Decision(None, why)


def _selected(
    one: Candidate, weights: KernelConfig, select: Select | None, default: bool
) -> KernelConfig | None:
    """The config that a selector gives a leaf, by the default rule of functions."""
    if select is not None and not isinstance(select, Patterns):
        return decide(WHO, one.path, one.leaf, weights, select)
    if select is None:
        return weights if default else None
    meant = any(match(p, one.path) for p in select.patterns)
    if not select.keep:
        return weights if default and not meant else None
    named = select(one.path, one.leaf)
    return weights if named or (meant and (default or is_kernel(one.path, one.leaf))) else None


class _Reach(NamedTuple):
    """What one leaf reaches."""

    number: int
    one: Candidate
    uses: list[Use]
    found: Found
    candidates: Sequence[Candidate | None]

    @property
    def stated(self) -> KernelConfig | None:
        """The config of the layer of ours that the leaf belongs to."""
        return next((u.stated.weights for u in self.uses if u.stated is not None), None)

    def by_default(self, weights: KernelConfig, tables: Collection[tuple[str, ...]]) -> str | None:
        """None where a leaf is quantised unless it is told otherwise; else why it is not."""
        if self.one.path in tables or any(use.primitive == "gather" for use in self.uses):
            return EMBEDDING
        met = {u.partner for u in self.uses if u.partner is not None and not u.beside}
        if met - {self.number} or len(self.uses) == sum(u.partner is not None for u in self.uses):
            for partner in sorted(met):
                return self._meets(partner)
        if self.number in self.found.missing:
            return None  # refused, and not left in float without a word
        return self.problem(weights)

    def meets_another(self, wanted: Sequence[KernelConfig | None]) -> str | None:
        """Which other leaf that is to be quantised this one meets, where neither is an input."""
        for use in self.uses:
            if use.partner is not None and not use.beside and wanted[use.partner] is not None:
                return self._meets(use.partner)
        return None

    def _meets(self, partner: int) -> str:
        if partner == self.number:
            return "it meets itself"
        other = self.candidates[partner]
        return f"it meets the parameter {'' if other is None else other.where}, not an input"

    def refusal(self) -> Exception | None:
        """Why a program cannot run with this leaf quantised, whoever asked for it."""
        where = self.one.where
        if self.number in self.found.missing:
            return _rule_missing(where, *self.found.missing[self.number])
        if any(use.partner == self.number for use in self.uses):
            return _used_two_ways(where, "on both sides of a product: it meets itself")
        axes = {(use.contracting, use.batch) for use in self.uses if use.problem is None}
        if len(axes) > 1 and self.number not in self.found.changed:
            both = " and ".join(str(contracting) for contracting, _ in sorted(axes)[:2])
            return _used_two_ways(where, f"over axes {both}")
        if len({use.stated for use in self.uses}) > 1:
            return _used_two_ways(where, "by two configs, or as ternary and as float")
        return None

    def problem(self, config: KernelConfig) -> str | None:
        """Why a leaf has no quantised form here; None: it has."""
        changed = self.found.changed.get(self.number)
        if changed is not None:
            return f"`{changed}` changes it before it is multiplied"
        if not self.uses:
            names = self.found.read.get(self.number)
            return f"{UNREACHED}, only `{names[0]}`" if names else UNREACHED
        for use in self.uses:
            if use.problem is not None:
                return use.problem
        if not isinstance(config, Int8Config) and any(u.primitive == "gather" for u in self.uses):
            return "rows are looked up in it: it takes an Int8Config"
        return None

    def unfit(self, config: KernelConfig, activations: ActivationConfig | None) -> Exception | None:
        """Why configs are none for the shape and the axes of this leaf."""
        use = self.uses[0]
        who = f"{WHO}: {self.one.where}"
        try:
            contraction_spec(who, self.one.leaf, config, use.contracting, use.batch)
            for use in self.uses:
                if use.primitive == "conv_general_dilated":
                    require_no_activation_groups(who, activations)
                    require_rotated_channels(who, config, use.channels_last)
                elif use.primitive != "gather":
                    lengths = tuple(self.one.leaf.shape[a] for a in use.contracting)
                    require_activation_groups(who, activations, lengths)
        except ValueError as error:
            return error
        return None

    def beside(self, why: str) -> str:
        """What else is done with a leaf."""
        if self.number in self.found.custom:
            name = self.found.custom[self.number].removesuffix("_call")
            why = f"{why}; the derivative that its `{name}` gives is not used"
        names = self.found.read.get(self.number)
        return f"{why}; `{names[0]}` reads it as float" if names else why


def check_decisions(
    candidates: Sequence[Candidate | None],
    decisions: Sequence[Decision | None],
    select: Select | None,
    extent: Extent,
) -> None:
    """Raises the first refusal; refuses a selection that chose nothing."""
    there = [decision for decision in decisions if decision is not None]
    for decision in there:
        missed = decision.why.startswith(UNREACHED) and extent != "whole"
        if decision.refusal is not None and not missed:
            raise decision.refusal
    if extent == "part":
        return
    if extent == "whole":
        check_patterns(candidates, select)
    left_over = select is None or (isinstance(select, Patterns) and not select.keep)
    some = any(d.config is not None and (left_over or not d.own) for d in there)
    waiting = extent == "call" and any(d.why == UNREACHED for d in there)
    if not some and not waiting:
        pairs = zip(candidates, decisions, strict=True)
        rows = [f"{c.where}: {d.why}" for c, d in pairs if c is not None and d is not None]
        _raise_nothing_chosen(select is not None, rows)


def check_patterns(candidates: Sequence[Candidate | None], select: Select | None) -> None:
    """Raises if a pattern names nothing: it is a misspelt one."""
    if isinstance(select, Patterns):
        matched(WHO, [one.path for one in candidates if one is not None], True, select)


def _raise_nothing_chosen(given: bool, rows: Sequence[str]) -> NoReturn:
    """Reports a function of which no leaf is quantised."""
    what = "`select` matches nothing" if given else "nothing can be quantised"
    listed = "; ".join(rows[:8]) + ("; ..." if len(rows) > 8 else "")
    hint = listed or "`params` holds no float array of two axes and more. Is argnums= right?"
    raise ValueError(f"{WHO}: {what} of what this function multiplies. {hint}")


def _cannot_ternarize(path: str, why: str) -> Exception:
    """For a leaf that a selector names and that has no ternary form."""
    return NotImplementedError(
        f"{WHO}: {path} cannot be ternarised: {why}. Leave it out of `select`, or multiply it "
        "as it is stored."
    )


def _rule_missing(path: str, primitive: str, scope: str) -> Exception:
    """For a leaf that enters code that the interpreter cannot read."""
    at = f" at {scope}" if scope else ""
    return NotImplementedError(
        f"{WHO}: an interpreter rule is missing for `{primitive}`{at}, which {path} enters. Leave "
        "the leaf in float (select=bj.exclude(...)), multiply it outside, or open an issue that "
        "names the primitive."
    )


def _used_two_ways(path: str, how: str) -> Exception:
    """For a leaf that no one packed form serves."""
    return ValueError(
        f"{WHO}: the kernel at {path} is used {how}. Give each use a kernel of its own, or leave "
        "it in float (select=). If the function takes gradients, ternarise the function that it "
        "differentiates."
    )


def require_packable(
    candidates: Sequence[Candidate | None], decisions: Sequence[Decision | None], found: Found
) -> None:
    """Refuses to pack a leaf that the function also reads as float: packed, it has no floats."""
    _checks.require_leaves("pack", "params", len(candidates))
    for i, (one, decision) in enumerate(zip(candidates, decisions, strict=True)):
        names = found.read.get(i)
        if one is None or decision is None or decision.config is None:
            continue
        if i in found.not_rows:
            raise_not_rows(one.where)
        if names:
            raise ValueError(
                f"pack: `{names[0]}` also reads the kernel at {one.where} as float, and packed it "
                "has none. Take that computation out of the function, or leave the kernel in "
                "float (select=)."
            )
