"""``--parity-record`` and ``--parity-baseline``: what a session computed, kept and compared."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flaxstab.parity import Baseline, Report, Subject
    from flaxstab.parity._diff import CaseDiff
    from flaxstab.parity._record import Record


class Baselines:
    """Records the comparisons of a session, and compares them with those of an earlier one.

    Args:
      file: the baseline to write at the end; None for none.
      earlier: the one to compare with; None for none.

    Attributes:
      broken: how the last comparison breaks what the baseline holds; '' if it does not.
    """

    def __init__(self, file: str | None, earlier: "Baseline | None") -> None:
        self.broken = ""
        self._file, self._earlier = file, earlier
        self._cases: dict[str, Record] = {}
        self._diffs: dict[str, CaseDiff] = {}
        self._lines: list[str] = []

    def compare(self, subject: "Subject") -> "Report":
        """Compares both sides, as the harness does, and keeps what they computed."""
        from flaxstab.parity._record._take import failure, take

        test = os.environ.get("PYTEST_CURRENT_TEST", "session").rpartition(" ")[0]
        again = sum(name == test or name.startswith(f"{test} (") for name in self._cases)
        name, self.broken = f"{test} ({again + 1})" if again else test, ""
        try:
            report, self._cases[name] = take(subject)
        except Exception as error:
            self._cases[name] = failure(error)
            self._note(name, subject)
            raise
        self._note(name, subject)
        return report

    def _note(self, name: str, subject: "Subject") -> None:
        """Compares with the baseline, if there is one."""
        if self._earlier is None:
            return
        from flaxstab.parity._diff import against

        found = against(name, subject, self._cases[name], self._earlier)
        self._diffs[name] = found
        self.broken = found.words if found.breaks else ""

    def pytest_sessionfinish(self) -> None:
        """Writes the baseline, and says what has moved since the earlier one."""
        if not self._cases:
            self._lines = ["no comparison was made: nothing is recorded"]
            return
        from flaxstab.parity._record import surroundings, write_baseline

        baseline = surroundings(self._cases)
        if self._file is not None:
            write_baseline(baseline, self._file)
            self._lines.append(f"{len(self._cases)} comparisons recorded: {self._file}")
        if self._earlier is not None:
            from flaxstab.parity._diff import gathered

            self._lines += str(gathered([*self._diffs.values()], self._earlier, baseline)).split(
                "\n"
            )
            rest = len(self._earlier.cases.keys() - self._diffs.keys())
            self._lines += [f"  {rest} records of the baseline were not compared"] if rest else []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Shows what was found."""
        terminalreporter.section("parity baseline")
        for line in self._lines:
            terminalreporter.line(line)


def baselines(config: pytest.Config) -> Baselines | None:
    """Refuses at once what would only fail at the end of the tests."""
    file, baseline = (config.getoption(f"--parity-{name}") for name in ("record", "baseline"))
    if file is None and baseline is None:
        return None
    if hasattr(config, "workerinput") or config.getoption("numprocesses", None):
        raise pytest.UsageError(
            "--parity-record and --parity-baseline must run in one process, got pytest-xdist. "
            "Pass -n 0."
        )
    if file is not None and (not Path(file).parent.is_dir() or Path(file).is_dir()):
        raise pytest.UsageError(
            f"--parity-record must name a file in a folder that exists, got {file!r}."
        )
    earlier = None
    if baseline is not None:
        from flaxstab.parity import read_baseline

        try:
            earlier = read_baseline(baseline)
        except ValueError as error:
            raise pytest.UsageError(f"--parity-baseline: {error}") from None
    return Baselines(file, earlier)
