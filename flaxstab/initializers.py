"""PyTorch's ``torch.nn.init`` as JAX initializers: ``(key, shape, dtype) -> Array``.

Shapes are Flax's: ``(in, out)`` for a linear kernel, ``(*window, in, out)`` for a convolution.
Every function returns a closure that serves as ``kernel_init`` or ``bias_init`` of any NNX or
Linen layer. Low-precision values are drawn in float32 and cast, as PyTorch does.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from flaxstab._checks import check
from flaxstab._dtypes import widest
from flaxstab._typing import Array, DTypeLike, Initializer, Shape

Nonlinearity = Literal[
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "sigmoid", "tanh", "relu", "leaky_relu", "selu",
]  # fmt: skip
FanMode = Literal["fan_in", "fan_out"]


def calculate_gain(nonlinearity: Nonlinearity, param: float | None = None) -> float:
    """Returns the factor that keeps the variance through a layer with the given nonlinearity.

    Same result as ``torch.nn.init.calculate_gain``.

    Args:
      nonlinearity: its PyTorch name.
      param: the negative slope of ``'leaky_relu'``; ``None`` = 0.01.

    Raises:
      ValueError: if the nonlinearity has no gain in PyTorch (GELU has none: use ``'relu'``).

    Example:
      >>> calculate_gain("tanh")
      1.6666666666666667
    """
    check(
        nonlinearity in get_args(Nonlinearity),
        f"nonlinearity must be one of {', '.join(get_args(Nonlinearity))}",
        fix="For GELU, ELU and SiLU use 'relu'.",
        nonlinearity=nonlinearity,
    )
    slope = 0.01 if param is None else param
    gains = {
        "tanh": 5.0 / 3,
        "relu": math.sqrt(2.0),
        "leaky_relu": math.sqrt(2.0 / (1 + slope**2)),
        "selu": 3.0 / 4,
    }
    return gains.get(nonlinearity, 1.0)


def fan_in_and_fan_out(shape: Shape, *, in_axis: int = -2, out_axis: int = -1) -> tuple[int, int]:
    """Returns how many inputs feed one output, and how many outputs one input feeds.

    Args:
      shape: a kernel's shape, ``(*window, in, out)``. With groups ``in`` counts one group's
        channels, as in PyTorch.
      in_axis: where the input channels are.
      out_axis: where the output channels are.

    Raises:
      ValueError: if the shape has fewer than two axes.

    Example:
      >>> fan_in_and_fan_out((3, 3, 16, 32))
      (144, 288)
    """
    check(len(shape) >= 2, "a fan needs a shape with at least 2 axes", shape=shape)
    fan_in, fan_out = shape[in_axis], shape[out_axis]
    channels = (in_axis % len(shape), out_axis % len(shape))
    window = math.prod(size for axis, size in enumerate(shape) if axis not in channels)
    return fan_in * window, fan_out * window


def constant(value: float) -> Initializer:
    """Returns an initializer that fills with one value (``torch.nn.init.constant_``)."""

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        del key
        return jnp.full(shape, value, dtype)

    return init


def zeros(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
    """Fills with 0 (``torch.nn.init.zeros_``); itself an initializer."""
    return constant(0)(key, shape, dtype)


def ones(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
    """Fills with 1 (``torch.nn.init.ones_``); itself an initializer."""
    return constant(1)(key, shape, dtype)


def uniform(a: float = 0.0, b: float = 1.0) -> Initializer:
    """Returns an initializer that draws from U(a, b) (``torch.nn.init.uniform_``).

    Differs from:
      ``jax.nn.initializers.uniform(scale)``, which draws from U(0, scale), scale 0.01.
    """

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        return jnp.asarray(jax.random.uniform(key, shape, widest(dtype), a, b), dtype)

    return init


def normal(mean: float = 0.0, std: float = 1.0) -> Initializer:
    """Returns an initializer that draws from N(mean, std²) (``torch.nn.init.normal_``).

    Differs from:
      ``jax.nn.initializers.normal``, whose default standard deviation is 0.01.
    """

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        return jnp.asarray(mean + std * jax.random.normal(key, shape, widest(dtype)), dtype)

    return init


def _scaled(
    law: Callable[[float], Initializer], std_of: Callable[[int, int], float], axes: tuple[int, int]
) -> Initializer:
    """Returns an initializer whose standard deviation follows from the fans of the shape."""

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        fans = fan_in_and_fan_out(shape, in_axis=axes[0], out_axis=axes[1])
        std = 0.0 if min(fans) == 0 else std_of(*fans)
        return law(std)(key, shape, dtype)

    return init


def _symmetric(std: float) -> Initializer:
    return uniform(-math.sqrt(3.0) * std, math.sqrt(3.0) * std)


def _centred(std: float) -> Initializer:
    return normal(0.0, std)


def _xavier_std(gain: float) -> Callable[[int, int], float]:
    return lambda fan_in, fan_out: gain * math.sqrt(2.0 / (fan_in + fan_out))


def xavier_uniform(gain: float = 1.0, *, in_axis: int = -2, out_axis: int = -1) -> Initializer:
    """Returns an initializer for U(-b, b), ``b = gain * sqrt(6 / (fan_in + fan_out))``.

    Same law as ``torch.nn.init.xavier_uniform_``.

    Args:
      gain: factor for the nonlinearity, see :func:`calculate_gain`.
      in_axis: where the input channels are.
      out_axis: where the output channels are.

    Reference:
      X. Glorot, Y. Bengio, "Understanding the Difficulty of Training Deep Feedforward Neural
      Networks", AISTATS 2010 (equation 16).
    """
    return _scaled(_symmetric, _xavier_std(gain), (in_axis, out_axis))


def xavier_normal(gain: float = 1.0, *, in_axis: int = -2, out_axis: int = -1) -> Initializer:
    """Returns an initializer for N(0, std²), ``std = gain * sqrt(2 / (fan_in + fan_out))``.

    Same law as ``torch.nn.init.xavier_normal_``: not truncated, unlike
    ``jax.nn.initializers.glorot_normal``.

    Args:
      gain: factor for the nonlinearity, see :func:`calculate_gain`.
      in_axis: where the input channels are.
      out_axis: where the output channels are.
    """
    return _scaled(_centred, _xavier_std(gain), (in_axis, out_axis))


def _kaiming_std(
    a: float, mode: FanMode, nonlinearity: Nonlinearity
) -> Callable[[int, int], float]:
    check(mode in ("fan_in", "fan_out"), "mode must be 'fan_in' or 'fan_out'", mode=mode)
    gain = calculate_gain(nonlinearity, a)
    return lambda fan_in, fan_out: gain / math.sqrt(fan_in if mode == "fan_in" else fan_out)


def kaiming_uniform(
    a: float = 0.0,
    mode: FanMode = "fan_in",
    nonlinearity: Nonlinearity = "leaky_relu",
    *,
    in_axis: int = -2,
    out_axis: int = -1,
) -> Initializer:
    """Returns an initializer for U(-b, b), ``b = gain * sqrt(3 / fan)``.

    Same law as ``torch.nn.init.kaiming_uniform_``. (Document 1 prints ``gain * 3 / fan_in``; the
    square root is right.)

    Args:
      a: the negative slope of ``'leaky_relu'``.
      mode: which fan keeps its variance: ``'fan_in'`` forward, ``'fan_out'`` backward.
      nonlinearity: see :func:`calculate_gain`.
      in_axis: where the input channels are.
      out_axis: where the output channels are.

    Raises:
      ValueError: if ``mode`` or ``nonlinearity`` is unknown.

    Reference:
      K. He, X. Zhang, S. Ren, J. Sun, "Delving Deep into Rectifiers", 2015, arXiv:1502.01852
      (equations 10 and 14).
    """
    return _scaled(_symmetric, _kaiming_std(a, mode, nonlinearity), (in_axis, out_axis))


def kaiming_normal(
    a: float = 0.0,
    mode: FanMode = "fan_in",
    nonlinearity: Nonlinearity = "leaky_relu",
    *,
    in_axis: int = -2,
    out_axis: int = -1,
) -> Initializer:
    """Returns an initializer for N(0, std²), ``std = gain / sqrt(fan)``.

    Same law as ``torch.nn.init.kaiming_normal_``: not truncated, unlike
    ``jax.nn.initializers.he_normal``. Arguments as in :func:`kaiming_uniform`.
    """
    return _scaled(_centred, _kaiming_std(a, mode, nonlinearity), (in_axis, out_axis))


def torch_weight(*, in_axis: int = -2, out_axis: int = -1) -> Initializer:
    """Returns the default of PyTorch's Linear and Conv weights: U(±1 / sqrt(fan_in)).

    Args:
      in_axis: where the input channels are. For a transposed convolution PyTorch takes the output
        channels for them: pass ``in_axis=-1, out_axis=-2`` for a kernel ``(*window, in, out)``.
      out_axis: where the output channels are.

    Differs from:
      ``flax.nnx.Linear`` and ``nnx.Conv``, whose default has 1.73 times this standard deviation.
    """
    return kaiming_uniform(math.sqrt(5.0), in_axis=in_axis, out_axis=out_axis)


def torch_bias(fan_in: int) -> Initializer:
    """Returns the default of PyTorch's Linear and Conv biases: U(±1 / sqrt(fan_in)).

    Args:
      fan_in: the fan of the layer's kernel; 0 gives zeros.
    """
    bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
    return uniform(-bound, bound)


def torch_embedding(padding_idx: int | None = None) -> Initializer:
    """Returns the default of PyTorch's Embedding: N(0, 1), the padding row 0.

    Args:
      padding_idx: the row of ``(num_embeddings, embedding_dim)`` that is 0; ``None`` = none.

    Differs from:
      ``flax.nnx.Embed``, whose default has the standard deviation ``1 / sqrt(embedding_dim)``.
    """

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        drawn = normal()(key, shape, dtype)
        return drawn if padding_idx is None else drawn.at[padding_idx].set(0)

    return init


def torch_attention(parts: int = 3) -> Initializer:
    """Returns the default of each input projection of PyTorch's MultiheadAttention.

    PyTorch draws query, key and value together, as one ``(3 * embed_dim, embed_dim)`` matrix with
    Xavier's uniform law, so the fan out of each counts three times.

    Args:
      parts: how many projections share a matrix; 1 where PyTorch keeps them apart (``kdim``,
        ``vdim``).
    """

    def std_of(fan_in: int, fan_out: int) -> float:
        return math.sqrt(2.0 / (fan_in + parts * fan_out))

    return _scaled(_symmetric, std_of, (-2, -1))


def torch_recurrent(hidden_size: int) -> Initializer:
    """Returns the default of every weight and bias of PyTorch's LSTM, GRU and RNN.

    All are U(±1 / sqrt(hidden_size)), the biases too.
    """
    return torch_bias(hidden_size)
