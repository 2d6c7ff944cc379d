"""The suite's own cases: the pairs in which the self-test plants its faults."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check
from flaxstab.parity._record._baseline import Record
from flaxstab.parity._record._subject import Subject
from flaxstab.parity._selftest._cases import layers
from flaxstab.parity._selftest._cases_attention import attention
from flaxstab.parity._selftest._cases_dropout import dropouts
from flaxstab.parity._selftest._cases_schedules import schedules
from flaxstab.parity._selftest._cases_training import training
from flaxstab.parity._selftest._plant import Build, Sides
from flaxstab.parity._selftest._sweep import sound_pairs

# PyTorch's side of these computes in float64 whatever it is given.
_EXACT = ("LSTM, masks given", "cosine annealing", "one cycle", "step schedule")


def suite(patterns: Sequence[str] = ()) -> dict[str, Callable[[], Sides]]:
    """Returns what builds every case, by name.

    Args:
      patterns: of the names that are wanted, with ``*`` and ``?``; all if there are none.

    Raises:
      ValueError: if a pattern fits no name.
    """
    known: Mapping[str, Callable[[], Sides]] = {
        **sound_pairs(), **layers(), **dropouts(), **attention(), **schedules(), **training(),
    }  # fmt: skip
    for pattern in patterns:
        fits = any(fnmatchcase(name, pattern) for name in known)
        names = f"Of {len(known)}, such as {', '.join(list(known)[:4])}."
        check(fits, "a pattern must fit the name of a case", pattern=pattern, fix=names)
    wanted = patterns or ("*",)
    return {n: b for n, b in known.items() if any(fnmatchcase(n, p) for p in wanted)}


def subject_of(name: str, build: Callable[[], Sides], source: Record | None) -> Subject:
    """Returns a case of the suite as a subject.

    Args:
      name: the case's.
      build: builds it.
      source: the record that stands for PyTorch's side where it is absent.
    """
    if source is not None and isinstance(build, Build):
        theirs = _absent
        sides = Sides(build.ours(), theirs, build.inputs, None, build.layout, build.dtypes)
    else:
        sides = build() if source is not None else _seeded(build)
    others = tuple(kind for kind in sides.dtypes if jnp.dtype(kind) != np.float32)
    dtypes = () if name in _EXACT else (np.float32, *others)
    return Subject(sides.ours, sides.theirs, sides.inputs, sides.layout, dtypes=dtypes)


def _absent() -> None:
    """Stands for a PyTorch side that was not built."""


def _seeded(build: Callable[[], Sides]) -> Sides:
    """Builds both sides with PyTorch's generator at the same place each time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()
