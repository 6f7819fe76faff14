"""README and guides: their code runs as it stands, and their tables are those of the records."""

import json
import pathlib
import re
import runpy
import shlex

import jax
import pytest
from example_loader import EXAMPLES, load_example

import bitnet_jax as bj
from bitnet_jax.__main__ import main

ROOT = EXAMPLES.parent
FILES = (ROOT / "README.md", *sorted((EXAMPLES / "guides").glob("*.md")))
CORE = ("README", "architecture", "files")  # pages whose code the fast core runs
PAGES = [
    pytest.param(file, id=file.stem, marks=[] if file.stem in CORE else [pytest.mark.full])
    for file in FILES
]
COMMAND = "python -m bitnet_jax "

# optax's adamw raises under strict promotion; pages run as a user's session does.
pytestmark = pytest.mark.standard_promotion


@pytest.mark.parametrize("file", PAGES)
def test_code_runs(file, tmp_path, monkeypatch, capsys):
    """A page's Python blocks and our own commands, in order, in one namespace and folder."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```(python|bash)\n(.*?)```", file.read_text(), flags=re.DOTALL)
    with jax.numpy_rank_promotion("allow"):
        for language, block in blocks:
            if language == "python":
                exec(compile(block, str(file), "exec"), names)
                continue
            for line in filter(lambda line: line.startswith(COMMAND), block.splitlines()):
                assert main(shlex.split(line.removeprefix(COMMAND), comments=True)) == 0, line
    capsys.readouterr()  # what the page prints is for its reader


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_pages_are_short_and_start_with_code(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= {"README": 140, "results": 190}.get(file.stem, 160)
    if file.stem not in ("architecture", "results"):
        assert lines.index("```python") < 24  # counted from 0


def test_every_public_name_is_shown():
    shown = [file.read_text() for file in (*FILES, *EXAMPLES.rglob("*.py"))]
    words = set(re.findall(r"\w+", "\n".join(shown)))
    rooms = (bj, bj.analysis, bj.io, bj.linen, bj.lora, bj.nnx, bj.optim, bj.sharding)
    missing = {room.__name__: sorted(set(room.__all__) - words) for room in rooms}
    assert not any(missing.values()), missing


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_links_lead_somewhere(file):
    for link in re.findall(r"\]\(([^)#]+)", file.read_text()):
        assert link.startswith("https://") or (file.parent / link).exists(), link


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tables_are_those_of_the_records(file):
    """After ``python examples/results.py`` they are."""
    assert load_example("results").rendered(file.read_text()) == file.read_text()


def test_a_run_takes_the_place_of_one_with_the_same_jax(tmp_path):
    results = load_example("results")
    path = tmp_path / "record.json"
    older = [{"jax": jax.__version__, "tables": []}, {"jax": "0.0.1", "tables": []}]
    path.write_text(json.dumps(older))
    results.save(path, results.Table("title", ["", "a"], [["row", "1"]]))
    new, kept = json.loads(path.read_text())
    assert new["jax"] == jax.__version__
    assert new["tables"] == [{"title": "title", "header": ["", "a"], "rows": [["row", "1"]]}]
    assert {"command", "date", "processor", "python"} <= new.keys()
    assert kept == older[1]


@pytest.mark.full
def test_quickstart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "quickstart.py"))
    printed = capsys.readouterr().out
    trained, loaded = map(float, re.findall(r"accuracy, \w+: +([\d.]+)%", printed))
    assert trained == loaded > 90
    assert "differ in any bit: 0 of 3,970" in printed
    assert pathlib.Path("digits.bitnet.safetensors").stat().st_size < 5000
