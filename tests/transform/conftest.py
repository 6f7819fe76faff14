"""Tests of models that others published are collected where those are installed."""

from third_party import FOUND

collect_ignore = [] if FOUND else ["test_third_party.py"]
