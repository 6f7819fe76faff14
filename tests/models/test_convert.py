"""``python -m bitnet_jax convert`` and ``inspect``: every form to every other, and refusals."""

import json
import os
import re

import gguf_files
import jax
import numpy as np
import oracles
import pytest
from flax import nnx
from published import Checkpoint, byte_tokenizer

import bitnet_jax as bj
from bitnet_jax.__main__ import main
from bitnet_jax._packed.static_data import encoded
from bitnet_jax.models import _saved, _translate
from bitnet_jax.models._command import Progress

SMALL = {"num_hidden_layers": 1}
CASES = {
    "bitnet": Checkpoint("BitNetForCausalLM", "multiply", **SMALL),
    "llama-bias": Checkpoint("LlamaForCausalLM", "divide", attention_bias=True, **SMALL),
    "qwen3-grid": Checkpoint("Qwen3ForCausalLM", 16, tie_word_embeddings=False, **SMALL),
    "llama-norm": Checkpoint(
        "LlamaForCausalLM", "online", quantization_config={"use_rms_norm": True}, **SMALL
    ),
}


def load(path, **options):
    return bj.models.Decoder.from_pretrained(path, **options)


def same_model(a, b):
    a, b = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        one, other = (jax.tree.flatten(m[path].get_value()) for m in (a, b))
        assert one[1] == other[1], path
        for x, y in zip(one[0], other[0], strict=True):
            assert x.dtype == y.dtype, path
            assert np.array_equal(x, y), path


def converted(source, target, *options):
    assert main(["convert", str(source), str(target), *options]) == 0
    return target


@pytest.fixture
def folder(tmp_path):
    checkpoint = Checkpoint(vocab_size=256, my_own_key=[1], eos_token_id=255, **SMALL)
    byte_tokenizer().save(str(checkpoint.write(tmp_path / "in") / "tokenizer.json"))
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return tmp_path / "in"


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_to_a_file_and_back_is_the_same_model(case, tmp_path):
    source = CASES[case].write(tmp_path / "in")
    model = load(source)
    for dense in ((), ("--dense",)):
        file = converted(source, tmp_path / "a.safetensors", "--overwrite", *dense)
        again = load(file)
        same_model(model, again)
        assert again.config == model.config
        same_model(model, load(converted(file, tmp_path / "out", "--overwrite")))
    assert main(["verify", str(tmp_path / "a.safetensors")]) == 0


@pytest.mark.full
@pytest.mark.parametrize("kind", ["TQ2_0", "Q2_0", "Q8_0", "F16"])
def test_a_gguf_file_is_read(kind, tmp_path, capsys):
    source = tmp_path / "model.gguf"
    gguf_files.Model("qwen3", kind).write(source)
    file = converted(source, tmp_path / "a.safetensors")
    assert ("Q8_0 weights become floats" in capsys.readouterr().err) == (kind in ("TQ2_0", "Q8_0"))
    same_model(load(source), load(file))
    unnamed = tmp_path / "unnamed"
    unnamed.write_bytes(source.read_bytes())  # told by what is in it
    same_model(load(unnamed), load(file))


@pytest.mark.full
def test_text_files_and_unknown_keys_come_along(folder, tmp_path):
    model = load(folder)
    file = converted(folder, tmp_path / "a.safetensors")
    for again in (load(file), load(converted(file, tmp_path / "out"))):
        assert again.text.encode("abc") == model.text.encode("abc")
        assert again.text.chat([{"role": "user", "content": "ab"}]) == model.text.encode("ab")
        assert again.text.stops == {255}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["my_own_key"] == [1]


@pytest.mark.full
def test_a_file_loads_as_a_folder_does(folder, tmp_path):
    """Options that change what is held do so from a file of floats too."""
    floats = Checkpoint("LlamaForCausalLM", "float", **SMALL).write(tmp_path / "floats")
    file = converted(floats, tmp_path / "floats.safetensors")
    narrow = bj.Int8Config()
    for options in ({"head": narrow}, {"weights": narrow, "dtype": "bfloat16"}, {"packed": False}):
        one, other = load(floats, **options), load(file, **options)
        same_model(one, other)
        assert one.config == other.config
    small = converted(floats, tmp_path / "int8.safetensors", "--int8")
    same_model(load(floats, weights=narrow, head=narrow), load(small))
    packed = converted(folder, tmp_path / "packed.safetensors")
    for options in ({"packed": False}, {"dtype": "bfloat16"}, {"activations": None}):
        same_model(load(folder, **options), load(packed, **options))
    with pytest.raises(ValueError, match="`quantization_config` is for folders"):
        load(packed, quantization_config={})


