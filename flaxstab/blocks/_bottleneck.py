"""Residual blocks of 1x1, 3x3 and 1x1 convolutions."""

import jax.numpy as jnp
from flax import nnx

from flaxstab._checks import check_positive
from flaxstab._typing import Array, DTypeLike, Initializer
from flaxstab.blocks._parts import Function, MakeNorm, chosen
from flaxstab.blocks._residual import Residual
from flaxstab.blocks._wiring import (
    Projects,
    check_projects,
    ended,
    joined,
    normed_conv,
    projected,
)
from flaxstab.dropout import ChannelDropout
from flaxstab.norms import BatchNorm

EXPANSION = 4
"""How many times more channels a bottleneck returns than its middle has."""


class Bottleneck(nnx.Module):
    """Post-activation bottleneck: 1x1, 3x3 and 1x1 convolution, each with a norm; add; ReLU.

    Same result as ``torchvision.models.resnet.Bottleneck``, whose 3x3 convolution has the stride
    (ResNet v1.5), and which returns ``4 * width`` channels. The names are torchvision's:
    ``conv1`` to ``conv3``, ``bn1`` to ``bn3``, ``downsample.0``, ``downsample.1``.

    Args:
      in_ch: channels of the input.
      width: channels of the middle.
      stride: step of the 3x3 convolution and of the skip's.
      norm: builds each norm; ``None`` = :class:`flaxstab.norms.BatchNorm`.
      act: the activation; ``None`` = ReLU.
      kernel_init: draws the convolutions' kernels; ``None`` = He normal, fan in. (torchvision's
        ResNet takes the fan out.)
      residual: how the branch is added; ``None`` = plainly.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of parameters and statistics.
      rngs: source of the keys; the ``params`` stream, and ``dropout`` if paths are dropped.

    Raises:
      ValueError: if a size is below 1, ``norm`` or ``act`` is no function, or ``rngs`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> Bottleneck(8, 4, stride=2, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 8))).shape
      (2, 4, 4, 16)

    Reference:
      K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", 2015,
      arXiv:1512.03385 (figure 5).
    """

    def __init__(
        self,
        in_ch: int,
        width: int,
        stride: int = 1,
        *,
        norm: MakeNorm | None = None,
        act: Function | None = None,
        kernel_init: Initializer | None = None,
        residual: Residual | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_positive(in_ch=in_ch, width=width, stride=stride)
        options = (norm, act, kernel_init, residual, dtype, param_dtype, rngs)
        parts = chosen(BatchNorm, *options)
        out_ch = EXPANSION * width
        self.conv1 = parts.conv(in_ch, width, 1)
        self.bn1 = parts.norm(width)
        self.conv2 = parts.conv(width, width, 3, stride)
        self.bn2 = parts.norm(width)
        self.conv3 = parts.conv(width, out_ch, 1)
        self.bn3 = parts.norm(out_ch, last=True)
        self.act = parts.act
        self.downsample = nnx.data(parts.downsample(in_ch, out_ch, stride))
        self.add = parts.add(out_ch)

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, H, W, in_ch)`` to ``(N, H / stride, W / stride, 4 * width)``, rounded up."""
        h = normed_conv(self.bn1, self.act, self.conv2, self.conv1(x))
        h = normed_conv(self.bn2, self.act, self.conv3, h)
        return joined(self.bn3, self.act, self.add, h, x, self.downsample)


class PreActBottleneck(nnx.Module):
    """Pre-activation bottleneck: norm, ReLU, then 1x1, 3x3, 1x1 convolution, each time; add.

    He et al.'s block of ResNet v2 and, but for its weight standardisation, timm's
    ``PreActBottleneck``: where the shape changes, a 1x1 convolution of the *activated* input is
    the skip. It returns ``4 * width`` channels. The names are those of
    :class:`PreActResBlock`: ``norm1`` to ``norm3``, ``conv1`` to ``conv3``, ``skip``.

    Args:
      in_ch: channels of the input.
      width: channels of the middle.
      stride: step of the 3x3 convolution and of the skip's.
      drop: the probability of dropping a channel of the branch.
      norm: builds each norm; ``None`` = :class:`flaxstab.norms.BatchNorm`.
      act: the activation; ``None`` = ReLU.
      kernel_init: draws the convolutions' kernels; ``None`` = He normal, fan in.
      residual: how the branch is added; ``None`` = plainly.
      projects: what the skip's convolution sees: ``'activated'``, or ``'raw'`` = the input.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of parameters and statistics.
      rngs: source of the keys, stream ``params``, and ``dropout`` if anything is dropped.

    Raises:
      ValueError: if a size is below 1, ``drop`` is outside [0, 1], ``norm`` or ``act`` is no
        function, ``projects`` is unknown, or ``rngs`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> PreActBottleneck(8, 4, stride=2, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 8))).shape
      (2, 4, 4, 16)

    Reference:
      K. He, X. Zhang, S. Ren, J. Sun, "Identity Mappings in Deep Residual Networks", 2016,
      arXiv:1603.05027 (figure 4e and its footnote on the first unit of a stage).
    """

    def __init__(
        self,
        in_ch: int,
        width: int,
        stride: int = 1,
        drop: float = 0.0,
        *,
        norm: MakeNorm | None = None,
        act: Function | None = None,
        kernel_init: Initializer | None = None,
        residual: Residual | None = None,
        projects: Projects = "activated",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_positive(in_ch=in_ch, width=width, stride=stride)
        check_projects(projects)
        options = (norm, act, kernel_init, residual, dtype, param_dtype, rngs)
        parts = chosen(BatchNorm, *options)
        out_ch = EXPANSION * width
        self.norm1 = parts.norm(in_ch)
        self.conv1 = parts.conv(in_ch, width, 1)
        self.norm2 = parts.norm(width)
        self.conv2 = parts.conv(width, width, 3, stride)
        self.norm3 = parts.norm(width)
        self.conv3 = parts.conv(width, out_ch, 1, last=True)
        self.act = parts.act
        self.projects = projects
        self.drop = ChannelDropout(drop, dtype=dtype, rngs=rngs if drop else None)
        self.skip = nnx.data(parts.projection(in_ch, out_ch, stride))
        self.add = parts.add(out_ch)

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, H, W, in_ch)`` to ``(N, H / stride, W / stride, 4 * width)``, rounded up."""
        h, skip = projected(self.norm1, self.act, self.conv1, x, self.skip, self.projects)
        h = normed_conv(self.norm2, self.act, self.conv2, h)
        return ended(self.norm3, self.act, self.conv3, self.drop, self.add, h, skip)
