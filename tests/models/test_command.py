"""``python -m bitnet_jax generate``: text to the output, the rest beside it."""

import io

import gguf_files
import pytest
from published import Checkpoint, byte_tokenizer

from bitnet_jax.__main__ import main
from bitnet_jax.models import Decoder, _command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    Checkpoint(vocab_size=256, num_hidden_layers=1, eos_token_id=255).write(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_it_streams_and_says_how_fast(folder, capsys, monkeypatch):
    options = ["generate", str(folder), "--max-new-tokens", "4", "--int8"]
    assert main([*options, "--prompt", "abc"]) == 0
    first = capsys.readouterr()
    assert first.out.endswith("\n")
    for words in ("loaded in", "first token", "prefill 3 tokens", "decode 4 tokens"):
        assert words in first.err
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    assert main(options) == 0
    assert capsys.readouterr().out == first.out


def test_it_chats(folder, capsys):
    options = ["--prompt", "abc", "--chat", "--system", "be brief", "--max-new-tokens", "2"]
    assert main(["generate", str(folder), *options]) == 0
    assert "prefill 25 tokens" in capsys.readouterr().err


def test_errors_are_said_in_a_line(folder, tmp_path, capsys):
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", "x"]) == 1
    assert capsys.readouterr().err.startswith("error: from_pretrained: no folder")
    assert main(["generate", str(folder), "--prompt", "x", "--top-k", "0"]) == 1
    assert "`top_k` must be" in capsys.readouterr().err


def test_a_name_of_the_hub_is_told_how_to_download_it(capsys):
    assert main(["generate", "nobody/no-model", "--prompt", "x"]) == 1
    assert "hf download nobody/no-model --local-dir no-model" in capsys.readouterr().err
    assert main(["generate", "./no-model", "--prompt", "x"]) == 1
    assert "hf download" not in capsys.readouterr().err


def test_ids_in_ids_out(tmp_path, capsys):
    """A folder without a tokenizer, and the file and the folder that it is converted to."""
    folder = Checkpoint(vocab_size=40, num_hidden_layers=1).write(tmp_path / "a")
    file, back = str(tmp_path / "b.safetensors"), str(tmp_path / "c")
    assert main(["convert", str(folder), file]) == main(["convert", file, back]) == 0
    wanted = Decoder.from_pretrained(folder).generate([3, 1, 4], max_new_tokens=5)
    capsys.readouterr()
    for path in (str(folder), file, back):
        assert main(["generate", path, "--max-new-tokens", "5", "--ids", "3", "1", "4"]) == 0
        assert [*map(int, capsys.readouterr().out.split())] == wanted
    assert main(["generate", str(folder), "--ids", "3", "--chat"]) == 1
    assert "--chat is of a prompt, and --ids are tokens" in capsys.readouterr().err


WRONG = {
    "temperature": (["--temperature", "-1"], "`temperature`"),
    "top_p": (["--top-p", "1.5"], "`top_p`"),
    "min_p": (["--min-p", "0"], "`min_p`"),
    "repetition_penalty": (["--repetition-penalty", "0"], "`repetition_penalty`"),
    "seed": (["--seed", str(2**63)], "`seed` must be an integer of 64 bits"),
    "max_new_tokens": (["--max-new-tokens", "0"], "`max_new_tokens`"),
    "stop": (["--stop", ""], "`stop`"),
    "system": (["--system", "be brief"], "--system is a message of a chat. Pass --chat too"),
    "context": (["--max-new-tokens", "62"], "the prompt has 3 tokens"),
    "empty": (["--prompt", ""], "a prompt has no tokens"),
}


@pytest.fixture
def unread(monkeypatch):
    """Fails where weights are read."""

    def read(*_, **__):
        pytest.fail("the weights were read first")

    monkeypatch.setattr(_command.Decoder, "from_pretrained", read)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_weights_are_read(name, folder, capsys):
    options, match = WRONG[name]
    assert main(["generate", str(folder), "--prompt", "abc", *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: generate: ")
    assert match in said


@pytest.mark.usefixtures("unread")
def test_a_missing_template_or_tokenizer_is_said_before_weights_are_read(tmp_path, capsys):
    folder = str(Checkpoint(vocab_size=256, num_hidden_layers=1).write(tmp_path))
    gguf = gguf_files.Model(kind="Q8_0", width=64).write(tmp_path / "model.gguf")
    for path in (folder, str(gguf)):
        assert main(["generate", path, "--prompt", "abc"]) == 1
        assert "there is no tokenizer" in capsys.readouterr().err
        assert main(["generate", path, "--prompt", "abc", "--chat"]) == 1
        assert "no chat template" in capsys.readouterr().err


def test_a_saved_file_talks_as_its_folder_does(folder, tmp_path, capsys):
    options = ["--prompt", "abc", "--max-new-tokens", "3"]
    assert main(["generate", str(folder), *options]) == 0
    want = capsys.readouterr().out
    file = tmp_path / "model.bitnet.safetensors"
    Decoder.from_pretrained(folder).save(file)
    assert main(["generate", str(file), *options]) == 0
    assert capsys.readouterr().out == want
    assert main(["generate", str(file), *options, "--max-new-tokens", "62"]) == 1
    assert "the prompt has 3 tokens" in capsys.readouterr().err


def test_it_can_be_stopped(folder, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_command._generation, "stream", interrupted)
    assert main(["generate", str(folder), "--prompt", "x", "--max-new-tokens", "2"]) == 130
    assert capsys.readouterr().err.endswith("stopped\n")


def test_help_is_for_a_newcomer(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert ".gguf file" in text
    assert "chat template" in text
