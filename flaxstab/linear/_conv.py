"""Convolution layers."""

import math
from functools import partial
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check, check_last_axis, check_positive, per_axis
from flaxstab._dtypes import floating, output_dtype
from flaxstab._typing import Array, DTypeLike, Initializer, Shape, Sizes
from flaxstab.functional._linear import PaddingMode, conv_options
from flaxstab.functional._recompute import with_parameters
from flaxstab.functional._transposed import transposed_options, transposed_space
from flaxstab.linear._base import drawn, drawn_bias


def _check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    check_positive(in_channels=in_channels, out_channels=out_channels, groups=groups)
    check(
        in_channels % groups == 0 and out_channels % groups == 0,
        "groups must divide in_channels and out_channels",
        groups=groups,
        in_channels=in_channels,
        out_channels=out_channels,
    )


def _window(kernel_size: Sizes) -> Shape:
    """Returns the window; an integer means two equal axes."""
    rank = 2 if isinstance(kernel_size, int | np.integer) else len(kernel_size)
    check(1 <= rank <= 3, "kernel_size must name one to three axes", kernel_size=kernel_size)
    return per_axis("kernel_size", kernel_size, rank, minimum=1)


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
        _check_channels(in_channels, out_channels, groups)
        window = _window(kernel_size)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = window
        options = conv_options(window, stride, padding, dilation, padding_mode)
        self.stride, _, self.dilation = options
        rank = len(window)
        self.padding = padding if isinstance(padding, str) else per_axis("padding", padding, rank)
        self.groups = groups
        self.padding_mode = padding_mode
        self.dtype = None if dtype is None else floating("dtype", dtype)
        shape = (*self.kernel_size, in_channels // groups, out_channels)
        self.kernel = drawn(rngs, kernel_init or initializers.torch_weight(), shape, param_dtype)
        parameter = (rngs, bias_init, math.prod(shape[:-1]), out_channels, param_dtype)
        self.bias = nnx.data(drawn_bias(*parameter) if bias else None)

    def __call__(self, x: Array) -> Array:
        """Maps ``(*batch, *space, in_channels)`` to ``(*batch, *space', out_channels)``."""
        check_last_axis("in_channels", self.in_channels, x.shape)
        dtype = output_dtype(x, self.dtype)
        bias = None if self.bias is None else self.bias[...]
        conv = partial(
            functional.conv,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )
        return with_parameters(conv, jnp.asarray(x, dtype), self.kernel[...], bias, dtype=dtype)


class ConvTranspose(nnx.Module):
    """Convolves transposed, over one, two or three spatial axes: the way to larger images.

    Same result as ``torch.nn.ConvTranspose1d``, ``ConvTranspose2d``, ``ConvTranspose3d``. Weight
    and bias start as U(±1 / sqrt(fan)), where PyTorch's fan counts the output channels of a group:
    ``out_channels / groups`` times the window.

    Args:
      in_channels: size of the input's last axis.
      out_channels: size of the output's last axis.
      kernel_size: the window, one entry per spatial axis; an integer means two equal axes.
      stride: distance between the windows that neighbouring elements are spread over.
      padding: elements cut off both sides of each axis of the output.
      output_padding: elements added behind each axis, where windows may reach; smaller than
        ``stride`` or ``dilation``.
      groups: into how many independent groups the channels fall.
      bias: whether to add a bias.
      dilation: spacing of the window's elements.
      padding_mode: ``'zeros'``, the only one there is.
      kernel_init: draws the kernel, shape ``(*kernel_size, in_channels, out_channels / groups)``.
        For the fans that ``torch.nn.init.kaiming_normal_`` and the others see in PyTorch's weight,
        give ours ``in_axis=-1, out_axis=-2``.
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
      >>> layer = ConvTranspose(8, 3, 4, stride=2, padding=1, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 16, 16, 8))).shape
      (1, 32, 32, 3)

    Differs from:
      ``torch.nn.ConvTranspose2d``, which is channels-first; ``flax.nnx.ConvTranspose``, which
      keeps its kernel flipped by default (ours is PyTorch's with axes moved, not flipped; with
      ``transpose_kernel=True`` its channels are swapped), counts ``padding`` at the input, and has
      no groups. ``flaxstab.interop`` carries all of them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: Literal["zeros"] = "zeros",
        *,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        _check_channels(in_channels, out_channels, groups)
        check(padding_mode == "zeros", "padding_mode must be 'zeros'", padding_mode=padding_mode)
        window = _window(kernel_size)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = window
        options = transposed_options(window, stride, padding, output_padding, dilation)
        self.stride, self.padding, self.output_padding, self.dilation = options
        self.groups = groups
        self.dtype = None if dtype is None else floating("dtype", dtype)
        shape = (*window, in_channels, out_channels // groups)
        law = kernel_init or initializers.torch_weight(in_axis=-1, out_axis=-2)
        self.kernel = drawn(rngs, law, shape, param_dtype)
        fan = math.prod(window) * shape[-1]
        parameter = (rngs, bias_init, fan, out_channels, param_dtype)
        self.bias = nnx.data(drawn_bias(*parameter) if bias else None)

    def __call__(self, x: Array, output_size: Sizes | None = None) -> Array:
        """Maps ``(*batch, *space, in_channels)`` to ``(*batch, *space', out_channels)``.

        Args:
          x: the input.
          output_size: the size of each spatial axis of the output, from which the output padding
            follows; ``None`` = the layer's ``output_padding``.
        """
        check_last_axis("in_channels", self.in_channels, x.shape)
        dtype = output_dtype(x, self.dtype)
        bias = None if self.bias is None else self.bias[...]
        conv = partial(
            functional.conv_transpose,
            stride=self.stride,
            padding=self.padding,
            output_padding=self._output_padding(x.shape, output_size),
            groups=self.groups,
            dilation=self.dilation,
        )
        return with_parameters(conv, jnp.asarray(x, dtype), self.kernel[...], bias, dtype=dtype)

    def _output_padding(self, shape: Shape, output_size: Sizes | None) -> Shape:
        if output_size is None:
            return self.output_padding
        rank = len(self.kernel_size)
        wanted = per_axis("output_size", output_size, rank)
        space = shape[-rank - 1 : -1]
        least = transposed_space(space, self.kernel_size, self.stride, self.padding, self.dilation)
        extra = tuple(w - n for w, n in zip(wanted, least, strict=True))
        check(
            all(0 <= e < s for e, s in zip(extra, self.stride, strict=True)),
            f"output_size must be {least} or larger by less than stride={self.stride}",
            output_size=output_size,
        )
        return extra
