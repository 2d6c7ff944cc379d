"""Reports as files: JSON that is read back exactly, one HTML page, or plain text."""

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple, cast

from flaxstab import _environment
from flaxstab._checks import check
from flaxstab._files import write_whole
from flaxstab.parity._layers import Location
from flaxstab.parity._plain import from_plain, read_plain, to_plain
from flaxstab.parity._report import Report

FORMAT, SCHEMA = "flaxstab.parity.report", 1
_ENDINGS = (".json", ".html", ".txt")


class Case(NamedTuple):
    """One comparison of several.

    Attributes:
      name: such as the test's.
      report: what was found; None if the sides could not be compared.
      words: why they could not.
      location: where the models differ, layer by layer, if they do and have layers.
      reproducer: where a stand-alone script shows the difference, or why there is none, in words.
    """

    name: str
    report: Report | None
    words: str = ""
    location: Location | None = None
    reproducer: str = ""

    @property
    def passed(self) -> bool:
        """Whether the sides could be compared and JAX's is as it should be."""
        return self.report is not None and self.report.passed

    @property
    def verdict(self) -> str:
        """The report's verdict, or 'not compared'."""
        return "not compared" if self.report is None else str(self.report.verdict)


class Session(NamedTuple):
    """Comparisons that were made together, and where.

    Attributes:
      cases: in the order of their comparison.
      environment: what ``flaxstab env`` tells.
      title: of the whole.
    """

    cases: tuple[Case, ...]
    environment: Mapping[str, object] = {}
    title: str = "Parity of JAX and PyTorch"

    @property
    def passed(self) -> bool:
        """Whether every case passed."""
        return all(case.passed for case in self.cases)

    @property
    def verdict(self) -> str:
        """One sentence: how many failed, of how many."""
        return session_verdict(self.cases)

    def sorted(self) -> tuple[Case, ...]:
        """Returns the cases, the gravest first; equally grave ones as they came."""
        return tuple(sorted(self.cases, key=_gravity))

    def __rich__(self) -> object:
        """Returns what ``rich`` prints: one screen, the gravest cases first."""
        from flaxstab.parity._report_screen import SessionScreen

        return SessionScreen(self)


def session_verdict(cases: Sequence[Case]) -> str:
    """Says how many cases failed."""
    if len(cases) == 1:
        (case,) = cases
        return f"{case.words}" if case.report is None else case.report.headline
    failed = sum(not case.passed for case in cases)
    if not cases:
        return "nothing was compared"
    if not failed:
        return f"all {len(cases)} comparisons pass"
    return f"{failed} of {len(cases)} comparisons fail"


def _gravity(case: Case) -> tuple[int, float]:
    """Orders cases: refused ones first, then by their worst finding."""
    if case.report is None:
        return (0, 0.0)
    if not case.report.findings:
        return (9, 0.0)
    worst = case.report.worst
    return (1 + case.report.gravity, -math.inf if math.isnan(worst.excess) else -worst.excess)


def write_report(
    report: Report | Session,
    path: str | PathLike[str],
    *,
    title: str = "",
    location: Location | None = None,
) -> Path:
    """Writes a report to a file, whole or not at all; the name's ending chooses the form.

    ``.json`` can be read back (:func:`read_report`) and by other programs; ``.html`` is one page
    that needs no other file and no network; ``.txt`` is one screen.

    Args:
      report: of one comparison, or a :class:`Session` of several.
      path: of the file. Its folder must exist.
      title: what was compared, in words; '' for a general one.
      location: of a single report, what :func:`locate` found: the page then has a bar for every
        layer. ``None`` takes the report's own, which ends with the first layer that differs.

    Returns:
      The path.

    Raises:
      ValueError: for another ending, or a folder that does not exist.

    Example:
      >>> import tempfile, numpy, torch
      >>> from flaxstab import functional, parity
      >>> found = parity.compare(functional.gelu, torch.nn.functional.gelu, numpy.arange(3.0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     written = write_report(found, f"{folder}/gelu.json")
      ...     read_report(written) == found
      True
    """
    target = Path(path)
    fix = "JSON can be read back, HTML is a page, text one screen."
    rule = f"the file's name must end in {', '.join(_ENDINGS)}"
    check(target.suffix.lower() in _ENDINGS, rule, path=str(path), fix=fix)
    session = _session(report, title, location)
    text = {".json": _json, ".html": _html, ".txt": _text}[target.suffix.lower()](session)
    return write_whole(target, lambda file: file.write_text(text, encoding="utf-8"))


def _session(report: Report | Session, title: str, location: Location | None) -> Session:
    if isinstance(report, Report):
        report = Session((Case(title, report, location=location or report.location),))
    environment = dict(report.environment) or _environment.describe()
    return report._replace(environment=environment, title=title or report.title)


def _json(session: Session) -> str:
    told = [
        {**cast(dict[str, object], to_plain(case)), "passed": case.passed, "verdict": case.verdict}
        for case in session.cases
    ]
    held = {
        "format": FORMAT,
        "schema": SCHEMA,
        "title": session.title,
        "passed": session.passed,
        "verdict": session.verdict,
        "environment": to_plain(session.environment),
        "cases": told,
    }
    return json.dumps(held, allow_nan=False, indent=1) + "\n"


def _html(session: Session) -> str:
    from flaxstab.parity._report_page import session_page

    return session_page(session)


def _text(session: Session) -> str:
    from flaxstab.parity._report_screen import as_text

    (first, *others) = session.cases or [None]
    single = first is not None and not others and first.report is not None
    return as_text(first.report if single and first is not None else session)


def read_session(path: str | PathLike[str]) -> Session:
    """Reads the comparisons of a JSON file that :func:`write_report` or pytest wrote.

    Args:
      path: of the file.

    Returns:
      What was written, but for functions: ``report.where`` is None, and ``case.location`` holds
      what it found. ``passed`` and ``verdict`` are told by the findings again.

    Raises:
      ValueError: if the file is not there, not whole, foreign, or written by a newer flaxstab; the
        message names the place in it.
    """
    file = Path(path)
    held = read_plain(file, FORMAT, SCHEMA)
    cases = held.get("cases")
    if isinstance(cases, list):  # what is derived is there for other programs
        derived = ("passed", "verdict")
        held["cases"] = [
            {n: item for n, item in case.items() if n not in derived}
            if isinstance(case, dict)
            else case
            for case in cases
        ]
    kept = {n: item for n, item in held.items() if n in Session._fields}
    return cast(Session, from_plain(Session, kept, file.name))


def read_report(path: str | PathLike[str]) -> Report:
    """Reads the one report of a JSON file; see :func:`read_session`.

    Raises:
      ValueError: as :func:`read_session`; if the file holds several cases, or one that could not be
        compared.
    """
    cases = read_session(path).cases
    fix = "Read them with parity.read_session."
    check(len(cases) == 1, "the file must hold one case", cases=len(cases), fix=fix)
    report = cases[0].report
    if report is None:
        raise ValueError(
            f"the file must hold a report, got a case that could not be compared: {cases[0].words}"
        )
    return report
