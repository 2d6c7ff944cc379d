"""One wording for every error: the rule, what was given, the fix."""

from collections.abc import Mapping
from numbers import Real
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._typing import Array, DTypeLike, Shape, Sizes


def check(condition: bool, rule: str, *, fix: str = "", **given: object) -> None:
    """Raises a ``ValueError`` that says the rule, what was given and the fix.

    Args:
      condition: what must hold.
      rule: what the caller's arguments must be, naming them as the caller typed them.
      fix: what to change, if that is not plain from the rule.
      **given: the offending arguments by name.

    Raises:
      ValueError: if ``condition`` is false.

    Example:
      >>> check(32 % 3 == 0, "heads must divide features", heads=3, features=32)
      Traceback (most recent call last):
      ...
      ValueError: heads must divide features, got heads=3 and features=32.
    """
    if not condition:
        _fail(rule, fix, given)


def _fail(rule: str, fix: str, given: Mapping[str, object]) -> NoReturn:
    got = " and ".join(f"{name}={value!r}" for name, value in given.items())
    raise ValueError(f"{rule}, got {got}." + (f" {fix}" if fix else ""))


def check_positive(**sizes: int) -> None:
    """Raises a ``ValueError`` unless every named size is an integer of at least 1."""
    for name, value in sizes.items():
        is_size = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1
        if not is_size:
            _fail(f"{name} must be an integer of at least 1", "", {name: value})


def known(value: object, name: str = "value") -> float | None:
    """Returns a number as Python's, or ``None`` if it is traced.

    Compare what this returns and not the value: under ``jit`` JAX traces whatever is computed of
    an array, of one with a known value too.

    Args:
      value: a Python number, a scalar of NumPy or JAX, or what ``jit``, ``grad`` or ``vmap`` trace.
      name: the argument's name, for the error.

    Raises:
      ValueError: if it is no single real number.

    Example:
      >>> import jax.numpy as jnp
      >>> rate = jnp.float32(0.5)
      >>> jax.jit(lambda traced: print(known(rate), known(traced)))(0.5)
      0.5 None
    """
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, Real):
        return float(value)
    arrays = np.generic | np.ndarray | jax.Array
    if isinstance(value, arrays) and value.ndim == 0 and _is_real(value.dtype):
        return float(value)
    _fail(f"{name} must be a single number", "", {name: value})


def _is_real(dtype: DTypeLike) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def number(eps: float | Array) -> float:
    """Returns ``eps`` as a Python number, on which programs may be specialised.

    Raises:
      ValueError: if it is traced.
    """
    try:
        return float(eps)
    except TypeError as traced:
        rule = f"eps must be a number, got {type(eps).__name__}"
        raise ValueError(f"{rule}. Pass a Python number; it cannot be traced.") from traced


def check_eps(eps: float | None) -> None:
    """Raises a ``ValueError`` unless ``eps`` is a number of at least 0."""
    if not isinstance(eps, int | float | np.number) or not eps >= 0:
        _fail("eps must be a number of at least 0", "", {"eps": eps})


def check_probability(**probabilities: float) -> None:
    """Raises a ``ValueError`` unless every named probability lies in [0, 1]."""
    for name, value in probabilities.items():
        if not 0.0 <= value <= 1.0:
            _fail(f"{name} must lie in [0, 1]", "", {name: value})


def check_last_axis(name: str, size: int, shape: Shape) -> None:
    """Raises a ``ValueError`` unless an input's last axis has the size that a layer was built for.

    Args:
      name: the constructor argument that set the size.
      size: its value.
      shape: the input's shape.
    """
    if not shape or shape[-1] != size:
        fix = "Arrays are features-last here: (N, ..., C)."
        _fail(f"the input's last axis must have {name} elements", fix, {name: size, "shape": shape})


def check_mask(mask: Array, shape: Shape) -> None:
    """Raises a ``ValueError`` unless a mask is boolean and has the axes of an input.

    Args:
      mask: what must have as many axes as the input, each of the input's size or 1.
      shape: the input's shape.
    """
    given = np.shape(mask)
    fits = len(given) == len(shape)
    if not fits or any(m not in (1, n) for m, n in zip(given, shape, strict=True)):
        rule = "mask must have as many axes as the input, each of its size or 1"
        _fail(rule, "A mask of (N, *space) becomes mask[..., None].", {"mask": given, "x": shape})
    if mask.dtype != np.bool_:
        _fail("mask must be boolean", "Pass mask.astype(bool).", {"dtype": str(mask.dtype)})


def check_axis_name(axis_name: object) -> None:
    """Raises a ``ValueError`` unless given a name, a tuple of names or ``None``."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not (names and all(isinstance(name, str) for name in names)):
        _fail("axis_name must be a name, a tuple of names or None", "", {"axis_name": axis_name})


def per_axis(name: str, value: Sizes, rank: int, *, minimum: int = 0) -> Shape:
    """Returns one integer per spatial axis from an integer or a tuple.

    Args:
      name: the argument's name, for the error.
      value: an integer for every axis, or a tuple with one entry per axis.
      rank: the number of spatial axes.
      minimum: the smallest entry allowed.

    Raises:
      ValueError: if the number of entries is not ``rank`` or an entry is too small.
    """
    entries = (value,) * rank if isinstance(value, int | np.integer) else tuple(value)
    if len(entries) != rank or not all(
        isinstance(e, int | np.integer) and e >= minimum for e in entries
    ):
        rule = f"{name} must be an integer or {rank} integers, each at least {minimum}"
        _fail(rule, "", {name: value})
    return tuple(int(entry) for entry in entries)
