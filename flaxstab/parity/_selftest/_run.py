"""Plants every fault, compares, and collects what was found and on which side."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Literal

import numpy as np

from flaxstab._checks import check
from flaxstab.parity._selftest._cases import layers
from flaxstab.parity._selftest._cases_attention import attention
from flaxstab.parity._selftest._cases_dropout import dropouts
from flaxstab.parity._selftest._cases_schedules import schedules
from flaxstab.parity._selftest._cases_training import training
from flaxstab.parity._selftest._faults_attention import ATTENTION
from flaxstab.parity._selftest._faults_dropout import DROPOUT
from flaxstab.parity._selftest._faults_layers import LAYERS
from flaxstab.parity._selftest._faults_linear import LINEAR
from flaxstab.parity._selftest._faults_norms import NORMS
from flaxstab.parity._selftest._faults_optim import OPTIM
from flaxstab.parity._selftest._faults_precision import PRECISION
from flaxstab.parity._selftest._faults_schedules import SCHEDULES
from flaxstab.parity._selftest._faults_steps import STEPS
from flaxstab.parity._selftest._laws import LAWS, Law, laws
from flaxstab.parity._selftest._limits import LIMITS
from flaxstab.parity._selftest._look import Seen, look
from flaxstab.parity._selftest._plant import Fault, Sides
from flaxstab.parity._selftest._table import Clean, Outcome, Table

SideChoice = Literal["jax", "torch", "both", "random"]
FAULTS: tuple[Fault, ...] = (
    *NORMS, *LINEAR, *LAYERS, *DROPOUT, *ATTENTION, *PRECISION, *OPTIM, *SCHEDULES, *STEPS, *LAWS,
)  # fmt: skip


def cases() -> Mapping[str, Callable[[], Sides | Law]]:
    """Returns what builds the sides of every case, by name."""
    return {
        **layers(), **dropouts(), **attention(), **training(), **schedules(), **laws(),
    }  # fmt: skip


def run(
    seed: int = 0,
    side: SideChoice = "random",
    only: Sequence[str] = (),
    *,
    faults: Sequence[Fault] = (*FAULTS, *LIMITS),
    told: Callable[[str], None] = lambda _: None,
) -> Table:
    """Plants every fault once, and runs every case that it takes without a fault.

    Args:
      seed: of the sides in which faults are planted, and of what the comparisons draw.
      side: where: ``'jax'``, ``'torch'``, ``'both'`` one after the other, or one at ``'random'``.
        Faults that one side cannot have are listed where they are left out.
      only: names of faults; all if empty.
      faults: the table of faults.
      told: is told what is being done.

    Returns:
      What was found.

    Raises:
      ValueError: if ``side`` or a name is unknown.
    """
    choices = ("jax", "torch", "both", "random")
    check(side in choices, "side must be 'jax', 'torch', 'both' or 'random'", side=side)
    known = {fault.name: fault for fault in faults}
    for name in only:
        near = get_close_matches(name, known, n=3, cutoff=0.4)
        fix = f"Near: {', '.join(near) or 'none'}. flaxstab parity selftest --list shows all."
        check(name in known, "only must be the name of a fault", fix=fix, only=name)
    chosen = [known[name] for name in dict.fromkeys(only)] if only else list(faults)
    rng, build = np.random.default_rng(seed), cases()
    clean = {case: look(build[case](), seed) for case in dict.fromkeys(f.case for f in chosen)}
    planted = [(fault, place) for fault in chosen for place in _places(fault, side, rng)]
    outcomes = []
    for number, (f, place) in enumerate(planted, 1):
        told(f"{number}/{len(planted)} {f.name} ({place})")
        outcomes.append(_outcome(f, place, _look_at(f, place, build[f.case], seed), clean[f.case]))
    absent = {fault.name for fault in chosen} - {fault.name for fault, _ in planted}
    quiet = tuple(_clean(case, seen) for case, seen in clean.items())
    return Table(tuple(outcomes), quiet, tuple(sorted(absent)))


def _places(fault: Fault, side: SideChoice, rng: np.random.Generator) -> list[str]:
    """Returns the sides to plant a fault in."""
    there = list(fault.plants)
    if side == "random":
        return [there[int(rng.integers(len(there)))]]
    return [place for place in there if side in ("both", place)]


def _look_at(fault: Fault, place: str, build: Callable[[], Sides | Law], seed: int) -> Seen:
    with fault.plants[place]():
        return look(build(), seed)


def _outcome(fault: Fault, place: str, seen: Seen, clean: Seen) -> Outcome:
    meant = [mark for mark in seen.marks if mark.name.startswith(fault.check)]
    caught = max((m for m in meant if m.differs), key=lambda m: m.excess, default=None)
    return Outcome(
        fault, place, seen.verdict, seen.side,
        "" if caught is None else caught.name,
        frozenset(mark.kind for mark in seen.marks if mark.differs),
        max((m.excess for m in meant), default=0.0) if caught is None else caught.excess,
        clean.excess,
    )  # fmt: skip


def _clean(case: str, seen: Seen) -> Clean:
    return Clean(case, tuple(m.name for m in seen.marks if m.differs), seen.excess)
