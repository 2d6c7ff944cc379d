"""One precision policy: reductions run in float32 or wider, results keep the input's dtype."""

import jax.numpy as jnp

from flaxstab._typing import Array, DTypeLike


def widest(*dtypes: DTypeLike) -> DTypeLike:
    """Returns the dtype in which values of the given dtypes are reduced: float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> widest(jnp.bfloat16), widest(jnp.float32)
      (dtype('float32'), dtype('float32'))
    """
    return jnp.result_type(jnp.float32, *dtypes)


def output_dtype(x: Array, dtype: DTypeLike | None) -> DTypeLike:
    """Returns the dtype of a layer's output: ``dtype``, or that of its input for ``None``.

    Raises:
      ValueError: if neither is a floating-point dtype.
    """
    result = x.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(result, jnp.floating):
        raise ValueError(
            f"a layer computes in floating point, got dtype={str(result)!r}. "
            "Cast the input, or pass dtype=."
        )
    return result


def cast(x: Array | None, dtype: DTypeLike) -> Array | None:
    """Returns ``x`` in ``dtype``; an absent array stays absent."""
    return None if x is None else jnp.asarray(x, dtype)
