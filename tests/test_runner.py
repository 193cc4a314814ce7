"""The verdict of ``python -m tests``: nothing that failed, or never ran, may look like a pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import __main__ as runner
from tests.__main__ import Result, closing_lines, count, duration


def report(folder: Path, cases: str) -> Path:
    path = folder / "report.xml"
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return path


GOOD = '<testcase classname="tests.test_a" time="1.5"/>'
BAD = '<testcase classname="tests.test_a" time="0.5"><failure/></testcase>'
ERROR = '<testcase classname=""><error/></testcase>'
SKIPPED = '<testcase classname="tests.test_b"><skipped/></testcase>'


@pytest.mark.parametrize(
    ("cases", "ok", "counts"),
    [
        (GOOD * 3 + SKIPPED, True, (3, 0, 1)),
        (GOOD + BAD, False, (1, 1, 0)),
        (GOOD + ERROR, False, (1, 1, 0)),
        (SKIPPED, False, (0, 0, 1)),
        ("", False, (0, 0, 0)),
    ],
)
def test_count(tmp_path: Path, cases: str, ok: bool, counts: tuple[int, int, int]) -> None:
    result = Result("tests", ok=True, seconds=1)
    count(result, report(tmp_path, cases))
    assert result.ok is ok
    assert (result.passed, result.failed, result.skipped) == counts


def test_a_crash_before_the_report_is_a_failure(tmp_path: Path) -> None:
    result = Result("tests", ok=True, seconds=1)
    count(result, tmp_path / "never_written.xml")
    assert not result.ok


def test_a_failing_command_stays_failed_though_every_test_passed(tmp_path: Path) -> None:
    result = Result("tests", ok=False, seconds=1)
    count(result, report(tmp_path, GOOD))
    assert not result.ok


def test_closing_lines() -> None:
    lint = Result("lint", ok=True, seconds=1)
    tests = Result("tests", ok=True, seconds=1, passed=214, skipped=2, summary="214 tests")
    types = Result("types", ok=False, seconds=1)
    assert closing_lines([lint, tests], 252) == [
        "214 passed, 0 failed, 2 skipped",
        "all passed: lint, 214 tests in 4 min 12 s",
    ]
    assert closing_lines([lint, types, tests], 9) == [
        "214 passed, 0 failed, 2 skipped",
        "failed: types; passed: lint, 214 tests; in 9.0 s",
    ]


def test_a_browser_is_not_opened_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def pretend(name: str) -> Result:
        ran.append(name)
        return Result(name, ok=True, seconds=0)

    monkeypatch.setattr(runner, "run_stage", pretend)
    for words in ([], ["browser"], ["types", "lint"]):
        monkeypatch.setattr("sys.argv", ["tests", *words])
        assert runner.main() == 0
    assert ran == ["lint", "format", "types", "tests", "notebooks", "browser", "lint", "types"]


def test_without_a_browser_its_stage_says_so_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "chromium", lambda: None)
    monkeypatch.setattr("subprocess.run", lambda *words, **options: pytest.fail("it ran"))
    result = runner.run_stage("browser")
    assert (result.ok, result.passed) == (True, 0)
    assert "no Chromium found" in capsys.readouterr().out


def test_duration() -> None:
    assert duration(59.94) == "59.9 s"
    assert duration(119.7) == "2 min 0 s"
