"""``--parity-report``: what a session compared, as files."""

import os
import re
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

if TYPE_CHECKING:
    from flaxstab.parity import Case, Report, Session


class Written:
    """Collects the comparisons of a session and writes them at its end.

    A test's comparisons travel on its reports, which pytest-xdist sends from its workers: those of
    tests that finished are kept if a worker dies.

    Args:
      config: pytest's.
      folder: where the files shall be.
    """

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._folder = folder
        self._worker = getattr(config, "workerinput", None) is not None  # of pytest-xdist
        self._pending: list[tuple[Report | None, str, str]] = []
        self._plain: list[dict[str, object]] = []
        self._session: Session | None = None

    def script(self) -> Path:
        """Returns where the script of the running test's failure shall be."""
        test = os.environ.get("PYTEST_CURRENT_TEST", "session").rpartition(" ")[0]
        again = f"_{len(self._pending) + 1}" if self._pending else ""
        return self._folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', test).strip('_')}{again}.py"

    def keep(self, report: "Report | None", words: str, script: str) -> None:
        """Keeps what the running test compared.

        Args:
          report: what was found; None if the sides could not be compared.
          words: why they could not.
          script: where a script shows it alone, in words.
        """
        self._pending.append((report, words, script))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Puts what was compared since the last report on a test's report."""
        report = yield
        pending, self._pending = self._pending, []
        if pending:
            from flaxstab.parity import Case
            from flaxstab.parity._plain import to_plain

            cases = [
                Case(item.nodeid, found, words, found and found.location, script)
                for found, words, script in pending
            ]
            report.__dict__["parity_cases"] = [to_plain(case) for case in cases]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes them from there, in the process that writes."""
        self._plain += vars(report).get("parity_cases", [])

    def pytest_sessionfinish(self) -> None:
        """Writes the files."""
        if self._worker:
            return
        from flaxstab.parity import Session, write_report

        self._session = Session(tuple(self._cases()))
        for ending in ("json", "html"):
            write_report(self._session, self._folder / f"parity.{ending}")

    def _cases(self) -> "Generator[Case, None, None]":
        from flaxstab.parity import Case
        from flaxstab.parity._plain import from_plain

        seen: Counter[str] = Counter()
        for plain in self._plain:
            case = cast("Case", from_plain(Case, plain, "a test's comparison"))
            seen[case.name] += 1
            again = seen[case.name]
            yield case if again == 1 else case._replace(name=f"{case.name} ({again})")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Says what was compared and where it stands."""
        if self._session is None:
            return
        terminalreporter.section("parity")
        terminalreporter.line(f"{self._session.verdict}: see {self._folder / 'parity.html'}")
