"""What conversion without training loses, and how well its report tells what it will lose.

    python tests/benchmarks/calibration.py --seeds 3              every table
    python tests/benchmarks/calibration.py --only ViT             one network
    python tests/benchmarks/calibration.py --quick                a few steps, a smoke test

The vision transformer and the convolutional network of ``examples/unedited.py`` on digits, and
the decoder of ``examples/language_model.py`` on bytes, trained in float as there. Four batches of
training data calibrate each of them.

The first tables: all kernels packed by one method, int8 inputs. Groups are of as many inputs as
divide a kernel's contraction, 128 at most. Of the images' networks what meets pixels and classes
is int8, as in the example.

``Report``: Spearman's rank correlation, over kernels, of the predicted changes of the loss with
those that ``bj.analysis.sensitivity`` measures on the same data. ``Budget``: one config for all
kernels against ``bj.convert.budget``'s choice in no more bytes. Both are of weights alone, and of
all kernels.

A figure is a median over seeds; a column "by seed" has them all.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from _bench import machine, parse, record, results, table
from _networks import (
    Network,
    Rule,
    Trained,
    configs,
    contractions,
    decoder,
    groups,
    images,
    labelled,
    losses_of,
    scores_of,
    whole,
)
from scipy.stats import spearmanr
from tqdm import tqdm

import bitnet_jax as bj

import unedited  # isort: skip  # _bench adds its folder

# Methods.

METHODS: dict[str, tuple[Rule, str]] = {
    "absmean, one scale": (whole("tensor"), "absmean"),
    "absmean": (groups(128), "absmean"),
    "survivors": (groups(128), "survivors"),
    "weighted": (groups(128), "weighted"),
    "gptq": (groups(128), "gptq"),
    "two planes, absmean": (groups(128, planes=2), "absmean"),
    "two planes, planes": (groups(128, planes=2), "planes"),
    "two planes, gptq": (groups(128, planes=2), "gptq"),
}
FLOAT = "float32"


class Packed(NamedTuple):
    """A network kept in some way: what it loses, and its bytes."""

    loss: float
    accuracy: float
    bytes: int


def by_method(
    network: Network, net: Trained, compiled: dict[str, Any], names: Sequence[str]
) -> dict[str, Packed]:
    """The network converted by each method; ``compiled`` keeps functions for the next seed."""
    lengths = contractions(network.apply, net)
    found = {FLOAT: Packed(*network.scores(net.params, net.test), bytes_of(net.params))}
    for name in names:
        rule, method = METHODS[name]
        if name not in compiled:
            select = with_ends(network, configs(lengths, rule))
            ternary = bj.ternarize(network.apply, select=select)
            compiled[name] = ternary, scores_of(ternary)
        ternary, scores = compiled[name]
        inputs = [x for x, _ in net.batches]
        packed, _ = bj.convert.calibrate(ternary, net.params, inputs, method=method)
        loss, accuracy = scores(packed, net.test)
        found[name] = Packed(loss, accuracy, bytes_of(packed))
    return found


def with_ends(network: Network, select: Any) -> Any:
    """A selector whose first and last layers are int8 where the network's are to be."""

    def chosen(path: tuple[str, ...], leaf: Any) -> Any:
        ends = unedited.first_and_last_at_eight_bits(path, leaf) if network.ends else None
        return ends if isinstance(ends, bj.Int8Config) else select(path, leaf)

    return chosen


def bytes_of(params: Any) -> int:
    """Of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def seeds_cell(values: Sequence[float], digits: int, sign: str = "") -> str:
    """All seeds' figures."""
    return " ".join(f"{value:{sign}.{digits}f}" for value in values)


def method_rows(seeds: Sequence[dict[str, Packed]]) -> list[list[str]]:
    """Accuracy, points behind float, loss, and nats above float: medians, and by seed."""
    rows = []
    for name in seeds[0]:
        mine, base = [s[name] for s in seeds], [s[FLOAT] for s in seeds]
        behind = [b.accuracy - m.accuracy for m, b in zip(mine, base, strict=True)]
        above = [m.loss - b.loss for m, b in zip(mine, base, strict=True)]
        gaps = ["", "", "", ""]
        if name != FLOAT:
            gaps = [f"{statistics.median(behind):.2f}", seeds_cell(behind, 2)]
            gaps += [f"{statistics.median(above):+.3f}", seeds_cell(above, 3, "+")]
        accuracy, loss = (
            statistics.median(getattr(m, k) for m in mine) for k in Packed._fields[1::-1]
        )
        rows.append(
            [name, f"{mine[0].bytes:,}", f"{accuracy:.2f}", *gaps[:2], f"{loss:.3f}", *gaps[2:]]
        )
    return rows


