"""The fast core, which `pytest` alone runs, reaches every public name."""

import ast
import doctest
import inspect
import pathlib
import re
import types

import pytest

import bitnet_jax as bj

TESTS = pathlib.Path(__file__).parent
ROOMS = [
    bj,
    *(
        module
        for name, module in vars(bj).items()
        if isinstance(module, types.ModuleType) and not name.startswith("_")
    ),
]


def public():
    """Every public callable, by the names that a user may type after `bj.`."""
    found = {}
    for room in ROOMS:
        inside = room.__name__.partition(".")[2]
        for name in getattr(room, "__all__", None) or vars(room):
            value = getattr(room, name)
            ours = str(getattr(value, "__module__", "")).startswith("bitnet_jax")
            if callable(value) and ours and not name.startswith("_"):
                found.setdefault(value, []).append(f"{inside}.{name}".lstrip("."))
    return found


PUBLIC = public()


def dotted(node):
    """`a.b.c` of an expression made of names and attributes alone, or the empty string."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def beyond(node):
    """Whether a test is marked full or slow as a whole."""
    marks = {dotted(mark) for mark in getattr(node, "decorator_list", ())}
    return bool(marks & {"pytest.mark.full", "pytest.mark.slow"})


def used(tree):
    """Names of the package that some source uses, without tests beyond the core."""
    for top in tree.body:
        if beyond(top):
            continue
        for node in ast.walk(top):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitnet_jax"):
                inside = node.module.partition(".")[2]
                yield from (f"{inside}.{alias.name}".lstrip(".") for alias in node.names)
            elif isinstance(node, ast.Attribute):
                root, _, rest = dotted(node).partition(".")
                if root in ("bj", "bitnet_jax"):
                    yield rest


def examples():
    """The sources of every doctest of a public name or its module."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for value in (*ROOMS, *PUBLIC):
        for test in finder.find(value, value.__name__, globs={}):
            yield from (example.source for example in test.examples)


def results(value):
    """What a function says that it returns, or a class that its fields hold."""
    if not inspect.isclass(value):
        return str(inspect.signature(value).return_annotation)
    return " ".join(str(hint) for hint in vars(value).get("__annotations__", {}).values())


@pytest.fixture(scope="module")
def reached():
    """Public callables that the core names, or that come out of those."""
    files = [path for path in TESTS.rglob("*.py") if path.name != pathlib.Path(__file__).name]
    sources = [*(path.read_text() for path in files), *examples()]
    names = {name for source in sources for name in used(ast.parse(source))}
    parents = {name.rpartition(".")[0] for name in names}  # bj.lora.Adapters.kernels
    found = {value for value, own in PUBLIC.items() if set(own) & (names | parents)}
    for _ in range(2):  # a report, and its rows
        told = " ".join(map(results, found))
        found |= {value for value in PUBLIC if re.search(rf"\b{value.__name__}\b", told)}
    return found


@pytest.mark.parametrize("value", PUBLIC, ids=[names[0] for names in PUBLIC.values()])
def test_the_core_reaches(value, reached):
    assert value in reached
