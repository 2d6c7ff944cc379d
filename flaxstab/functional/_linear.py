"""Affine maps: matrix product and convolution, features last."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from flaxstab._checks import check, per_axis
from flaxstab._dtypes import aligned
from flaxstab._typing import Array, Float, Shape, Sizes

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Pairs = tuple[tuple[int, int], ...]  # elements added before and after each spatial axis
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
    return with_bias(jnp.matmul(x, kernel), bias)


def padding_pairs(padding: Sizes | str, window: Shape, dilation: Shape) -> Pairs:
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
) -> tuple[Shape, Pairs, Shape]:
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


def _check_room(space: Shape, window: Shape, dilation: Shape, pairs: Pairs, mode: str) -> None:
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
    batch, x = one_batch(x, rank)
    _check_room(x.shape[1:-1], kernel.shape[:rank], dilations, pairs, padding_mode)
    if padding_mode != "zeros":
        x = jnp.pad(x, ((0, 0), *pairs, (0, 0)), mode=_NUMPY_MODE[padding_mode])
        pairs = ((0, 0),) * rank
    x = _longer(x, kernel.shape[:rank], strides, pairs, dilations)
    y = correlated(x, kernel, pairs, stride=strides, dilation=dilations, groups=groups)
    return with_bias(y, bias).reshape(*batch, *y.shape[1:])


def _longer(x: Array, window: Shape, stride: Shape, pairs: Pairs, dilation: Shape) -> Array:
    """Adds an element that no window reaches to axes whose gradient XLA cannot compile.

    XLA's CPU compiler aborts on some convolutions that pull elements apart by 2, with a window of
    2 and no padding (docs/upstream.md): here that is the input gradient. The test
    ``test_conv_takes_an_option_per_axis`` compiles one.
    """
    options = zip(x.shape[1:-1], window, stride, pairs, dilation, strict=True)
    more = [
        int(k == s == 2 and low == d and (n + low + high - d) % s == 1)
        for n, k, s, (low, high), d in options
    ]
    return jnp.pad(x, ((0, 0), *((0, m) for m in more), (0, 0))) if any(more) else x


def one_batch(x: Array, rank: int) -> tuple[Shape, Array]:
    """Returns the batch axes, and the array with one in their place: (N, *space, C)."""
    batch, rest = x.shape[: x.ndim - rank - 1], x.shape[x.ndim - rank - 1 :]
    return batch, x.reshape(math.prod(batch), *rest)


def with_bias(y: Array, bias: Array | None) -> Array:
    """Adds a bias of the last axis, if there is one."""
    return y if bias is None else y + aligned(bias, y, bias.dtype)


def correlated(
    x: Float[Array, "n *space in"],
    kernel: Float[Array, "*window in_per_group out"],
    pairs: Pairs,
    *,
    stride: Shape,
    dilation: Shape,
    groups: int,
    spread: Shape | None = None,
) -> Float[Array, "n *space out"]:
    """Correlates; ``spread`` is the distance to which the input's elements are pulled apart."""
    space = tuple(range(1, x.ndim - 1))
    channels = x.ndim - 1
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        stride,
        pairs,
        lhs_dilation=spread,
        rhs_dilation=dilation,
        feature_group_count=groups,
        dimension_numbers=jax.lax.ConvDimensionNumbers(
            lhs_spec=(0, channels, *space),
            rhs_spec=(channels, channels - 1, *range(len(space))),
            out_spec=(0, channels, *space),
        ),
    )
