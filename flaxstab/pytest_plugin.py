"""The pytest fixture ``parity``: a Flax model beside its PyTorch twin, in anyone's test suite.

``--parity-report DIR`` writes every comparison of a session to ``DIR/parity.json`` and
``DIR/parity.html``, also of tests that pass and under pytest-xdist.

``--parity-record FILE`` writes all that they computed to a baseline; ``--parity-baseline FILE``
compares them with one, and fails a test whose comparison breaks what was right then.

Loaded by pytest wherever flaxstab is installed, so it imports neither JAX nor PyTorch before use.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import pytest

if TYPE_CHECKING:
    import numpy as np

    from flaxstab._typing import DTypeLike, PyTree
    from flaxstab.parity import (
        Baseline,
        Case,
        Report,
        Session,
        Subject,
        Tolerance,
        TrainStep,
    )
    from flaxstab.parity._diff import CaseDiff
    from flaxstab.parity._record import Record

_NAME = "flaxstab-parity-report"
_BASELINES = "flaxstab-parity-baselines"


class Parity:
    """What the fixture ``parity`` is.

    Args:
      written: keeps every comparison for ``--parity-report``; None without it.
      baselines: records and compares them for ``--parity-record`` and ``--parity-baseline``.
    """

    def __init__(
        self, written: "Written | None" = None, baselines: "Baselines | None" = None
    ) -> None:
        self._written, self._baselines = written, baselines

    def check(
        self,
        flax_side: "PyTree",
        torch_side: "PyTree",
        *inputs: "np.ndarray",
        layout: Literal["image"] | None = None,
        weights: Literal["torch", "flax"] | None = "torch",
        rename: Callable[[str], str] | None = None,
        dtypes: "Sequence[DTypeLike]" = ("float32",),
        witness: "PyTree" = None,
        tolerances: "Sequence[Tolerance]" = (),
        seed: int = 0,
        reproduce: str | os.PathLike[str] | None = None,
        flax_source: str = "",
        torch_source: str = "",
    ) -> "Report":
        """Compares both sides, and fails the test unless JAX's side is as it should be.

        The arguments are those of :func:`flaxstab.parity.compare`; ``reproduce`` is where to write
        a script that shows the difference alone, if there is one (see
        :func:`flaxstab.parity.reproduce`, also for ``flax_source`` and ``torch_source``). With
        ``--parity-report DIR`` it is written to a file of the test's name there.

        Returns:
          The report of a comparison that passed.
        """
        from flaxstab import parity

        def script(path: Path, report: "Report") -> object:
            return parity.reproduce(
                flax_side, torch_side, *inputs, path=path, layout=layout, weights=weights,
                rename=rename, dtypes=dtypes, seed=seed,
                flax_source=flax_source, torch_source=torch_source, report=report,
            )  # fmt: skip

        def compare() -> "Report":
            options: dict[str, PyTree] = {
                "layout": layout, "weights": weights, "rename": rename, "dtypes": dtypes,
                "witness": witness, "tolerances": tolerances, "seed": seed,
            }  # fmt: skip
            if self._baselines is None:
                return parity.compare(flax_side, torch_side, *inputs, **options)
            subject = parity.Subject(flax_side, torch_side, inputs, **options)
            return self._baselines.compare(subject)

        return self._passed(compare, script, None if reproduce is None else Path(reproduce))

    def check_trajectory(
        self,
        flax_side: "TrainStep",
        torch_side: "TrainStep",
        batches: "Sequence[Sequence[np.ndarray]]",
        *,
        steps: int,
        layout: Literal["image"] | None = None,
        weights: Literal["torch", "flax"] | None = "torch",
        rename: Callable[[str], str] | None = None,
        dtypes: "Sequence[DTypeLike]" = (),
        tolerances: "Sequence[Tolerance]" = (),
    ) -> "Report":
        """Trains both sides, and fails the test if they part.

        The arguments are those of :func:`flaxstab.parity.trajectory`.

        Returns:
          The report of a training that passed.
        """
        from flaxstab import parity

        def compare() -> "Report":
            options: dict[str, PyTree] = {
                "steps": steps, "layout": layout, "weights": weights, "rename": rename,
                "dtypes": dtypes, "tolerances": tolerances,
            }  # fmt: skip
            if self._baselines is None:
                return parity.trajectory(flax_side, torch_side, batches, **options)
            subject = parity.Subject(flax_side, torch_side, tuple(batches), **options)
            return self._baselines.compare(subject)

        return self._passed(compare)

    def _passed(
        self,
        compare: "Callable[[], Report]",
        script: "Callable[[Path, Report], object] | None" = None,
        path: Path | None = None,
    ) -> "Report":
        """Returns the report, or fails the test with one screen of it.

        Args:
          compare: makes the report.
          script: writes a script that shows the difference; None if none can be written.
          path: where to; None: nowhere, or where the report of the session is.
        """
        report, words, shown = None, "", ""
        try:
            report = compare()
        except ModuleNotFoundError as error:
            words = f"the comparison needs {error.name}: pip install 'flaxstab[torch]'"
        except ValueError as error:
            words = f"cannot compare: {error}"
        if path is None and self._written is not None:
            path = self._written.script()
        if report is not None and not report.passed and script is not None and path is not None:
            shown = _reproduced(script, path, report)
        if self._written is not None:
            self._written.keep(report, words, shown)
        broken = "" if self._baselines is None else self._baselines.broken
        if broken and report is not None and report.passed:
            pytest.fail(f"parity: not as in the baseline: {broken}", pytrace=False)
        if report is not None and report.passed:
            return report
        pytest.fail(f"parity: {words or report}" + (f"\n  {shown}" if shown else ""), pytrace=False)


def _reproduced(script: "Callable[[Path, Report], object]", path: Path, report: "Report") -> str:
    """Says where the script of a difference is, or why there is none."""
    try:
        return f"alone: {script(path, report)}"
    except Exception as error:  # the test's own failure is what must be told
        return f"no script: {error}"


@pytest.fixture(scope="session")
def parity(request: pytest.FixtureRequest) -> Parity:
    """The harness: ``parity.check(flax_model, torch_model, *inputs, layout=...)``."""
    find = request.config.pluginmanager.get_plugin
    return Parity(find(_NAME), find(_BASELINES))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the fixture ``parity``."""
    group = parser.getgroup("parity")
    group.addoption(
        "--parity-report",
        metavar="DIR",
        help="write every comparison of the fixture 'parity' to DIR/parity.json and parity.html",
    )
    group.addoption(
        "--parity-record",
        metavar="FILE",
        help="write inputs, weights and results of every comparison to a baseline",
    )
    group.addoption(
        "--parity-baseline",
        metavar="FILE",
        help="compare every comparison with an earlier baseline; what breaks fails its test",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder of the report at once, so that hours of tests do not end in an error."""
    _configure_baselines(config)
    folder = config.getoption("--parity-report")
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(
            f"--parity-report must name a folder that exists or can be made, got {folder!r}: "
            f"{error.strerror}."
        ) from None
    config.pluginmanager.register(Written(config, Path(folder)), _NAME)


def _configure_baselines(config: pytest.Config) -> None:
    """Refuses at once what would only fail at the end of the tests."""
    file, baseline = (config.getoption(f"--parity-{name}") for name in ("record", "baseline"))
    if file is None and baseline is None:
        return
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
    config.pluginmanager.register(Baselines(file, earlier), _BASELINES)


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
