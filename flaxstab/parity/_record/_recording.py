"""Makes baselines: of the suite's own cases, and of a user's pairs of models."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from flaxstab import _environment
from flaxstab._checks import check
from flaxstab.parity._record._baseline import (
    Baseline,
    Origin,
    Record,
    Signature,
    read_baseline,
    write_baseline,
)
from flaxstab.parity._record._streams import streams, torchs
from flaxstab.parity._record._subject import Subject
from flaxstab.parity._record._suite import subject_of, suite
from flaxstab.parity._record._surface import surface
from flaxstab.parity._record._take import attempt, take
from flaxstab.parity._report import Report

Told = Callable[[str], None]
Make = Callable[[Record | None], Subject]


def record(
    path: str | os.PathLike[str],
    subjects: Mapping[str, Subject],
    *,
    inputs_from: str | os.PathLike[str] | None = None,
) -> Baseline:
    """Compares pairs of models, and writes all that both sides computed to a baseline.

    Do this before an upgrade, and again after it with ``inputs_from`` set to the first file; then
    :func:`diff` says what has moved, and on which side. A baseline holds inputs, weights, outputs,
    gradients, buffers, optimizer state and the bounds that they are judged by, for every precision
    that is compared; beside them versions, flags and devices, public signatures, and a few draws of
    every random function. Weights of a case that take over 1 MiB are kept as hashes, with the path
    that you give as ``weights_file``; other arrays of over 65,536 elements as hashes and sums.

    A pair that cannot be compared is recorded with the reason.

    Args:
      path: of the file, which is written whole or not at all. Its folder must exist.
      subjects: the pairs by name.
      inputs_from: an earlier baseline, whose inputs and weights are taken in place of those given,
        so that nothing depends on what a seed draws today.

    Returns:
      What was written.

    Raises:
      ValueError: if the folder does not exist or is the path itself, there is no subject, or the
        earlier file is no baseline; before anything is compared.

    Example:
      >>> import tempfile, numpy, torch
      >>> from flaxstab import functional
      >>> pair = Subject(functional.gelu, torch.nn.functional.gelu, (numpy.linspace(-3, 3, 7),))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     made = record(f"{folder}/before.parity", {"gelu": pair})
      >>> made.cases["gelu"].facts.passed
      True
    """
    _check_target(path)
    _check_subjects(subjects)
    earlier = None if inputs_from is None else read_baseline(inputs_from)
    makes: dict[str, Make] = {name: _given(subject) for name, subject in subjects.items()}
    return _written(path, makes, earlier, torch_from=False)


def record_suite(
    path: str | os.PathLike[str],
    patterns: Sequence[str] = (),
    *,
    inputs_from: str | os.PathLike[str] | None = None,
    torch_from: str | os.PathLike[str] | None = None,
    told: Told = lambda _: None,
) -> Baseline:
    """Records the suite's own cases: ``flaxstab parity record``.

    Args:
      path: see :func:`record`.
      patterns: of the cases' names, with ``*`` and ``?``; all if there are none.
      inputs_from: see :func:`record`.
      torch_from: an earlier baseline that stands for PyTorch, which may be absent.
      told: is told the name of each case before it runs.

    Returns:
      What was written.

    Raises:
      ValueError: as :func:`record`; if a pattern fits no case, both files are given, or PyTorch is
        absent and no file stands for it.
    """
    _check_target(path)
    check(
        inputs_from is None or torch_from is None,
        "torch_from takes inputs and weights as well, and inputs_from must not be given beside it",
        inputs_from=str(inputs_from),
        torch_from=str(torch_from),
    )
    check(
        torch_from is not None or _has_torch(),
        "PyTorch must be installed, or recorded values must stand for it",
        torch_from=None,
        fix="pip install 'flaxstab[torch]', or name a baseline with --torch-from.",
    )
    builds = suite(patterns)
    source = torch_from if inputs_from is None else inputs_from
    earlier = None if source is None else read_baseline(source)
    recorded = torch_from is not None

    def made(name: str) -> Make:
        def make(before: Record | None) -> Subject:
            told(name)
            return subject_of(name, builds[name], before if recorded else None)

        return make

    return _written(path, {n: made(n) for n in builds}, earlier, torch_from=recorded)


def _check_target(path: str | os.PathLike[str]) -> None:
    """Refuses a path that no baseline can be written to, before minutes are spent on it."""
    target = Path(path)
    fix = "Make it, or name a file elsewhere."
    check(target.parent.is_dir(), "a baseline's folder must exist", path=str(path), fix=fix)
    fix = "Name a file in it, such as before.parity."
    check(not target.is_dir(), "a baseline must be a file, not a folder", path=str(path), fix=fix)


def _check_subjects(subjects: object) -> None:
    rule = "subjects must be a dict of parity.Subject by name"
    fix = "Pass {'model': parity.Subject(...)}."
    if not isinstance(subjects, Mapping):
        check(False, rule, subjects=type(subjects).__name__, fix=fix)
        return
    good = all(isinstance(n, str) and isinstance(s, Subject) for n, s in subjects.items())
    kinds = {n: type(s).__name__ for n, s in subjects.items()}
    check(good and bool(kinds), rule, subjects=kinds, fix=fix)


def _given(subject: Subject) -> Make:
    return lambda _: subject


def _written(
    path: str | os.PathLike[str],
    makes: Mapping[str, Make],
    earlier: Baseline | None,
    *,
    torch_from: bool,
) -> Baseline:
    known = {} if earlier is None else earlier.cases
    cases = {
        name: attempt(partial(_taken, make, known.get(name), torch_from))
        for name, make in makes.items()
    }
    baseline = surroundings(cases, earlier if torch_from else None)
    write_baseline(baseline, path)
    return baseline


def _taken(make: Make, before: Record | None, torch_from: bool) -> tuple[Report, Record]:
    if torch_from and before is None:
        raise ValueError("the case must have been recorded with PyTorch, and was not")
    return take(make(before), before, recorded=torch_from)


def surroundings(cases: Mapping[str, Record], torch_side: Baseline | None = None) -> Baseline:
    """Returns a baseline of cases, with all that is recorded once.

    Args:
      cases: by name.
      torch_side: what stands for PyTorch, if that is absent.
    """
    has_torch = _has_torch()
    found, failures = streams(torch_too=has_torch and torch_side is None)
    public, origin = surface(), _origin(has_torch, torch_side)
    if torch_side is not None:
        public = tuple(s for s in public if not _is_torchs(s))
        public = tuple(sorted((*public, *filter(_is_torchs, torch_side.surface))))
        found |= torchs(torch_side.streams)
    environment = _environment.describe(devices=True)
    told = {} if torch_side is None else torch_side.torch_environment or torch_side.environment
    return Baseline(cases, environment, origin, told, public, found, failures)


def _has_torch() -> bool:
    try:
        import_module("torch")
    except ImportError:
        return False
    return True


def _origin(has_torch: bool, torch_side: Baseline | None) -> Origin:
    if torch_side is not None:
        return "recorded"
    return "live" if has_torch else "absent"


def _is_torchs(signature: Signature) -> bool:
    return signature.name.startswith("torch.")
