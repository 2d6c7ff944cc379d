"""ResNets of every depth with torchvision's parameters, and their pre-activation forms."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check, check_positive
from flaxstab._typing import Array, DTypeLike, Initializer, Shape
from flaxstab.blocks import (
    BasicBlock,
    Bottleneck,
    MakeNorm,
    PreActBottleneck,
    PreActResBlock,
    Residual,
)
from flaxstab.blocks._parts import Function, Parts, chosen
from flaxstab.linear import Linear
from flaxstab.models._depth import DropPathRule, check_drop_path_rule, residual_at
from flaxstab.models._stack import Chain
from flaxstab.norms import BatchNorm, norm_act
from flaxstab.norms._fused import region

BlockName = Literal["basic", "bottleneck", "preact", "preact_bottleneck"]
Stem = Literal["imagenet", "cifar"]


class _Kind(NamedTuple):
    """One kind of block: how it is made, and how many times its width it returns."""

    make: Callable[..., nnx.Module]
    expansion: int
    activates_first: bool


_KINDS: dict[str, _Kind] = {
    "basic": _Kind(BasicBlock, 1, activates_first=False),
    "bottleneck": _Kind(Bottleneck, 4, activates_first=False),
    "preact": _Kind(partial(PreActResBlock, projects="activated"), 1, activates_first=True),
    "preact_bottleneck": _Kind(PreActBottleneck, 4, activates_first=True),
}


@dataclass(frozen=True, kw_only=True)
class ResNetSize:
    """How large a :class:`ResNet` is.

    Args:
      block: ``'basic'``, ``'bottleneck'``, or their pre-activation forms ``'preact'`` and
        ``'preact_bottleneck'``.
      layers: the number of blocks of each stage. From the second stage on, the first block halves
        the image and the width doubles.
      width: channels of the stem, and the width of the first stage's blocks.

    Raises:
      ValueError: if ``block`` is unknown or a number is below 1.

    Example:
      >>> from dataclasses import replace
      >>> replace(RESNET18, width=16)
      ResNetSize(block='basic', layers=(2, 2, 2, 2), width=16)
    """

    block: BlockName
    layers: Shape
    width: int = 64

    def __post_init__(self) -> None:
        known = ", ".join(map(repr, _KINDS))
        check(self.block in _KINDS, f"block must be one of {known}", block=self.block)
        fits = isinstance(self.layers, tuple) and len(self.layers) > 0
        check(fits, "layers must be a tuple with a number for each stage", layers=self.layers)
        for number in self.layers:
            check_positive(layers=number)
        check_positive(width=self.width)


RESNET18 = ResNetSize(block="basic", layers=(2, 2, 2, 2))
RESNET34 = ResNetSize(block="basic", layers=(3, 4, 6, 3))
RESNET50 = ResNetSize(block="bottleneck", layers=(3, 4, 6, 3))
RESNET101 = ResNetSize(block="bottleneck", layers=(3, 4, 23, 3))
RESNET152 = ResNetSize(block="bottleneck", layers=(3, 8, 36, 3))


class ResNet(nnx.Module):
    """A stem, stages of residual blocks, global average pooling and a linear head.

    Same result as ``torchvision.models.ResNet``, with its parameters under its names (``conv1``,
    ``bn1``, ``layer1.0.conv1``, ``fc``) and its initialisation: convolutions He normal by the fan
    out, the head as ``torch.nn.Linear``. With pre-activation blocks the stem is the convolution
    alone, a last ``norm`` and activation precede the pooling, and where the shape changes the skip
    projects the activated input, as in He et al. 2016 and timm's ``ResNetV2``.

    ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``resnet152`` and ``preact_resnet18``
    to ``preact_resnet152`` are this class with its first argument given.

    Args:
      size: blocks, depth and width.
      num_classes: size of the output.
      stem: ``'imagenet'``: 7x7 convolution of step 2, then 3x3 max pooling of step 2;
        ``'cifar'``: 3x3 convolution of step 1.
      in_channels: channels of the images.
      norm: builds each norm; ``None`` = :class:`flaxstab.norms.BatchNorm`, in every kind of block.
      act: the activation; ``None`` = ReLU.
      kernel_init: draws the convolutions' kernels; ``None`` = torchvision's law.
      residual: how each block adds its branch; ``None`` = plainly. torchvision's
        ``zero_init_residual=True`` is ``Residual(zero_init=True)``.
      drop_path_rule: whether every block has the ``drop_path`` of ``residual`` (``'uniform'``), or
        it grows from 0 in the first block to that in the last (``'linear'``).
      scan: whether equal blocks of a stage are stacked and run by a loop: a shorter program with
        the same weights and numbers. Slow on a CPU (docs/blocks.md), and parameters have other
        names: see :func:`stacked` and :func:`unstacked`.
      remat: whether the backward pass keeps each block's input only, and computes the rest again.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of parameters and statistics.
      rngs: source of the keys; the ``params`` stream, and ``dropout`` if paths are dropped.

    Raises:
      ValueError: if an option is unknown or out of range, or ``scan`` meets blocks that the linear
        rule makes unequal.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from flaxstab import models
      >>> build = lambda: models.resnet18(10, stem="cifar", rngs=nnx.Rngs(0))
      >>> model, x = nnx.eval_shape(build), jnp.ones((2, 32, 32, 3))
      >>> nnx.eval_shape(lambda model, x: model(x), model, x).shape
      (2, 10)

    Reference:
      K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", 2015,
      arXiv:1512.03385 (table 1); "Identity Mappings in Deep Residual Networks", 2016,
      arXiv:1603.05027; G. Huang et al., "Deep Networks with Stochastic Depth", 2016,
      arXiv:1603.09382 (section 4, the two rules).
    """

    def __init__(
        self,
        size: ResNetSize,
        num_classes: int = 1000,
        *,
        stem: Stem = "imagenet",
        in_channels: int = 3,
        norm: MakeNorm | None = None,
        act: Function | None = None,
        kernel_init: Initializer | None = None,
        residual: Residual | None = None,
        drop_path_rule: DropPathRule = "uniform",
        scan: bool = False,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        _check(size, num_classes, stem)
        init = kernel_init or initializers.kaiming_normal(mode="fan_out", nonlinearity="relu")
        parts = chosen(BatchNorm, norm, act, init, residual, dtype, param_dtype, rngs)
        check_drop_path_rule(drop_path_rule, parts.residual, scan=scan)
        kind = _KINDS[size.block]
        channels = kind.expansion * size.width * 2 ** (len(size.layers) - 1)
        self.pools = stem == "imagenet"
        self.conv1 = parts.conv(in_channels, size.width, *((7, 2) if self.pools else (3, 1)))
        self.bn1 = nnx.data(None if kind.activates_first else parts.norm(size.width))
        self.act = parts.act
        self.stages = len(size.layers)
        for number, blocks in enumerate(_stages(size, kind, parts, drop_path_rule)):
            setattr(self, f"layer{number + 1}", Chain(blocks, scan=scan, remat=remat))
        self.norm = nnx.data(parts.norm(channels) if kind.activates_first else None)
        self.fc = Linear(channels, num_classes, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps images ``(N, H, W, in_channels)`` to logits ``(N, num_classes)``."""
        x = self._stem(self.conv1(x))
        for number in range(self.stages):
            x = getattr(self, f"layer{number + 1}")(x)
        if self.norm is not None:
            x = norm_act(self.norm, self.act, x)
        return self.fc(functional.adaptive_avg_pool(x, 1)[:, 0, 0])

    def _stem(self, x: Array) -> Array:
        """Norm, activation and pooling as one step, which keeps the convolution's output alone."""

        def pooled(x: Array) -> Array:
            return functional.max_pool(x, 3, 2, 1) if self.pools else x

        if self.bn1 is None:
            return pooled(x)
        return region(lambda norm, x: pooled(self.act(norm(x))), (self.bn1,), x)


