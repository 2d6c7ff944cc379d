"""Laws whose spread follows from the shape: gains, fans, Xavier and Kaiming."""

import math
from typing import Literal, get_args

import jax.numpy as jnp
from jax.nn.initializers import variance_scaling

from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike, Initializer, Shape
from flaxstab.initializers._arguments import Axes, axes_of, check_axes, check_numbers, drawn_in
from flaxstab.initializers._plain import below

Nonlinearity = Literal[
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "sigmoid", "tanh", "relu", "leaky_relu", "selu",
]  # fmt: skip
FanMode = Literal["fan_in", "fan_out"]
XAVIER = ("tanh", "sigmoid", "linear")
"""The activations for which document 2 takes Xavier's law; for all others it takes Kaiming's."""


def calculate_gain(nonlinearity: Nonlinearity, param: float | None = None) -> float:
    """Returns the factor that keeps the variance through a layer with the given nonlinearity.

    Same result as ``torch.nn.init.calculate_gain``.

    Args:
      nonlinearity: its PyTorch name.
      param: the negative slope of ``'leaky_relu'``, which alone has one; ``None`` = 0.01.

    Raises:
      ValueError: if the nonlinearity has no gain in PyTorch (GELU has none: use ``'relu'``), or the
        slope is not a Python number.

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
    gains = {"tanh": 5.0 / 3, "relu": math.sqrt(2.0), "selu": 3.0 / 4}
    if nonlinearity != "leaky_relu":
        return gains.get(nonlinearity, 1.0)
    slope = 0.01 if param is None else param
    is_number = isinstance(slope, int | float) and not isinstance(slope, bool)
    check(is_number, "the slope of leaky_relu must be an int or a float", param=param)
    return math.sqrt(2.0 / (1 + slope**2))


def fan_in_and_fan_out(shape: Shape, *, in_axis: Axes = -2, out_axis: Axes = -1) -> tuple[int, int]:
    """Returns how many inputs feed one output, and how many outputs one input feeds.

    Same result as PyTorch's for the same layer, whose axes 1 and 0 are ``in_axis`` and
    ``out_axis``; all others are the window.

    Args:
      shape: a kernel's shape, ``(*window, in, out)``. With groups ``in`` counts one group's
        channels, as in PyTorch.
      in_axis: where the inputs are: an axis, or several: ``(0, 1)`` for ``(heads, head_dim, out)``.
      out_axis: where the outputs are.

    Raises:
      ValueError: if the shape has fewer than two axes, or the axes are not different ones of it.

    Example:
      >>> fan_in_and_fan_out((3, 3, 16, 32))
      (144, 288)
      >>> fan_in_and_fan_out((768, 12, 64), in_axis=0, out_axis=(1, 2))
      (768, 768)
    """
    check(len(shape) >= 2, "a fan needs a shape with at least 2 axes", shape=shape)
    check_axes(shape, in_axis=in_axis, out_axis=out_axis)
    inputs, outputs = axes_of(in_axis), axes_of(out_axis)
    channels = {axis % len(shape) for axis in inputs + outputs}
    window = math.prod(size for axis, size in enumerate(shape) if axis not in channels)
    fan_in, fan_out = (math.prod(shape[axis] for axis in axes) for axes in (inputs, outputs))
    return fan_in * window, fan_out * window


def _scaled(
    gain: float,
    mode: Literal["fan_in", "fan_out", "fan_avg"],
    distribution: Literal["normal", "uniform"],
    in_axis: Axes,
    out_axis: Axes,
) -> Initializer:
    """Returns JAX's initializer of the standard deviation ``gain / sqrt(fan)``, which is PyTorch's.

    JAX leaves shapes without elements to a division by zero, and draws in the dtype itself.
    """
    check(gain >= 0, "gain must not be negative", gain=gain)
    law = variance_scaling(gain**2, mode, distribution, axes_of(in_axis), axes_of(out_axis))

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        kind = drawn_in(dtype)
        fan_in, fan_out = fan_in_and_fan_out(shape, in_axis=in_axis, out_axis=out_axis)
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        values = law(key, shape, kind)
        if distribution == "normal":
            return jnp.asarray(values, dtype)
        fans = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
        bound = gain * math.sqrt(3 / fans[mode])
        return below(values, -bound, bound, dtype)

    return init


def xavier_uniform(gain: float = 1.0, *, in_axis: Axes = -2, out_axis: Axes = -1) -> Initializer:
    """Returns an initializer for U(-b, b), ``b = gain * sqrt(6 / (fan_in + fan_out))``.

    Same law as ``torch.nn.init.xavier_uniform_``; with the gain 1 also as
    ``jax.nn.initializers.glorot_uniform``, which has no gain.

    Args:
      gain: factor for the nonlinearity, see :func:`calculate_gain`.
      in_axis: where the inputs are, see :func:`fan_in_and_fan_out`.
      out_axis: where the outputs are.

    Raises:
      ValueError: if ``gain`` is negative or no number; when called, if the shape has no such fans.

    Example:
      >>> import jax
      >>> heads = xavier_uniform(in_axis=0, out_axis=(1, 2))  # as for a kernel (768, 768)
      >>> x = heads(jax.random.key(0), (768, 12, 64))
      >>> bool(0.0624 < x.max() < 0.0625)
      True

    Reference:
      X. Glorot, Y. Bengio, "Understanding the Difficulty of Training Deep Feedforward Neural
      Networks", AISTATS 2010 (equation 16).
    """
    check_numbers("xavier_uniform()", gain=gain)
    return _scaled(gain, "fan_avg", "uniform", in_axis, out_axis)


def xavier_normal(gain: float = 1.0, *, in_axis: Axes = -2, out_axis: Axes = -1) -> Initializer:
    """Returns an initializer for N(0, std²), ``std = gain * sqrt(2 / (fan_in + fan_out))``.

    Same law as ``torch.nn.init.xavier_normal_``. Arguments as in :func:`xavier_uniform`.

    Differs from:
      ``jax.nn.initializers.glorot_normal``, which is cut at 2.27 of these standard deviations.
    """
    check_numbers("xavier_normal()", gain=gain)
    return _scaled(gain, "fan_avg", "normal", in_axis, out_axis)


def kaiming_uniform(
    a: float = 0.0,
    mode: FanMode = "fan_in",
    nonlinearity: Nonlinearity = "leaky_relu",
    *,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
) -> Initializer:
    """Returns an initializer for U(-b, b), ``b = gain * sqrt(3 / fan)``.

    Same law as ``torch.nn.init.kaiming_uniform_``. (Document 1 prints ``gain * 3 / fan_in``; the
    square root is right.)

    Args:
      a: the negative slope of ``'leaky_relu'``.
      mode: which fan keeps its variance: ``'fan_in'`` forward, ``'fan_out'`` backward.
      nonlinearity: see :func:`calculate_gain`.
      in_axis: where the inputs are, see :func:`fan_in_and_fan_out`.
      out_axis: where the outputs are.

    Raises:
      ValueError: if ``mode`` or ``nonlinearity`` is unknown, or ``a`` is not a number; when called,
        if the shape has no such fans.

    Reference:
      K. He, X. Zhang, S. Ren, J. Sun, "Delving Deep into Rectifiers", 2015, arXiv:1502.01852
      (equations 10 and 14).
    """
    check_numbers("kaiming_uniform()", a=0.01 if a is None else a)  # PyTorch takes None too
    return _scaled(calculate_gain(nonlinearity, a), _known(mode), "uniform", in_axis, out_axis)


def kaiming_normal(
    a: float = 0.0,
    mode: FanMode = "fan_in",
    nonlinearity: Nonlinearity = "leaky_relu",
    *,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
) -> Initializer:
    """Returns an initializer for N(0, std²), ``std = gain / sqrt(fan)``.

    Same law as ``torch.nn.init.kaiming_normal_``. Arguments as in :func:`kaiming_uniform`.

    Differs from:
      ``jax.nn.initializers.he_normal``, which is cut at 2.27 of these standard deviations.
    """
    check_numbers("kaiming_normal()", a=0.01 if a is None else a)  # PyTorch takes None too
    return _scaled(calculate_gain(nonlinearity, a), _known(mode), "normal", in_axis, out_axis)


def _known(mode: FanMode) -> FanMode:
    """Returns a mode in lower case, as PyTorch takes it in any."""
    modes: dict[str, FanMode] = {"fan_in": "fan_in", "fan_out": "fan_out"}
    lower = str(mode).lower()
    check(lower in modes, "mode must be 'fan_in' or 'fan_out'", mode=mode)
    return modes[lower]
