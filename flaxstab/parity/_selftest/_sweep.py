"""False alarms: sound pairs compared on many inputs, of any mean."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flaxstab.parity._inputs import is_float
from flaxstab.parity._models import Pair
from flaxstab.parity._selftest._plant import Sides

OFFSETS = (0.0, 10.0, 100.0, 1000.0)
DTYPES = (np.float32, jnp.bfloat16)


class Sweep(NamedTuple):
    """What a sound pair gave over many inputs.

    Attributes:
      name: the case.
      comparisons: how many there were: seeds times offsets, each in float64 and both precisions.
      alarms: those that did not agree, in words.
      largest: the largest error over its bound.
      quantity: where that was.
    """

    name: str
    comparisons: int
    alarms: tuple[str, ...]
    largest: float
    quantity: str


def sweep(cases: Mapping[str, Callable[[], Sides]], seeds: int) -> Iterator[Sweep]:
    """Compares each sound pair on inputs from many seeds, at means 0, 10, 100 and 1000.

    Args:
      cases: by name.
      seeds: how many.

    Yields:
      One result for each case.
    """
    for name, build in cases.items():
        sides = build()
        pair = Pair(sides.ours, sides.theirs, sides.inputs, layout=sides.layout)
        alarms, worst = [], (0.0, "")
        for seed in range(seeds):
            for offset in OFFSETS:
                inputs = redrawn(sides.inputs, seed, offset)
                report = pair.judge(inputs, dtypes=DTYPES, seed=seed)
                # An alarm on either side is one: both are sound.
                alarms += [
                    f"seed {seed}, mean {offset:g}: {f.verdict} {f.name} in {f.dtype}, "
                    f"{f.excess:.3g} of the bound"
                    for f in report.findings
                    if f.side or not f.passed
                ]
                found = max(report.findings, key=lambda f: f.excess)
                worst = max(worst, (found.excess, f"{found.name} in {found.dtype}"))
        yield Sweep(name, seeds * len(OFFSETS), tuple(alarms), *worst)


def redrawn(inputs: tuple[np.ndarray, ...], seed: int, offset: float) -> tuple[np.ndarray, ...]:
    """Returns normal numbers of deviation 1 and some mean in place of floating-point inputs."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(offset, 1.0, a.shape) if is_float(a) else a for a in inputs)
