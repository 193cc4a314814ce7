"""A pytest plugin for the copies: which test failed first, with which error, on which code."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator

import pytest

FILE = "witness.json"
first: dict[str, object] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note the first failure of a test, or of what it needs."""
    report = yield
    if report.failed and not first and call.excinfo is not None:
        kinds = [kind.__name__ for kind in call.excinfo.type.__mro__]
        first.update(test=item.nodeid, when=report.when, errors=kinds)
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a file that could not even be imported."""
    if report.failed and not first:
        last = str(report.longrepr).strip().splitlines()[-1]
        first.update(test=report.nodeid, when="collect", errors=[last])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was noted, and where package and tests were imported from."""
    modules = [sys.modules.get(name) for name in ("dsv3_mini", "tests")]
    imported = [str(getattr(module, "__file__", None)) for module in modules]
    found = json.dumps({"imported": imported, "first": first})
    (session.config.rootpath / FILE).write_text(found, encoding="utf-8")