METHOD_HEADER = (
    "",
    "bytes",
    "accuracy, %",
    "points behind",
    "by seed",
    "loss, nats",
    "above float",
    "by seed",
)


# The report.

LOSSES: dict[str, Callable[..., jax.Array]] = {
    "loss": lambda logits, x, y: losses_of(logits, y),
    "logits": lambda logits, *args: logits,
}
REPORTED: dict[str, bj.TernaryConfig] = {
    "one scale a kernel": bj.B158,
    "one scale an output": bj.TernaryConfig(granularity="channel"),
    "the same, of survivors": bj.TWN,
}


def correlations(network: Network, net: Trained) -> dict[str, dict[str, float]]:
    """By config, Spearman's correlation of each prediction with what is measured."""

    def loss(params: Any) -> jax.Array:
        return losses_of(network.apply(params, net.seen[0]), net.seen[1]).mean()

    measured = {}
    for name, config in REPORTED.items():
        kernels = bj.ternarize(network.apply, weights=config).kernels(net.params, net.seen[0])
        found = bj.analysis.sensitivity(loss, net.params, select=kernels)
        measured[name] = {row.path: row.change for row in found.rows}
    ranks: dict[str, dict[str, float]] = {name: {} for name in REPORTED}
    ternary = bj.ternarize(labelled(network.apply), activations=None)
    for what, each in LOSSES.items():
        _, report = bj.convert.calibrate(
            ternary,
            net.params,
            net.batches,
            method="absmean",
            loss=each,
            candidates=[*REPORTED.values()],
        )
        for name, config in REPORTED.items():
            options = [next(o for o in row.options if o.config == config) for row in report.rows]
            true = [measured[name][row.path] for row in report.rows]
            ranks[name][what] = rank(true, [option.change for option in options])
            ranks[name]["error"] = rank(true, [option.error for option in options])
    return ranks


def rank(true: Sequence[float], predicted: Sequence[float]) -> float:
    """Spearman's correlation."""
    return float(np.asarray(spearmanr(true, predicted))[0])


def report_rows(name: str, seeds: Sequence[dict[str, dict[str, float]]]) -> list[list[str]]:
    """For each config the median correlation, and by seed, of each prediction."""
    rows = []
    for config in seeds[0]:
        row = [f"{name}, {config}"]
        for what in ("loss", "logits", "error"):
            values = [seed[config][what] for seed in seeds]
            row += [f"{statistics.median(values):.2f}", seeds_cell(values, 2)]
        rows.append(row)
    return rows


REPORT_HEADER = ("", "by the loss", "by seed", "by logits", "by seed", "by the error", "by seed")


# Budgets.

SIZES: dict[str, Rule] = {
    "one scale an output": whole("channel"),
    "groups of 32": groups(32),
    "two planes": whole("channel", planes=2),
}
OTHERS: tuple[Rule, ...] = (whole("tensor"), lambda _: bj.Int8Config())


class Chosen(NamedTuple):
    """All kernels by one config, and what a budget of as many bytes chose by each prediction."""

    limit: int
    uniform: float  # held-out loss in nats
    bytes: dict[str, int]
    losses: dict[str, float]
    kinds: dict[str, Counter[str]]


