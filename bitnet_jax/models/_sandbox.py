"""Jinja's sandbox, with the filters and functions that chat templates use, and everything counted.

Imported when a template is rendered: Jinja is an extra.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from bitnet_jax.models import _template_limits as limits
from bitnet_jax.models._template_limits import STEPS, TEXT, TemplateError

# What chat templates use; others could be asked for more than their input's size.
_FILTERS = (
    "capitalize",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "unique",
    "upper",
)


class _Counting(NodeTransformer):
    """Puts a step at the head of every loop and macro of a parsed template, and bounds ``~``."""

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        call = nodes.Call(nodes.Name("_step", "load"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call))
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return nodes.Call(nodes.Name("_joined", "load"), node.nodes, [], None, None)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox for one rendering: it holds the count of steps and of text."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.steps = self.text = 0
        self.filters = {name: self.bounded(self.filters[name]) for name in _FILTERS}
        self.filters["tojson"] = self.bounded(_to_json)
        self.globals = {
            "_step": self.step,
            "_joined": self.joined,
            "range": self.range,
            "dict": dict,
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        template = _Counting().visit(super()._parse(source, name, filename))
        template.set_environment(self)
        return template.set_lineno(1)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**"):
            limits.bound_product(operator, left, right)
        limits.bound_widths((left,) if operator == "%" else ())
        return self.counted(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        # str.format comes wrapped by the sandbox.
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, str):  # a method of text may make more text
            limits.bound_widths((owner,))
            limits.bound_arguments((owner, *args, *kwargs.values()))
        return self.counted(super().call(context, obj, *args, **kwargs))

    def step(self) -> str:
        """Counts one turn of a loop, or one call of a macro."""
        self.steps += 1
        if self.steps > STEPS:
            limits.stop(f"it took more than {STEPS} steps")
        return ""

    def counted(self, value: Any) -> Any:
        """A value, once its size is added to what was made."""
        self.text += len(value) if isinstance(value, limits.SIZED) else 0
        if self.text > TEXT:
            limits.stop(f"it made more than {TEXT} characters")
        return value

    def joined(self, *parts: Any) -> str:
        """The ``~`` operator."""
        return self.concat(map(str, parts))

    def concat(self, parts: Iterable[str]) -> str:
        """What blocks, macros and the template itself join their output by."""
        return "".join([self.counted(part) for part in parts])

    def range(self, *args: int) -> range:
        """``range``, its length counted as text."""
        return self.counted(range(*args))

    def bounded(self, function: Any) -> Any:
        """A filter whose arguments are looked at first, and whose result is counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            for argument in args:
                self.counted(argument)
            limits.bound_arguments((*args, *kwargs.values()))
            return self.counted(function(*args, **kwargs))

        if hasattr(function, "jinja_pass_arg"):
            run.jinja_pass_arg = function.jinja_pass_arg  # pyright: ignore
        return run


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(f"generate: the checkpoint's chat template says: {message}")


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    """JSON as chat templates mean it: not escaped for HTML, as Jinja's own is."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
