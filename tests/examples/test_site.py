"""The site: its own pages run, lead somewhere, and hold every public name."""

import functools
import html
import importlib
import importlib.util
import inspect
import json
import re
import sys
import tomllib
import types

import jax
import pytest
from example_loader import EXAMPLES, load_example

import bitnet_jax as bj

ROOT = EXAMPLES.parent
DOCS = ROOT / "docs"
ROOMS = [
    "bitnet_jax",
    *(
        f"bitnet_jax.{name}"
        for name in bj.__all__
        if isinstance(getattr(bj, name), types.ModuleType)
    ),
]
# A user's session: optax and Flax promote dtypes.
pytestmark = pytest.mark.standard_promotion
OWN = [DOCS / "index.md", DOCS / "coming_from.md", DOCS / "gallery.md"]
ALL = [*sorted(DOCS.rglob("*.md")), *sorted((EXAMPLES / "guides").glob("*.md"))]
PICTURE = re.compile(r"!\[(.*?)\]\((.+?)\)", flags=re.DOTALL)


@pytest.mark.full
@pytest.mark.parametrize("page", OWN, ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    """Blocks in ``python`` are ours and run in order; ``py`` is another library's."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    with jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
    capsys.readouterr()


def shown(page):
    """The names that a page of the API has documented."""
    return re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_on_a_page(room):
    module = importlib.import_module(room)
    wanted = {
        f"{room}.{name}" for name in module.__all__ if not inspect.ismodule(getattr(module, name))
    }
    names = shown(DOCS / "api" / f"{room.removeprefix('bitnet_jax.')}.md")
    assert len(names) == len(set(names))
    assert set(names) == wanted


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": (\S+\.md)$", text, flags=re.MULTILINE))
    own = {str(page.relative_to(DOCS).as_posix()) for page in DOCS.rglob("*.md")}
    guides = {f"guides/{page.name}" for page in (EXAMPLES / "guides").glob("*.md")}
    notebooks = {f"notebooks/{one.stem}.md" for one in (EXAMPLES / "notebooks").glob("*.ipynb")}
    assert listed == own | guides | notebooks


@pytest.mark.parametrize("name", ["decoder", "vision_transformer"])
def test_a_notebook_is_a_page_with_what_it_showed(name):
    source = EXAMPLES / "notebooks" / f"{name}.ipynb"
    text, pictures = loaded("_notebooks").page(source)
    cells = json.loads(source.read_text())["cells"]
    assert text.startswith("# ")
    assert text.count("```python\n") == sum(cell["cell_type"] == "code" for cell in cells)
    printed = [o for cell in cells for o in cell.get("outputs", []) if "text" in o]
    assert text.count("```text\n") == len(printed) > 5
    assert all("".join(output["text"]).rstrip() in text for output in printed)
    assert re.findall(r"!\[.{30,}\]\((\S+)\)", text) == [*pictures]
    assert len(pictures) == 2
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        place = (page.parent / link).resolve()
        if place.parent == DOCS / "guides":  # the guides, which the build brings in
            place = EXAMPLES / "guides" / place.name
        assert link.startswith("https://") or place.exists(), link


def test_home_says_it_in_ten_lines_and_links_the_five_tasks():
    text = (DOCS / "index.md").read_text()
    first, rest = text.split("## ", maxsplit=1)
    (block,) = re.findall(r"```python\n(.*?)```", first, flags=re.DOTALL)
    assert len(block.splitlines()) <= 10
    for page in ("training", "converting", "cpu", "files", "meshes"):
        assert f"](guides/{page}.md)" in first
    assert "```python" not in rest


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_pictures_are_there_and_say_what_they_show(page):
    for alt, link in PICTURE.findall(page.read_text()):
        assert len(alt.split()) > 4, link
        assert (page.parent / link).stat().st_size < 200_000, link


def test_gallery_has_every_picture_and_a_command_for_each():
    text = (DOCS / "gallery.md").read_text()
    shown = [link for _, link in PICTURE.findall(text)]
    assert sorted(shown) == sorted(f"pictures/{p.name}" for p in (DOCS / "pictures").iterdir())
    for section in text.split("\n## ")[1:]:
        assert (
            len(PICTURE.findall(section)) == len(re.findall(r"^```\w", section, re.MULTILINE)) == 1
        )
    scripts = re.findall(r"^python (\S+)", text, flags=re.MULTILINE)
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)


def test_names_that_the_pages_give_are_there():
    """``bj.x.y`` in a table or a sentence is a name of the package."""
    for page in OWN:
        for name in set(re.findall(r"\bbj((?:\.\w+)+)", page.read_text())):
            value = bj
            for part in name[1:].split("."):
                value = getattr(value, part)


def test_commands_are_there():
    text = (DOCS / "coming_from.md").read_text()
    used = set(re.findall(r"python -m bitnet_jax (\w+)", text))
    assert used == {"generate", "convert"}
    help_text = inspect.getsource(importlib.import_module("bitnet_jax.__main__"))
    assert all(f'"{name}"' in help_text for name in used)


def loaded(name):
    """A module of the site's build."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCSTRING = """Sums, exact below 2**24, and beyond 2**-17 as ``a**2`` and `b**2`::

    code

Args:
  x: see :func:`~jax.jit`.

Example:
  >>> 2**3

  8

References:
  A paper.
"""
MARKDOWN = r"""Sums, exact below 2\*\*24, and beyond 2\*\*-17 as ``a**2`` and `b**2`:

    code

Examples:
  >>> 2**3

  8

Args:
  x: see `jax.jit`.

References:
  A paper."""


def test_docstrings_become_markdown(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", types.SimpleNamespace(Extension=object))
    assert loaded("_docstrings").markdown(DOCSTRING) == MARKDOWN


@pytest.fixture
def site(monkeypatch):
    """The hook of the build, without MkDocs, which only the build has."""
    names = ("mkdocs", "mkdocs.structure", "mkdocs.structure.files")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(File=None, Files=None))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return loaded("_site")


def test_guides_become_pages_with_the_same_code(site):
    for guide in (EXAMPLES / "guides").glob("*.md"):
        text, page = guide.read_text(), site.page(guide)
        code = re.compile(r"```.*?```", re.DOTALL)
        assert code.findall(page) == code.findall(text)
        assert "<!--" not in page
        assert "](../../" not in page
    assert site.unbroken("| 9 % ± 1 | x % 2 |") == "| 9\u00a0%\u00a0±\u00a01 | x % 2 |"


def test_dependencies_are_those_of_the_project(site):
    text = (ROOT / "pyproject.toml").read_text()
    wanted = [line.split(">=") for line in tomllib.loads(text)["project"]["dependencies"]]
    _, _, *rows = site.bounds(text).splitlines()
    assert [[cell.strip() for cell in row.split("|")[1:3]] for row in rows] == wanted
    one = 'dependencies = [\n  "a>=1.0", # before, it fails\n  "b>=2"\n]\n'
    assert site.bounds(one).endswith("| a | 1.0 | before, it fails |\n| b | 2 |  |\n")


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_powers_stand_in_code(page):
    """``**`` in prose is the beginning of bold text."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    assert not re.findall(r".*\w\*\*-?\d.*", prose)


figures = functools.cache(lambda: loaded("_figures"))


def drawn(name):
    """Width of each bar, in percent, and the value beside it."""
    text = html.unescape(figures().drawn(name))
    return re.findall(r'style="width:([\d.]+)%.*"value">([^<]+)<', text)


def number(value):
    return float(value.lstrip("> ").replace(",", ""))


def test_costs_are_drawn_as_recorded():
    ratios = [row[2] for row in load_example("results").costs("").rows if row[2]]
    bars = drawn("costs")
    assert [value for _, value in bars] == ratios
    assert all(float(width) == pytest.approx(50 * float(ratio), abs=0.1) for width, ratio in bars)


@pytest.mark.parametrize("name", sorted(figures().FIGURES))
def test_figures_show_cells_of_their_table_and_none_leaves_the_page(name):
    cells = {
        word
        for row in load_example("results").table(name).rows
        for cell in row
        for word in (cell, cell.split(" ±")[0])
    }
    bars = drawn(name)
    assert len(bars) > 2
    assert {value for _, value in bars} <= cells
    assert all(0 < float(width) <= 100 for width, _ in bars)
    by_width = sorted(bars, key=lambda bar: (float(bar[0]), number(bar[1])))
    assert by_width == sorted(bars, key=lambda bar: (number(bar[1]), float(bar[0])))


def test_a_table_without_a_figure_has_none():
    assert figures().drawn("digits") == ""


def test_every_figure_stands_on_a_page():
    text = "".join(page.read_text() for page in (EXAMPLES / "guides").glob("*.md"))
    marks = re.findall(r"<!-- table: ([\w.]+) -->", text)
    assert all(marks.count(name) == 1 for name in figures().FIGURES)


SOUND = """<pre>x % 2</pre>a\u00a0b
<link rel="stylesheet" href="../style.css"><h1 id="top">A</h1><img src="a.png" alt="A">
<a href="#top">1</a><a href="../">2</a><a href="/page/#top">3</a><a href="https://example.org/x">4</a>
<script src="data:,1"></script>"""
FAULTS = {
    '<a href="b/">x</a>': "leads nowhere: b/",
    '<a href="#other">x</a>': "no such anchor: #other",
    '<a href="../#top">x</a>': "no such anchor: ../#top",
    '<img src="a.png">': "no alternative text: a.png",
    '<img src="b.png" alt="B">': "leads nowhere: b.png",
    '<p id="top">x</p>': "identifier twice: top",
    '<a href="http://example.org">x</a>': "no https address: http://example.org",
    '<a href="https://example">x</a>': "no https address: https://example",
    "<pre><span>x</span>\u00a0% 2</pre>": r"code with '\xa0': 'x\xa0% 2'",
    "<pre>print(\u201ca\u201d)</pre>": "code with '\u201c': 'print(\u201ca\u201d)'",
    '<script src="https://cdn.org/a.js"></script>': "fetches https://cdn.org/a.js",
    '<link rel="stylesheet" href="//cdn.org/a.css">': "fetches //cdn.org/a.css",
}


def built(folder, page, style=""):
    (folder / "page").mkdir()
    (folder / "index.html").write_text("<p>home</p>")
    (folder / "style.css").write_text(style)
    (folder / "page" / "a.png").write_bytes(b"")
    (folder / "page" / "index.html").write_text(page)
    return folder


def test_a_sound_site_has_no_fault(tmp_path):
    site = built(tmp_path, SOUND, "a { background: url(data:image/png;base64,aa) }")
    assert loaded("_check").faults(site) == []


@pytest.mark.parametrize(("tag", "says"), FAULTS.items(), ids=FAULTS.values())
def test_faults_of_a_built_site_are_found(tmp_path, tag, says):
    assert loaded("_check").faults(built(tmp_path, SOUND + tag)) == [f"page/index.html: {says}"]


@pytest.mark.parametrize("style", ["@import 'https://cdn.org/a';", "a { b: url(//cdn.org/a) }"])
def test_styles_that_fetch_are_found(tmp_path, style):
    (fault,) = loaded("_check").faults(built(tmp_path, SOUND, style))
    assert fault.startswith("style.css: fetches ")


def test_an_empty_site_is_a_fault(tmp_path):
    assert loaded("_check").faults(tmp_path) == [f"{tmp_path}: no page"]
