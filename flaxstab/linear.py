"""Linear and convolution layers with PyTorch's arguments and defaults."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check, check_last_axis, check_positive, per_axis
from flaxstab._dtypes import cast, floating, output_dtype
from flaxstab._typing import Array, DTypeLike, Initializer, Shape, Sizes
from flaxstab.functional._linear import PaddingMode, conv_options


def _drawn(
    rngs: nnx.Rngs | None, init: Initializer, shape: Shape, dtype: DTypeLike
) -> nnx.Param[Array]:
    if rngs is None:
        raise ValueError("a layer with random weights needs rngs. Pass rngs=nnx.Rngs(seed).")
    return nnx.Param(init(rngs.params(), shape, floating("param_dtype", dtype)))


class Linear(nnx.Module):
    """Computes ``x @ kernel + bias``.

    Same result as ``torch.nn.Linear``: weight and bias start as U(±1 / sqrt(in_features)).

    Args:
      in_features: size of the input's last axis.
      out_features: size of the output's last axis.
      bias: whether to add a bias.
      kernel_init: draws the kernel, shape ``(in_features, out_features)``.
      bias_init: draws the bias, shape ``(out_features,)``; ``None`` = PyTorch's law.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys; the ``params`` stream is used.

    Raises:
      ValueError: if a size is below 1, ``rngs`` is missing, or the input does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> Linear(3, 5, rngs=nnx.Rngs(0))(jnp.ones((2, 3))).shape
      (2, 5)

    Differs from:
      ``torch.nn.Linear``, whose weight is the transposed kernel; ``flax.nnx.Linear``, whose
      kernel starts 1.73 times wider and whose bias starts at 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_positive(in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = None if dtype is None else floating("dtype", dtype)
        shape = (in_features, out_features)
        self.kernel = _drawn(rngs, kernel_init or initializers.torch_weight(), shape, param_dtype)
        bias_init = bias_init or initializers.torch_bias(in_features)
        drawn = _drawn(rngs, bias_init, (out_features,), param_dtype) if bias else None
        self.bias = nnx.data(drawn)

    def __call__(self, x: Array) -> Array:
        """Maps ``(*batch, in_features)`` to ``(*batch, out_features)``."""
        check_last_axis("in_features", self.in_features, x.shape)
        dtype = output_dtype(x, self.dtype)
        bias = None if self.bias is None else self.bias[...]
        return functional.linear(
            jnp.asarray(x, dtype), jnp.asarray(self.kernel[...], dtype), cast(bias, dtype)
        )


class Conv(nnx.Module):
    """Convolves over one, two or three spatial axes.

    Same result as ``torch.nn.Conv1d``, ``Conv2d``, ``Conv3d``: padding 0 by default, weight and
    bias start as U(±1 / sqrt(fan_in)).

    Args:
      in_channels: size of the input's last axis.
      out_channels: size of the output's last axis.
      kernel_size: the window, one entry per spatial axis; an integer means two equal axes.
      stride: step of the window along each axis.
      padding: elements added on both sides of each axis, or ``'valid'``, or ``'same'``.
      dilation: spacing of the window's elements.
      groups: into how many independent groups the channels fall.
      bias: whether to add a bias.
      padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
      kernel_init: draws the kernel, shape ``(*kernel_size, in_channels / groups, out_channels)``.
      bias_init: draws the bias, shape ``(out_channels,)``; ``None`` = PyTorch's law.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys; the ``params`` stream is used.

    Raises:
      ValueError: if the options do not fit together, ``rngs`` is missing, or the input does not
        fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> Conv(3, 8, 3, stride=2, padding=1, rngs=nnx.Rngs(0))(jnp.ones((1, 32, 32, 3))).shape
      (1, 16, 16, 8)

    Differs from:
      ``torch.nn.Conv2d``, which is channels-first; ``flax.nnx.Conv``, which pads ``'SAME'`` and
      takes an integer ``kernel_size`` as one spatial axis.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_positive(in_channels=in_channels, out_channels=out_channels, groups=groups)
        check(
            in_channels % groups == 0 and out_channels % groups == 0,
            "groups must divide in_channels and out_channels",
            groups=groups,
            in_channels=in_channels,
            out_channels=out_channels,
        )
        rank = 2 if isinstance(kernel_size, int | np.integer) else len(kernel_size)
        window = per_axis("kernel_size", kernel_size, rank, minimum=1)
        check(rank > 0, "kernel_size must name at least one axis", kernel_size=kernel_size)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = window
        options = conv_options(self.kernel_size, stride, padding, dilation, padding_mode)
        self.stride, _, self.dilation = options
        self.padding = padding if isinstance(padding, str) else per_axis("padding", padding, rank)
        self.groups = groups
        self.padding_mode = padding_mode
        self.dtype = None if dtype is None else floating("dtype", dtype)
        shape = (*self.kernel_size, in_channels // groups, out_channels)
        self.kernel = _drawn(rngs, kernel_init or initializers.torch_weight(), shape, param_dtype)
        bias_init = bias_init or initializers.torch_bias(math.prod(shape[:-1]))
        drawn = _drawn(rngs, bias_init, (out_channels,), param_dtype) if bias else None
        self.bias = nnx.data(drawn)

    def __call__(self, x: Array) -> Array:
        """Maps ``(*batch, *space, in_channels)`` to ``(*batch, *space', out_channels)``."""
        check_last_axis("in_channels", self.in_channels, x.shape)
        dtype = output_dtype(x, self.dtype)
        bias = None if self.bias is None else self.bias[...]
        return functional.conv(
            jnp.asarray(x, dtype),
            jnp.asarray(self.kernel[...], dtype),
            cast(bias, dtype),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )
