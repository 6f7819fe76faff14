"""The table of scales by name: every quantiser reads it, and none guesses for a new one."""

import copy
import typing

import jax
import numpy as np
import pytest

import bitnet_jax as bj
from bitnet_jax._quantize import by_library, statistics
from bitnet_jax._quantize.config import rule_of
from bitnet_jax._quantize.scale_rules import SCALE_RULES, ScaleRule, scale_rule

W = jax.random.normal(jax.random.key(0), (16, 6))


def largest(magnitude, across):
    """A statistic that no quantiser knows."""
    return magnitude.max((-2, -1) if across else -2, keepdims=True)


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(SCALE_RULES, "largest", ScaleRule(largest, of_kept=False, native=False))
    config = copy.copy(bj.TernaryConfig())
    object.__setattr__(config, "scale", "largest")  # the annotation has the names of today
    return config


def test_the_names_are_those_of_the_annotation():
    hint = typing.get_type_hints(bj.TernaryConfig)["scale"]
    assert typing.get_args(hint) == tuple(SCALE_RULES)
    assert [rule_of(bj.TernaryConfig(scale=name)) for name in SCALE_RULES] == [
        *SCALE_RULES.values()
    ]


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="`scale` must be one of 'absmean', 'absmedian', 'surv"):
        bj.TernaryConfig(scale="largest")
    with pytest.raises(ValueError, match="TernaryConfig: no rule for the scale 'largest'; there"):
        scale_rule("largest")


def test_a_name_that_is_gone_is_refused_where_it_is_used(added, monkeypatch):
    monkeypatch.delitem(SCALE_RULES, "largest")
    with pytest.raises(ValueError, match="no rule for the scale 'largest'"):
        bj.quantize(W, added)
    with pytest.raises(ValueError, match="no rule for the scale 'largest'"):
        by_library.quantizes(added)


def test_a_new_entry_is_what_is_computed(added):
    t = bj.quantize(W, added)
    wide = np.abs(np.asarray(W, np.float64)).max()
    np.testing.assert_allclose(t.scale, wide, rtol=1e-6)
    np.testing.assert_array_equal(t.codes, np.trunc(np.asarray(W) / wide * 1.9999).astype(np.int8))
    assert not by_library.quantizes(added)


def test_a_new_statistic_has_no_inverse_until_it_is_given_one(added):
    with pytest.raises(NotImplementedError, match="magnitudes of a given largest are not known"):
        bj.unpack(bj.pack(W, added))


@pytest.mark.parametrize("name", SCALE_RULES)
def test_every_entry_has_an_inverse(name):
    config = bj.TernaryConfig(scale=name)
    packed = bj.pack(W, config)
    again = bj.pack(bj.unpack(packed), config)
    np.testing.assert_array_equal(packed.codes, again.codes)
    np.testing.assert_array_equal(packed.scale, again.scale)


def test_the_parts_are_the_statistics():
    assert {rule.statistic for rule in SCALE_RULES.values()} == {statistics.mean, statistics.median}
    assert [name for name, rule in SCALE_RULES.items() if rule.of_kept] == ["survivors"]
