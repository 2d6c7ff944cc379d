"""``flaxstab parity upgrade``: tries other versions beside the current ones."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from flaxstab._environment import (
    Ended,
    InstallError,
    build,
    incidents,
    installed,
    packages,
    pair_findings,
    parse_pins,
    tracked,
)
from flaxstab._files import write_whole
from flaxstab.cli._command import FAILED, PASSED, refuse, tell
from flaxstab.cli._env import told, wrapped

if TYPE_CHECKING:
    from flaxstab.cli._command import Actions

STOPPED = (1, 2, 15)  # signals that come from outside, and say nothing of the upgrade
LIMIT = 3600.0  # seconds for one step
NEEDED = ("numpy", "jax", "flax", "optax")
SHOWN = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
COMMAND = ("-m", "flaxstab.cli")


class Verdict(NamedTuple):
    """What an upgrade does: ``word`` is ``safe``, ``safe with changes`` or ``breaks``."""

    word: str
    why: str
    details: str = ""


def add(actions: "Actions") -> None:
    """Adds the command to the parser."""
    upgrade = actions.add_parser(
        "upgrade",
        help="try other versions beside the current ones, and say what they change",
        description="Makes a second environment with other versions, runs the recorded cases in"
        " both, and says what moved, on which side, and whether it matters. The current environment"
        " stays as it is. PyTorch is installed there only if its version is to change; otherwise"
        " what it computes here is used, recorded.",
        epilog="exit code: 0 safe, or safe with the listed changes; 1 it breaks; 2 refused",
    )
    upgrade.add_argument(
        "--to", required=True, metavar="VERSIONS",
        help="like 'jax==0.11.0,flax==0.12.8', or 'torch' for the newest",
    )  # fmt: skip
    upgrade.add_argument("--python", default="", metavar="EXE", help="for the second environment")
    upgrade.add_argument(
        "--baseline", type=Path, metavar="FILE", help="recorded here before; otherwise done now"
    )
    upgrade.add_argument("--cases", nargs="+", default=(), metavar="PATTERN", help="of them only")
    upgrade.add_argument(
        "--report", type=Path, metavar="FOLDER", help="write both baselines and the reports there"
    )
    upgrade.add_argument("--keep", action="store_true", help="keep the second environment")
    upgrade.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    try:
        pins = parse_pins(given.to)
        _check(given, pins)
    except ValueError as error:
        return refuse(str(error))
    place = Path(tempfile.mkdtemp(prefix="flaxstab-upgrade-"))
    try:
        return _run(given, pins, place)
    finally:
        if given.keep:
            tell(f"kept: {place / 'environment'}")
        else:
            shutil.rmtree(place, ignore_errors=True)


def _check(given: argparse.Namespace, pins: Mapping[str, str]) -> None:
    """Raises a ``ValueError`` for what cannot be carried out."""
    tracked(pins)
    now = {**packages(), **installed()}
    if all(version and version == (now.get(name) or "").partition("+")[0]
           for name, version in pins.items()):  # fmt: skip
        raise ValueError(f"to must name a version that is not installed, got {given.to!r}.")
    if "flaxstab" in pins:
        raise ValueError(
            f"to must name what flaxstab runs on, got {given.to!r}. flaxstab itself stays."
        )
    if given.baseline is not None and not given.baseline.is_file():
        raise ValueError(f"baseline must be a file, got {str(given.baseline)!r}.")
    if given.report is not None and given.report.exists() and not given.report.is_dir():
        raise ValueError(f"report must be a folder, got {str(given.report)!r}.")


def _run(given: argparse.Namespace, pins: Mapping[str, str], place: Path) -> int:
    """Makes the environment, records both, compares; returns the exit code."""
    reports = given.report or place / "report"
    reports.mkdir(parents=True, exist_ok=True)
    here: dict[str, str | None] = packages()
    there: dict[str, str | None] = {**here, **{name: v for name, v in pins.items() if v}}
    try:
        python, there, verdict = _environment(given, pins, place)
        if python is not None:
            verdict = _compare(given, python, reports, torch="torch" in pins)
    except InstallError as failed:
        verdict = Verdict("breaks", str(failed), _explained(there))
    except _RefusalError as refused:
        return refuse(str(refused))
    shown = "\n".join(_shown(here, there, verdict)) + "\n"
    write_whole(reports / "upgrade.txt", lambda path: path.write_text(shown, encoding="utf-8"))
    sys.stdout.write(shown)
    return FAILED if verdict.word == "breaks" else PASSED


class _RefusalError(Exception):
    """The comparison cannot be made for a reason that is not the upgrade's."""


