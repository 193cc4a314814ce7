"""Which browser tests share a process: a file's own, and site and slides, which are read once."""

from __future__ import annotations

import pytest

PAGES = ("test_site", "test_slides")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A group each for ``--dist loadgroup``."""
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group("pages" if name in PAGES else name))
