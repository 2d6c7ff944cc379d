"""The difference of two baselines, and its verdict."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flaxstab._checks import check
from flaxstab.parity._diff._surroundings import names, settings, streams
from flaxstab.parity._diff._types import (
    BREAKING,
    CHANGING,
    GRAVITY,
    CaseDiff,
    Effect,
    NameDiff,
    Outcome,
    Setting,
    StreamDiff,
    counted,
)
from flaxstab.parity._diff._values import compare_records
from flaxstab.parity._record._baseline import Baseline, Origin, Record, read_baseline
from flaxstab.parity._record._subject import Subject
from flaxstab.parity._record._take import attempt, take


class Diff(NamedTuple):
    """What has moved between two environments.

    Attributes:
      cases: every case, the gravest first.
      settings: in what the environments differ.
      names: public names and parameters that differ, those that matter first.
      streams: random functions whose draws differ.
      torch: where PyTorch's new values come from: if they were recorded, that side cannot move.
      torch_version: PyTorch's, old and new; '' where it was absent.
    """

    cases: tuple[CaseDiff, ...]
    settings: tuple[Setting, ...] = ()
    names: tuple[NameDiff, ...] = ()
    streams: tuple[StreamDiff, ...] = ()
    torch: Origin = "live"
    torch_version: tuple[str, str] = ("", "")

    @property
    def verdict(self) -> Outcome:
        """Whether the upgrade is safe, safe with changes that are listed, or breaks."""
        effects = {case.effect for case in self.cases}
        if effects & {*BREAKING}:
            return Outcome.BREAKS
        if effects == {Effect.NEITHER}:
            return Outcome.CHANGES  # nothing was compared
        others = {stream.effect for stream in self.streams} & {Effect.STREAM, Effect.GONE}
        named = any(name.matters for name in self.names)
        return Outcome.CHANGES if effects & {*CHANGING} or others or named else Outcome.SAFE

    @property
    def counts(self) -> Mapping[Effect, int]:
        """How many cases there are of each effect."""
        return Counter(case.effect for case in self.cases)

    @property
    def headline(self) -> str:
        """The verdict and the number of cases of each effect, in one line."""
        counts = self.counts
        parts = [f"{counts[effect]} {effect}" for effect in Effect if counts[effect]]
        return f"{self.verdict}: of {counted(len(self.cases))} {', '.join(parts) or 'none'}"

    def __rich__(self) -> object:
        """Returns what ``rich`` prints: one screen, the gravest cases first."""
        from flaxstab.parity._diff._screen import DiffScreen

        return DiffScreen(self)

    def __str__(self) -> str:
        from flaxstab.parity._report_screen import as_text

        return as_text(self, 100).rstrip()


def diff(old: str | os.PathLike[str] | Baseline, new: str | os.PathLike[str] | Baseline) -> Diff:
    """Says what has moved between two baselines, case by case and value by value.

    Each value is compared with itself: of JAX old and new, of PyTorch old and new, from the inputs
    and weights that both files hold. In float64 a move of up to 1e-12 of the quantity's magnitude
    is rounding, one beyond it another meaning; in lower precisions a side's error against its own
    float64 may grow to twice what it was plus 2 eps, or to what the comparison with the other side
    allows. Where random layers draw other numbers, values are not compared: the comparison of both
    sides in the new environment, given equal draws, judges the mathematics.

    Args:
      old: a file that :func:`record` or ``flaxstab parity record`` wrote, or what was read of it.
      new: the same after the upgrade, recorded from the first file's inputs.

    Returns:
      What has moved, and a verdict.

    Raises:
      ValueError: if a file is not there, damaged, foreign or of a newer flaxstab; if the two have
        no case in common, or none from equal inputs.

    Example:
      >>> import tempfile, numpy, torch
      >>> from flaxstab import functional
      >>> from flaxstab.parity import Subject, record
      >>> pair = Subject(functional.gelu, torch.nn.functional.gelu, (numpy.linspace(-3, 3, 7),))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     before = record(f"{folder}/before.parity", {"gelu": pair})
      ...     after = record(
      ...         f"{folder}/after.parity", {"gelu": pair}, inputs_from=f"{folder}/before.parity"
      ...     )
      >>> str(diff(before, after).verdict)
      'safe'
    """
    both = [b if isinstance(b, Baseline) else read_baseline(b) for b in (old, new)]
    labels = [b.environment if isinstance(b, Baseline) else Path(b).name for b in (old, new)]
    words = [label if isinstance(label, str) else "a baseline" for label in labels]
    return diff_baselines(both[0], both[1], words[0], words[1])


def diff_baselines(
    old: Baseline, new: Baseline, old_name: str = "OLD", new_name: str = "NEW"
) -> Diff:
    """Returns the difference of two baselines; see :func:`diff`.

    Args:
      old: what was.
      new: what is.
      old_name: the file's name, for errors.
      new_name: the other's.
    """
    common = [name for name in old.cases if name in new.cases]
    if not common:
        raise ValueError(
            f"two baselines must have a case in common, got {_few(old.cases)} in {old_name} and "
            f"{_few(new.cases)} in {new_name}. Record the same cases in both environments."
        )
    cases = [compare_records(name, old.cases[name], new.cases[name]) for name in common]
    apart = [case for case in cases if case.effect is Effect.APART]
    check(
        len(apart) < len(cases),
        "two baselines must hold a case from equal inputs and weights",
        fix=f"Record {new_name} with --inputs-from {old_name} (or inputs_from=).",
        case=apart[0].name if apart else "",
    )
    cases += [
        CaseDiff(n, Effect.GONE, words=f"only {old_name} has it")
        for n in old.cases
        if n not in common
    ]
    cases += [
        CaseDiff(n, Effect.NEW, words=_new(new, n, new_name)) for n in new.cases if n not in common
    ]
    return gathered(cases, old, new)


def gathered(cases: Sequence[CaseDiff], old: Baseline, new: Baseline) -> Diff:
    """Returns the difference of two baselines of which the cases are compared already.

    Args:
      cases: what became of them.
      old: what was.
      new: what is.
    """
    grave = sorted(
        cases, key=lambda c: (GRAVITY[c.effect], -c.moves[0].excess if c.moves else 0.0, c.name)
    )
    return Diff(
        tuple(grave),
        settings(old, new),
        names(old.surface, new.surface),
        streams(old, new),
        new.torch,
        (_torch_version(old), _torch_version(new)),
    )


def against(name: str, subject: Subject, record: Record, earlier: Baseline) -> CaseDiff:
    """Compares what a pair of models gave with its record in a baseline.

    Args:
      name: of both.
      subject: the pair, which is compared once more with the inputs and weights of the baseline if
        it had others.
      record: what it gave.
      earlier: the baseline.
    """
    old = earlier.cases.get(name)
    if old is None:
        return CaseDiff(name, Effect.NEW, words="the baseline does not have it")
    found = compare_records(name, old, record)
    if found.effect is not Effect.APART:
        return found
    again = attempt(lambda: take(subject, old))
    if again.facts.kind == "none":
        return CaseDiff(name, Effect.APART, words=again.facts.error)
    return compare_records(name, old, again)


def _few(cases: Mapping[str, Record]) -> str:
    shown = ", ".join(map(repr, [*cases][:3])) or "none"
    return f"{shown}, ... ({len(cases)})" if len(cases) > 3 else shown


def _new(new: Baseline, name: str, file: str) -> str:
    error = new.cases[name].facts.error
    return f"only {file} has it{': ' * bool(error)}{error}"


def _torch_version(baseline: Baseline) -> str:
    environment = baseline.torch_environment or baseline.environment
    packages = environment.get("packages", {})
    found = packages.get("torch") if isinstance(packages, Mapping) else None
    return str(found or "")
