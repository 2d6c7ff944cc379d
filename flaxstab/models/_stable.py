"""The mini project's network: one stable block, three times, with a choice of norm."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike, Shape
from flaxstab.dropout import Dropout
from flaxstab.linear import Conv, Linear
from flaxstab.models._activations import Act, activation
from flaxstab.norms import BatchNorm, GhostBatchNorm, GroupNorm


class StableBlock(nnx.Module):
    """Convolution, norm, activation, 2x2 max pooling, dropout: the order of document 2 E-2.

    Args:
      in_channels: channels of the input.
      out_channels: channels of the output.
      norm: ``'batch'``, ``'group'``, ``'layer'`` (one group: over ``(H, W, C)`` of a sample) or
        ``'ghost'``.
      act: ``'relu'``, ``'gelu'`` (exact) or ``'elu'``.
      groups: the groups of ``norm='group'``; the samples per chunk of ``norm='ghost'``.
      drop: the probability of dropping an element.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of parameters and statistics.
      rngs: source of the keys, streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "batch",
        act: Act = "relu",
        *,
        groups: int = 16,
        drop: float = 0.1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = Conv(
            in_channels, out_channels, 3, padding=1, bias=False,
            kernel_init=initializers.kaiming_normal(nonlinearity="relu"),
            dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.norm = _norm(norm, out_channels, groups, dtype, param_dtype)
        self.act = activation(act)
        self.drop = Dropout(drop, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, H, W, in_channels)`` to ``(N, H / 2, W / 2, out_channels)``."""
        return self.drop(functional.max_pool(self.act(self.norm(self.conv(x))), 2))


def _norm(
    norm: str, channels: int, groups: int, dtype: DTypeLike | None, param_dtype: DTypeLike
) -> nnx.Module:
    makers: dict[str, Callable[[], nnx.Module]] = {
        "batch": lambda: BatchNorm(channels, dtype=dtype, param_dtype=param_dtype),
        "group": lambda: GroupNorm(groups, channels, dtype=dtype, param_dtype=param_dtype),
        "layer": lambda: GroupNorm(1, channels, dtype=dtype, param_dtype=param_dtype),
        "ghost": lambda: GhostBatchNorm(channels, groups, dtype=dtype, param_dtype=param_dtype),
    }
    check(norm in makers, f"norm must be one of {', '.join(makers)}", norm=norm)
    return makers[norm]()


class StableCNN(nnx.Module):
    """The mini project of document 2 (section M): a small CNN that compares norms on CIFAR-10.

    Each block is convolution (no bias before a norm), norm, activation, max pooling, dropout;
    the head is linear on the flattened grid. He initialisation, biases 0.

    Args:
      norm: ``'batch'``, ``'group'``, ``'layer'`` or ``'ghost'``, see :class:`StableBlock`.
      act: ``'relu'``, ``'gelu'`` (exact) or ``'elu'``.
      widths: channels of each block.
      groups: the groups of ``norm='group'``; the samples per chunk of ``norm='ghost'``.
      drop: the probability of dropping an element after each block.
      num_classes: size of the output.
      image_size: height and width of the input, divisible by 2 for each block.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of parameters and statistics.
      rngs: source of the keys, streams ``params`` and ``dropout``.

    Raises:
      ValueError: if an option is unknown or the sizes do not fit.
    """

    def __init__(
        self,
        norm: str = "batch",
        act: Act = "relu",
        *,
        widths: Shape = (32, 64, 128),
        groups: int = 16,
        drop: float = 0.1,
        num_classes: int = 10,
        image_size: int = 32,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        shrink = 2 ** len(widths)
        check(shrink > 1, "widths must name at least one block", widths=widths)
        check(
            image_size > 0 and image_size % shrink == 0,
            f"image_size must be above 0 and divisible by {shrink}, since each block halves it",
            image_size=image_size,
        )
        channels = (3, *widths)
        self.blocks = nnx.List(
            StableBlock(
                before, after, norm, act, groups=groups, drop=drop, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )
            for before, after in zip(channels, widths, strict=False)
        )  # fmt: skip
        self.head = Linear(
            widths[-1] * (image_size // shrink) ** 2, num_classes,
            kernel_init=initializers.kaiming_normal(nonlinearity="relu"),
            bias_init=initializers.zeros, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: Array) -> Array:
        """Maps images ``(N, image_size, image_size, 3)`` to logits ``(N, num_classes)``."""
        for block in self.blocks:
            x = block(x)
        # (N, H, W, C) -> (N, C * H * W): torch's order, so that its head's weights fit as they are.
        return self.head(jnp.moveaxis(x, -1, 1).reshape(x.shape[0], math.prod(x.shape[1:])))
