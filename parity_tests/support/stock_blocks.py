"""A residual block as flax.nnx has its parts, to be measured beside flaxstab's."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


class StockBlock(nnx.Module):
    """Two 3x3 convolutions with stock batch or group normalisation, skip the input.

    Args:
      channels: of input and output.
      norm: ``nnx.BatchNorm``, or a like maker.
      first: whether norm and ReLU precede each convolution (pre-activation).
      dtype: of computation.
      rngs: source of the keys.
    """

    def __init__(
        self, channels: int, norm: partial[nnx.Module], first: bool, dtype: object, rngs: nnx.Rngs
    ) -> None:
        conv = partial(nnx.Conv, channels, channels, (3, 3), padding=1, use_bias=False)
        self.conv1, self.conv2 = (conv(dtype=dtype, rngs=rngs) for _ in range(2))
        self.norm1, self.norm2 = (norm(channels, dtype=dtype, rngs=rngs) for _ in range(2))
        self.first = first

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.first:
            h = self.conv1(nnx.relu(self.norm1(x)))
            return jnp.asarray(x, h.dtype) + self.conv2(nnx.relu(self.norm2(h)))
        h = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(x + self.norm2(self.conv2(h)))