@pytest.mark.full
def test_stacked_layers_are_saved_one_by_one(tmp_path):
    source = Checkpoint(num_hidden_layers=2).write(tmp_path / "in")
    model, stacked = load(source), load(source, scan=True)
    stacked.save(tmp_path / "a.safetensors")
    same_model(model, load(tmp_path / "a.safetensors"))
    same_model(stacked, load(tmp_path / "a.safetensors", scan=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floats_keep_the_dtype_of_the_source(dtype, tmp_path):
    import ml_dtypes
    from safetensors.numpy import save_file

    checkpoint = Checkpoint(**SMALL)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    name = "model.embed_tokens.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name].astype(kind)
    checkpoint.write(tmp_path / "in")
    save_file(checkpoint.tensors, tmp_path / "in" / "model.safetensors")
    assert _translate.own_dtype(_translate.stored_floats(tmp_path / "in", "folder")) == dtype
    file = converted(tmp_path / "in", tmp_path / "a.safetensors")
    assert bj.io.load(file)["params"]["embed"]["embedding"].dtype == kind
    assert load(file).config.param_dtype == kind
    wide = converted(file, tmp_path / "b.safetensors", "--dtype", "float32")
    assert load(wide).config.param_dtype == np.float32


def test_other_parameters_are_copied(tmp_path):
    tree = {"kernel": bj.pack(jax.random.normal(jax.random.key(0), (64, 16)))}
    bj.io.save(tmp_path / "a.safetensors", tree)
    dense = converted(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--dense")
    assert dense.stat().st_size < (tmp_path / "a.safetensors").stat().st_size
    assert np.array_equal(bj.io.load(dense)["kernel"].codes, tree["kernel"].codes)


REFUSED = [
    (["nowhere", "out"], "there is no 'nowhere'"),
    (["in", "out.gguf"], "a kind that is not written"),
    (["in", "in"], "is SRC, or one is in the other"),
    (["in", "in/model.safetensors", "--overwrite"], "one is in the other"),
    (["in", "nowhere/out"], "Make it first"),
    (["in", "there.safetensors"], "Pass --overwrite to replace it"),
    (["in", "strange"], "holds 'notes.md', which is no part of a checkpoint"),
    (["in", "there.safetensors/"], "names a file and a folder"),
    (["in", "strange.safetensors"], "is a folder already"),
    (["in", "out", "--dense"], "--dense is of a file"),
    (["in", "out", "--int8"], "--int8 is of a file"),
    (["in", "out.safetensors", "--layout", "bitlinear"], "--layout is of a folder"),
    (["there.safetensors", "out"], "no decoder's config"),
    (["text", "out"], "is not a safetensors file"),
]


@pytest.mark.parametrize(("arguments", "match"), REFUSED)
def test_refusals_come_before_any_work(arguments, match, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    CASES["bitnet"].write("in")
    bj.io.save("there.safetensors", {"x": np.zeros(3)})
    for name in ("strange", "strange.safetensors"):
        os.mkdir(name)
        (tmp_path / name / "notes.md").write_text("mine")
    (tmp_path / "text").write_text("no model")
    before = sorted(map(str, tmp_path.rglob("*")))
    assert main(["convert", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: convert: ")
    assert said.count("\n") == 1
    assert match in said
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_a_folder_is_written_whole_or_not_at_all(error, tmp_path, monkeypatch, capsys):
    source = CASES["bitnet"].write(tmp_path / "in")
    out = converted(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real = bj.io.export_huggingface

    def failing(*arguments, **options):
        real(*arguments, **options)
        raise error

    monkeypatch.setattr(_translate.bitnet_io, "export_huggingface", failing)
    code = main(["convert", str(source), str(out), "--overwrite"])
    assert code == (130 if error is KeyboardInterrupt else 1)
    assert capsys.readouterr().err.endswith(("stopped\n", "disk full\n"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_damaged_description_is_refused(tmp_path, capsys):
    from bitnet_jax.io import _file

    def write(**changes):
        says = {"config": {"DecoderConfig": {"vocabulary": 8, **changes}}, "origin": {}}
        notes = {"decoder": json.dumps(says)}
        _file.write(tmp_path / "a", {"params": {"x": np.zeros(1)}}, dense=False, notes=notes)

    for changes in ({"heads": 3}, {"unknown": 1}, {"rope": {"Rope": {"kind": "none"}}}):
        write(**changes)
        with pytest.raises(bj.io.FormatError, match="no decoder that this version reads"):
            load(tmp_path / "a")
        assert main(["inspect", str(tmp_path / "a")]) == 1
    write()
    with pytest.raises(ValueError, match=r"is missing|has no place"):
        load(tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 1
    assert "has no 'layers/0/attention/query/linear/kernel' of shape" in capsys.readouterr().err


def lines(text):
    return dict(line.split("  ", 1) for line in text.split("\n\n")[1].splitlines())


def test_inspect_reads_headers_alone(folder, tmp_path, capsys, monkeypatch):
    file = converted(folder, tmp_path / "a.safetensors")
    monkeypatch.setattr(bj.models.Decoder, "from_pretrained", None)
    capsys.readouterr()
    for path in (folder, file):
        assert main(["inspect", str(path)]) == 0
        printed = capsys.readouterr().out
        found = {name: value.strip() for name, value in lines(printed).items()}
        assert found["architecture"] == "BitNetForCausalLM"
        assert found["layers"] == "1, width 32, hidden 48"
        assert found["vocabulary"] == "256, tied head"
        assert found["ternary kernels"].startswith("7")
        assert "not read" in found["data"]
        row = next(line for line in printed.splitlines() if "mlp/down" in line).split()
        assert row[:5] == ["layers/*/mlp/down", "1", "48x32", "ternary", "2"]
        assert row[-1] == f"{8 * (48 * 32 / 4 + 4) / (48 * 32):.2f}"
        said = "autobitlinear, offline" if path == folder else "float as float32, ternary as 2 bits"
        assert found["quantization"] == said
        assert found["text"] == "tokenizer, a chat template"
    assert "verify checks it" in found["data"]
    assert found["format"].startswith("version ")


def rows_of(path, capsys):
    """The table of ``inspect``, by kernel."""
    assert main(["inspect", str(path)]) == 0
    cells = [
        re.split(r"  +", line) for line in capsys.readouterr().out.split("\n\n")[0].split("\n")
    ]
    return {row[0]: dict(zip(cells[0], row, strict=False)) for row in cells[1:]}


def test_inspect_of_a_saved_decoder_groups_layers(tmp_path, capsys):
    """Alike in all layers is one row; one that differs has its own."""
    other = (("layers/1/mlp/up", None),)
    fields = {"depth": 3, "tied": False, "head": bj.Int8Config(), "overrides": other}
    trained = small(**PLAIN | fields)
    packed, _ = bj.nnx.pack(trained)
    packed.save(tmp_path / "packed.safetensors")
    rows = rows_of(tmp_path / "packed.safetensors", capsys)
    assert len(rows) == 9  # seven projections, the embedding and the head; up is there twice
    assert rows["layers/*/mlp/down"]["tensors"] == "3"
    assert rows["layers/*/mlp/down"]["stored as"] == "2 bits"
    assert rows["layers/*/mlp/down"]["scales"] == "one for a tensor"
    assert rows["head"]["kind"] == "int8"
    assert rows["head"]["scales"] == "one for each output"
    trained.save(tmp_path / "trained.safetensors")
    row = rows_of(tmp_path / "trained.safetensors", capsys)["layers/*/mlp/down"]
    assert (row["kind"], row["stored as"]) == ("ternary", "float32")
    assert row["scales"] == "one for a tensor, when run"
    packed.save(tmp_path / "dense.safetensors", dense=True)
    row = rows_of(tmp_path / "dense.safetensors", capsys)["layers/*/mlp/down"]
    assert row["stored as"] == "5 trits/byte"


def test_inspect_of_a_gguf_file(tmp_path, capsys):
    gguf_files.Model("llama", "TQ2_0").write(tmp_path / "model.gguf")
    assert main(["inspect", str(tmp_path / "model.gguf")]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "mlp/up" in line)
    assert row.split()[2:5] == ["256x256", "ternary", "TQ2_0"]
    assert row.endswith("2.06")  # 66 bytes for each 256
    assert lines(printed)["architecture"].strip() == "llama (GGUF)"
    assert lines(printed)["text"].strip().startswith("no tokenizer")


def test_inspect_refuses_in_a_line(folder, tmp_path, capsys):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"architectures": ["\x1b[2JGpt"]}))
    (tmp_path / "empty").mkdir()
    for name, inside in (("shards", "model-00001-of-00002.safetensors"), ("files", "x.gguf")):
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).write_bytes(b"")
    (tmp_path / "bad.gguf").write_bytes(b"GGUFno")
    wanted = {
        folder: "`architectures` is",
        tmp_path / "empty": "neither model.safetensors",
        tmp_path / "shards": "Download the safetensors files of the checkpoint",
        tmp_path / "files": f"Name one of its files: {str(tmp_path / 'files' / 'x.gguf')!r}",
    }
    for path, match in {**wanted, tmp_path / "bad.gguf": "ends within its version"}.items():
        assert main(["inspect", str(path)]) == 1
        said = capsys.readouterr().err
        assert match in said
        assert said.rstrip("\n").isprintable()


BASE = {"vocabulary": 64, "width": 32, "hidden": 64, "depth": 1, "heads": 4}
PLAIN = {"sub_norms": False, "activation": "silu"}
TOKENS = jax.numpy.arange(6)[None]


def small(**fields):
    model = bj.models.Decoder(bj.models.DecoderConfig(**BASE | fields), rngs=nnx.Rngs(1))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "bias":
            noise = jax.random.normal(jax.random.key(2), variable.shape)
            variable.set_value(noise.astype(variable.dtype))
    return model


def same_logits(a, b):
    oracles.assert_same_bits(a(TOKENS)[0], b(TOKENS)[0])


def test_only_a_whole_checkpoint_is_overwritten(folder, tmp_path, capsys):
    for name, make in {
        "own files": lambda path: bj.io.save(path / "run.bitnet.safetensors", {"a": np.ones(3)}),
        "a folder inside": lambda path: (path / "model.safetensors").mkdir(),
        "no config": lambda path: (path / "tokenizer.json").write_text("{}"),
    }.items():
        target = tmp_path / name
        target.mkdir()
        make(target)
        kept = sorted(target.iterdir())
        assert main(["convert", str(folder), str(target), "--overwrite"]) == 1
        assert "Name another folder" in capsys.readouterr().err
        assert sorted(target.iterdir()) == kept


@pytest.mark.parametrize("weights", [bj.B158, bj.PHASE4, bj.TernaryConfig(granularity=16)])
def test_a_saved_packed_decoder_is_trained_on_from_the_same_bits(weights, tmp_path):
    packed, _ = bj.nnx.pack(small(weights=weights, **PLAIN))
    packed.save(tmp_path / "a.safetensors")
    floats = load(tmp_path / "a.safetensors", packed=False)
    assert floats.config == packed.config
    same_logits(floats, packed)
    same_model(bj.nnx.pack(floats)[0], packed)


def test_float32_biases_of_16_bit_weights_are_kept(tmp_path):
    model = small(attention_bias=True, weights=None, activations=None, **PLAIN)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] != "bias":
            variable.set_value(variable.get_value().astype("bfloat16").astype("float32"))
    model = nnx.clone(model)
    bj.io.export_huggingface(model, tmp_path / "in")
    same_logits(load(converted(tmp_path / "in", tmp_path / "a.safetensors")), model)


@pytest.mark.parametrize(
    "fields",
    [
        {"activations": None, "weights": bj.PHASE4},
        {"activations": None, "weights": None},
        {"dtype": "bfloat16", "param_dtype": "bfloat16"},
        {"dtype": "bfloat16", "param_dtype": "bfloat16", **PLAIN},
    ],
    ids=str,
)
def test_exports_load_with_the_same_bits(fields, tmp_path, capsys):
    model, _ = bj.nnx.pack(small(**fields)) if fields.get("weights", 1) else (small(**fields), None)
    bj.io.export_huggingface(model, tmp_path / "out")
    dtype = fields.get("dtype", "float32")
    same_logits(load(tmp_path / "out", dtype=dtype), model)
    same_logits(load(converted(tmp_path / "out", tmp_path / "a.safetensors")), model)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    found = "floats on a ternary grid are found when" in capsys.readouterr().out
    assert found == ("activations" in fields)  # written as floats


def test_options_change_what_they_name_alone(tmp_path):
    untied, _ = bj.nnx.pack(small(tied=False, **PLAIN))
    untied.save(tmp_path / "untied.safetensors")
    model = load(tmp_path / "untied.safetensors", head=bj.Int8Config())
    assert (model.config.embedding, model.config.head) == (None, bj.Int8Config())
    for activations in (None, bj.ActivationConfig(group=16)):
        ternary, _ = bj.nnx.pack(small(activations=activations, **PLAIN))
        ternary.save(tmp_path / "a.safetensors")
        model = load(tmp_path / "a.safetensors", weights=bj.Int8Config())
        assert model.config == ternary.config
        same_logits(model, ternary)
    floats = small(weights=None, activations=None, **PLAIN)
    floats.save(tmp_path / "b.safetensors")
    model = load(tmp_path / "b.safetensors", weights=bj.Int8Config())
    assert model.config.activations == bj.ActivationConfig()


def test_a_saved_decoder_keeps_both_of_its_dtypes(tmp_path):
    model = small(dtype="bfloat16", **PLAIN)
    model.save(tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert again.config == model.config
    same_logits(again, model)


def test_groups_are_asked_of_a_layout_with_one_scale(tmp_path):
    packed, _ = bj.nnx.pack(small(**PLAIN))
    bj.io.export_huggingface(packed, tmp_path / "out")
    model = load(tmp_path / "out", activations=bj.ActivationConfig(group=16))
    assert model.config.activation_rounding == "float32"
    assert np.isfinite(model(TOKENS)[0]).all()


def test_what_would_not_be_the_same_is_refused(folder, tmp_path, capsys):
    model = small(weights=None, activations=None, **PLAIN)
    table = model.embed.embedding
    table.set_value(table.get_value().at[0, 0].set(1e6))
    bj.io.export_huggingface(model, tmp_path / "wide")
    assert main(["convert", str(tmp_path / "wide"), str(tmp_path / "x"), "--dtype", "float16"]) == 1
    assert "float16 cannot hold" in capsys.readouterr().err
    bj.io.save(tmp_path / "p.safetensors", {"a": np.ones(3, np.float32)})
    for option in (["--int8"], ["--dtype", "bfloat16"]):
        arguments = [str(tmp_path / "p.safetensors"), str(tmp_path / "q.safetensors"), *option]
        assert main(["convert", *arguments]) == 1
        assert f"{option[0]} is for decoders" in capsys.readouterr().err
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"rope_theta": 0}))
    with pytest.raises(ValueError, match="theta"):
        load(folder)


def test_files_come_along_byte_for_byte(folder, tmp_path):
    (folder / "merges.txt").write_bytes(b"a b\r\nc d\r\n")
    (folder / "tokenizer.model").write_bytes(b"\xff\x00\n")
    file = converted(folder, tmp_path / "a.safetensors")
    back = converted(file, tmp_path / "back")
    for name in ("merges.txt", "tokenizer.model", "chat_template.jinja"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()


def test_a_file_whose_config_has_a_head_that_its_decoder_has_not():
    """Earlier versions took a tied config with a quantiser for a head, which nothing used."""
    config = bj.models.DecoderConfig(vocabulary=8, width=16, hidden=16, depth=1)
    says = {"config": encoded(config), "origin": {}}
    says["config"]["DecoderConfig"]["head"] = encoded(bj.Int8Config())
    assert _saved.described({_saved.KEY: json.dumps(says)}) == (config, {})


class Told:
    """What a command says of its progress: (what is done, the part), one after the other."""

    calls = ()

    def __init__(self, _, doing="loading"):
        self.doing = doing

    def __call__(self, part):
        Told.calls += ((self.doing, part),)


def test_convert_shows_what_it_loads_and_what_it_writes(folder, tmp_path, monkeypatch):
    file, plain = tmp_path / "a.safetensors", tmp_path / "plain.safetensors"
    bj.io.save(plain, {"a": np.ones(3), "b": np.ones((2, 2))})
    monkeypatch.setattr(_translate, "Progress", Told)
    ways = ((folder, file), (file, tmp_path / "out"), (file, tmp_path / "b.safetensors"))
    for source, target in (*ways, (plain, tmp_path / "c.safetensors")):
        Told.calls = ()
        converted(source, target)
        for doing in ("loading", "writing")[source == plain :]:
            parts = [part for what, part in Told.calls if what == doing]
            assert len(parts) > 1
            assert parts == sorted(parts)
            assert 0 < parts[0] < parts[-1] == 1
        words = [what for what, _ in Told.calls]
        assert words == sorted(words)  # all of loading, then all of writing


def test_a_line_of_progress(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    show = Progress(-1e9, "writing")  # long ago
    for part in (0.251, 0.252, 1.0):
        show(part)
    assert capsys.readouterr().err == "\rwriting 25 %\rwriting 100 %\r"
