"""Chat templates, run in a sandbox that bounds what they may do.

A template comes with a checkpoint and is a program. Here it reaches no attribute that
Python keeps private, no file, no import and no include. It may take so many steps and
make so much text, and is stopped where it would take more: loops and macro calls are
counted, and what multiplies text is bounded before it is made.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

_STEPS = 100_000

_TEXT = 16 << 20  # characters, and items of lists

_SIZED = (str, bytes, list, tuple, dict, range)

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


class TemplateError(ValueError):
    """A chat template that is refused, or that refuses the messages."""


def render(
    source: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], **extra: Any
) -> str:
    """The text of a conversation, ready for the model's turn.

    Args:
      source: a Jinja template.
      messages: mappings with a role and a content.
      tokens: special tokens by name, ``bos_token`` and the like.
      **extra: more names for the template.
    """
    try:
        import jinja2.sandbox
        import jinja2.visitor
    except ImportError as error:
        raise ImportError(
            "generate: jinja2 is missing, and chat templates need it. Install it with: pip "
            "install 'bitnet_jax[models]', or pass the text of the conversation."
        ) from error
    if len(source) > _TEXT // 16:
        _stop(f"it is longer than {_TEXT // 16} characters")
    environment = _environment(jinja2)
    context = {"messages": messages, "add_generation_prompt": True, **tokens, **extra}
    try:
        return environment.from_string(source).render(context)
    except TemplateError:
        raise
    except (jinja2.TemplateError, RecursionError, OverflowError, MemoryError) as error:
        raise TemplateError(
            f"generate: the checkpoint's chat template failed: {type(error).__name__}: {error}. "
            "Pass the text of the conversation instead of messages."
        ) from None
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise TemplateError(
            f"generate: the checkpoint's chat template does not take these messages: {error}. "
            "Give each a role and a content, or pass the text of the conversation."
        ) from None


def _stop(what: str) -> NoReturn:
    raise TemplateError(
        f"generate: the checkpoint's chat template was stopped: {what}. Pass the text of the "
        "conversation instead of messages."
    )


def _environment(jinja2: Any) -> Any:
    """A sandbox of its own for each rendering, for it holds the count."""
    environment = _sandbox(jinja2)()
    filters = {name: environment.bounded(environment.filters[name]) for name in _FILTERS}
    environment.filters = filters | {"tojson": environment.bounded(_to_json)}
    environment.globals = {
        "_step": environment.step,
        "_joined": environment.joined,
        "range": environment.range,
        "dict": dict,
        "namespace": environment.globals["namespace"],
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment


def _sandbox(jinja2: Any) -> type:
    """Jinja's sandbox, with steps and text counted."""

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def __init__(self) -> None:
            extensions = ["jinja2.ext.loopcontrols"]
            super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
            self.steps = self.text = 0

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            template = _counting(jinja2)().visit(super()._parse(source, name, filename))
            template.set_environment(self)
            return template.set_lineno(1)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator in ("*", "**"):
                _bound_product(operator, left, right)
            _bound_widths((left,) if operator == "%" else ())
            return self.counted(super().call_binop(context, operator, left, right))

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            # str.format comes wrapped by the sandbox.
            owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
            if isinstance(owner, str):  # a method of text may make more text
                _bound_widths((owner,))
                _bound_arguments((owner, *args, *kwargs.values()))
            return self.counted(super().call(context, obj, *args, **kwargs))

        def step(self) -> str:
            """Counts one turn of a loop, or one call of a macro."""
            self.steps += 1
            if self.steps > _STEPS:
                _stop(f"it took more than {_STEPS} steps")
            return ""

        def counted(self, value: Any) -> Any:
            """A value, once its size is added to what was made."""
            self.text += len(value) if isinstance(value, _SIZED) else 0
            if self.text > _TEXT:
                _stop(f"it made more than {_TEXT} characters")
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
                _bound_arguments((*args, *kwargs.values()))
                return self.counted(function(*args, **kwargs))

            if hasattr(function, "jinja_pass_arg"):
                run.jinja_pass_arg = function.jinja_pass_arg  # pyright: ignore
            return run

    return Sandbox


def _counting(jinja2: Any) -> type:
    """A pass over a parsed template: every loop and macro begins with a step; ``~`` is bounded."""
    nodes = jinja2.nodes

    class Counting(jinja2.visitor.NodeTransformer):
        def _counted(self, node: Any) -> Any:
            self.generic_visit(node)
            call = nodes.Call(nodes.Name("_step", "load"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(call))
            return node

        visit_For = visit_Macro = visit_CallBlock = _counted

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return nodes.Call(nodes.Name("_joined", "load"), node.nodes, [], None, None)

    return Counting


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(f"generate: the checkpoint's chat template says: {message}")


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    """JSON as chat templates mean it: not escaped for HTML, as Jinja's own is."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _bound_product(operator: str, left: Any, right: Any) -> None:
    """Stops what would make a long text, list or number of short ones."""
    sized = max(len(v) if isinstance(v, _SIZED) else 0 for v in (left, right))
    numbers = [abs(v) for v in (left, right) if isinstance(v, (int, float))]
    if sized and numbers and sized * max(numbers) > _TEXT:
        _stop(f"it made more than {_TEXT} characters")
    if any(n > 2**64 for n in numbers) or (operator == "**" and max(numbers, default=0) > 1000):
        _stop("it counted too far")


def _bound_arguments(values: Iterable[Any]) -> None:
    """Stops calls whose result could be far larger than what they are given."""
    size = 1
    for value in values:
        if isinstance(value, int) and abs(value) > _STEPS:
            _stop("it counted too far")
        size *= max(1, len(value)) if isinstance(value, str) else 1
    if size > _TEXT * 1000:
        _stop(f"it made more than {_TEXT} characters")


def _bound_widths(values: Iterable[Any]) -> None:
    """Stops formats that would pad to a width of five digits or more."""
    if any(isinstance(value, str) and re.search(r"[%{][^ ]*\d{5}", value) for value in values):
        _stop("it counted too far")
