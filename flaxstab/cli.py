"""The command line: ``flaxstab parity selftest``."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

PASSED, FAILED, REFUSED = 0, 1, 2
_NEEDED = ("jax", "flax", "optax", "torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: the words behind ``flaxstab``; ``None`` takes them from the command line.

    Returns:
      The exit code: 0 if all is well, 1 if a fault was missed or a sound case alarmed, 2 if the
      command could not be carried out.
    """
    given = _parser().parse_args(arguments)
    missing = [name for name in _NEEDED if not _imports(name)]
    if missing:
        names = " and ".join(missing)
        return _refuse(f"{names} cannot be imported. Install them: pip install 'flaxstab[torch]'.")
    from flaxstab.parity._selftest import FAULTS, run

    if given.list:
        sys.stdout.write("\n".join(f"{fault.name:44s} {fault.claim}" for fault in FAULTS) + "\n")
        return PASSED
    if given.sweep is not None:
        return _sweep(given.sweep)
    try:
        table = run(given.seed, given.side, given.only, told=_tell)
    except ValueError as error:
        return _refuse(str(error))
    sys.stdout.write(f"{table}\n")
    return PASSED if table.passed else FAILED


def _tell(words: str) -> None:
    """Shows progress, apart from the table."""
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


def _seeds(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {word!r}")
    return int(word)


def _sweep(seeds: int) -> int:
    from flaxstab.parity._selftest import sound_pairs, sweep

    alarms = 0
    for found in sweep(sound_pairs(), seeds):
        alarms += len(found.alarms)
        sys.stdout.write(f"{found}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{alarms} false alarms\n")
    return FAILED if alarms else PASSED


def _imports(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


def _refuse(message: str) -> int:
    sys.stderr.write(f"flaxstab: {message}\n")
    return REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flaxstab", description="PyTorch's training semantics for JAX, proven equal."
    )
    topics = parser.add_subparsers(metavar="COMMAND", required=True)
    parity = topics.add_parser("parity", help="the harness that compares JAX with PyTorch")
    actions = parity.add_subparsers(metavar="ACTION", required=True)
    selftest = actions.add_parser(
        "selftest",
        help="plant faults on either side and see whether the harness finds them",
        description="Plants one fault after the other in the JAX side or the PyTorch side, compares"
        " the sides as every user does, and says which check found it. Takes about two minutes.",
        epilog="exit code: 0 every fault was found and sound code passed; 1 not so; 2 refused",
    )
    selftest.add_argument("--seed", type=int, default=0, help="of sides and inputs (default: 0)")
    selftest.add_argument(
        "--side", choices=("jax", "torch", "both", "random"), default="random",
        help="where to plant: one side, both in turn, or a random one for each (default)",
    )  # fmt: skip
    selftest.add_argument("--list", action="store_true", help="show the names of all faults")
    selftest.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="plant these faults alone"
    )
    selftest.add_argument(
        "--sweep", type=_seeds, default=None, metavar="SEEDS",
        help="plant nothing: compare every sound pair on inputs of so many seeds, at means 0, 10,"
        " 100 and 1000, in float64, float32 and bfloat16 (100 seeds take about an hour)",
    )  # fmt: skip
    return parser
