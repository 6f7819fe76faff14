"""Fixtures of the tests of files and checkpoints."""

import pytest
from damaged_files import contents


@pytest.fixture
def folder(tmp_path):
    """Where a test keeps its checkpoints."""
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small plain file, and a place to write it changed."""
    path, found = contents(tmp_path_factory.mktemp("small"))
    return path, found["plain"]
