"""The transposed convolution, features last."""

import jax.numpy as jnp

from flaxstab._checks import check, per_axis
from flaxstab._typing import Array, Float, Shape, Sizes
from flaxstab.functional._linear import Pairs, correlated, one_batch, with_bias


def transposed_options(
    window: Shape, stride: Sizes, padding: Sizes, output_padding: Sizes, dilation: Sizes
) -> tuple[Shape, Shape, Shape, Shape]:
    """Returns a transposed convolution's options for each spatial axis, checked.

    Returns:
      ``stride``, ``padding``, ``output_padding`` and ``dilation``.

    Raises:
      ValueError: if an option is too small or they do not fit together.
    """
    rank = len(window)
    strides = per_axis("stride", stride, rank, minimum=1)
    dilations = per_axis("dilation", dilation, rank, minimum=1)
    extra = per_axis("output_padding", output_padding, rank)
    check(
        all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)),
        "output_padding must be smaller than stride or dilation",
        output_padding=output_padding,
        stride=stride,
        dilation=dilation,
    )
    return strides, per_axis("padding", padding, rank), extra, dilations


def transposed_space(
    space: Shape, window: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> Shape:
    """Returns the size of a transposed convolution's output without output padding.

    Example:
      >>> transposed_space((4,), (3,), (2,), (1,), (1,))
      (7,)
    """
    options = zip(space, window, stride, padding, dilation, strict=True)
    return tuple((n - 1) * s + d * (k - 1) + 1 - 2 * p for n, k, s, p, d in options)


def transposed_pairs(
    window: Shape, padding: Shape, output_padding: Shape, dilation: Shape
) -> Pairs:
    """Returns the zeros around the spread input of a transposed convolution; negative = cropped.

    Example:
      >>> transposed_pairs((3,), (1,), (1,), (1,))
      ((1, 2),)
    """
    options = zip(window, padding, output_padding, dilation, strict=True)
    return tuple((d * (k - 1) - p, d * (k - 1) - p + e) for k, p, e, d in options)


def conv_transpose(
    x: Float[Array, "*batch_and_space in"],
    kernel: Float[Array, "*window in out_per_group"],
    bias: Float[Array, " out"] | None = None,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Float[Array, "*batch_and_space out"]:
    """Computes a transposed convolution: the input gradient of :func:`conv`, as a layer.

    Same result as ``torch.nn.functional.conv_transpose1d``, ``conv_transpose2d``,
    ``conv_transpose3d`` with axes moved. An axis of n elements gets
    ``(n - 1) * stride - 2 * padding + dilation * (window - 1) + output_padding + 1``.

    Args:
      x: features-last values, shape ``(*batch, *space, in)``.
      kernel: shape ``(*window, in, out / groups)``, in the dtype of ``x``, not flipped.
      bias: shape ``(out,)``, in the dtype of ``x``.
      stride: distance between the windows that neighbouring elements are spread over.
      padding: elements cut off both sides of each axis of the output.
      output_padding: elements added behind each axis of the output, where windows may reach.
      groups: into how many independent groups input and output channels fall.
      dilation: spacing of the window's elements.

    Returns:
      Values of shape ``(*batch, *space', out)``.

    Raises:
      ValueError: if the shapes or options do not fit together, or nothing is left of the output.

    Differs from:
      ``jax.lax.conv_transpose`` and ``flax.nnx.ConvTranspose``, which flip the kernel by default,
      count ``padding`` at the input, and have no groups.

    Reference:
      V. Dumoulin, F. Visin, "A guide to convolution arithmetic for deep learning", 2016,
      arXiv:1603.07285 (section 4).
    """
    rank = kernel.ndim - 2
    check(
        x.ndim >= rank + 1 and x.shape[-1] == kernel.shape[-2],
        "the input's last axis must have in_channels elements",
        fix="Arrays are features-last here: (N, ..., C).",
        in_channels=kernel.shape[-2],
        shape=x.shape,
    )
    check(
        kernel.shape[-2] % groups == 0,
        "groups must divide in_channels",
        groups=groups,
        in_channels=kernel.shape[-2],
    )
    window = kernel.shape[:rank]
    options = transposed_options(window, stride, padding, output_padding, dilation)
    strides, paddings, extra, dilations = options
    batch, x = one_batch(x, rank)
    space = transposed_space(x.shape[1:-1], window, strides, paddings, dilations)
    check(
        0 not in x.shape[1:-1] and all(n + e > 0 for n, e in zip(space, extra, strict=True)),
        "padding must leave at least one element of each axis of the output",
        padding=paddings,
        kernel_size=window,
        space=x.shape[1:-1],
    )
    pairs = transposed_pairs(window, paddings, extra, dilations)
    y = _spread_correlated(x, _by_output(kernel, groups), pairs, strides, dilations, groups)
    return with_bias(y, bias).reshape(*batch, *y.shape[1:])


def _by_output(kernel: Array, groups: int) -> Array:
    """Flips the window; (*window, G * in, out) -> (*window, in, G * out)."""
    *window, inputs, outputs = kernel.shape
    grouped = kernel.reshape(*window, groups, inputs // groups, outputs)
    # (*window, G, in, out) -> (*window, in, G, out)
    moved = jnp.moveaxis(grouped, -3, -2).reshape(*window, inputs // groups, groups * outputs)
    return jnp.flip(moved, range(len(window)))


def _spread_correlated(
    x: Array, kernel: Array, pairs: Pairs, spread: Shape, dilation: Shape, groups: int
) -> Array:
    """Pulls the input's elements apart and correlates, around a bug of XLA.

    XLA's CPU compiler aborts on some convolutions with an axis that is spread and not padded
    (docs/upstream.md). Along such an axis one element more is computed and cut off; the test
    ``test_shapes_that_abort_xla_are_worked_around`` compiles them.
    """
    more = [int(pair == (0, 0) and s > 1) for pair, s in zip(pairs, spread, strict=True)]
    pairs = tuple((low, high + m) for (low, high), m in zip(pairs, more, strict=True))
    ones = (1,) * len(pairs)
    y = correlated(x, kernel, pairs, stride=ones, dilation=dilation, groups=groups, spread=spread)
    return y[:, *(slice(-1 if m else None) for m in more)] if any(more) else y
