"""Random bits for masks: every bit of every hash is used, and integers decide."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._typing import Array, Bool, Shape

_WORD = 32
_HASH = 2 * _WORD  # bits of one hash that are used
_MANY = 512  # rows: each of 128 devices gets a multiple of 4
# Their bits depend on the platform or are not independent of each other (a seed fills an rbg key
# twice), and under vmap they ignore all keys but the first.
_UNFIT = ("rbg", "unsafe_rbg")


@partial(jax.jit, static_argnums=(1, 2, 3))  # without it an eager call compiles every operation
def draw_mask(key: Array, threshold: int, bits: int, shape: Shape) -> Bool[Array, "..."]:
    """Draws booleans that are true with probability ``threshold / 2**bits``, independently.

    One hash serves ``64 / bits`` neighbours along one axis. They lie side by side, so that a device
    with a multiple of them of a sharded axis hashes for its own elements, and nothing is exchanged.

    Args:
      key: a PRNG key.
      threshold: between 1 and ``2**bits - 1``.
      bits: 16 or 32.
      shape: of the mask, not empty.
    """
    sharing = _HASH // bits
    axis = _shared_axis(shape, sharing)
    if axis is None:
        size = math.prod(shape)
        flat = draw_mask(key, threshold, bits, (-(-size // sharing) * sharing,))
        return flat[:size].reshape(shape)
    hashes = (*shape[:axis], shape[axis] // sharing, *shape[axis + 1 :])
    words = _words(key, hashes)
    packed = jnp.zeros(hashes, jnp.uint8)
    for place in range(sharing):
        word, shift = divmod(place * bits, _WORD)
        number = (words[..., word] >> shift) & np.uint32(2**bits - 1)
        packed |= jnp.asarray(number < np.uint32(threshold), jnp.uint8) << place
    # What reads the bits may be fused with what follows, but not repeat the hash for each of them
    # (for a CPU, XLA drops the barrier; Threefry is a loop there, with which nothing is fused).
    packed = jax.lax.optimization_barrier(packed)
    kept = [(packed >> place) & 1 == 1 for place in range(sharing)]
    return jnp.stack(kept, axis + 1).reshape(shape)  # (..., n / 4, 4, ...) -> (..., n, ...)


def _shared_axis(shape: Shape, sharing: int) -> int | None:
    """Returns the axis along which neighbours share a hash; ``None`` if none divides.

    Elements are interleaved faster along any other axis than along the last one. But the first one
    is what gets sharded, so it is taken where every device is sure to have a multiple of 4 of it,
    or at last. Axes of size 1 do not count: the mask of (N, 1, C) is that of (N, C).
    """
    last = len(shape) - 1
    order = [*range(last - 1, 0, -1), last, 0] if shape else []
    if shape and shape[0] % _MANY == 0:
        order.insert(-2, 0)
    return next((axis for axis in order if shape[axis] % sharing == 0), None)


def _words(key: Array, shape: Shape) -> Array:
    """Returns two random words for each element of a shape: ``(*shape, 2)``."""
    if str(jax.random.key_impl(key)) in _UNFIT:
        key = _as_threefry(key)
    words = jax.random.key_data(jax.random.split(key, shape))
    if words.shape[-1] == 1:  # philox2x32 has keys of one word
        words = jax.random.key_data(jax.random.split(key, (*shape, 2)))[..., 0]
    return words[..., :2]


def _as_threefry(key: Array) -> Array:
    """Returns a Threefry key made of all four words of another key."""
    data = jax.random.key_data(key)
    made = jax.random.wrap_key_data(data[:2], impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(made, data[2]), data[3])
