"""What PyTorch's layers start with."""

import math

import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check, check_positive
from flaxstab._typing import Array, DTypeLike, Initializer, Shape
from flaxstab.initializers._arguments import Axes
from flaxstab.initializers._fans import fan_in_and_fan_out, kaiming_uniform
from flaxstab.initializers._plain import normal, uniform


def torch_weight(*, in_axis: Axes = -2, out_axis: Axes = -1) -> Initializer:
    """Returns the default of PyTorch's Linear and Conv weights: U(±1 / sqrt(fan_in)).

    Args:
      in_axis: where the inputs are, see :func:`fan_in_and_fan_out`. For a transposed convolution
        PyTorch takes the output channels for them: pass ``in_axis=-1, out_axis=-2`` for a kernel
        ``(*window, in, out)``, nothing for one ``(*window, out, in)``, as ``nnx.ConvTranspose``
        has with ``transpose_kernel=True``.
      out_axis: where the outputs are.

    Differs from:
      ``flax.nnx.Linear`` and ``nnx.Conv``, whose default has 1.73 times this standard deviation.
    """
    return kaiming_uniform(math.sqrt(5.0), in_axis=in_axis, out_axis=out_axis)


def torch_bias(fan_in: int) -> Initializer:
    """Returns the default of PyTorch's Linear and Conv biases: U(±1 / sqrt(fan_in)).

    Args:
      fan_in: the fan of the layer's kernel; 0 gives zeros.

    Raises:
      ValueError: unless it is an integer of at least 0.
    """
    is_fan = isinstance(fan_in, int | np.integer) and not isinstance(fan_in, bool) and fan_in >= 0
    check(is_fan, "fan_in must be an integer of at least 0", fan_in=fan_in)
    bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
    return uniform(-bound, bound)


def torch_embedding(padding_idx: int | None = None) -> Initializer:
    """Returns the default of PyTorch's Embedding: N(0, 1), the padding row 0.

    Args:
      padding_idx: the row of ``(num_embeddings, embedding_dim)`` that is 0, negative from the end;
        ``None`` = none.

    Raises:
      ValueError: when called, if there is no such row.

    Differs from:
      ``flax.nnx.Embed``, whose default has the standard deviation ``1 / sqrt(embedding_dim)``.
    """

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        drawn = normal()(key, shape, dtype)
        if padding_idx is None:
            return drawn
        rule = "padding_idx must be a row of the embedding"
        rows = shape[0] if shape else 0
        check(-rows <= padding_idx < rows, rule, padding_idx=padding_idx, shape=shape)
        return drawn.at[padding_idx].set(0)

    return init


def torch_attention(parts: int = 3, *, in_axis: Axes = -2, out_axis: Axes = -1) -> Initializer:
    """Returns the default of each input projection of PyTorch's MultiheadAttention.

    PyTorch draws query, key and value together, as one ``(3 * embed_dim, embed_dim)`` matrix with
    Xavier's uniform law, so the fan out of each counts three times.

    Args:
      parts: how many projections share a matrix; 1 where PyTorch keeps them apart (``kdim``,
        ``vdim``).
      in_axis: where the inputs are, see :func:`fan_in_and_fan_out`: 0 for a kernel
        ``(in, heads, head_dim)``.
      out_axis: where the outputs are: ``(1, 2)`` there.

    Raises:
      ValueError: if ``parts`` is less than 1; when called, if the shape has no such fans.

    Differs from:
      ``flax.nnx.MultiHeadAttention``, whose default has 1.41 times this standard deviation.
    """
    check_positive(parts=parts)

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        fan_in, fan_out = fan_in_and_fan_out(shape, in_axis=in_axis, out_axis=out_axis)
        bound = math.sqrt(6.0 / max(fan_in + parts * fan_out, 1))
        return uniform(-bound, bound)(key, shape, dtype)

    return init


def torch_recurrent(hidden_size: int) -> Initializer:
    """Returns the default of every weight and bias of PyTorch's LSTM, GRU and RNN.

    All are U(±1 / sqrt(hidden_size)), the biases too.

    Args:
      hidden_size: of the layer, at least 1.

    Raises:
      ValueError: if it is less.
    """
    check_positive(hidden_size=hidden_size)
    return torch_bias(hidden_size)
