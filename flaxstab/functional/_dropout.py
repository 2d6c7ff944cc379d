"""Dropout and alpha dropout, by a mask that is given or drawn from a key."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check, check_probability
from flaxstab._typing import Array, Bool, Float, Shape
from flaxstab.functional._masks import draw_mask
from flaxstab.functional._recompute import recomputed

_ALPHA = 1.7580993408473766  # SELU goes to minus this far to the left; the digits are torch's


def dropout_mask(key: Array, p: float, shape: Shape) -> Bool[Array, "..."]:
    """Draws which elements dropout keeps.

    Four neighbours share one hash, each compares 16 of its bits with a threshold: integers alone,
    so that the mask depends neither on the platform nor on sharding, ``jit`` or JAX's x64 mode.
    For ``p`` within 2⁻¹⁷ of 0 or 1 it is two neighbours and 32 bits.

    Args:
      key: a PRNG key, typed or raw, of any implementation.
      p: the probability of dropping an element, in [0, 1].
      shape: the shape of the mask.

    Returns:
      Booleans of the given shape, true (keep) independently and each with a probability within
      2⁻¹⁷ of ``1 - p``: never 0 or 1 unless ``p`` is, and then nothing is drawn.

    Raises:
      ValueError: if ``p`` is outside [0, 1].

    Example:
      >>> import jax
      >>> mask = dropout_mask(jax.random.key(0), 0.25, (1000, 1000))
      >>> round(float(mask.mean()), 2)
      0.75

    Differs from:
      ``jax.random.bernoulli``, which takes one hash for each element.

    Reference:
      J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As Easy as 1,
      2, 3", SC 2011 (Threefry).
    """
    check_probability(p=p)
    if p in (0, 1) or 0 in shape:
        return jnp.full(shape, p < 1)
    bits, keep = 16, 1 - float(p)
    threshold = round(keep * 2**bits)
    if not 0 < threshold < 2**bits:
        bits = 32
        threshold = min(max(round(keep * 2**bits), 1), 2**bits - 1)
    return draw_mask(key, threshold, bits, tuple(shape))


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
    _check(p, mask)
    return _masked(x, mask, 0.0 if p == 1 else 1 / (1 - p))


def alpha_dropout(
    x: Float[Array, "*shape"], p: float, mask: Bool[Array, "..."]
) -> Float[Array, "*shape"]:
    """Puts ``-1.7581`` where the mask drops, then maps everything so that mean and variance stay.

    Same result as ``torch.nn.functional.alpha_dropout`` with the same mask:
    ``a * (x if kept else -alpha) + b`` with ``a = 1 / sqrt((1 + alpha² p) (1 - p))`` and
    ``b = a * alpha * p``, which keeps mean 0 and variance 1. For ``p`` 1 it is ``0 * x``, as there.

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
      >>> y = alpha_dropout(jnp.ones(2), 0.5, jnp.array([True, False]))
      >>> [round(value, 3) for value in y.tolist()]
      [1.666, -0.779]

    Reference:
      G. Klambauer, T. Unterthiner, A. Mayr, S. Hochreiter, "Self-Normalizing Neural Networks",
      2017, arXiv:1706.02515 ("New Dropout Technique").
    """
    _check(p, mask)
    if p == 1:
        return _masked(x, mask, 0.0)
    scale = 1 / math.sqrt((_ALPHA**2 * p + 1) * (1 - p))
    kept, dropped = (np.asarray(c * scale * _ALPHA, x.dtype) for c in (p, p - 1))
    return _masked(x, mask, scale) + jnp.broadcast_to(jnp.where(mask, kept, dropped), x.shape)


def random_dropout(
    x: Float[Array, "*shape"], p: float, key: Array, shape: Shape | None = None
) -> Float[Array, "*shape"]:
    """Applies :func:`dropout` by a mask that is drawn, and drawn again for the backward pass.

    Nothing but the key is kept for the backward pass. Inside a region that is recomputed anyway
    ``dropout(x, p, dropout_mask(key, p, x.shape))`` keeps no more and draws twice instead of three
    times.

    Args:
      x: values, any shape and floating-point dtype.
      p: the probability of dropping, in [0, 1].
      key: a PRNG key, as :func:`dropout_mask` takes it.
      shape: the shape in which the mask is drawn, which must broadcast to that of ``x``;
        ``None`` = that of ``x``. ``(N, 1, 1, C)`` drops channels of a sample.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      ValueError: if ``p`` is outside [0, 1], there is no key, or ``shape`` does not broadcast.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> y = random_dropout(jnp.ones((2, 3, 100)), 0.5, jax.random.key(0), (2, 1, 100))
      >>> bool((y == y[:, :1]).all()), sorted(set(y.ravel().tolist()))
      (True, [0.0, 2.0])
    """
    return _randomly(dropout, x, p, key, shape)


def random_alpha_dropout(
    x: Float[Array, "*shape"], p: float, key: Array, shape: Shape | None = None
) -> Float[Array, "*shape"]:
    """Applies :func:`alpha_dropout` by a mask that is drawn, as :func:`random_dropout` does.

    With ``shape=(N, 1, 1, C)`` it is ``torch.nn.functional.feature_alpha_dropout``.

    Args:
      x: values, any shape and floating-point dtype.
      p: the probability of dropping, in [0, 1].
      key: a PRNG key, as :func:`dropout_mask` takes it.
      shape: the shape in which the mask is drawn, as of :func:`random_dropout`.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      ValueError: if ``p`` is outside [0, 1], there is no key, or ``shape`` does not broadcast.
    """
    return _randomly(alpha_dropout, x, p, key, shape)


def _randomly(
    drop: Callable[[Array, float, Array], Array],
    x: Array,
    p: float,
    key: Array,
    shape: Shape | None,
) -> Array:
    check_probability(p=p)
    check(key is not None, "random dropout needs a key", fix="Pass jax.random.key(seed).", key=key)
    drawn = x.shape if shape is None else tuple(shape)
    given = (1,) * (x.ndim - len(drawn)) + drawn
    check(
        len(given) == x.ndim and all(m in (1, n) for m, n in zip(given, x.shape, strict=True)),
        "the mask's shape must broadcast to the input's",
        shape=drawn,
        x=x.shape,
    )

    def run(x: Array, key: Array) -> Array:
        return drop(x, p, dropout_mask(key, p, given))

    return x if p == 0 else recomputed(run)(x, key)


def _check(p: float, mask: Array) -> None:
    check_probability(p=p)
    check(
        mask.dtype == jnp.bool_,
        "mask must be boolean, true where an element is kept",
        fix="Pass mask=mask.astype(bool).",
        dtype=str(mask.dtype),
    )


def _masked(x: Array, mask: Array, scale: float) -> Array:
    """Multiplies, also by 0: NaN stays. The scale is that of the dtype, as in torch."""
    # Chosen, not multiplied: 0 times a scale that overflows in 16 bits would be NaN.
    with np.errstate(over="ignore"):
        factor = np.asarray(scale).astype(x.dtype)
    factors = jnp.where(mask, factor, np.zeros((), x.dtype))
    return x * jnp.broadcast_to(factors, x.shape)
