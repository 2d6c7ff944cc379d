"""Hyper-parameters: numbers, traced numbers or schedules; checked when they are known."""

import math
from typing import TypeAlias

import jax
import numpy as np
import optax

from flaxstab._checks import check
from flaxstab._typing import Array

Hyper: TypeAlias = float | Array | optax.Schedule  # a number, a traced number, or a schedule


def at(hyper: Hyper, count: Array) -> float | Array:
    """Returns a hyper-parameter's value after ``count`` updates."""
    return hyper(count) if callable(hyper) else hyper


def is_zero(hyper: Hyper) -> bool:
    """Whether it is 0 for ever. An array may be another one at the next call."""
    return isinstance(hyper, int | float | np.number) and hyper == 0


def is_traced(value: object) -> bool:
    """Whether a value is not known while the program is traced."""
    return isinstance(value, jax.core.Tracer)


def check_hypers(rule: str, **hypers: Hyper) -> None:
    """Raises a ``ValueError`` unless those that are known are finite and at least 0.

    Args:
      rule: what they must be, naming them all.
      **hypers: numbers, traced numbers and schedules.
    """
    given = {name: value for name, value in hypers.items() if not callable(value)}
    for name, value in given.items():
        check(np.ndim(value) == 0, f"{name} must be a single number", shape=np.shape(value))
    known = [float(value) for value in given.values() if not is_traced(value)]
    shown: dict[str, object] = dict(hypers)
    check(all(value >= 0 and math.isfinite(value) for value in known), rule, fix="", **shown)
