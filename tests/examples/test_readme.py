"""The README's code runs as it stands."""

import pathlib
import re

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_code_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:  # the second goes on where the first ended
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "model.bitnet.safetensors").stat().st_size > 0
