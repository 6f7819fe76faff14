"""CONTRIBUTING and RELEASING name files, tests and names that are there."""

import importlib
import pathlib
import re

import jax.numpy as jnp
import pytest

import bitnet_jax as bj
from bitnet_jax._matmul import IMPLEMENTATIONS
from bitnet_jax._matmul.implementations import Implementation

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / f"{name}.md" for name in ("CONTRIBUTING", "RELEASING", "SECURITY")]
W, X = jnp.ones((4, 4)), jnp.ones((2, 4))
# What the walks say is in a file, and is: module -> names.
NAMED = {
    "bitnet_jax._quantize.statistics": ["total"],
    "bitnet_jax._quantize.ternary": ["_ratio"],
    "bitnet_jax._quantize.by_library": ["quantizes"],
    "bitnet_jax._transform.layout": ["_RULES", "_ELEMENTWISE", "_PLACING", "Step"],
    "bitnet_jax._transform.products": ["_PLANS", "multiplications"],
    "bitnet_jax._transform.higher_order": ["RULES", "Rule"],
    "bitnet_jax._transform.view": ["View"],
    "bitnet_jax.models._published": ["FAMILIES"],
}
IN_TESTS = {
    "oracles.py": ["def quantize64", "def quantize32"],
    "quantize/test_ternary.py": ["CONFIGS = {", "def test_every_config_on_every_kernel"],
    "packed/test_unpack.py": ["CONFIGS = {"],
    "transform/test_programs.py": ["LAYOUTS = {", "def check("],
    "published.py": ["FAMILIES = {", "def _fill", "def logits64"],
    "models/test_published.py": ["CASES = {"],
    "models/test_transformers.py": ["pytest.mark.slow"],
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_are_there(page):
    text = page.read_text()
    named = re.findall(r"`([\w./]+/[\w.]+)`", text) + re.findall(r"(tests/[\w/]+\.py)", text)
    made = {"_matmul/NAME.py", "tests/benchmarks/NAME.py", "examples/results/NAME.json", "out/site"}
    missing = [
        name
        for name in {*named} - made
        if not (ROOT / name).exists() and not (ROOT / "bitnet_jax" / name).exists()
    ]
    assert missing == []
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    assert max(map(len, text.splitlines())) < 160


def test_names_are_there():
    for module, names in NAMED.items():
        assert [n for n in names if not hasattr(importlib.import_module(module), n)] == []
    for file, words in IN_TESTS.items():
        text = (ROOT / "tests" / file).read_text()
        assert [word for word in words if word not in text] == []
    assert {"prepare", "layout", "codes_of", "preferred"} <= {*Implementation._fields}
    assert IMPLEMENTATIONS["reference"].prepare is None  # the shortest example


def test_what_the_walks_begin_with_fails():
    with pytest.raises(ValueError, match="`scale` must be one of"):
        bj.TernaryConfig(scale="absmax")
    explained = bj.ternarize(lambda w, x: x @ w[::-1]).explain
    assert "`rev` changes it before it is multiplied" in str(explained(W, X))
    published = importlib.import_module("bitnet_jax.models._published")
    with pytest.raises(ValueError, match="`architectures` is"):
        published.architecture({"architectures": ["MistralForCausalLM"]})


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {bj.__version__}" in citation
    assert "license: Apache-2.0" in citation
