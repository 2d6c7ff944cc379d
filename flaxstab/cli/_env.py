"""``flaxstab env``: what is installed, how it computes, what is known to be wrong with it."""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from flaxstab._environment import (
    Finding,
    Incident,
    ahead,
    describe,
    findings,
    incidents,
    order,
    packages,
    parse_pins,
    standing,
    tracked,
)
from flaxstab.cli._command import FAILED, PASSED, refuse

if TYPE_CHECKING:
    from flaxstab.cli._command import Actions

WIDTH = 96
SCHEMA = 1


def add(actions: "Actions") -> None:
    """Adds the command to the parser."""
    env = actions.add_parser(
        "env",
        help="show versions, devices and precision, and what is known to be wrong with them",
        description="Shows what is installed, which devices and which precision JAX and PyTorch"
        " compute with (measured), and what is known to be wrong with these versions. Works where a"
        " framework cannot be imported, and says why.",
        epilog="exit code: 0 all is well; 1 something cannot work; 2 refused",
    )
    env.add_argument("--json", action="store_true", help="print everything as JSON")
    env.add_argument("--quick", action="store_true", help="import no framework: versions only")
    env.add_argument(
        "--from", dest="before", metavar="VERSIONS", default="",
        help="show what is known to have changed since these versions, like 'jax==0.4.30'",
    )  # fmt: skip
    env.add_argument(
        "--to", dest="after", metavar="VERSIONS", default="",
        help="up to these versions (default: the installed ones)",
    )  # fmt: skip
    env.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    installed = packages()
    try:
        before, after = _pins(given.before), _pins(given.after)
    except ValueError as error:
        return refuse(str(error))
    if given.before or given.after:
        return _show_changes(installed, before, after, given.json)
    if given.json:
        described = describe(devices=not given.quick)
        found = findings(described)
        sys.stdout.write(json.dumps(_data(described, found), indent=1) + "\n")
        return _code(found)
    # The part that imports nothing comes first: an import may end the process.
    described = describe()
    _say(_environment(described))
    if not given.quick:
        described = describe(devices=True)
        _say(_frameworks(described))
    found = findings(described)
    _say(_verdict(found))
    _say(_ahead(installed))
    return _code(found)


def _pins(words: str) -> dict[str, str]:
    pins = tracked(parse_pins(words)) if words else {}
    for name, version in pins.items():
        if not version:
            raise ValueError(f"a version must be given for each package, got {name!r} without one.")
    return pins


def _code(found: Iterable[Finding]) -> int:
    return FAILED if any(each.level == "bad" for each in found) else PASSED


def _say(lines: Iterable[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()


def _environment(described: Mapping[str, object]) -> Iterable[str]:
    versions = cast("Mapping[str, str | None]", described["packages"])
    python = cast("Mapping[str, str]", described["python"])
    place = cast("Mapping[str, object]", described["platform"])
    yield f"Python {python['version']}, {place['system']}"
    yield f"{place['cpu']}, {place['cores']} cores"
    yield ""
    yield from _entries((name, version or "not installed") for name, version in versions.items())
    settings = cast("Mapping[str, str]", described["settings"])
    if settings:
        yield ""
        yield from _entries(settings.items())


def _frameworks(described: Mapping[str, object]) -> Iterable[str]:
    failed = cast("Mapping[str, str]", described["imports"])
    for name in ("jax", "torch"):
        side = cast("Mapping[str, object]", described[name])
        yield ""
        if not side:
            yield f"{name} cannot be imported: {failed[name]}"
        elif "error" in side:
            yield f"{name} cannot compute: {side['error']}"
        else:
            devices = cast("Sequence[str]", side["devices"])
            yield f"{name} {side['version']} on {side['backend']}: {', '.join(devices)}"
            for product in ("matmul", "convolution"):
                measured = cast("Mapping[str, object]", side[product])
                yield (
                    f"  float32 {product}: {measured['name']}"
                    f" ({measured['bits']} bits of mantissa, measured)"
                )
            flags = cast("Mapping[str, object]", side["flags"])
            yield from (f"  {line}" for line in _entries(flags.items()))


def _entries(pairs: Iterable[tuple[str, object]]) -> Iterable[str]:
    listed = list(pairs)
    wide = max(len(name) for name, _ in listed)
    return (f"{name:{wide}}  {value}" for name, value in listed)


def _verdict(found: Sequence[Finding]) -> Iterable[str]:
    yield ""
    if not found:
        yield "Nothing is known to be wrong here."
    for each in found:
        mark = "WRONG: " if each.level == "bad" else "note: "
        yield from wrapped(mark + each.what)
        if each.fix:
            yield from wrapped(each.fix, "  -> ")


def _ahead(versions: Mapping[str, str | None]) -> Iterable[str]:
    coming = ahead(versions)
    if coming:
        yield ""
        yield "Known changes of newer releases (flaxstab parity upgrade --to ... tries them):"
        for known in coming:
            yield from told(known)


def told(known: Incident) -> Iterable[str]:
    """Returns an incident as lines of a list."""
    ends = f" to {known.until}" if known.until else ""
    return wrapped(
        f"{known.package} {known.version}{ends} [{known.kind}] {known.what} ({known.reference})",
        "  ",
    )


def wrapped(words: str, indent: str = "") -> Iterable[str]:
    """Returns words as lines that fit a screen."""
    return textwrap.wrap(
        words, WIDTH, initial_indent=indent, subsequent_indent=" " * (len(indent) + 2),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _show_changes(
    installed: Mapping[str, str | None],
    before: Mapping[str, str],
    after: Mapping[str, str],
    as_json: bool,
) -> int:
    """Shows the incidents between two sets of versions, or the installed ones."""
    old = {**installed, **before}
    new = {**installed, **after}
    changed = [name for name in sorted({*before, *after}) if old.get(name) != new.get(name)]
    lower = [name for name in changed if _is_older(new.get(name), old.get(name))]
    known = incidents(old, new)
    if as_json:
        data = [_incident(each) for each in known]
        held = {"schema": SCHEMA, "incidents": data, "downgrades": lower}
        sys.stdout.write(json.dumps(held, indent=1) + "\n")
        return PASSED
    _say([", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in changed)])
    if lower:
        _say(wrapped(f"A downgrade of {', '.join(lower)}: its changes below are undone."))
    for each in known:
        _say(told(each))
    if not known:
        _say(["  Nothing is known to have changed between them. That is no proof:"
              " flaxstab parity upgrade runs both."])  # fmt: skip
    return PASSED


def _is_older(one: str | None, other: str | None) -> bool:
    return bool(one and other) and order(str(one)) < order(str(other))


def _incident(known: Incident) -> dict[str, object]:
    return known._asdict()


def _data(described: Mapping[str, object], found: Sequence[Finding]) -> dict[str, object]:
    versions = cast("Mapping[str, str | None]", described["packages"])
    return {
        "schema": SCHEMA,
        **described,
        "findings": [each._asdict() for each in found],
        "standing": [_incident(each) for each in standing(versions)],
        "ahead": [_incident(each) for each in ahead(versions)],
    }
