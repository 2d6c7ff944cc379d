"""What cannot be tested here is listed with its reason: a checkout's files, or PyTorch.

The wheel has the tests, and neither README, docs, examples nor benchmarks; and where PyTorch is not
installed nothing can be compared with it. Both are outcomes, not failures and not silence.
"""

import importlib.util
from collections.abc import Generator

import pytest

CHECKOUT = "not part of the wheel"
TORCH = "needs PyTorch, which is not installed"
REASONS = (CHECKOUT, TORCH)
HAS_TORCH = importlib.util.find_spec("torch") is not None


def is_for_want_of_torch(error: BaseException | None) -> bool:
    """Tells whether an error says that there is no PyTorch where it is not installed."""
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "torch"
    return missing and not HAS_TORCH


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Counts a file that cannot be imported for want of PyTorch as skipped, with that reason."""
    report = yield
    error = getattr(report, "call", None)
    if error is not None and error.excinfo and is_for_want_of_torch(_cause(error.excinfo.value)):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {TORCH}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Counts a test that imports PyTorch where there is none as skipped, with that reason."""
    report = yield
    if call.excinfo and is_for_want_of_torch(_cause(call.excinfo.value)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {TORCH}")
    return report


def _cause(error: BaseException) -> BaseException | None:
    """Returns the first error of a chain: pytest wraps what importing a file raises."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists what was not applicable here, file by file, and why."""
    reasons: dict[tuple[str, str], int] = {}
    for report in terminalreporter.getreports("skipped"):
        _, _, words = report.longrepr
        if any(reason in words for reason in REASONS):
            place = (report.nodeid.split("::")[0], words.removeprefix("Skipped: "))
            reasons[place] = reasons.get(place, 0) + 1
    if reasons:
        files = len({file for file, _ in reasons})
        terminalreporter.section(f"not applicable here: {files} files, whole or in part")
        for (file, reason), count in sorted(reasons.items()):
            terminalreporter.line(f"{file} ({count}): {reason}")
