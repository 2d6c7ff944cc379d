"""Inverted dropout with a mask that can be drawn, injected and replayed."""

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check, check_probability
from flaxstab._typing import Array, Bool, Float, Shape


def dropout_mask(key: Array, p: float, shape: Shape) -> Bool[Array, "..."]:
    """Draws which elements dropout keeps.

    Args:
      key: a PRNG key.
      p: the probability of dropping an element, in [0, 1].
      shape: the shape of the mask.

    Returns:
      Booleans of the given shape, true (keep) with probability ``1 - p`` each, independently.
      They do not depend on the platform, on sharding, or on JAX's x64 mode.
    """
    check_probability(p=p)
    # A float32 probability whatever JAX's x64 mode, so that the mode does not change the mask.
    return jax.random.bernoulli(key, np.float32(1 - p), shape)


def dropout(
    x: Float[Array, "*shape"], p: float, mask: Bool[Array, "..."]
) -> Float[Array, "*shape"]:
    """Zeroes the elements that the mask drops and scales the others by ``1 / (1 - p)``.

    Same result as ``torch.nn.functional.dropout`` with the same mask. As in torch, the input is
    multiplied by 0 where it is dropped, so NaN and infinity in a dropped place give NaN.

    Args:
      x: values, any shape and floating-point dtype.
      p: the probability with which the mask drops, in [0, 1].
      mask: booleans that broadcast to ``x``, true where an element is kept.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      ValueError: if ``p`` is outside [0, 1] or the mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> dropout(jnp.ones(3), 0.5, jnp.array([True, False, True])).tolist()
      [2.0, 0.0, 2.0]

    Reference:
      N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, "Dropout: A Simple
      Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014.
    """
    check_probability(p=p)
    check(
        mask.dtype == jnp.bool_,
        "mask must be boolean, true where an element is kept",
        fix="Pass mask=mask.astype(bool).",
        dtype=str(mask.dtype),
    )
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return x * (jnp.broadcast_to(jnp.asarray(mask, x.dtype), x.shape) * scale)