def _environment(
    given: argparse.Namespace, pins: Mapping[str, str], place: Path
) -> tuple[Path | None, dict[str, str | None], Verdict]:
    """Makes the second environment; returns its Python, unless a framework fails to import."""
    tell(
        "installing " + ", ".join(f"{name} {version or 'newest'}" for name, version in pins.items())
    )
    python = build(place / "environment", pins, call, python=given.python, here=installed())
    ended = call([str(python), "-I", *COMMAND, "env", "--json"])
    try:
        described = json.loads(ended.out)
    except ValueError:
        raise InstallError(f"ends while its frameworks are imported: {_end(ended)}") from None
    there = cast("dict[str, str | None]", described["packages"])
    needed = (*NEEDED, *(("torch",) if "torch" in pins else ()))
    for name in needed:
        error = described["imports"].get(name)
        if error:
            beside = f" with jax {there['jax']}" if name != "jax" else ""
            why = f"{name} {there[name]} cannot be imported{beside}: {error}"
            return None, there, Verdict("breaks", why, _explained(there))
    return python, there, Verdict("safe", "")


def _explained(versions: Mapping[str, str | None]) -> str:
    """Returns what is known of a pair that cannot be used together; '' if nothing."""
    found = pair_findings(versions)
    return "\n".join(line for each in found for line in wrapped(f"{each.what} {each.fix}"))


def _compare(given: argparse.Namespace, python: Path, reports: Path, *, torch: bool) -> Verdict:
    """Records in both environments and compares."""
    old = given.baseline or reports / "before.baseline"
    new = reports / "after.baseline"
    cases = ("--cases", *given.cases) if given.cases else ()
    if given.baseline is None:
        tell(f"recording with the current versions: {old}")
        ended = call([sys.executable, *COMMAND, "parity", "record", str(old), *cases])
        if not _recorded(ended, old):
            raise _RefusalError(f"nothing could be recorded as things are: {_end(ended)}")
    tell(f"recording with the other versions: {new}")
    source = ("--inputs-from" if torch else "--torch-from", str(old))
    ended = call([str(python), "-I", *COMMAND, "parity", "record", str(new), *cases, *source])
    if -ended.code in STOPPED:
        raise _RefusalError(f"it was stopped while it recorded: {_end(ended)}")
    if not _recorded(ended, new):
        return Verdict("breaks", f"the cases cannot be run: {_end(ended)}")
    tell("comparing")
    written = ("--json", str(reports / "diff.json"), "--html", str(reports / "diff.html"))
    ended = call([sys.executable, *COMMAND, "parity", "diff", str(old), str(new), *written])
    if ended.code not in (PASSED, FAILED):
        raise _RefusalError(f"the two records cannot be compared: {_end(ended)}")
    found = json.loads((reports / "diff.json").read_text(encoding="utf-8"))
    details = "\n".join([ended.out.strip(), *_changed_names(found.get("names", ()))])
    why = str(found["headline"]).removeprefix(f"{found['verdict']}: ")
    return Verdict(found["verdict"], why, details)


def _changed_names(names: Iterable[Mapping[str, str]]) -> Iterable[str]:
    """Returns which public names of the frameworks are gone, called otherwise or new."""
    changes: dict[tuple[bool, str], list[str]] = {}
    for name in names:
        if not name["name"].startswith("flaxstab."):
            new = name["change"] == "new"
            words = "new" if new else f"{name['change']}: {name['words']}"
            changes.setdefault((new, words), []).append(name["name"])
    if changes:
        yield "Public names that changed:"
    for (_, words), changed in sorted(changes.items()):
        yield from wrapped(f"{words}: {', '.join(changed)}", "  ")


def _recorded(ended: Ended, file: Path) -> bool:
    """Tells whether a record was written; one with cases that do not pass is one, too."""
    return ended.code in (PASSED, FAILED) and file.is_file()


def call(words: Sequence[str]) -> Ended:
    """Runs a command that ends within an hour, apart from this process's own import path."""
    own = words[0] == sys.executable
    env = {name: value for name, value in os.environ.items() if own or name != "PYTHONPATH"}
    env.setdefault("COLUMNS", "100")
    try:
        ended = subprocess.run(  # noqa: S603
            words, capture_output=True, text=True, check=False, env=env, timeout=LIMIT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Ended(124, "", f"not done after {LIMIT:.0f} seconds")
    except OSError as error:
        return Ended(127, "", f"{words[0]}: {error.strerror}")
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def _end(ended: Ended) -> str:
    """Returns the last that a command said, in one line."""
    lines = [line.strip() for line in ended.err.splitlines() if line.strip()]
    signal = f"signal {-ended.code}. " if ended.code < 0 else ""
    return signal + (" ".join(lines[-3:]) or f"exit code {ended.code}")


def _shown(
    here: Mapping[str, str | None], there: Mapping[str, str | None], verdict: Verdict
) -> Iterable[str]:
    """Returns the report's lines."""
    yield f"verdict: {verdict.word}" + (f": {verdict.why}" if verdict.why else "")
    yield ""
    for name in SHOWN:
        old, new = here.get(name), there.get(name)
        if new is None and old is not None:
            yield f"{name:10} {old} (unchanged, not installed there)"
        elif old != new:
            yield f"{name:10} {old} -> {new}"
        else:
            yield f"{name:10} {old}"
    if verdict.details:
        yield ""
        yield from verdict.details.rstrip().splitlines()
    known = incidents(here, there)
    if known:
        yield ""
        yield "Known changes between these versions:"
        for each in known:
            yield from told(each)