def _check(size: ResNetSize, num_classes: int, stem: str) -> None:
    is_size = isinstance(size, ResNetSize)
    fix = "Pass e.g. ResNetSize(block='basic', layers=(2, 2, 2, 2))."
    check(is_size, "size must be a ResNetSize", fix=fix, size=size)
    check_positive(num_classes=num_classes)
    check(stem in ("imagenet", "cifar"), "stem must be 'imagenet' or 'cifar'", stem=stem)


def _stages(
    size: ResNetSize, kind: _Kind, parts: Parts, rule: DropPathRule
) -> Iterator[list[nnx.Module]]:
    """Yields each stage's blocks, built one after the other."""
    made, total, channels = 0, sum(size.layers), size.width
    for stage, count in enumerate(size.layers):
        width, blocks = size.width * 2**stage, []
        for number in range(count):
            residual = residual_at(parts.residual, rule, made, total)
            blocks.append(
                kind.make(
                    channels, width, stride=2 if stage and not number else 1,
                    norm=parts.make_norm, act=parts.act, kernel_init=parts.kernel_init,
                    residual=residual, dtype=parts.dtype, param_dtype=parts.param_dtype,
                    rngs=parts.rngs,
                )
            )  # fmt: skip
            made, channels = made + 1, kind.expansion * width
        yield blocks


def _preact(size: ResNetSize) -> ResNetSize:
    names: dict[str, BlockName] = {"basic": "preact", "bottleneck": "preact_bottleneck"}
    return replace(size, block=names[size.block])


resnet18 = partial(ResNet, RESNET18)
resnet34 = partial(ResNet, RESNET34)
resnet50 = partial(ResNet, RESNET50)
resnet101 = partial(ResNet, RESNET101)
resnet152 = partial(ResNet, RESNET152)
preact_resnet18 = partial(ResNet, _preact(RESNET18))
preact_resnet34 = partial(ResNet, _preact(RESNET34))
preact_resnet50 = partial(ResNet, _preact(RESNET50))
preact_resnet101 = partial(ResNet, _preact(RESNET101))
preact_resnet152 = partial(ResNet, _preact(RESNET152))
