"""Records one case: runs it, and keeps what a later environment is compared with."""

from collections.abc import Callable, Mapping

import numpy as np

from flaxstab.parity._inputs import Values
from flaxstab.parity._record._baseline import Errors, Facts, Mark, Record
from flaxstab.parity._record._fold import digest, folded, folded_unit
from flaxstab.parity._record._subject import (
    Run,
    Subject,
    names_of,
    run,
    with_inputs,
    with_weights,
)
from flaxstab.parity._recorded import RecordedSide, RecordedSteps
from flaxstab.parity._report import Report

COPIED = 1 << 20  # bytes of weights that are copied into a baseline; more are kept by their hashes
_SENTENCE = 300


def take(
    subject: Subject, source: Record | None = None, *, recorded: bool = False
) -> tuple[Report, Record]:
    """Compares a subject and records it.

    Args:
      subject: two sides; of a recorded PyTorch side only Flax's counts.
      source: an earlier record, whose inputs and weights are taken.
      recorded: whether PyTorch's values are those of ``source``, too.

    Raises:
      ValueError: as :func:`compare`; if there is no PyTorch side to be had.
    """
    if source is not None:
        _check_source(source, recorded=recorded)
        subject = with_inputs(subject, source.inputs)
        if recorded:
            subject = subject._replace(torch_side=recorded_side(source), witness=None)
        elif not _hashes(source, "weights"):
            subject = with_weights(subject, source.weights)
    found = run(subject)
    record = _record(subject, found, recorded=recorded)
    if source is not None:
        _check_weights(record, source)
    report = found.report
    if recorded and source is not None and source.facts.draws != record.facts.draws:
        report = _without_draws(report)
        facts = record.facts._replace(findings=report.findings, notes=report.notes)
        record = record._replace(facts=facts)
    return report, record


def attempt(make: Callable[[], tuple[Report, Record]]) -> Record:
    """Returns a record, or one that says why there is none: that is a result, not a crash."""
    try:
        return make()[1]
    except Exception as error:  # of a user's model or a framework: any
        return failure(error)


def failure(error: Exception) -> Record:
    """Returns the record of a case that could not be compared."""
    words = " ".join(str(error).split())[:_SENTENCE]
    return Record(Facts("none", f"{type(error).__name__}: {words}", "absent"))


def recorded_side(source: Record) -> RecordedSide | RecordedSteps:
    """Returns PyTorch's side of a record, to be compared with."""
    values = {
        name.removeprefix("torch "): group
        for name, group in source.values.items()
        if name.startswith("torch ")
    }
    side = RecordedSide(values, source.weights, source.facts.buffers)
    names = {n.split(" ", 2)[-1] for group in values.values() for n in group}
    held = ("loss", "param", "update", "buffer", "gradient")
    state = {n for n in names if n.split(" ", maxsplit=1)[0] not in held}
    optional = {n.split(" ", 2)[-1] for n in source.facts.optional}
    return side if source.facts.kind == "model" else RecordedSteps(side, (*(state | optional),))


def _check_source(source: Record, *, recorded: bool) -> None:
    facts = source.facts
    if facts.kind == "none":
        raise ValueError(f"the earlier record must hold values, got an error: {facts.error}")
    large = [mark.name for mark in facts.hashes]
    if recorded and large:
        raise ValueError(
            f"PyTorch's recorded values must be whole, got {large[0]!r}, which is too large and "
            "was kept as sums. Record smaller inputs, or install PyTorch."
        )


def _check_weights(record: Record, source: Record) -> None:
    """Refuses weights that are not the earlier ones: they were too large to be copied."""
    old, new = _hashes(source, "weights"), _hashes(record, "weights")
    apart = sorted(name for name in old if new.get(name) != old[name])
    if apart:
        file = f" (they came from {source.facts.source!r})" if source.facts.source else ""
        raise ValueError(
            f"weights must be those of the baseline, which keeps hashes of large ones, got other "
            f"values of {apart[0].removeprefix('weights ')!r}{file}. Load the same weights."
        )


def _hashes(record: Record, start: str) -> dict[str, str]:
    return {m.name: m.word for m in record.facts.hashes if m.name.startswith(f"{start} ")}


def _record(subject: Subject, found: Run, *, recorded: bool) -> Record:
    watched, report = found.watched, found.report
    groups: dict[str, Values] = {f"jax {kind}": values for kind, values in watched.jax.items()}
    groups |= {f"torch {kind}": values for kind, values in watched.torch.items()}
    values: dict[str, Values] = {}
    hashes: dict[str, str] = {}
    for group, arrays in groups.items():
        values[group], large = folded({n: _plain(a) for n, a in arrays.items()})
        hashes |= {f"{group} {name}": word for name, word in large.items()}
    weights: Values = {n: _plain(a) for n, a in found.weights.items()}
    if sum(a.nbytes for a in weights.values()) > COPIED:
        hashes |= {f"weights {name}": digest(a) for name, a in weights.items()}
        weights = {}
    errors = tuple(
        Errors(kind, name, *both, watched.slack.get((kind, name), 2.0))
        for (kind, name), both in watched.errors.items()
    )
    facts = Facts(
        found.kind,
        torch="recorded" if recorded else "live",
        dtypes=names_of(subject.dtypes),
        findings=report.findings,
        notes=report.notes,
        errors=errors,
        draws=_marks({n: digest(a) for n, a in found.draws.items()}),
        hashes=_marks(hashes),
        buffers=found.buffers,
        optional=found.optional,
        source=subject.weights_file,
    )
    return Record(facts, found.inputs, weights, values, _units(watched.units, groups))


def _units(units: Mapping[str, Values], groups: Mapping[str, Values]) -> dict[str, Values]:
    """Returns units as one number where all elements have the same."""

    def small(unit: np.ndarray, value: np.ndarray) -> np.ndarray:
        unit = np.asarray(unit, np.float64)
        one = unit.ravel()[0] if unit.size else np.float64(0)
        if bool(np.all(unit == one)):
            unit = np.asarray(one)
        held, _ = folded({"": value})
        return unit if held[""].size == value.size else folded_unit(unit, value.size)

    return {
        kind: {n: small(u, groups[f"jax {kind}"][n]) for n, u in named.items()}
        for kind, named in units.items()
    }


def _plain(array: object) -> np.ndarray:
    return np.asarray(array)


def _marks(words: Mapping[str, str]) -> tuple[Mark, ...]:
    return tuple(Mark(name, word) for name, word in words.items())


def _without_draws(report: Report) -> Report:
    """Returns what can be said where PyTorch's recorded values had other random draws."""
    kept = tuple(f for f in report.findings if f.name.startswith("evaluation"))
    note = "training: the random stream has changed since PyTorch's values were recorded"
    return report._replace(findings=kept, notes=(*report.notes, note))
