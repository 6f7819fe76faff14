"""Axes of kernels: one canonical form, and the way back."""

import itertools

import numpy as np
import pytest

import bitnet_jax as bj
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.kernel_spec import kernel_spec


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_restore_undoes_canonical_for_every_choice_of_axes(rank):
    shape = (2, 3, 4, 5)[:rank]
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    for roles in itertools.product("cbo", repeat=rank):
        contracting, batch, outputs = (
            tuple(a for a, role in enumerate(roles) if role == kind) for kind in "cbo"
        )
        if not contracting:
            continue
        axes = kernel_axes.resolve("test", w, contracting, batch)
        assert axes == (contracting, batch, outputs)
        c = kernel_axes.to_canonical(w, axes)
        lengths = axes.split(shape)
        assert c.shape == (*lengths[0], int(np.prod(lengths[1])), int(np.prod(lengths[2])))
        np.testing.assert_array_equal(kernel_axes.from_canonical(c, axes, *lengths[1:]), w)
        # an entry is where its indices say
        at = tuple(n - 1 for n in shape)
        b, k, n = (tuple(at[a] for a in part) for part in (batch, contracting, outputs))
        row = np.ravel_multi_index(k, lengths[1])
        column = np.ravel_multi_index(n, lengths[2]) if n else 0
        assert c[(*b, row, column)] == w[at]


def test_a_matrix_needs_no_axes_and_a_stack_only_its_batch():
    assert kernel_axes.resolve("test", np.ones((4, 3)), None, ()) == ((0,), (), (1,))
    assert kernel_axes.resolve("test", np.ones((2, 4, 3)), None, 0) == ((1,), (0,), (2,))
    assert kernel_axes.resolve("test", np.ones((4, 2, 3)), None, -2) == ((0,), (1,), (2,))
    assert kernel_axes.resolve("test", np.ones((2, 5, 4, 3)), None, (1, 0)) == ((2,), (0, 1), (3,))


@pytest.mark.parametrize("contraction", [(12,), (3, 4), (2, 3, 4), (2, 1, 6), (5, 7)])
def test_group_grid_counts_runs_of_adjacent_weights(contraction):
    total = int(np.prod(contraction))
    for group in range(1, total + 3):
        # Groups are runs of the flattened contraction; a grid exists where every run is a box.
        flat = np.arange(total) // group
        boxes = flat.reshape(contraction)
        grid = [len(np.unique(np.moveaxis(boxes, a, 0)[:, *[0] * (len(contraction) - 1)]))
                for a in range(len(contraction))]  # fmt: skip
        tiles = total % group == 0 and np.prod(grid) == total // group
        if tiles:
            want = np.arange(total // group).reshape(grid)
            for axis, (have, length) in enumerate(zip(grid, contraction, strict=True)):
                tiles = tiles and length % have == 0
                want = want.repeat(length // have, axis) if tiles else want
            tiles = tiles and np.array_equal(want, boxes)
        if tiles:
            assert kernel_axes.group_grid(contraction, group) == tuple(grid)
        else:
            assert kernel_axes.group_grid(contraction, group) is None
            w, config = np.ones((*contraction, 2), np.float32), bj.TernaryConfig(granularity=group)
            axes = tuple(range(len(contraction)))
            with pytest.raises(ValueError, match=f"^test: `granularity`={group} does not divide"):
                kernel_spec("test", w, config, axes, ())
