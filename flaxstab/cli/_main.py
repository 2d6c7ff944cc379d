"""The parser of ``flaxstab`` and its commands."""

import argparse
from collections.abc import Callable, Sequence
from typing import cast

from flaxstab.cli import _convert, _selftest


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: the words behind ``flaxstab``; ``None`` takes them from the command line.

    Returns:
      The exit code: 0 if all is well, 1 if the command found that it is not, 2 if it could not be
      carried out.
    """
    given = _parser().parse_args(arguments)
    return cast(Callable[[argparse.Namespace], int], given.run)(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flaxstab", description="PyTorch's training semantics for JAX, proven equal."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _convert.add(commands)
    parity = commands.add_parser("parity", help="the harness that compares JAX with PyTorch")
    actions = parity.add_subparsers(metavar="ACTION", required=True)
    _selftest.add(actions)
    return parser
