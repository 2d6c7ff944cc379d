"""How many hashes a program takes for its random numbers."""

import math
from collections.abc import Callable

import jax

from parity_tests.support.contracts import steps


def hashes(f: Callable[..., object], *args: object) -> int:
    """Counts the keys and numbers that a program draws, inner programs included.

    One of Threefry's hashes makes a key, or a number of any width; a loop's body counts once.

    Args:
      f: a function of arrays and keys.
      *args: what to trace it with.
    """
    count = 0
    for step in steps(jax.make_jaxpr(f)(*args)):
        if step.primitive.name == "random_split":
            count += math.prod(step.params["shape"])
        elif step.primitive.name in ("random_bits", "random_fold_in"):
            count += step.outvars[0].aval.size
    return count
