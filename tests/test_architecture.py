"""The shape of the code: imports go down, exports are frozen, everything public is documented."""

import ast
import doctest
import graphlib
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import typing
from collections import Counter

import pytest

import bitnet_jax as bj

ROOT = pathlib.Path(bj.__file__).parent
# Imports go strictly down between rooms; DESIGN's table, from the ground up.
FLOORS = {
    "_checks": 1,
    "_context": 1,
    "_display": 1,
    "_mesh": 2,
    "_native": 2,
    "_quantize": 3,
    "_packed": 4,
    "_ops": 5,
    "_tree": 5,
    "_matmul": 6,
    "_layers": 7,
    "_transform": 8,
    "analysis": 8,
    "io": 8,
    "lora": 8,
    "sharding": 8,
    "linen": 9,
    "nnx": 9,
    "optim": 9,
    "convert": 10,
    "models": 10,
    "_doctor": 11,
    "_tune": 12,
    "__main__": 13,
}
EXPORTS = [
    "B158",
    "PHASE4",
    "TWN",
    "ActivationConfig",
    "Int8Config",
    "PackReport",
    "PackedInt8",
    "PackedTernary",
    "Ternary",
    "TernaryConfig",
    "TernaryPlanes",
    "analysis",
    "combine",
    "convert",
    "exclude",
    "fake_quantize",
    "fake_quantize_activations",
    "fake_quantize_params",
    "io",
    "is_packed",
    "linen",
    "lora",
    "matmul",
    "models",
    "nnx",
    "only",
    "optim",
    "pack",
    "pack_params",
    "partition",
    "phase_in",
    "prepare",
    "quantize",
    "quantize_activations",
    "sharding",
    "ternarize",
    "ternary_dot",
    "unpack",
    "unpack_params",
]
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "bitnet_jax."))


def room(module):
    """The room a module of the package is in: ``bitnet_jax._matmul.api`` is in ``_matmul``."""
    return module.split(".")[1] if "." in module else None


def imported(path):
    """The modules of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("bitnet_jax"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitnet_jax"):
            if node.module == "bitnet_jax":
                yield from (f"bitnet_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


def arrows():
    """Pairs of rooms, the importing and the imported one."""
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "__init__.py":
            continue
        here = path.relative_to(ROOT).with_suffix("").parts[0]
        for module in imported(path):
            if room(module) != here:
                yield here, room(module)


def test_every_room_has_a_floor():
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__", "py"} - {"CHANGELOG"} == set(FLOORS)


def test_imports_go_down():
    drawn = set(arrows())
    assert ("_packed", "_quantize") in drawn  # the reader of imports reads
    assert {(a, b) for a, b in drawn if FLOORS[a] <= FLOORS[b]} == set()


def inner_arrows():
    """Pairs of files of one room, the importing and the imported one."""
    for path in ROOT.rglob("*.py"):
        here = ".".join(("bitnet_jax", *path.relative_to(ROOT).with_suffix("").parts))
        for module in imported(path):
            if room(module) == room(here) and path.name != "__init__.py":
                yield here, module


def test_no_cycle_inside_a_room():
    below: dict[str, set[str]] = {}
    for importer, module in inner_arrows():
        below.setdefault(importer, set()).add(module)
    assert below["bitnet_jax._ops.ternary_dot"] >= {"bitnet_jax._ops.product"}
    graphlib.TopologicalSorter(below).prepare()  # raises CycleError


def test_no_module_name_twice():
    """A room's own name counts too: ``kernel.py`` is one file, whatever folder it is in."""
    names = [path.stem.lstrip("_") for path in ROOT.rglob("*.py") if path.stem != "__init__"]
    rooms = [path.name.lstrip("_") for path in ROOT.iterdir() if path.is_dir()]
    assert [name for name, n in Counter(names + rooms).items() if n > 1] == []


def drawn():
    """The rooms of the drawing in the guide, room to its floor and what it points at."""
    page = (ROOT.parent / "examples/guides/architecture.md").read_text()
    drawing = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)[0]
    for line in drawing.splitlines()[1:]:
        floor, room, *_ = line.split()
        points = line.partition("-> ")[2]
        yield room, int(floor), set(points.split(", ")) if points else set()


def below(room, points):
    """All that can be reached from a room."""
    return set().union(*({other} | below(other, points) for other in points.get(room, ())))


def test_the_drawing_is_that_of_the_imports():
    floors = {room: floor for room, floor, _ in drawn()}
    points = {room: others for room, _, others in drawn()}
    assert floors == FLOORS
    real = set(arrows())
    for room, others in points.items():
        assert {(room, other) for other in others} <= real  # every arrow is an import
        assert all(floors[other] < floors[room] for other in others)  # and goes down
    assert {(a, b) for a, b in real if b not in below(a, points)} == set()  # none is missing


def test_the_guide_names_files_that_are_there():
    page = (ROOT.parent / "examples/guides/architecture.md").read_text()
    assert len(page.splitlines()) <= 120
    files = set(re.findall(r"`(\w+/\w+\.py)`", page)) - {"tests/test_architecture.py"}
    files = {file for file in files if not file.startswith("bitnet_jax/")}
    assert len(files) > 10
    assert {file for file in files if not (ROOT / file).exists()} == set()


