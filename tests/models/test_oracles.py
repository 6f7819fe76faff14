"""Small checkpoints that transformers ran, against what it computed.

Collected where ``shared/oracles`` lies beside the checkout (conftest). Logits agree until the
first int8 code that rounds the other way; positions beyond one are counted and printed.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import ORACLES, distance

import bitnet_jax as bj
from bitnet_jax.models import _parts

pytestmark = pytest.mark.full  # each compiles a decoder

CASES = sorted(path.parent.name for path in ORACLES.glob("*/oracle.npz"))
# One token of the 24 lies on the border of two codes, and four look at it.
FLIPPED = {"bitnet-auto-bf16": 5}


@nnx.jit
def logits_of(model, ids, mask):
    return model(ids, None, None, mask)[0]


@nnx.jit
def states_of(model, ids):
    states = []
    model.hidden(ids, states=states)
    return states


@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_states(case):
    oracle = np.load(ORACLES / case / "oracle.npz")
    model = bj.models.Decoder.from_pretrained(ORACLES / case)
    ids = jnp.asarray(oracle["input_ids"], jnp.int32)
    stored_narrow = "logits_float32" in oracle
    far = distance(
        logits_of(model, ids, None), oracle["logits_float32" if stored_narrow else "logits"]
    )
    print(f"{case}: {far.min():.1e} to {far.max():.1e}, {(far > 1e-5).sum()} of {far.size} flipped")
    assert (far > 1e-5).sum() == FLIPPED.get(case, 0)
    if stored_narrow:
        return  # its states and padded logits are of bfloat16
    for got, wanted in zip(states_of(model, ids), oracle["hidden_states"], strict=True):
        assert (distance(got, wanted) <= 1e-5).all()
    mask = oracle["attention_mask"]
    got = logits_of(model, ids, jnp.asarray(mask))
    assert (distance(got, oracle["logits_left_padded"])[mask > 0] <= 1e-5).all()


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case):
    oracle = np.load(ORACLES / case / "oracle.npz")
    narrow = "logits_float32" in oracle
    model = bj.models.Decoder.from_pretrained(
        ORACLES / case, dtype=jnp.bfloat16 if narrow else jnp.float32
    )
    model.text.stops = frozenset()
    greedy = oracle["greedy"]
    assert model.generate(greedy[:, :5], max_new_tokens=16) == greedy[:, 5:].tolist()


def q8_0(x):
    """As llama.cpp rounds what meets Q2_0: int8 for each 32, with a float16 scale."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    step = jnp.abs(groups).max(-1, keepdims=True) / np.float32(127)
    codes = jnp.round(jnp.where(step > 0, groups / jnp.where(step > 0, step, 1), 0))
    return (codes * step.astype(jnp.float16).astype(jnp.float32)).reshape(x.shape)


@pytest.mark.parametrize("case", sorted(path.stem for path in (ORACLES / "gguf").glob("*.npz")))
def test_gguf(case, monkeypatch):
    """Against llama.cpp: one block of its int8 activations is a whole token at 256 features."""
    oracle = np.load(ORACLES / "gguf" / f"{case}.npz")
    model = bj.models.Decoder.from_pretrained(ORACLES / "gguf" / f"{case}.gguf")
    if model.config.activations is None:
        plain = _parts.Projection.__call__
        monkeypatch.setattr(_parts.Projection, "__call__", lambda self, x: plain(self, q8_0(x)))
    ids = jnp.asarray(oracle["input_ids"], jnp.int32)[None]
    far = distance(logits_of(model, ids, None)[0], oracle["logits"])
    print(f"{case}: {far.min():.1e} to {far.max():.1e}, {(far > 1e-5).sum()} of {far.size} flipped")
    assert (far <= 1e-5).all()


def test_bfloat16_is_as_near_as_the_dtype_is():
    """transformers rounds activations to bfloat16 once more; both are as far from float32."""
    case = ORACLES / "bitnet-auto-bf16"
    oracle = np.load(case / "oracle.npz")
    model = bj.models.Decoder.from_pretrained(case, dtype=jnp.bfloat16)
    ids = jnp.asarray(oracle["input_ids"], jnp.int32)
    got = logits_of(model, ids, None)
    own = distance(oracle["logits"], oracle["logits_float32"])
    ours = distance(got, oracle["logits_float32"])
    print(f"bfloat16 from float32: theirs {own.max():.4f}, ours {ours.max():.4f} of max")
    assert ours.max() <= 1.5 * own.max()
