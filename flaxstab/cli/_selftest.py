"""``flaxstab parity selftest``: plants faults and shows which check finds each."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flaxstab.cli._command import FAILED, PASSED, missing, refuse, tell

if TYPE_CHECKING:
    from flaxstab.cli._command import Actions


def add(actions: "Actions") -> None:
    """Adds the command to the parser."""
    selftest = actions.add_parser(
        "selftest",
        help="plant faults on either side and see whether the harness finds them",
        description="Plants one fault after the other in the JAX side or the PyTorch side, compares"
        " the sides as every user does, and says which check found it; then in single layers of"
        " four networks, and says which layer was named. Takes about four minutes on two cores.",
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
        "--layers", type=_number, default=1, metavar="N",
        help="plant N faults in single layers of each of four networks (default: 1; 0 = none)",
    )  # fmt: skip
    selftest.add_argument(
        "--write", default=None, metavar="FILE.md",
        help="plant every fault that a layer of the networks can have, and write the kill matrix as"
        " a page of Markdown (takes a quarter of an hour)",
    )  # fmt: skip
    selftest.add_argument(
        "--sweep", type=_seeds, default=None, metavar="SEEDS",
        help="plant nothing: compare every sound pair on inputs of so many seeds, at means 0, 10,"
        " 100 and 1000, in float64, float32 and bfloat16 (100 seeds take about an hour)",
    )  # fmt: skip
    selftest.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    absent = missing("jax", "flax", "optax", "torch")
    if absent:
        return refuse(absent)
    if given.write and not Path(given.write).parent.is_dir():
        return refuse(f"--write must name a file in a folder that exists, got {given.write!r}.")
    from flaxstab.parity._selftest import FAULTS

    if given.list:
        sys.stdout.write("\n".join(f"{fault.name:44s} {fault.claim}" for fault in FAULTS) + "\n")
        return PASSED
    if given.sweep is not None:
        return _sweep(given.sweep)
    try:
        return _plant(given)
    except ValueError as error:
        return refuse(str(error))


def _plant(given: argparse.Namespace) -> int:
    """Plants faults, shows what came of them, and writes the page if that is asked for."""
    from flaxstab._files import write_whole
    from flaxstab.parity import _selftest

    table = _selftest.run(given.seed, given.side, given.only, told=tell)
    sys.stdout.write(f"{table}\n")
    if given.only:
        return PASSED if table.passed else FAILED
    layers = _selftest.run_instances(given.seed, None if given.write else given.layers, told=tell)
    sys.stdout.write(f"\n{layers}\n")
    if given.write:
        command = f"flaxstab parity selftest --seed {given.seed} --write {given.write}"
        text = _selftest.page(table, layers, command)
        write_whole(given.write, lambda path: path.write_text(text, encoding="utf-8"))
    return PASSED if table.passed and layers.passed else FAILED


def _number(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {word!r}")
    return int(word)


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
