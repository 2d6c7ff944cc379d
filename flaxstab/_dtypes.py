"""One precision policy: reductions run in float32 or wider, results keep the input's dtype."""

import jax
import jax.numpy as jnp

from flaxstab._typing import Array, DTypeLike


def widest(*dtypes: DTypeLike) -> DTypeLike:
    """Returns the dtype in which values of the given dtypes are reduced: float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> widest(jnp.bfloat16), widest(jnp.float32)
      (dtype('float32'), dtype('float32'))
    """
    # One at a time: under strict promotion jnp.result_type refuses float32 with bfloat16.
    kinds = [jax.dtypes.canonicalize_dtype(dtype) for dtype in (jnp.float32, *dtypes)]
    floats = [kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)]
    return max(floats, key=lambda kind: kind.itemsize)


def floating(name: str, dtype: DTypeLike) -> DTypeLike:
    """Returns a constructor's dtype argument, which must be a floating-point one.

    Raises:
      ValueError: if it is not.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point dtype, got {name}={dtype!r}.")
    return dtype


def output_dtype(x: Array, dtype: DTypeLike | None) -> DTypeLike:
    """Returns the dtype of a layer's output: ``dtype``, or that of its input for ``None``.

    Raises:
      ValueError: if neither is a floating-point dtype.
    """
    result = jax.dtypes.canonicalize_dtype(x.dtype if dtype is None else dtype)
    if not jnp.issubdtype(result, jnp.floating):
        raise ValueError(
            f"a layer computes in floating point, got dtype={str(result)!r}. "
            "Cast the input, or pass dtype=."
        )
    return result


def aligned(parameter: Array, x: Array, dtype: DTypeLike) -> Array:
    """Returns ``parameter`` in ``dtype`` with leading axes of size 1, as many as ``x`` has more.

    JAX can be told to refuse the implicit version of either step; this library does without.
    """
    shape = (1,) * (x.ndim - parameter.ndim) + parameter.shape
    return jnp.asarray(parameter, dtype).reshape(shape)


def cast(x: Array | None, dtype: DTypeLike) -> Array | None:
    """Returns ``x`` in ``dtype``; an absent array stays absent."""
    return None if x is None else jnp.asarray(x, dtype)
