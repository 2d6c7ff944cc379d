"""What cannot be tested here is listed with its reason: a checkout's files, PyTorch, an extra.

The wheel has the tests, and neither README, docs, examples nor benchmarks; and where PyTorch is not
installed nothing can be compared with it. Both are outcomes, not failures and not silence.
"""

import importlib.util
import os
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

CHECKOUT = "not part of the wheel"
TREE_MODE = "which NNX does not allow in tree mode"
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs torch, which is not installed"
)
needs_graph_mode = pytest.mark.skipif(
    os.environ.get("NNX_GRAPH_MODE", "").lower() in ("false", "0"),
    reason=f"shares a module, {TREE_MODE}",
)
Report = TypeVar("Report", pytest.CollectReport, pytest.TestReport)
ABSENT = "which is not installed"
EXTRAS = ("torch", "matplotlib", "safetensors")  # flaxstab's, and no others


def why_absent(error: BaseException) -> str:
    """Returns which extra an error misses; '' if it is about anything else.

    Looks at the first error of the chain: pytest wraps what importing a file raises.
    """
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    name = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in EXTRAS or importlib.util.find_spec(name) is not None:
        return ""
    return f"needs {name}, {ABSENT}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Counts a file that cannot be imported for want of an extra as skipped, with that reason."""
    report = yield
    call = getattr(report, "call", None)
    return _excused(report, collector.path, call and call.excinfo)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Counts a test that needs an extra which is not there as skipped, with that reason."""
    report = yield
    return _excused(report, item.path, call.excinfo)


def _excused(
    report: Report, path: Path, raised: "pytest.ExceptionInfo[BaseException] | None"
) -> Report:
    reason = why_absent(raised.value) if raised else ""
    if reason and report.outcome == "failed":
        report.outcome = "skipped"
        report.longrepr = (str(path), 0, f"Skipped: {reason}")
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists what was not applicable here, file by file, and why."""
    places: dict[tuple[str, str], int] = {}
    for report in terminalreporter.getreports("skipped"):
        _, _, words = report.longrepr
        if any(why in words for why in (CHECKOUT, ABSENT, TREE_MODE)):
            place = (report.nodeid.split("::")[0], words.removeprefix("Skipped: "))
            whole = isinstance(report, pytest.CollectReport)
            places[place] = 0 if whole else places.get(place, 0) + 1
    if places:
        files = len({file for file, _ in places})
        terminalreporter.section(f"not applicable here: {files} files, whole or in part")
        for (file, reason), count in sorted(places.items()):
            terminalreporter.line(f"{file} ({f'{count} tests' if count else 'whole'}): {reason}")
