"""The HTML page of one comparison or of several: the verdict on top, failing cases first."""

import math
from collections.abc import Iterator, Mapping, Sequence

from flaxstab.parity._html import Bars, Body, Section, State, Table, Text, page
from flaxstab.parity._layers import LayerError, Location
from flaxstab.parity._report import Report
from flaxstab.parity._session import Case, Session
from flaxstab.parity._verdict import Finding, Verdict

_SHOWN = 20  # rows of a failing case; the JSON file holds all
_CHARTED = 30  # bars of quantities
_MEANT = {
    "own": "differs",
    "inherited": "only what comes before it differs",
    "agrees": "agrees",
    "unknown": "not run alone",
}


def session_page(session: Session) -> str:
    """Returns the page of a session."""
    cases = session.sorted()
    failing = [case for case in cases if not case.passed]
    sections: list[Section] = []
    if len(session.cases) > 1:
        sections.append(Section("Cases", _cases(cases)))
    for case in cases if len(cases) == 1 else failing:
        sections += _case_sections(case, alone=len(cases) == 1)
    sections.append(Section("Environment", _environment(session.environment), folded=True))
    state: State = "good" if session.passed else "bad"
    return page(session.title, session.verdict, sections, state=state if cases else "mixed")


def _cases(cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        worst = _worst(case)
        excess: object = "" if worst is None else worst.excess
        found = case.words if worst is None else f"{worst.name} in {worst.dtype}"
        rows.append([case.name, case.verdict, excess, found])
    states: list[State] = [_case_state(case) for case in cases]
    return Table(["case", "verdict", "error over its bound", "worst"], rows, states)


def _worst(case: Case) -> Finding | None:
    if case.report is None or not case.report.findings:
        return None
    return (*case.report.telling, case.report.worst)[0]


def _case_state(case: Case) -> State:
    if not case.passed:
        return "bad"
    return "good" if case.verdict == Verdict.AGREE else "mixed"


def _case_sections(case: Case, *, alone: bool) -> Iterator[Section]:
    of = "" if alone else f" of {case.name}"
    if case.report is None:
        yield Section(f"{case.name}: not compared", Text(case.words))
        return
    report = case.report
    yield Section(
        f"Findings{of}" if report.passed else f"Failures{of}", [*_found(case, report, alone)]
    )
    if case.location is not None and case.location.layers:
        yield Section(f"Layers{of}", [*_layers(case.location)])
    if report.findings:
        yield Section(f"Quantities{of}", [*_quantities(report)], folded=not alone)
    if alone and report.findings:
        rows = sorted(report.findings, key=lambda f: (f.passed, -_number(f.excess)))
        yield Section(f"All {len(rows)} findings", _findings(rows), folded=True)


def _found(case: Case, report: Report, alone: bool) -> Iterator[Body]:
    if not alone:  # then it is the page's own
        yield Text(report.headline)
    if report.departure is not None:
        first = report.departure
        yield Text(f"First apart: {first.name} after step {first.step}, in {first.dtype}.")
    if case.location is not None:
        yield Text(f"The {case.location.line}." if case.location.first else case.location.line)
    shown = report.telling or ((report.worst,) if report.findings else ())
    if shown:
        yield _findings(shown[:_SHOWN])
    if len(shown) > _SHOWN:
        where = f"under 'All {len(report.findings)} findings'" if alone else "in the JSON file"
        yield Text(f"... and {len(shown) - _SHOWN} more {where}.")
    words = [f"Look at: {hint}." for hint in report.hints]
    if case.reproducer:
        words.append(f"As a script, {case.reproducer}")
    words += [f"Not compared: {note}." for note in report.notes]
    words += [f"Computes in less than float64: {layer}." for layer in report.pinned]
    words += [f"Widened: {t.pattern} x{t.factor:g}, because {t.reason}." for t in report.tolerances]
    if words:
        yield Text("\n\n".join(words))


def _findings(findings: Sequence[Finding]) -> Table:
    headers = ["quantity", "in", "verdict", "at fault", "over its bound", "found"]
    rows = [[f.name, f.dtype, str(f.verdict), f.side, f.excess, f.explanation] for f in findings]
    return Table(headers, rows, [_state(f) for f in findings])


def _state(finding: Finding) -> State:
    if not finding.passed:
        return "bad"
    return "good" if finding.verdict is Verdict.AGREE else "mixed"


def _layers(location: Location) -> Iterator[Body]:
    for direction in ("forward", "backward"):
        layers = [layer for layer in location.layers if layer.direction == direction]
        run = [layer for layer in layers if not math.isnan(layer.own)]
        if run:
            yield Bars(
                [layer.name for layer in run],
                [layer.own for layer in run],
                f"{direction}: a layer's own error over its bound",
                others=[_number(layer.inherited) for layer in run],
                others_title="its error where it stands, with what it inherits",
            )
        left = [layer for layer in layers if math.isnan(layer.own)]
        if left:
            yield _left(left)
    if location.notes:
        yield Text("\n\n".join(f"Not judged: {note}." for note in location.notes))


def _left(layers: Sequence[LayerError]) -> Table:
    rows = [[layer.name, _MEANT[layer.kind], layer.note] for layer in layers]
    return Table([f"{layers[0].direction}, not run alone", "found", "why"], rows)


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _quantities(report: Report) -> Iterator[Body]:
    for dtype in dict.fromkeys(f.dtype for f in report.findings):
        of = sorted(
            (f for f in report.findings if f.dtype == dtype),
            key=lambda f: -(math.inf if math.isnan(f.excess) else f.excess),
        )
        more = f", the largest {_CHARTED} of {len(of)}" if len(of) > _CHARTED else ""
        shown = of[:_CHARTED]
        values = [f.excess for f in shown]
        yield Bars(
            [f.name for f in shown],
            values,
            f"{dtype}: error over its bound{more}",
            excused=[f.passed for f in shown],
        )


def _environment(environment: Mapping[str, object]) -> Table:
    rows = [[name, value] for name, value in _flat("", environment)]
    return Table(["what", "value"], rows)


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), item)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for i, item in enumerate(value):
            yield from _flat(f"{prefix}[{i}]", item)
    else:
        words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield prefix, "absent" if value is None else words
