"""Reports on a terminal: one screen of any width, the gravest first."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from flaxstab.parity._plain import printable
from flaxstab.parity._report import Report
from flaxstab.parity._verdict import Finding

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from flaxstab.parity._session import Case, Session

_LINES, _WIDTH = 24, 80  # of a terminal; one line is the prompt's
_NOTES = 3


class ReportScreen(NamedTuple):
    """One report, to be printed by ``rich``."""

    report: Report

    def __rich_console__(
        self, console: "Console", options: "ConsoleOptions"
    ) -> "Iterator[RenderableType]":
        report = self.report
        above = [_verdict(report.headline, "bold green" if report.passed else "bold red")]
        if report.departure is not None:
            first = report.departure
            words = f"first apart: {first.name} after step {first.step}, in {first.dtype}"
            above.append(_words(words))
        if report.location is not None:
            above.append(_words(report.location.line))
        below = [_words(f"look at: {hint}") for hint in report.hints]
        below += [_words(f"not compared: {note}") for note in report.notes[:_NOTES]]
        more = len(report.notes) - _NOTES
        below += [_words(f"... and {more} more in report.notes")] if more > 0 else []
        below += [
            _words(f"tolerance: {t.pattern} x{t.factor:g}, because {t.reason}")
            for t in report.tolerances
        ]
        shown = report.telling or ((report.worst,) if report.findings else ())

        def rows(n: int) -> "RenderableType":
            headers = ("quantity", "in", "x bound", "found")
            return _table(headers, [_finding(f) for f in shown[:n]], numbers=(2,))

        yield from _fitting(console, options, above, rows, len(shown), below)


class SessionScreen(NamedTuple):
    """Several reports, to be printed by ``rich``."""

    session: "Session"

    def __rich_console__(
        self, console: "Console", options: "ConsoleOptions"
    ) -> "Iterator[RenderableType]":
        session = self.session
        style = "bold green" if session.passed else "bold red"
        above = [_verdict(session.verdict, style)]
        cases = session.sorted()

        def rows(n: int) -> "RenderableType":
            headers = ("case", "", "x bound", "worst")
            return _table(headers, [_case(case) for case in cases[:n]], numbers=(2,))

        yield from _fitting(console, options, above, rows, len(cases), [])


def as_text(what: object, width: int = _WIDTH) -> str:
    """Returns what ``rich`` would print, without colours.

    Args:
      what: a report or a session.
      width: of a line.
    """
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, height=_LINES, no_color=True)
    with console.capture() as captured:
        console.print(what)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _fitting(
    console: "Console",
    options: "ConsoleOptions",
    above: "Sequence[RenderableType]",
    rows: "Callable[[int], RenderableType]",
    count: int,
    below: "Sequence[RenderableType]",
) -> "Iterator[RenderableType]":
    """Yields as many rows as the screen has room for, at least one."""

    def lines(part: "RenderableType") -> int:
        return len(console.render_lines(part, options))

    room = min(console.height, _LINES) - 1 - sum(map(lines, [*above, *below]))
    n = next((n for n in range(min(count, room), 1, -1) if lines(rows(n)) + (n < count) <= room), 1)
    yield from above
    if count:
        yield rows(n)
    if count > n:
        yield _words(f"... and {count - n} more")
    yield from below


def _table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]
) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim")
    for i, header in enumerate(headers):
        ratio = {"quantity": 2, "case": 2, "found": 3, "worst": 2}.get(header)
        side: Literal["right", "left"] = "right" if i in numbers else "left"
        table.add_column(header, justify=side, overflow="fold", ratio=ratio)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _finding(finding: Finding) -> tuple[str, str, str, str]:
    side = f", {finding.side}" if finding.side else ""
    return (
        finding.name,
        finding.dtype,
        f"{finding.excess:.2g}",
        f"{finding.verdict}{side}: {finding.explanation}",
    )


def _case(case: "Case") -> tuple[str, str, str, str]:
    if case.report is None:
        return case.name, case.verdict, "", case.words
    if not case.report.findings:
        return case.name, case.verdict, "", ""
    shown = (*case.report.telling, case.report.worst)[0]
    return case.name, case.verdict, f"{shown.excess:.2g}", f"{shown.name} in {shown.dtype}"


def _verdict(words: str, style: str) -> "RenderableType":
    from rich.text import Text

    return Text(printable(words), style=style)


def _words(words: str) -> "RenderableType":
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(printable(words)), (0, 0, 0, 2))
