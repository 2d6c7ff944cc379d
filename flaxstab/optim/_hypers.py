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


def check_hypers(**hypers: Hyper) -> None:
    """Raises a ``ValueError`` unless those that are known are finite and at least 0."""
    for name, value in hypers.items():
        if not callable(value):
            check_number(name, value)
            in_range = is_traced(value) or (float(value) >= 0 and math.isfinite(float(value)))
            check(in_range, f"{name} must be finite and at least 0", fix="", **{name: value})


def check_number(name: str, value: object) -> None:
    """Raises a ``ValueError`` unless given one number, known or traced."""
    is_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    check(is_number, f"{name} must be a number", fix="", **{name: value})
    shape = getattr(value, "shape", ())
    check(shape == (), f"{name} must be a single number", shape=shape)


def check_bound(name: str, value: float | Array) -> None:
    """Raises a ``ValueError`` unless a number that is known is at least 0."""
    check_number(name, value)
    in_range = is_traced(value) or float(value) >= 0
    check(in_range, f"{name} must be at least 0", fix="", **{name: value})
