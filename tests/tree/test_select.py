"""Selectors: which paths a pattern matches, what a function may answer, what a typo raises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitnet_jax as bj
from bitnet_jax._tree import select as _select

F32 = np.float32


def tree():
    """Leaves are ones: only names, dtypes and ranks matter here."""
    return {
        "embed": {"embedding": np.ones((6, 8), F32)},
        "blocks_0": {
            "attn": {"query": {"kernel": np.ones((8, 8), F32), "bias": np.ones(8, F32)}},
            "mlp": {"kernel": np.ones((8, 8), F32)},
        },
        "blocks_1": {"mlp": {"kernel": np.ones((8, 8), F32)}},
        "blocks_10": {"mlp": {"kernel": np.ones((8, 8), F32)}},
        "head": {"kernel": np.ones((8, 4), F32), "scale": np.ones((8, 4), F32)},
        "steps": {"kernel": np.ones((2, 2), np.int32)},
    }


KERNELS = {
    "blocks_0/attn/query/kernel",
    "blocks_0/mlp/kernel",
    "blocks_1/mlp/kernel",
    "blocks_10/mlp/kernel",
    "head/kernel",
}


def leaves(params):
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(tuple(part.key for part in path), leaf) for path, leaf in flat]


def chosen(select, params=None, config=bj.B158):
    """The paths that a selector takes, with their configs."""
    flat = leaves(tree() if params is None else params)
    configs = _select.choose("pack_params", flat, config, select)
    assert len(configs) == len(flat)
    return {"/".join(path): c for (path, _), c in zip(flat, configs, strict=True) if c is not None}


@pytest.mark.parametrize(
    ("pattern", "path", "wanted"),
    [
        ("head", "head/kernel", True),
        ("kernel", "head/kernel", True),
        ("head/kernel", "head/kernel", True),
        ("head/kernel", "model/head/kernel", True),
        ("model/head", "model/head/kernel", True),
        ("model/kernel", "model/head/kernel", False),  # the names must follow each other
        ("kernel/head", "head/kernel", False),
        ("hea", "head/kernel", False),  # a name is matched whole
        ("ead", "head/kernel", False),
        ("Head", "head/kernel", False),  # and by its case
        ("he*", "head/kernel", True),
        ("*d", "head/kernel", True),
        ("h??d", "head/kernel", True),
        ("h?d", "head/kernel", False),
        ("[gh]ead", "head/kernel", True),
        ("[!h]ead", "head/kernel", False),
        ("model*kernel", "model/head/kernel", False),  # a star stays inside its name
        ("model/*/kernel", "model/head/kernel", True),
        ("model/*/kernel", "model/a/b/kernel", False),  # and stands for one
        ("*/*", "kernel", False),
        ("*", "kernel", True),
        ("a/b", "a", False),
        ("blocks_1", "blocks_10/kernel", False),
        ("blocks_1?", "blocks_10/kernel", True),
    ],
)
def test_a_pattern_matches_whole_names_that_follow_each_other(pattern, path, wanted):
    assert _select.match(pattern, tuple(path.split("/"))) is wanted


@pytest.mark.parametrize(
    ("select", "wanted"),
    [
        (None, KERNELS),
        (bj.exclude("head"), KERNELS - {"head/kernel"}),
        (bj.exclude("head", "attn"), KERNELS - {"head/kernel", "blocks_0/attn/query/kernel"}),
        (bj.exclude("blocks_0/mlp"), KERNELS - {"blocks_0/mlp/kernel"}),
        (bj.exclude("blocks_*"), {"head/kernel"}),
        (bj.exclude("blocks_?"), {"blocks_10/mlp/kernel", "head/kernel"}),
        (bj.exclude("embed"), KERNELS),  # no kernel below it: nothing more to leave out
        (bj.only("head"), {"head/kernel"}),  # and not head/scale
        (bj.only("mlp"), {path for path in KERNELS if "/mlp/" in path}),
        (bj.only("blocks_0/*/query"), {"blocks_0/attn/query/kernel"}),
        (bj.only("kernel"), KERNELS | {"steps/kernel"}),  # by its own name, integers too
        (bj.only("head/scale"), {"head/scale"}),
        (bj.only("embedding", "head"), {"embed/embedding", "head/kernel"}),
        (bj.only("*"), KERNELS),
    ],
    ids=lambda value: str(value) if callable(value) else "",
)
def test_what_is_selected(select, wanted):
    assert set(chosen(select)) == wanted


def test_exclude_and_only_split_the_kernels():
    for pattern in ("head", "mlp", "blocks_?", "attn/query"):
        out, kept = set(chosen(bj.exclude(pattern))), set(chosen(bj.only(pattern)))
        assert out | kept == KERNELS
        assert not out & kept


def test_selectors_are_values_and_functions():
    select = bj.exclude("head", "embed")
    assert select == bj.exclude("head", "embed")
    assert hash(select) == hash(bj.exclude("head", "embed"))
    assert select != bj.only("head", "embed")
    assert select(("body", "kernel"), np.ones((2, 2), F32)) is True
    assert select(("head", "kernel"), np.ones((2, 2), F32)) is False


@pytest.mark.parametrize(
    ("path", "leaf", "wanted"),
    [
        ("a/kernel", np.ones((2, 2), F32), True),
        ("kernel", np.ones((2, 2), F32), True),
        ("a/kernel", np.ones((2, 2, 2), F32), True),  # refused later, by name and with a remedy
        ("a/kernel", jnp.ones((2, 2), jnp.bfloat16), True),
        ("a/kernel", np.ones(2, F32), False),
        ("a/kernel", np.ones((2, 2), np.int8), False),
        ("a/kernel", np.ones((2, 2), np.complex64), False),
        ("a/kernel", 1.0, False),
        ("a/kernel", jax.random.key(0), False),
        ("a/kernels", np.ones((2, 2), F32), False),
        ("kernel/w", np.ones((2, 2), F32), False),
    ],
)
def test_what_counts_as_a_kernel(path, leaf, wanted):
    assert _select.is_kernel(tuple(path.split("/")), leaf) is wanted


def test_functions_decide_for_themselves():
    seen = []

    def select(path, leaf):
        seen.append((path, leaf.shape))
        return {"blocks_0": True, "blocks_1": bj.PHASE4, "head": False}.get(path[0]) and (
            path[-1] == "kernel" and (True if path[0] == "blocks_0" else bj.PHASE4)
        )

    got = chosen(select, config=bj.TWN)
    assert got == {
        "blocks_0/attn/query/kernel": bj.TWN,
        "blocks_0/mlp/kernel": bj.TWN,
        "blocks_1/mlp/kernel": bj.PHASE4,
    }
    assert seen == [(path, leaf.shape) for path, leaf in leaves(tree())]  # every leaf, once


@pytest.mark.parametrize("yes", [True, np.True_, np.bool_(1)])
@pytest.mark.parametrize("no", [False, None, np.False_])
def test_every_bool_and_none_is_a_decision(yes, no):
    got = chosen(lambda path, _: yes if path[0] == "head" else no)
    assert set(got) == {"head/kernel", "head/scale"}


@pytest.mark.parametrize(
    ("garbage", "shown"),
    [
        ("yes", r"str 'yes'"),
        (1, r"int 1"),
        (0, r"int 0"),
        ((), r"tuple \(\)"),
        (bj.TernaryConfig, r"type <class"),
        (np.ones(2, bool), r"bool of shape \(2,\)"),
        (bj.ActivationConfig(), r"ActivationConfig"),
    ],
)
def test_garbage_is_refused_with_the_path(garbage, shown):
    wanted = rf"^pack_params: `select` returned {shown}.* for blocks_0/mlp/kernel\. Return True or"
    with pytest.raises(TypeError, match=wanted):
        chosen(lambda path, _: garbage if path[:2] == ("blocks_0", "mlp") else True)


@pytest.mark.parametrize("make", [bj.exclude, bj.only])
@pytest.mark.parametrize(
    ("typo", "near"),
    [
        ("haed", "head/kernel"),
        ("Head", "head/kernel"),
        ("embeding", "embed/embedding"),  # codespell:ignore
        ("blocks_0/mpl", "blocks_0/mlp/kernel"),
        ("blocks_0/attention", "blocks_0/attn/query/kernel"),
        ("head/kernal", "head/kernel"),  # codespell:ignore
    ],
)
def test_a_typo_raises_with_near_paths(make, typo, near):
    wanted = rf"^pack_params: the pattern '{typo}' matches nothing\. Near paths: .*{near}"
    with pytest.raises(ValueError, match=wanted):
        chosen(make(typo))


def test_one_typo_among_good_patterns_raises():
    with pytest.raises(ValueError, match="the pattern 'haed' matches nothing"):
        chosen(bj.exclude("embed", "haed"))


@pytest.mark.parametrize(
    ("select", "what"),
    [
        (lambda *_: False, "`select` matches nothing"),
        (lambda *_: None, "`select` matches nothing"),
        (bj.exclude("blocks_*", "head"), "`select` matches nothing"),
        (bj.only("steps"), "`select` matches nothing"),  # its kernel holds integers
        (bj.only("embed"), "`select` matches nothing"),  # the leaf's own name is needed
    ],
)
def test_a_selection_of_nothing_raises(select, what):
    with pytest.raises(ValueError, match=rf"^pack_params: {what}\. Near paths: \w"):
        chosen(select)


def test_near_paths_are_few():
    many = {f"block_{i}": {"w": np.ones((2, 2), F32)} for i in range(50)}
    with pytest.raises(ValueError, match="default selection") as caught:
        chosen(None, many)
    assert str(caught.value).count("block_") <= 8


def test_names_of_other_libraries():
    haiku = {"mlp/~/linear_0": {"w": np.ones((8, 8), F32), "b": np.ones(8, F32)}}
    with pytest.raises(ValueError, match=r"named 'kernel'\) matches nothing.*mlp/~/linear_0/w"):
        chosen(None, haiku)
    assert set(chosen(bj.only("w"), haiku)) == {"mlp/~/linear_0/w"}
    by_rank = chosen(lambda path, leaf: path[-1] == "w" and leaf.ndim == 2, haiku)
    assert set(by_rank) == {"mlp/~/linear_0/w"}


def test_errors_name_the_function_that_was_called():
    with pytest.raises(ValueError, match=r"^fake_quantize_params: the pattern 'haed'"):
        bj.fake_quantize_params(tree(), select=bj.exclude("haed"))


@pytest.mark.parametrize("make", [bj.exclude, bj.only])
@pytest.mark.parametrize("patterns", [(), ("",), (None,), (3,), (["head"],), ("head", "")])
def test_patterns_are_names(make, patterns):
    with pytest.raises(ValueError, match=rf"^{make.__name__}: `patterns` must be one or more"):
        make(*patterns)


@pytest.mark.parametrize("select", ["head", ("head",), bj.PHASE4, True])
def test_a_selector_that_is_no_function_is_refused_with_a_remedy(select):
    with pytest.raises(TypeError, match=r"^pack_params: `select` must be .*bj\.(only|exclude)"):
        bj.pack_params(tree(), select=select)