def test_exports_are_frozen():
    assert sorted(EXPORTS) == sorted(bj.__all__)
    assert all(hasattr(bj, name) for name in EXPORTS)
    assert bj.io.__all__ == [
        "FormatError",
        "abstract",
        "check",
        "describe",
        "export_huggingface",
        "load",
        "save",
    ]
    assert bj.linen.__all__ == [
        "BitConv",
        "BitDense",
        "BitDenseGeneral",
        "BitEinsum",
        "TernaryDotGeneral",
        "explain",
        "kernels",
        "pack",
        "ternarize",
    ]
    assert bj.nnx.__all__ == [
        "BitConv",
        "BitEinsum",
        "BitLinear",
        "BitLinearGeneral",
        "TernaryDotGeneral",
        "explain",
        "kernels",
        "pack",
        "ternarize",
        "trainable",
    ]
    assert bj.models.__all__ == ["Decoder", "DecoderConfig", "LoadReport", "LoadedKernel", "Rope"]
    assert bj.analysis.__all__ == [
        "Comparison",
        "GradientFlow",
        "LayerSensitivity",
        "LayerTrits",
        "LeafGradient",
        "Sensitivity",
        "TritStats",
        "compare",
        "gradient_flow",
        "sensitivity",
        "trit_stats",
    ]
    assert bj.convert.__all__ == [
        "CANDIDATES",
        "Budget",
        "BudgetedKernel",
        "CalibratedKernel",
        "Calibration",
        "Captured",
        "FinetuneRecipe",
        "Losses",
        "Method",
        "Option",
        "Quantized",
        "SmoothedKernel",
        "Smoothing",
        "Statistics",
        "attention_relation",
        "budget",
        "calibrate",
        "capture",
        "finetune_recipe",
        "hidden_distillation",
        "logit_distillation",
        "smooth",
    ]
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        bj.nope  # noqa: B018


def members(module):
    """Functions and classes of a module, and what is defined in those classes."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            yield value
            for member in vars(value).values():
                member = getattr(member, "fget", getattr(member, "__func__", member))
                if inspect.isfunction(inspect.unwrap(member)):
                    yield inspect.unwrap(member)
        elif callable(value):
            yield inspect.unwrap(value)


@pytest.mark.parametrize("name", ["bitnet_jax", *MODULES])
def test_annotations_evaluate(name):
    failed = []
    for member in members(importlib.import_module(name)):
        try:
            typing.get_type_hints(member)
        except Exception as error:
            failed.append(f"{member.__qualname__}: {error}")
    assert failed == []


def functions():
    """Every function of the package, with the file it is in."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path.relative_to(ROOT), node


def test_annotations_say_more_than_any():
    """At most one parameter in twenty is a bare ``Any``, or without an annotation."""
    bare, count = Counter(), 0
    for path, node in functions():
        args = node.args
        more = [arg for arg in (args.vararg, args.kwarg) if arg]
        for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, *more):
            if arg.arg in ("self", "cls", "_"):
                continue
            count += 1
            bare[str(path)] += arg.annotation is None or ast.unparse(arg.annotation) == "Any"
    assert bare.total() <= 0.05 * count, +bare


def test_what_always_raises_says_so():
    """``raise_*`` is annotated NoReturn, so nobody has to write anything after a call of it."""
    for path, node in functions():
        if node.name.lstrip("_").startswith("raise_"):
            assert ast.unparse(node.returns) == "NoReturn", (path, node.name)
    for path in ROOT.rglob("*.py"):
        assert "raise AssertionError" not in path.read_text(), path


REPORTS = {
    "bitnet_jax": ["PackReport"],
    "bitnet_jax.analysis": ["Comparison", "GradientFlow", "Sensitivity", "TritStats"],
    "bitnet_jax.convert": ["Budget", "Calibration", "Smoothing"],
    "bitnet_jax.sharding": ["Collectives", "TrainingMemory"],
    "bitnet_jax.nnx._coverage": ["Coverage"],
    "bitnet_jax._transform.explain": ["ProgramCoverage"],
}


@pytest.mark.parametrize("module", REPORTS)
def test_reports_are_alike(module):
    for name in REPORTS[module]:
        report = getattr(importlib.import_module(module), name)
        assert hasattr(report, "rows") or "rows" in typing.get_type_hints(report), name
        assert callable(report.to_dict)
        assert report.__str__ is not object.__str__


def public():
    for module in (
        bj,
        bj.analysis,
        bj.convert,
        bj.io,
        bj.linen,
        bj.lora,
        bj.models,
        bj.nnx,
        bj.optim,
        bj.sharding,
    ):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("value", list(public()))
def test_public_names_are_documented(value):
    text = inspect.getdoc(value)
    if inspect.isfunction(value):
        assert text.split("\n")[0].endswith(".")
        assert "Args:" in text
        assert "Returns:" in text or value in (bj.io.save, bj.io.export_huggingface)
        assert "Example:" in text
        assert ">>>" in text
        for parameter in inspect.signature(value).parameters.values():
            assert f"{parameter.name}:" in text, parameter
    else:
        own = vars(value)
        assert "__doc__" in own
        assert text
        for name, member in own.items():
            if not name.startswith("_") and (callable(member) or isinstance(member, property)):
                assert inspect.getdoc(member), name


@pytest.mark.standard_promotion  # a doctest is a user's session, with JAX's defaults
@pytest.mark.parametrize("name", ["bitnet_jax", *MODULES])
def test_doctests(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


def test_doctests_are_there():
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in found) > 80


def test_import_stays_light():
    code = (
        "import sys, bitnet_jax;"
        "heavy = {'flax.nnx', 'optax', 'matplotlib', 'sklearn', 'orbax', 'tqdm'};"
        "found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
