"""What both sides are fed, and how what they compute is named."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from flaxstab._typing import Array, DTypeLike, PyTree

Layout = Literal["image"] | None
Values = Mapping[str, np.ndarray]  # quantities by name, in PyTorch's names and Flax's layout
STEPS = (1, 2, 10)  # after how many training steps the statistics are looked at


class Inputs(NamedTuple):
    """What both sides are fed.

    Attributes:
      arrays: the arguments, features last; floating-point ones are differentiated.
      cotangents: of each floating-point output, by its name.
      layout: ``'image'`` if PyTorch wants the last axis at 1, ``None`` for the same arrays.
    """

    arrays: tuple[np.ndarray, ...]
    cotangents: Values
    layout: Layout

    def rounded(self, dtype: DTypeLike) -> "Inputs":
        """Returns the inputs rounded to a dtype, as float64, so that every precision sees them."""
        arrays = tuple(round_to(a, dtype) for a in self.arrays)
        cotangents = {name: round_to(a, dtype) for name, a in self.cotangents.items()}
        return Inputs(arrays, cotangents, self.layout)

    def redrawn(self, seed: int) -> "Inputs":
        """Returns inputs a little way off (1/64 of each value) and other cotangents."""
        rng = own_rng(seed)
        arrays = tuple(
            a * (1 + rng.uniform(-1, 1, a.shape) / 64) if is_float(a) else a for a in self.arrays
        )
        cotangents = {name: rng.normal(size=a.shape) for name, a in self.cotangents.items()}
        return Inputs(arrays, cotangents, self.layout)


def own_rng(seed: int) -> np.random.Generator:
    """Returns a generator whose draws are not those of ``default_rng(seed)``.

    Callers draw their inputs from that, and a cotangent equal to the standardised input has no
    gradient through a norm.

    Args:
      seed: as the caller gave it.
    """
    return np.random.default_rng((seed, 0xF1A))


def is_float(array: np.ndarray | Array) -> bool:
    """Whether an array holds floating-point numbers, bfloat16 included."""
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def is_integral(array: np.ndarray) -> bool:
    """Whether floating-point values are all integers or infinite, as masks and classes are."""
    finite = array[np.isfinite(array)]
    return bool(np.all(finite == np.round(finite)))


def round_to(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Returns floating-point values rounded to a dtype, as float64; others as they are."""
    return array.astype(dtype).astype(np.float64) if is_float(array) else array


def growth(step: int) -> float:
    """Returns the factor of a later training step's inputs, so that each has other statistics."""
    return 1 + step / 8


def channels_first(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Moves the last axis to 1 for ``layout='image'``; integers and booleans have no channels."""
    moves = layout == "image" and array.ndim > 2 and is_float(array)
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if moves else array


def channels_last(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Moves axis 1 back to the end for ``layout='image'``."""
    moves = layout == "image" and array.ndim > 2 and is_float(array)
    return np.moveaxis(array, 1, -1) if moves else array


def named_leaves(name: str, value: PyTree) -> dict[str, PyTree]:
    """Returns the leaves of nested tuples, lists and dicts by name: ``output``, ``output[0]``."""
    if isinstance(value, Mapping):
        items = [(repr(key), value[key]) for key in value]
    elif isinstance(value, tuple | list):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {} if value is None else {name: value}
    found: dict[str, PyTree] = {}
    for key, item in items:
        found |= named_leaves(f"{name}[{key}]", item)
    return found


def largest(array: np.ndarray) -> float:
    """Returns the largest absolute value; NaN and infinity count as 0."""
    wide = np.abs(np.asarray(array, np.float64))
    return float(np.max(wide, initial=0, where=np.isfinite(wide)))
