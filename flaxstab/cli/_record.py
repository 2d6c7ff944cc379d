"""``flaxstab parity record``: writes what the suite's cases give in this environment to a file."""

import argparse
import sys
from typing import TYPE_CHECKING

from flaxstab.cli._command import FAILED, PASSED, missing, refuse, tell

if TYPE_CHECKING:
    from flaxstab.cli._command import Actions


def add(actions: "Actions") -> None:
    """Adds the command to the parser."""
    record = actions.add_parser(
        "record",
        help="write what every case gives here to a baseline, before or after an upgrade",
        description="Runs the suite's cases in JAX and PyTorch and writes inputs, weights, all"
        " results, the environment, public signatures and random streams to one file, which"
        " 'flaxstab parity diff' compares with another. Takes about three minutes.",
        epilog="exit code: 0 every case passed; 1 one did not, or could not run; 2 refused",
    )
    record.add_argument("file", metavar="FILE", nargs="?", help="the baseline to write")
    record.add_argument(
        "--cases", nargs="+", default=(), metavar="PATTERN",
        help="only cases whose names fit, with * and ?, such as '*norm*'",
    )  # fmt: skip
    source = record.add_mutually_exclusive_group()
    source.add_argument(
        "--inputs-from", default=None, metavar="BASELINE",
        help="take inputs and weights from an earlier baseline",
    )  # fmt: skip
    source.add_argument(
        "--torch-from", default=None, metavar="BASELINE",
        help="take PyTorch's values, too: it need not be installed, and is labelled 'recorded'",
    )  # fmt: skip
    record.add_argument(
        "--list", action="store_true", help="show the names of cases; needs no FILE"
    )
    record.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if given.file is None and not given.list:
        return refuse("FILE must name the baseline to write, got none. Name it before --cases.")
    needed = ("jax", "flax", "optax", *(() if given.torch_from else ("torch",)))
    absent = missing(*needed)
    if absent:
        return refuse(absent)
    from flaxstab.parity import _record
    from flaxstab.parity._record._suite import suite

    if given.list:
        sys.stdout.write("\n".join(suite(given.cases)) + "\n")
        return PASSED
    try:
        made = _record.record_suite(
            given.file, given.cases,
            inputs_from=given.inputs_from, torch_from=given.torch_from, told=tell,
        )  # fmt: skip
    except ValueError as error:
        return refuse(str(error))
    failed = [name for name, case in made.cases.items() if not case.facts.passed]
    label = "recorded" if made.torch == "recorded" else "live"
    words = f"{given.file}: {len(made.cases)} cases, PyTorch's side {label}"
    for name in failed:
        facts = made.cases[name].facts
        reasons = (f"{f.name}: {f.verdict}" for f in facts.findings if not f.passed)
        reason = facts.error or next(reasons)
        words += f"\n  {name}: {reason}"
    sys.stdout.write(f"{words}\n")
    return FAILED if failed else PASSED
