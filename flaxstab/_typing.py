"""Names for the arrays, shapes and callables that signatures speak of."""

from typing import Protocol, TypeAlias

from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int, PyTree

__all__ = [
    "Array",
    "ArrayLike",
    "AxisName",
    "Bool",
    "DTypeLike",
    "Float",
    "Initializer",
    "Int",
    "PyTree",
    "Shape",
    "Sizes",
]

Shape: TypeAlias = tuple[int, ...]
Sizes: TypeAlias = int | tuple[int, ...]  # one size for every spatial axis, or one per axis
AxisName: TypeAlias = str | tuple[str, ...]  # a mapped axis of vmap or shard_map


class Initializer(Protocol):
    """Draws an array: the calling convention of ``jax.nn.initializers``."""

    def __call__(self, key: Array, shape: Shape, dtype: DTypeLike = ..., /) -> Array:
        """Returns an array of the given shape and dtype, drawn with the given key."""
