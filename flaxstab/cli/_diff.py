"""``flaxstab parity diff``: says what has moved between two baselines, and whether it matters."""

import argparse
from typing import TYPE_CHECKING

from flaxstab.cli._command import FAILED, PASSED, missing, refuse

if TYPE_CHECKING:
    from flaxstab.cli._command import Actions


def add(actions: "Actions") -> None:
    """Adds the command to the parser."""
    diff = actions.add_parser(
        "diff",
        help="say what has moved between two baselines, on which side, and whether it matters",
        description="Compares two files of 'flaxstab parity record', value by value: what moved, in"
        " JAX or in PyTorch, judged by float64; public names, defaults and random streams.",
        epilog="exit code: 0 safe, or safe with the changes that are listed; 1 breaks; 2 refused",
    )
    diff.add_argument("old", metavar="OLD", help="the baseline from before the upgrade")
    diff.add_argument("new", metavar="NEW", help="the one from after it")
    diff.add_argument("--json", default=None, metavar="FILE", help="write all of it as JSON")
    diff.add_argument("--html", default=None, metavar="FILE", help="write all of it as one page")
    diff.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    absent = missing("jax", "flax", "optax")
    if absent:
        return refuse(absent)
    from rich.console import Console

    from flaxstab.parity import _diff
    from flaxstab.parity._diff._files import write_html, write_json

    try:
        found = _diff.diff(given.old, given.new)
        if given.json is not None:
            write_json(found, given.json)
        if given.html is not None:
            write_html(found, given.html)
    except ValueError as error:
        return refuse(str(error))
    Console().print(found)
    return FAILED if found.verdict is _diff.Outcome.BREAKS else PASSED
