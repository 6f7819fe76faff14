"""``python -m bitnet_jax generate``: text to the output, the rest beside it."""

import io

import pytest
from published import Checkpoint, byte_tokenizer

from bitnet_jax.__main__ import main
from bitnet_jax.models import _command


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
