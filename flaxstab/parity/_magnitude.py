"""How large rounding errors of a computation may be: its first-order sensitivity."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._typing import Array

_DRAWS = 4


def magnitude(
    compute: Callable[..., Mapping[str, object]], *arguments: object, seed: int = 0
) -> Mapping[str, object]:
    """Returns the magnitude M of each result, in whose eps its errors are counted.

    Every element of every argument is changed by one unit of its own size with a random sign; M
    is the largest change of the result to first order, or its largest value if that is more. For
    a sum this is about its largest term or more, also where the terms cancel, and eps * M is the
    error that rounding the arguments alone can cause. Relative error of single elements has no
    such meaning.

    Args:
      compute: a differentiable function to a tree of floating-point arrays.
      *arguments: trees of floating-point arrays, float64 for a reliable result.
      seed: of the random signs.

    Returns:
      A tree like the result's, each array filled with its M.
    """
    rng = np.random.default_rng(seed)

    def perturbed(leaf: Array) -> Array:
        return leaf * jnp.asarray(rng.choice([-1.0, 1.0], leaf.shape), leaf.dtype)

    def larger(so_far: Array, value: Array, change: Array) -> Array:
        sizes = (jnp.max(jnp.abs(a), initial=0) for a in (so_far, value, change))
        return jnp.full(value.shape, jnp.max(jnp.stack(list(sizes))))

    result: Mapping[str, object] = {}
    for _ in range(_DRAWS):
        values, changes = jax.jvp(compute, arguments, jax.tree.map(perturbed, arguments))
        result = jax.tree.map(larger, result or values, values, changes)
    return result
