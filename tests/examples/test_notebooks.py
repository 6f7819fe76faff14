"""The notebooks: their code runs, and what they show is fit to be read where nothing runs."""

import copy
import json
import re

import jax
import matplotlib as mpl
import pytest
from example_loader import EXAMPLES, load_example

import bitnet_jax as bj

FOLDER = EXAMPLES / "notebooks"
NOTEBOOKS = [
    pytest.param(json.loads(path.read_text()), id=path.stem)
    for path in sorted(FOLDER.glob("*.ipynb"))
]
execute = load_example("notebooks/execute")
text_of = execute.text_of


def test_there_are_two():
    assert [one.id for one in NOTEBOOKS] == ["decoder", "vision_transformer"]


@pytest.mark.full
@pytest.mark.standard_promotion  # as in a user's session
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_code_runs(notebook, tmp_path, monkeypatch, capsys):
    """In order, in one namespace and an empty folder; .ci/run does it in a Jupyter kernel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BITNET_JAX_CHECKPOINT", raising=False)
    names: dict = {"__name__": "__main__"}
    with jax.numpy_rank_promotion("allow"), mpl.rc_context({"backend": "agg"}):
        for cell in execute.code_cells(notebook):
            source = text_of(cell["source"])
            exec(compile(source, cell["id"], "exec"), names)
            names["plt"].close("all")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 30
    assert list(tmp_path.iterdir()) == []  # it cleans up


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_outputs_are_fit_to_be_read(notebook):
    assert list(execute.faults(notebook)) == []
    assert notebook == execute.tidied(notebook)
    shown = [kind for cell in execute.code_cells(notebook) for kind in execute.shown(cell)]
    assert shown.count("image/png") == 2
    assert shown.count("stdout") >= 8
    assert len(json.dumps(notebook)) < 150_000  # the sdist holds them


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_cells_are_short_and_explained(notebook):
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == "markdown"
    assert "code, code, code" not in ", ".join(kinds)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(kinds)
    for cell in notebook["cells"]:
        lines = text_of(cell["source"]).splitlines()
        assert len(lines) <= 25, cell["id"]
        assert max(map(len, lines)) <= 120, cell["id"]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert len(output["metadata"]["image/png"]["alt"]) > 30, cell["id"]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_links_and_names_are_there(notebook):
    text = "\n".join(text_of(cell["source"]) for cell in notebook["cells"])
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (FOLDER / link).exists(), link
    for name in set(re.findall(r"\bbj((?:\.\w+)+)", text)):
        value = bj
        for part in name[1:].split("."):
            value = getattr(value, part)
    seeds = re.findall(r"default_rng\((.*?)\)|random\.key\((.*?)\)", text)
    assert seeds
    assert all(any(pair) for pair in seeds)


STREAM = {"output_type": "stream", "name": "stdout", "text": ["fine\n"]}
UNFIT = {
    "an error": {"output_type": "error", "ename": "E", "evalue": "", "traceback": []},
    "stderr": {**STREAM, "name": "stderr"},
    "a path": {**STREAM, "text": ["wrote /tmp/x/model\n"]},
    "an address": {**STREAM, "text": ["<object at 0x7f0011223344>"]},
    "large": {**STREAM, "text": ["A" * 60_001]},
    "a picture": {"output_type": "display_data", "data": {"image/png": "A"}, "metadata": {}},
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_unfit_is_named(kind):
    source = {"source": ["print()\n"], "cell_type": "code", "metadata": {}, "execution_count": 1}
    notebook = execute.tidied({"cells": [{**source, "outputs": [STREAM]}], "metadata": {}})
    assert list(execute.faults(notebook)) == []
    notebook["cells"][0]["outputs"] = [UNFIT[kind]]
    (fault,) = execute.faults(notebook)
    assert fault.startswith("cell 1 ")


def test_stale_outputs_and_another_order_are_named():
    (notebook,) = (one.values[0] for one in NOTEBOOKS if one.id == "decoder")
    stale = copy.deepcopy(notebook)
    execute.code_cells(stale)[0]["source"] += "\nother = 1"
    execute.code_cells(stale)[1]["execution_count"] = 9
    order, code = execute.faults(stale)
    assert order.startswith("cell 2 was executed as 9")
    assert code.startswith("its outputs are of other code")


def test_pieces_that_were_printed_become_one():
    pieces = [{**STREAM, "text": ["a\n"]}, {**STREAM, "text": ["b\n"]}, UNFIT["a picture"], STREAM]
    texts = [one.get("text") for one in execute.joined(copy.deepcopy(pieces))]
    assert texts == [["a\n", "b\n"], None, ["fine\n"]]


@pytest.mark.parametrize("check", [False, True])
def test_the_command_refuses_what_differs_or_is_unfit(check, tmp_path, monkeypatch, capsys):
    """The execution itself is .ci/run's; here is what becomes of it."""
    path = tmp_path / "one.ipynb"
    cell = {"cell_type": "code", "source": ["1\n"], "metadata": {}, "execution_count": 1}
    old = execute.tidied({"cells": [{**cell, "outputs": []}], "metadata": {}})
    new = execute.tidied({"cells": [{**cell, "outputs": [STREAM]}], "metadata": {}})
    path.write_text(json.dumps(old))
    flags = ["--check"] if check else []
    monkeypatch.setattr(execute, "executed", lambda _: new)
    assert execute.main([*flags, str(path)]) == int(check)
    assert ("cell 1 shows ['stdout'], and in the file []" in capsys.readouterr().out) == check
    assert json.loads(path.read_text()) == (old if check else new)
    new["cells"][0]["outputs"] = [UNFIT["stderr"]]
    assert execute.main([*flags, str(path)]) == 1
    assert json.loads(path.read_text())["cells"][0]["outputs"] != [UNFIT["stderr"]]
