"""The report of packing: its numbers, its table, its plot."""

import functools
import itertools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from draws import params_of
from flax import linen as nn
from matplotlib.backends.backend_agg import FigureCanvasAgg

import bitnet_jax as bj
from bitnet_jax._tree import pack_report


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@cases(
    "config",
    {"b158": bj.B158, "phase4": bj.PHASE4, "twn": bj.TWN, "5": bj.TernaryConfig(granularity=5)},
    core=["phase4", "5"],
)
@cases("shape", [(30, 7), (35, 8)], core=[(35, 8)])
def test_numbers_are_counted_from_the_arrays(config, shape):
    w = normal(*shape)
    params = {"layer": {"kernel": w, "bias": jnp.zeros(shape[1])}, "steps": jnp.arange(3)}
    packed, report = bj.pack_params(params, config)
    (layer,) = report.rows
    codes = np.asarray(bj.quantize(w, config).codes)
    assert [layer.minus, layer.zero, layer.plus] == [(codes == c).sum() for c in (-1, 0, 1)]
    leaf = packed["layer"]["kernel"]
    scale = np.asarray(leaf.scale)
    assert (layer.scale_min, layer.scale_max) == (scale.min(), scale.max())
    exact, hat = np.asarray(w, np.float64), np.asarray(leaf.dequantize(), np.float64)
    np.testing.assert_allclose(layer.error, ((exact - hat) ** 2).sum() / (exact**2).sum(), 1e-5)
    assert layer.shape == shape
    assert layer.config == config
    assert layer.bytes_before == 4 * w.size
    assert layer.bytes_after == -(-shape[0] // 4) * shape[1] + 4 * scale.size
    stored = -(-shape[0] // 4) * shape[1]
    assert layer.bytes_dense == 4 * -(-stored // 5) + 4 * scale.size
    rest = 4 * shape[1] + 12
    assert report.model_bytes_before == layer.bytes_before + rest
    assert report.model_bytes_after == layer.bytes_after + rest
    assert report.model_bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    assert report.ratio == layer.ratio == layer.bytes_before / layer.bytes_after


@cases(
    ("config", "error"),
    {
        "0.1": (bj.TernaryConfig(threshold=0.1), 0.327),
        "b158": (bj.B158, 0.263),
        "survivors": (bj.TernaryConfig(scale="survivors", threshold=0.7), 0.190),
    },
    core=["b158"],
)
def test_error_of_gaussian_weights(config, error):
    _, report = bj.pack_params({"kernel": normal(512, 512)}, config)
    assert abs(report.rows[0].error - error) < 0.005


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_error_of_huge_and_tiny_weights_is_finite(magnitude):
    _, report = bj.pack_params({"kernel": normal(8, 8) * magnitude})
    assert 0 < report.rows[0].error <= 1.0


def test_a_kernel_of_zeros_has_no_error_to_speak_of():
    _, report = bj.pack_params({"kernel": jnp.zeros((8, 8))})
    assert math.isnan(report.rows[0].error)
    assert report.to_dict()["rows"][0]["error"] is None


class MLP(nn.Module):
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for size in self.sizes:
            x = bj.linen.BitDense(size)(x)
        return x


@cases(
    ("inputs", "sizes", "count", "ratio"),
    {
        "small": (128, (128, 128, 128, 10), 50_826, 14.3),
        "large": (2048, (4096, 2048, 2048, 2048), 25_176_064, 15.9),
    },
    core=["small"],
)
def test_whole_model_ratio(inputs, sizes, count, ratio):
    params = params_of(MLP(sizes), jax.ShapeDtypeStruct((1, inputs), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    _, report = bj.pack_params(params)
    assert report.model_ratio >= ratio


@functools.cache
def report_of(layers):
    return bj.pack_params({f"block_{i}": {"kernel": normal(16, 8)} for i in range(layers)})[1]


def test_table_and_dict():
    report = report_of(3)
    text = str(report)
    for wanted in (
        "block_0/kernel",
        "block_1/kernel",
        "block_2/kernel",
        "16x8",
        "ternary kernels",
        "whole model",
    ):
        assert wanted in text
    assert len({line.rindex("x") for line in text.splitlines()[1:]}) == 1  # ratios line up
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["rows"][1]["config"]["threshold"] == 0.5
    assert plain["rows"][1]["shape"] == [16, 8]
    sizes = {name: plain["model"][name] for name in plain["ternary"]}
    assert sizes == plain["ternary"]
    assert plain["model"]["ratio"] == report.model_ratio


@cases("layers", [1, 12], core=[1])
def test_plot_writes_a_picture(tmp_path, layers):
    path = tmp_path / "weights.png"
    report_of(layers).plot(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 5_000


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'bitnet_jax\[plot\]'"):
        report_of(1).plot(tmp_path / "weights.png")


@functools.cache
def mixed():
    """Three kernels with their own configs and dtypes, among float leaves."""
    params = {
        "a": {"kernel": normal(30, 7), "bias": jnp.zeros(7)},
        "b": {"kernel": normal(16, 8, seed=1).astype(jnp.bfloat16)},
        "c": {"kernel": normal(33, 5, seed=2), "norm": jnp.ones(5, jnp.bfloat16)},
        "embed": {"embedding": normal(9, 4, seed=3)},
    }
    configs = {"a": bj.PHASE4, "b": bj.B158, "c": bj.TernaryConfig(granularity=11)}

    def select(path, leaf):
        return configs.get(path[0]) if path[-1] == "kernel" else None

    return params, *bj.pack_params(params, select=select)


def test_totals_are_sums_of_the_arrays():
    params, packed, report = mixed()
    assert [layer.path for layer in report.rows] == ["a/kernel", "b/kernel", "c/kernel"]
    kernels = [params[name]["kernel"] for name in "abc"]
    # ceil(K / 4) bytes a column, and 4 bytes a scale.
    after = [8 * 7 + 4 * 7, 4 * 8 + 4, 9 * 5 + 4 * 15]
    assert [layer.bytes_before for layer in report.rows] == [4 * 210, 2 * 128, 4 * 165]
    assert [layer.bytes_after for layer in report.rows] == after
    assert report.bytes_before == sum(w.nbytes for w in kernels)
    assert report.bytes_after == sum(after)
    rest = 4 * 7 + 2 * 5 + 4 * 36
    assert report.model_bytes_before == report.bytes_before + rest
    assert report.model_bytes_after == report.bytes_after + rest
    assert report.model_bytes_before == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert report.model_bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    assert report.ratio == report.bytes_before / report.bytes_after
    assert report.model_ratio == report.model_bytes_before / report.model_bytes_after
    for layer, w in zip(report.rows, kernels, strict=True):
        leaf = packed[layer.path[0]]["kernel"]
        codes = np.asarray(leaf.int8_codes())
        counts = [(codes == code).sum() for code in (-1, 0, 1)]
        assert [layer.minus, layer.zero, layer.plus] == counts
        assert sum(counts) == w.size
        scale = np.asarray(leaf.scale)
        assert (layer.scale_min, layer.scale_max) == (scale.min(), scale.max())
        exact, hat = np.asarray(w, np.float64), np.asarray(leaf.dequantize(jnp.float32), np.float64)
        wanted = ((exact - hat) ** 2).sum() / (exact**2).sum()
        np.testing.assert_allclose(layer.error, wanted, rtol=1e-5)


def test_keys_and_counters_in_a_state_are_counted_or_passed_over():
    params = {"layer": {"kernel": normal(16, 8)}, "count": 3, "steps": np.int32(7)}
    _, report = bj.pack_params(params)
    assert report.model_bytes_before == 4 * 128 + 4
    packed, report = bj.pack_params({"layer": {"kernel": normal(16, 8)}, "rng": jax.random.key(0)})
    assert jax.dtypes.issubdtype(packed["rng"].dtype, jax.dtypes.prng_key)
    assert report.model_bytes_before - report.model_bytes_after == 4 * 128 - (4 * 8 + 4)


def test_every_number_of_the_dict_is_plain_python():
    _, _, report = mixed()
    plain = report.to_dict()

    def kinds(value):
        if isinstance(value, dict):
            return set().union(*map(kinds, value.values()))
        if isinstance(value, (list, tuple)):
            return set().union(*map(kinds, value))
        return {type(value)}

    assert kinds(plain) <= {int, float, str}
    again = json.loads(json.dumps(plain, allow_nan=False))
    for layer, row in zip(report.rows, again["rows"], strict=True):
        assert row.pop("shape") == list(layer.shape)
        assert row.pop("config")["granularity"] == layer.config.granularity
        assert row == {name: getattr(layer, name) for name in row}
        assert set(row) > {"path", "minus", "zero", "plus", "scale_min", "scale_max", "error"}
    assert again["ternary"] == {
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "ratio": report.ratio,
    }
    assert again["model"]["bytes_after"] == report.model_bytes_after
    assert again["model"]["ratio"] == report.model_ratio
    assert again["model"]["bytes_dense"] == report.model_bytes_dense < report.model_bytes_after
    assert again["model"]["dense_ratio"] == report.model_dense_ratio > report.model_ratio


def test_the_table_holds_the_numbers():
    _, _, report = mixed()
    _, *lines = str(report).splitlines()
    *rows, kernels, whole, dense = [line.split("  ") for line in lines]
    rows, kernels, whole, dense = (
        [c.strip() for c in r if c.strip()] for r in (rows[0], kernels, whole, dense)
    )
    layer = report.rows[0]
    assert rows == [
        "a/kernel",
        "30x7",
        *(f"{100 * n / 210:.1f}%" for n in (layer.minus, layer.zero, layer.plus)),
        f"{layer.scale_min:.3g}..{layer.scale_max:.3g}",
        f"{layer.error:.3f}",
        "840 B",
        "84 B",
        "10.00x",
    ]
    assert kernels == ["ternary kernels", "1.8 kB", "225 B", f"{report.ratio:.2f}x"]
    assert whole == ["whole model", "1.9 kB", "407 B", f"{report.model_ratio:.2f}x"]
    saved = sum(layer.bytes_after - layer.bytes_dense for layer in report.rows)
    assert report.model_bytes_dense == 407 - saved < 407
    ratio = f"{report.model_dense_ratio:.2f}x"
    assert dense == ["whole model, dense", "1.9 kB", f"{407 - saved} B", ratio]
    assert [line.split()[0] for line in lines[:3]] == ["a/kernel", "b/kernel", "c/kernel"]


def test_a_kernel_of_zeros_is_shown():
    _, report = bj.pack_params({"z": {"kernel": jnp.zeros((8, 8))}})
    (layer,) = report.rows
    assert (layer.minus, layer.zero, layer.plus) == (0, 64, 0)
    assert "nan" in str(report)
    assert json.dumps(report.to_dict(), allow_nan=False)


def drawn(report):
    """The three panels of a report's figure, laid out, and the canvas that measures them."""
    figure = pack_report._draw(report)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure.axes, canvas.get_renderer()


@cases("layers", [3, 30], core=[3])
def test_labels_of_a_plot_do_not_overlap(layers):
    report = report_of(layers)
    (codes, error, size), renderer = drawn(report)

    def boxes(texts):
        return [text.get_window_extent(renderer) for text in texts]

    labels = codes.get_yticklabels()
    assert [text.get_text() for text in labels][::-1] == [layer.path for layer in report.rows]
    names = sorted(boxes(labels), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(names))
    assert all(box.x1 <= codes.get_window_extent(renderer).x0 for box in names)
    frame, ratios = size.get_window_extent(renderer), boxes(size.texts)
    assert len(ratios) == layers
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in ratios)
    titles = boxes(axes.title for axes in (codes, error, size))
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(titles))


def test_a_plot_draws_the_numbers():
    _, _, report = mixed()
    codes, error, size = drawn(report)[0]
    widths = {c.get_label(): [bar.get_width() for bar in c][::-1] for c in codes.containers}
    assert list(widths) == ["-1", "0", "+1"]
    for label, name in (("-1", "minus"), ("0", "zero"), ("+1", "plus")):
        shares = [100 * getattr(x, name) / (x.minus + x.zero + x.plus) for x in report.rows]
        np.testing.assert_allclose(widths[label], shares)
    errors = [bar.get_width() for bar in error.patches][::-1]
    np.testing.assert_allclose(errors, [layer.error for layer in report.rows])
    widths = {c.get_label(): [bar.get_width() for bar in c][::-1] for c in size.containers}
    assert widths["float"] == [layer.bytes_before for layer in report.rows]
    assert widths["packed"] == [layer.bytes_after for layer in report.rows]
    ratios = [text.get_text().strip() for text in size.texts][::-1]
    assert ratios == [f"{layer.ratio:.1f}x" for layer in report.rows]


@pytest.mark.parametrize(("ending", "starts"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_ending_chooses_the_format(tmp_path, ending, starts):
    path = tmp_path / f"weights.{ending}"
    bj.pack_params({"z": {"kernel": jnp.zeros((8, 8))}})[1].plot(path)  # its error is NaN
    assert path.read_bytes().startswith(starts)
