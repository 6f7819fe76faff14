"""Tests against what others computed are collected where that, or the others, are."""

import importlib.util

from published import ORACLES, SMOLLM2

there = {
    "test_oracles.py": ORACLES.is_dir(),
    "test_smollm2.py": ORACLES.is_dir() and SMOLLM2 is not None,
    "test_transformers.py": all(
        map(importlib.util.find_spec, ("transformers", "torch", "accelerate"))
    ),
}
collect_ignore = [name for name, found in there.items() if not found]
