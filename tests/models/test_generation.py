"""Generation: the same tokens however they are asked for, and text that is whole."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import Checkpoint, byte_tokenizer

import bitnet_jax as bj
from bitnet_jax.models import _generation, _sampling
from bitnet_jax.models._text import Pieces, Text

pytestmark = pytest.mark.full  # each compiles a decoder

TEXT = "naïve 🙂 日本, stop here"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    Checkpoint(vocab_size=256, num_hidden_layers=1, eos_token_id=255).write(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return bj.models.Decoder.from_pretrained(folder)


@nnx.jit
def logits_of(model, ids):
    return model(ids)[0]


def without_cache(model, row, count):
    """Greedy tokens, every one from the whole row."""
    width = len(row) + count
    ids = np.zeros((1, width), np.int32)  # what comes later is not seen
    ids[0, : len(row)] = row
    for at in range(len(row), width):
        ids[0, at] = int(np.asarray(logits_of(model, jnp.asarray(ids)))[0, at - 1].argmax())
    return ids[0, len(row) :].tolist()


def test_batch_cache_and_neither_give_the_same_tokens(model):
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9], [3]]
    whole = model.generate(prompts, max_new_tokens=6)
    assert [model.generate(p, max_new_tokens=6) for p in prompts] == whole
    assert without_cache(model, prompts[0], 6) == whole[0]
    assert list(model.stream(prompts[2], max_new_tokens=6)) == whole[2]
    assert model.generate(np.array(prompts[1]), max_new_tokens=6) == whole[1]
    packed_away = bj.models.Decoder.generate(model, prompts, max_new_tokens=3)
    assert packed_away == [row[:3] for row in whole]


def test_one_trace_for_a_bucket_and_one_for_a_step(model, monkeypatch):
    """Prompts of 3 to 16 tokens share a bucket; sampling's numbers are no new trace."""
    traced = chex.assert_max_traces(_generation.run_step, n=3)
    jitted = jax.jit(traced, static_argnums=(0, 1), donate_argnums=(3, 4))
    monkeypatch.setattr(_generation, "step", jitted)
    for length in (3, 9, 16):
        model.generate([1] * length, max_new_tokens=4, cache_size=32)
    model.generate([1] * 17, max_new_tokens=1, cache_size=32)  # the next bucket
    with pytest.raises(AssertionError, match="traced"):
        model.generate([[1], [2]], max_new_tokens=1, cache_size=32)  # another batch


def test_the_cache_is_donated(model, monkeypatch):
    kept = []

    def watched(*args):
        kept.append(jax.tree.leaves(args[3])[0])
        return _generation_step(*args)

    _generation_step = _generation.step
    monkeypatch.setattr(_generation, "step", watched)
    model.generate([1, 2, 3], max_new_tokens=3)
    assert len(kept) == 3
    assert all(array.is_deleted() for array in kept)


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.int8])
def test_narrow_caches(model, kind):
    """What a narrow cache costs is measured: the distance of the logits."""
    ids = jnp.arange(8, dtype=jnp.int32)[None]

    def run(cache):
        return nnx.jit(lambda m, t, c: m(t, None, c)[0])(model, ids, cache)

    exact, narrow = run(model.init_cache(1, 8)), run(model.init_cache(1, 8, kind))
    far = float(jnp.abs(exact - narrow).max() / jnp.abs(exact).max())
    print(f"{jnp.dtype(kind).name} cache: {far:.4f} of max |logit|")
    assert 0 < far < 0.05
    assert len(model.generate([1, 2, 3], max_new_tokens=2, cache_dtype=kind)) == 2


def test_stacked_layers_and_eight_devices(folder, model):
    stacked = bj.models.Decoder.from_pretrained(folder, scan=True)
    prompts = [[i, 2 * i + 1, 7] for i in range(8)]
    wanted = model.generate(prompts, max_new_tokens=4)
    assert stacked.generate(prompts, max_new_tokens=4) == wanted
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = nnx.clone(model)
    nnx.update(spread, jax.device_put(nnx.state(spread), everywhere))
    assert spread.generate(prompts, max_new_tokens=4) == wanted


def test_prepared_kernels_give_the_same_tokens(model):
    fast = nnx.clone(model)
    nnx.update(fast, bj.prepare(nnx.state(fast, nnx.Param)))
    assert fast.generate([1, 2, 3], max_new_tokens=4) == model.generate([1, 2, 3], max_new_tokens=4)


