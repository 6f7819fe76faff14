"""README and guides: their code runs as it stands, and their tables are those of the records."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest
from example_loader import EXAMPLES, load_example

ROOT = EXAMPLES.parent
SLOW = ("meshes.md", "optimizers.md", "any_model.md")
COMMANDS = re.compile(r"```bash\n(.*?)```", flags=re.DOTALL)
PAGES = [
    pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])
    for page in (ROOT / "README.md", *sorted((EXAMPLES / "guides").glob("*.md")))
]
results = load_example("results")


@pytest.mark.standard_promotion  # optax's adamw raises under the strict one
@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, tmp_path, monkeypatch):
    """Python blocks in order, in one namespace a page; after each, the commands that follow it."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", page.read_text(), re.DOTALL):
        if language == "python":
            with jax.numpy_rank_promotion("allow"):
                exec(compile(block, str(page), "exec"), names)
            continue
        for line in block.splitlines():
            if line.startswith("python -m bitnet_jax"):
                command = shlex.split(line, comments=True)[1:]
                subprocess.run([sys.executable, *command], check=True, env={...})
