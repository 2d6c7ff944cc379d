"""What initializers take: numbers, axes of a shape, floating-point dtypes."""

from numbers import Real
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check
from flaxstab._dtypes import floating, widest
from flaxstab._typing import DTypeLike, Shape

Axes: TypeAlias = int | tuple[int, ...]


def check_numbers(call: str, **given: object) -> None:
    """Raises a ``ValueError`` unless every named argument is a real number.

    An array is most likely a layer's key: the initializer was passed without being called.

    Args:
      call: what should have been passed, e.g. ``'uniform()'``.
      **given: the arguments by name.

    Raises:
      ValueError: naming an array's type alone, for its elements would fill the screen.
    """
    for name, value in given.items():
        got, fix = value, ""
        if isinstance(value, jax.Array | np.ndarray):
            got, fix = type(value), f"Call it first: kernel_init={call}."
        elif isinstance(value, str) and name == "gain":
            fix = f"Use calculate_gain({value!r})."
        check(_is_number(value), f"{name} must be a number", fix=fix, **{name: got})


def _is_number(value: object) -> bool:
    if not isinstance(value, jax.Array | np.ndarray):
        return isinstance(value, Real)
    kinds = (jnp.floating, jnp.integer)
    return value.ndim == 0 and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)


def axes_of(axes: Axes) -> tuple[int, ...]:
    """Returns one or several axes as a tuple."""
    return tuple(axes) if isinstance(axes, tuple | list) else (axes,)


def check_axes(shape: Shape, **named: Axes) -> None:
    """Raises a ``ValueError`` unless the named axes are different ones of a shape."""
    rank, axes = len(shape), [axis for given in named.values() for axis in axes_of(given)]
    inside = all(isinstance(axis, int | np.integer) and -rank <= axis < rank for axis in axes)
    distinct = inside and len({axis % rank for axis in axes}) == len(axes)
    kind = "different axes" if len(named) > 1 else "an axis"
    given: dict[str, object] = {**named, "shape": shape}
    check(distinct, f"{' and '.join(named)} must be {kind} of the shape", fix="", **given)


def drawn_in(dtype: DTypeLike) -> DTypeLike:
    """Returns the dtype in which random numbers are drawn: float32 or wider.

    Raises:
      ValueError: if ``dtype`` is not a floating-point one: a cast would make integers of the draws.
    """
    return widest(floating("dtype", dtype))
