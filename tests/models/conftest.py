"""Tests against the oracles of transformers and llama.cpp are collected where those are."""

from published import ORACLES

collect_ignore = [] if ORACLES.is_dir() else ["test_oracles.py"]