def budgets(network: Network, net: Trained) -> dict[str, Chosen]:
    """By size, the losses of one config for all and of a budget's choice; ``"gptq"`` for all."""
    lengths, inputs = contractions(network.apply, net), [x for x, _ in net.batches]

    def converted(select: Any) -> tuple[float, int]:
        ternary = bj.ternarize(network.apply, select=select, activations=None)
        packed, _ = bj.convert.calibrate(ternary, net.params, inputs)
        floats = bj.unpack_params(packed, dequantize=True)
        kernels = filter(bj.is_packed, jax.tree.leaves(packed, is_leaf=bj.is_packed))
        return network.scores(floats, net.test)[0], sum(kernel.nbytes for kernel in kernels)

    every = [rule(kernel) for rule in (*SIZES.values(), *OTHERS) for kernel in lengths.values()]
    own = configs(lengths, SIZES["one scale an output"])
    ternary = bj.ternarize(labelled(network.apply), select=own, activations=None)
    reports = {}
    for what, each in LOSSES.items():
        _, reports[what] = bj.convert.calibrate(
            ternary, net.params, net.batches, loss=each, candidates=every
        )
    found = {}
    for name, rule in SIZES.items():
        loss, limit = converted(configs(lengths, rule))
        found[name] = Chosen(limit, loss, {}, {}, {})
        for what, report in reports.items():
            choice = bj.convert.budget(report, bytes=limit)
            found[name].losses[what], _ = converted(choice)
            found[name].bytes[what] = choice.bytes
            kinds = Counter(row["kind"] for row in choice.to_dict()["rows"])
            found[name].kinds[what] = kinds
    return found


def budget_rows(network: str, seeds: Sequence[dict[str, Chosen]]) -> list[list[str]]:
    """For each size the bytes, the uniform loss, and the losses of choices less it, by seed."""
    rows = []
    for name in seeds[0]:
        mine = [seed[name] for seed in seeds]
        row = [f"{network}, {name}", f"{mine[0].limit:,}"]
        row.append(f"{statistics.median(m.uniform for m in mine):.3f}")
        for what in LOSSES:
            row.append(f"{statistics.median(m.losses[what] for m in mine):.3f}")
            row.append(seeds_cell([m.losses[what] - m.uniform for m in mine], 3, "+"))
        row.append(", ".join(f"{n} {kind}" for kind, n in mine[0].kinds["logits"].most_common()))
        rows.append(row)
    return rows


BUDGET_HEADER = (
    "",
    "bytes",
    "uniform, nats",
    "by the loss",
    "less uniform, by seed",
    "by logits",
    "less uniform, by seed",
    "kernels of the first seed, by logits",
)


# Everything.

Found = dict[str, dict[str, list[Any]]]  # by network and part, of each seed


def tables(found: Found) -> list[results.Table]:
    """What is known so far: titles, headers, rows."""
    shown = [
        results.Table(
            f"{name}, packed without training", METHOD_HEADER, method_rows(parts["methods"])
        )
        for name, parts in found.items()
        if "methods" in parts
    ]
    for part, title, header, rows_of in (
        ("report", "Report: rank correlation of predicted changes", REPORT_HEADER, report_rows),
        ("budget", "Budget against one config for all", BUDGET_HEADER, budget_rows),
    ):
        rows = [r for name, p in found.items() if part in p for r in rows_of(name, p[part])]
        if rows:
            shown.append(results.Table(title, header, rows))
    return shown


def main() -> None:
    """Trains, converts, prints every table; records them after each seed, too."""
    networks = {n.name: n for n in (images(unedited.ViT()), images(unedited.ConvNet()), decoder())}
    parts = ("methods", "report", "budget")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=networks, default=list(networks))
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--quick", action="store_true", help="a few steps, and two methods")
    args = parse(parser)
    share, names = (0.02, ["weighted", "two planes, gptq"]) if args.quick else (1.0, list(METHODS))
    machine()
    found: Found = {}
    with tqdm(total=args.seeds * len(args.only) * len(args.parts), disable=None) as bar:
        for name, network in ((name, networks[name]) for name in args.only):
            compiled: dict[str, Any] = {}
            for seed in range(args.seeds):
                bar.set_description(f"{name}, seed {seed}")
                net = network.trained(seed, share)
                for part in args.parts:
                    run = {
                        "methods": functools.partial(by_method, compiled=compiled, names=names),
                        "report": correlations,
                        "budget": budgets,
                    }[part]
                    found.setdefault(name, {}).setdefault(part, []).append(run(network, net))
                    bar.update()
                results.save(args.json, *tables(found))
    for shown in tables(found):
        table(*shown)
    record(args)


if __name__ == "__main__":
    main()
