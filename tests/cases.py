"""Which parameters of a test belong to the fast core."""

import pytest


def cases(names, values, *, core, ids=None):
    """``pytest.mark.parametrize``, where parameters that are not in ``core`` are marked full.

    Args:
        names: The name of one argument, or a tuple of several.
        values: Parameters by their id, or a sequence of them.
        core: Ids, or members of the sequence, that the fast core runs.
        ids: As for ``pytest.mark.parametrize``; a dict brings its own.

    Returns:
        The decorator.
    """
    by_id = isinstance(values, dict)
    keys = list(values)
    unknown = [each for each in core if each not in keys]
    if unknown:
        raise ValueError(f"cases: {unknown} in `core` are not among the parameters {keys}")
    marked = []
    for key in keys:
        value = values[key] if by_id else key
        arguments = (value,) if isinstance(names, str) else value
        marks = () if key in core else (pytest.mark.full,)
        marked.append(pytest.param(*arguments, marks=marks, id=key if by_id else None))
    return pytest.mark.parametrize(names, marked, ids=ids)