def test_kernels_prepared_as_they_load(folder, model):
    """Layer by layer or scanned, where each is read from its stack; float and int8 caches."""
    options = {"max_new_tokens": 4}
    for cache in (None, jnp.bfloat16, jnp.int8):
        wanted = model.generate([1, 2, 3], cache_dtype=cache, **options)
        for scan in (False, True, None):
            fast = bj.models.Decoder.from_pretrained(folder, prepared=True, scan=scan)
            assert fast.config.scan == (scan is not False)
            assert fast.generate([1, 2, 3], cache_dtype=cache, **options) == wanted
            with pytest.raises(TypeError, match="prepared"):
                bj.io.export_huggingface(fast, folder / "out")


def test_layers_are_stacked_where_that_is_faster(tmp_path):
    """Not where they differ, where kernels are float, or where activations are."""
    mixed = Checkpoint("LlamaForCausalLM", "float", num_hidden_layers=1).write(tmp_path / "a")
    grid = Checkpoint("LlamaForCausalLM", "channel", num_hidden_layers=1).write(tmp_path / "b")
    ready = {"scan": None, "prepared": True}
    load = bj.models.Decoder.from_pretrained
    assert not load(mixed, **ready).config.scan
    assert load(mixed, weights=bj.Int8Config(), **ready).config.scan
    assert not load(grid, **ready).config.scan
    assert load(grid, activations=bj.ActivationConfig(), **ready).config.scan
    assert not load(grid, scan=None, activations=bj.ActivationConfig()).config.scan


def test_text_chat_and_streams(model):
    answer = model.generate("abc", max_new_tokens=5)
    assert isinstance(answer, str)
    pieces = list(model.stream("abc", max_new_tokens=5))
    assert "".join(pieces) == answer
    messages = [{"role": "user", "content": "abc"}]
    by_hand = model.text.encode("<user>abc<assistant>")
    ids = model.generate(by_hand, max_new_tokens=5)
    assert model.generate(messages, max_new_tokens=5) == model.text.decode(ids)
    both = model.generate([messages, messages], max_new_tokens=5)
    assert both == [model.text.decode(ids)] * 2


def pieces_of(text, stops=()):
    tokenizer = byte_tokenizer()
    decoder = Pieces(Text(256, frozenset(), lambda: tokenizer, None, {}, ""), stops)
    out = []
    for token in tokenizer.encode(text).ids:
        out.append(decoder.push(token))
        if decoder.stopped:
            break
    return [*out, decoder.finish()]


def test_every_piece_is_valid_text():
    out = pieces_of(TEXT)
    assert "".join(out) == TEXT
    assert len([piece for piece in out if piece]) == len(TEXT)
    assert not any("\ufffd" in piece for piece in out)


def test_bytes_that_are_never_whole_come_out_at_the_end():
    tokenizer = byte_tokenizer()
    decoder = Pieces(Text(256, frozenset(), lambda: tokenizer, None, {}, ""))
    half = tokenizer.encode("é").ids[:1]
    assert [decoder.push(token) for token in half] == [""]
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("stops", "wanted"),
    [
        (("stop",), "naïve 🙂 日本, "),
        (("日本",), "naïve 🙂 "),
        (("stop there",), TEXT),
        (("here", "ve"), "naï"),
    ],
)
def test_stop_strings_across_tokens(stops, wanted):
    out = pieces_of(TEXT, stops)
    assert "".join(out) == wanted
    assert all(stop not in "".join(out) for stop in stops)


def test_a_special_token_as_a_stop_string(folder, tmp_path):
    """Answers leave special tokens out: one that is to end them is looked for by its id."""
    here = shutil.copytree(folder, tmp_path / "here")
    tokenizer = byte_tokenizer()
    ids = bj.models.Decoder.from_pretrained(folder).generate([1, 2, 3], max_new_tokens=8)
    special = tokenizer.id_to_token(ids[3])
    tokenizer.add_special_tokens([special])
    tokenizer.save(str(here / "tokenizer.json"))
    model = bj.models.Decoder.from_pretrained(here)
    wanted = ids[: ids.index(ids[3]) + 1]
    assert model.generate([1, 2, 3], max_new_tokens=8, stop=special) == wanted
    assert list(model.stream([1, 2, 3], max_new_tokens=8, stop=[np.int64(ids[3])])) == wanted


