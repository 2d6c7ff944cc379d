"""The parser of ``flaxstab`` and its commands."""

import argparse
from collections.abc import Callable, Sequence
from typing import cast

from flaxstab.cli import _diff, _env, _record, _run, _selftest, _upgrade


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: the words behind ``flaxstab``; ``None`` takes them from the command line.

    Returns:
      The exit code: 0 if all is well, 1 if the command found that it is not, 2 if it could not be
      carried out.
    """
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    given.rest = rest
    if rest and not getattr(given, "passes_on", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return cast(Callable[[argparse.Namespace], int], given.run)(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flaxstab", description="PyTorch's training semantics for JAX, proven equal."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _env.add(commands)
    parity = commands.add_parser("parity", help="the harness that compares JAX with PyTorch")
    actions = parity.add_subparsers(metavar="ACTION", required=True)
    _diff.add(actions)
    _record.add(actions)
    _selftest.add(actions)
    _run.add(actions)
    _upgrade.add(actions)
    return parser
