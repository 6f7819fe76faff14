"""What is imported is declared, what is declared is imported, each with its oldest version."""

import ast
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def imported(folder):
    """Top-level names of what the modules of a folder import, wherever in them."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.partition(".")[0]


def bounds(*lists):
    """Name and oldest version of each requirement; ``.ci/lower_bounds`` knows no other form."""
    requirements = [one for names in lists for one in names if not one.startswith("bitnet_jax[")]
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", one).groups() for one in requirements)


def test_the_package_needs_what_it_imports():
    declared = bounds(PROJECT["dependencies"], EXTRAS["models"], EXTRAS["plot"])
    assert {*imported("bitnet_jax")} - sys.stdlib_module_names - {"bitnet_jax"} == {*declared}


def test_every_bound_is_an_exact_version():
    declared = bounds(PROJECT["dependencies"], *(EXTRAS[name] for name in EXTRAS if tried(name)))
    assert [one for one, version in declared.items() if version.count(".") < 2] == []


def tried(extra):
    return extra not in ("docs", "lint", "notebooks")


def test_the_library_is_compiled_with_the_oldest_headers():
    oldest = bounds(PROJECT["dependencies"])["jax"]
    assert f"jaxlib=={oldest}" in PYPROJECT["build-system"]["requires"]


def test_the_oldest_versions_are_tried_at_night():
    script = (ROOT / ".ci/lower_bounds").read_text()
    (extras,) = re.findall(r"for extra in \((.*)\):", script)
    assert {*re.findall(r'"(\w+)"', extras)} == {name for name in EXTRAS if tried(name)}
    assert "run: .ci/lower_bounds" in (ROOT / ".github/workflows/nightly.yml").read_text()