@pytest.mark.parametrize("least", [1e-60, 1e-38])
def test_limits_of_sampling(model, least):
    """What no float32 holds, or overflows when logits are divided by it, draws the likeliest."""
    likeliest = model.generate([1, 2, 3], max_new_tokens=4)
    for how in ({"temperature": least}, {"temperature": 1.0, "top_p": least}):
        assert model.generate([1, 2, 3], max_new_tokens=4, **how) == likeliest


def test_stop_strings_and_ids_end_an_answer(model):
    ids = model.generate([1, 2, 3], max_new_tokens=8)
    at = ids.index(ids[3])  # the first time that this token comes
    assert model.generate([1, 2, 3], max_new_tokens=8, stop=ids[3]) == ids[: at + 1]
    text = model.generate("abc", max_new_tokens=8)
    assert model.generate("abc", max_new_tokens=8, stop=text[2]) == text[: text.index(text[2])]


def test_filters_against_numpy():
    logits = np.array([[2.0, 1.0, 0.5, -1.0, 1.5]], np.float32)
    weights = np.exp(logits) / np.exp(logits).sum()
    values = {"top_p": jnp.float32(0.7), "min_p": jnp.float32(0.4)}

    def kept(**filters):
        out = _sampling.filtered(jnp.asarray(logits), _sampling.Filters(True, **filters), values)
        return set(np.flatnonzero(np.isfinite(np.asarray(out)[0])).tolist())

    order = np.argsort(-weights[0])
    least = int(np.searchsorted(np.cumsum(weights[0][order]), 0.7)) + 1
    assert kept(top_k=2) == {0, 4}
    assert kept(top_k=99) == {0, 1, 2, 3, 4}
    assert kept(top_p=True) == set(order[:least].tolist())
    assert kept(min_p=True) == set(np.flatnonzero(weights[0] >= 0.4 * weights.max()).tolist())


def test_repetition_penalty_and_draws():
    logits = jnp.array([[2.0, 1.9, -1.0], [-2.0, -1.0, -1.9]])
    seen = jnp.array([[True, False, False], [False, True, False]])
    sampling = _sampling.Sampling(repetition_penalty=2.0)
    key = jax.random.key(0)
    values = {k: jnp.asarray(v) for k, v in sampling.values.items()}
    assert _sampling.choose(logits, seen, key, sampling.filters, values).tolist() == [1, 2]
    sampling = _sampling.Sampling(temperature=1.0)
    values = {k: jnp.asarray(v) for k, v in sampling.values.items()}
    flat = jnp.broadcast_to(jnp.log(jnp.array([[0.7, 0.2, 0.1]])), (4000, 3))
    drawn = np.asarray(_sampling.choose(flat, None, key, sampling.filters, values))
    assert np.allclose(np.bincount(drawn) / 4000, [0.7, 0.2, 0.1], atol=0.03)
    first = _sampling.choose(flat[:1], None, key, sampling.filters, values)
    assert int(first[0]) == drawn[0]  # a row's draw does not depend on the others


def test_the_same_seed_gives_the_same_draws(model):
    def draw(seed, prompts):
        return model.generate(prompts, max_new_tokens=6, temperature=1.5, top_k=50, seed=seed)

    one = draw(3, [1, 2])
    assert draw(3, [[1, 2], [5, 6]])[0] == one
    assert draw(4, [1, 2]) != one


def test_tunix_may_bring_its_own_cache(folder):
    """One entry a layer, whether layers are stacked or not."""
    ids = jnp.arange(4, dtype=jnp.int32)[None]
    mask = jnp.tril(jnp.ones((4, 8), bool))[None]
    positions = jnp.arange(4, dtype=jnp.int32)[None]
    shape = (1, 8, 2, 8)
    for scan in (False, True):
        model = bj.models.Decoder.from_pretrained(folder, scan=scan)
        cache = {
            "layer_0": {
                "k": jnp.zeros(shape),
                "v": jnp.zeros(shape),
                "end_index": jnp.zeros((1,), jnp.int32),
            }
        }
        logits, new = nnx.jit(lambda m, *a: m(*a))(model, ids, positions, cache, mask)
        assert new["layer_0"]["end_index"].tolist() == [4]
        assert jnp.allclose(logits, logits_of(model, ids), atol=1e-4)
