"""Which method converts which kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from bitnet_jax import _checks
from bitnet_jax._checks import describe
from bitnet_jax._quantize.config import Int8Config, KernelConfig, planes_of
from bitnet_jax._tree.select import Kernels, Path, match
from bitnet_jax.convert._methods import METHODS, Method

WHO = "calibrate"

# A name in METHODS, or a method of the caller's.
AnyMethod = str | Method

MethodOf = Callable[[Path, jax.ShapeDtypeStruct], AnyMethod]


def methods_of(uses: Kernels, method: Any) -> dict[Path, tuple[str, Method]]:
    """The method of each ternary kernel, by path."""
    paths = list(uses.uses)
    where = ["/".join(path) for path in paths]
    if isinstance(method, Mapping):
        for pattern in method:
            if not any(match(pattern, path) for path in paths):
                what = f"the pattern {pattern!r} of `method`"
                _checks.raise_selector_matches_nothing(WHO, what, where, [pattern])
    found = {}
    for path, use in uses.uses.items():
        given: Any = method
        if isinstance(method, Mapping):
            matching = [m for pattern, m in method.items() if match(pattern, path)]
            if not matching:
                _raise_no_method("/".join(path), list(method))
            given = matching[-1]
        elif callable(method) and not isinstance(method, Method):
            given = method(path, jax.ShapeDtypeStruct(use.shape, jnp.float32))
        found[path] = _resolved(given)
    return found


def _resolved(method: object) -> tuple[str, Method]:
    """A method and its name."""
    if isinstance(method, Method):
        _checks.require_one_of(WHO, "needs", method.needs, ("nothing", "diagonal", "matrix"))
        names = [name for name, one in METHODS.items() if one == method]
        return (names or ["custom"])[0], method
    if not isinstance(method, str):
        raise TypeError(
            f"{WHO}: `method` must be one of {', '.join(map(repr, METHODS))} or a "
            f"bj.convert.Method, got {describe(method)}."
        )
    _checks.require_one_of(WHO, "method", method, tuple(METHODS))
    return method, METHODS[method]


def require_methods(method: Any) -> None:
    """Raises for a method that is none, before anything is run."""
    if isinstance(method, Mapping):
        for pattern, one in method.items():
            if not isinstance(pattern, str) or not pattern:
                raise TypeError(
                    f"{WHO}: `method` must have patterns as keys, got {describe(pattern)}. Write "
                    "for example {'*': 'gptq', 'head': 'survivors'}."
                )
            _resolved(one)
    elif isinstance(method, (str, Method)) or not callable(method):
        _resolved(method)


def takes(method: Method | None, config: KernelConfig) -> bool:
    """Whether a method can make a kernel of this config."""
    return method != METHODS["planes"] or planes_of(config) > 1 or isinstance(config, Int8Config)


def require_planes(path: str, method: Method | None, config: KernelConfig) -> None:
    """Raises where several planes are to be fitted to a kernel of one."""
    if not takes(method, config):
        raise ValueError(
            f"{WHO}: the method 'planes' is for kernels of several ternary planes, and {path} has "
            f"{config}. Ternarize with weights=TernaryConfig(planes=2), or choose a method for "
            "one plane ('gptq', 'survivors')."
        )


def _raise_no_method(path: str, patterns: Sequence[str]) -> NoReturn:
    """Reports a kernel that no pattern of ``method`` matches."""
    raise ValueError(
        f"{WHO}: no pattern of `method` matches {path}, got {patterns}. Begin with '*' for all "
        "others: {'*': 'gptq', ...}."
    )
