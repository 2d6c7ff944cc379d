"""Affine maps: matrix product and convolution, features last."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from flaxstab._checks import check, per_axis
from flaxstab._dtypes import aligned
from flaxstab._typing import Array, Float, Shape, Sizes

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
_NUMPY_MODE = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def linear(
    x: Float[Array, "*batch in"],
    kernel: Float[Array, "in out"],
    bias: Float[Array, " out"] | None = None,
) -> Float[Array, "*batch out"]:
    """Computes ``x @ kernel + bias``.

    Same result as ``torch.nn.functional.linear`` with ``kernel`` transposed.

    Args:
      x: values, shape ``(*batch, in)``.
      kernel: shape ``(in, out)``, in the dtype of ``x``.
      bias: shape ``(out,)``, in the dtype of ``x``.

    Returns:
      Values of shape ``(*batch, out)``.
    """
    y = jnp.matmul(x, kernel)
    return y if bias is None else y + aligned(bias, y, bias.dtype)


def padding_pairs(
    padding: Sizes | str, window: Shape, dilation: Shape
) -> tuple[tuple[int, int], ...]:
    """Returns the zeros that PyTorch adds before and after each spatial axis.

    Args:
      padding: an integer, one per axis, ``'valid'`` or ``'same'`` (for stride 1).
      window: the kernel's size along each axis.
      dilation: the kernel's dilation along each axis.

    Returns:
      One ``(before, after)`` pair per axis. ``'same'`` puts an odd element after.

    Raises:
      ValueError: if ``padding`` is none of these.

    Example:
      >>> padding_pairs("same", (3, 4), (1, 1))
      ((1, 1), (1, 2))
    """
    if isinstance(padding, str):
        check(
            padding in ("same", "valid"),
            "padding must be 'same', 'valid', an integer or integers",
            padding=padding,
        )
        spans = (d * (k - 1) for d, k in zip(dilation, window, strict=True))
        extra = [span if padding == "same" else 0 for span in spans]
        return tuple((e // 2, e - e // 2) for e in extra)
    return tuple((p, p) for p in per_axis("padding", padding, len(window)))


def conv_options(
    window: Shape, stride: Sizes, padding: Sizes | str, dilation: Sizes, padding_mode: str
) -> tuple[Shape, tuple[tuple[int, int], ...], Shape]:
    """Returns stride, padding and dilation for each spatial axis, checked.

    Raises:
      ValueError: if an option is unknown or they do not fit together.
    """
    rank = len(window)
    strides = per_axis("stride", stride, rank, minimum=1)
    dilations = per_axis("dilation", dilation, rank, minimum=1)
    check(
        padding != "same" or set(strides) == {1},
        "padding='same' needs stride 1",
        fix="Give the padding as integers.",
        stride=stride,
    )
    modes = ("zeros", *_NUMPY_MODE)
    check(padding_mode in modes, f"padding_mode must be one of {modes}", padding_mode=padding_mode)
    return strides, padding_pairs(padding, window, dilations), dilations


def _check_room(
    space: Shape, window: Shape, dilation: Shape, pairs: tuple[tuple[int, int], ...], mode: str
) -> None:
    """Raises a ``ValueError`` if the padding needs more input than there is, or the kernel does."""
    most = {"reflect": -1, "circular": 0}
    check(
        mode not in most
        or all(max(pair) <= n + most[mode] for n, pair in zip(space, pairs, strict=True)),
        "padding must be smaller than the input to reflect it, and at most its size to wrap it",
        padding_mode=mode,
        padding=pairs,
        space=space,
    )
    sizes = zip(space, window, dilation, pairs, strict=True)
    check(
        all(d * (k - 1) < n + sum(pair) for n, k, d, pair in sizes),
        "kernel_size must fit into the padded input",
        kernel_size=window,
        space=space,
        padding=pairs,
    )


def conv(
    x: Float[Array, "*batch_and_space in"],
    kernel: Float[Array, "*window in_per_group out"],
    bias: Float[Array, " out"] | None = None,
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
) -> Float[Array, "*batch_and_space out"]:
    """Computes a convolution (cross-correlation) over any number of spatial axes.

    Same result as ``torch.nn.functional.conv1d``, ``conv2d``, ``conv3d`` with axes moved.

    Args:
      x: features-last values, shape ``(*batch, *space, in)``.
      kernel: shape ``(*window, in / groups, out)``, in the dtype of ``x``.
      bias: shape ``(out,)``, in the dtype of ``x``.
      stride: step of the window along each axis.
      padding: elements added on both sides of each axis, or ``'valid'``, or ``'same'``.
      dilation: spacing of the window's elements.
      groups: into how many independent groups input and output channels fall.
      padding_mode: what the added elements hold.

    Returns:
      Values of shape ``(*batch, *space', out)``.

    Raises:
      ValueError: if the shapes or options do not fit together.

    Differs from:
      ``flax.nnx.Conv``, whose default padding is ``'SAME'``, and whose ``'SAME'`` at stride 2
      starts one pixel later than PyTorch's ``padding=1`` on even sizes.
    """
    rank = kernel.ndim - 2
    check(
        x.ndim >= rank + 1 and x.shape[-1] == kernel.shape[-2] * groups,
        "the input's last axis must have in_channels elements",
        fix="Arrays are features-last here: (N, ..., C).",
        in_channels=kernel.shape[-2] * groups,
        shape=x.shape,
    )
    options = (kernel.shape[:rank], stride, padding, dilation, padding_mode)
    strides, pairs, dilations = conv_options(*options)
    batch = x.shape[: x.ndim - rank - 1]
    # (*batch, *space, C) -> (N, *space, C)
    x = x.reshape(math.prod(batch), *x.shape[x.ndim - rank - 1 :])
    _check_room(x.shape[1:-1], kernel.shape[:rank], dilations, pairs, padding_mode)
    if padding_mode != "zeros":
        x = jnp.pad(x, ((0, 0), *pairs, (0, 0)), mode=_NUMPY_MODE[padding_mode])
        pairs = ((0, 0),) * rank
    space = tuple(range(1, rank + 1))
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pairs,
        rhs_dilation=dilations,
        feature_group_count=groups,
        dimension_numbers=jax.lax.ConvDimensionNumbers(
            lhs_spec=(0, rank + 1, *space),
            rhs_spec=(rank + 1, rank, *range(rank)),
            out_spec=(0, rank + 1, *space),
        ),
    )
    if bias is not None:
        y = y + aligned(bias, y, bias.dtype)
    return y.reshape(*batch, *y.shape[1:])
