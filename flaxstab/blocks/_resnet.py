"""Residual blocks of two 3x3 convolutions."""

import functools

import jax.numpy as jnp
from flax import nnx

from flaxstab._checks import check, check_positive
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
from flaxstab.norms import BatchNorm, GroupNorm


class BasicBlock(nnx.Module):
    """Post-activation block: convolution, norm, ReLU, convolution, norm; add the skip; ReLU.

    Same result as ``torchvision.models.resnet.BasicBlock`` and document 2's post-activation block
    (C-5, C-6): 3x3 convolutions without bias, padding 1; the skip is the input itself, or a 1x1
    convolution with a norm where the shape changes. The names are torchvision's: ``conv1``,
    ``bn1``, ``conv2``, ``bn2``, ``downsample.0``, ``downsample.1``.

    Args:
      in_ch: channels of the input.
      out_ch: channels of the output.
      stride: step of the first convolution and of the skip's.
      norm: builds each norm; ``None`` = :class:`flaxstab.norms.BatchNorm`.
      act: the activation; ``None`` = ReLU.
      kernel_init: draws the convolutions' kernels; ``None`` = He normal, fan in, as in the
        documents. (torchvision's ResNet takes the fan out.)
      residual: how the branch is added; ``None`` = plainly.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of parameters and statistics.
      rngs: source of the keys; the ``params`` stream, and ``dropout`` if paths are dropped.

    Raises:
      ValueError: if a size is below 1, ``norm`` or ``act`` is no function, or ``rngs`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> BasicBlock(3, 8, stride=2, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 3))).shape
      (2, 4, 4, 8)

    Differs from:
      torchvision's ResNet, which builds ``downsample`` before the block: with
      :func:`flaxstab.torch_rng.seed_parameters` alone a block's layers get other numbers of the
      stream. They are torchvision's where all convolutions draw again, as in its networks
      (docs/seeds.md). The documents' block draws in our order.

    Reference:
      K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", 2015,
      arXiv:1512.03385 (figures 2 and 5).
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
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
        check_positive(in_ch=in_ch, out_ch=out_ch, stride=stride)
        options = (norm, act, kernel_init, residual, dtype, param_dtype, rngs)
        parts = chosen(BatchNorm, *options)
        self.conv1 = parts.conv(in_ch, out_ch, 3, stride)
        self.bn1 = parts.norm(out_ch)
        self.conv2 = parts.conv(out_ch, out_ch, 3)
        self.bn2 = parts.norm(out_ch, last=True)
        self.act = parts.act
        self.downsample = nnx.data(parts.downsample(in_ch, out_ch, stride))
        self.add = parts.add(out_ch)

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, H, W, in_ch)`` to ``(N, H / stride, W / stride, out_ch)``, rounded up."""
        h = normed_conv(self.bn1, self.act, self.conv2, self.conv1(x))
        return joined(self.bn2, self.act, self.add, h, x, self.downsample)


class PreActResBlock(nnx.Module):
    """Pre-activation block: norm, ReLU, convolution, twice; channel dropout; add the skip.

    Same result as document 2's ``PreActResBlock`` (I-1): group normalisation, 3x3 convolutions
    without bias, padding 1; the skip is the input itself, or a 1x1 convolution of the raw input
    where the shape changes. The names are the document's: ``norm1``, ``conv1``, ``norm2``,
    ``conv2``, ``skip``.

    Args:
      in_ch: channels of the input.
      out_ch: channels of the output.
      groups: the groups of both norms; divides both sizes. Not used with ``norm``.
      stride: step of the first convolution and of the skip's.
      drop: the probability of dropping a channel of the branch.
      norm: builds each norm; ``None`` = :class:`flaxstab.norms.GroupNorm`.
      act: the activation; ``None`` = ReLU.
      kernel_init: draws the convolutions' kernels; ``None`` = He normal, fan in.
      residual: how the branch is added; ``None`` = plainly.
      projects: what the skip's convolution sees: ``'raw'`` = the input, as printed in the
        document; ``'activated'`` = the normalised and activated input, as He et al. and timm.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys, stream ``params``, and ``dropout`` if anything is dropped.

    Raises:
      ValueError: if a size is below 1, the groups do not divide, ``drop`` is outside [0, 1],
        ``norm`` or ``act`` is no function, or ``rngs`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> PreActResBlock(4, 8, groups=2, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 5, 4))).shape
      (2, 5, 5, 8)

    Differs from:
      He et al. and timm, which project the activated input: ``projects="activated"``.

    Reference:
      K. He, X. Zhang, S. Ren, J. Sun, "Identity Mappings in Deep Residual Networks", 2016,
      arXiv:1603.05027 (figure 4e).
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        groups: int = 32,
        stride: int = 1,
        drop: float = 0.0,
        *,
        norm: MakeNorm | None = None,
        act: Function | None = None,
        kernel_init: Initializer | None = None,
        residual: Residual | None = None,
        projects: Projects = "raw",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_positive(in_ch=in_ch, out_ch=out_ch, groups=groups, stride=stride)
        check(
            norm is not None or in_ch % groups == out_ch % groups == 0,
            "groups must divide in_ch and out_ch",
            groups=groups,
            in_ch=in_ch,
            out_ch=out_ch,
        )
        check_projects(projects)
        options = (norm, act, kernel_init, residual, dtype, param_dtype, rngs)
        parts = chosen(functools.partial(GroupNorm, groups), *options)
        self.norm1 = parts.norm(in_ch)
        self.conv1 = parts.conv(in_ch, out_ch, 3, stride)
        self.norm2 = parts.norm(out_ch)
        self.conv2 = parts.conv(out_ch, out_ch, 3, last=True)
        self.act = parts.act
        self.projects = projects
        self.drop = ChannelDropout(drop, dtype=dtype, rngs=rngs if drop else None)
        self.skip = nnx.data(parts.projection(in_ch, out_ch, stride))
        self.add = parts.add(out_ch)

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, H, W, in_ch)`` to ``(N, H / stride, W / stride, out_ch)``, rounded up."""
        h, skip = projected(self.norm1, self.act, self.conv1, x, self.skip, self.projects)
        return ended(self.norm2, self.act, self.conv2, self.drop, self.add, h, skip)
