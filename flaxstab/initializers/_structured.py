"""Kernels with a pattern: identities, sparse and orthogonal matrices."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check, check_positive, check_probability
from flaxstab._typing import Array, DTypeLike, Initializer, Shape
from flaxstab.initializers._arguments import check_axes, check_numbers, drawn_in
from flaxstab.initializers._plain import normal


def eye() -> Initializer:
    """Returns an initializer that fills a kernel ``(in, out)`` with the identity.

    Same result as ``torch.nn.init.eye_``: a layer hands on as many inputs as it has outputs. When
    called it raises a ``ValueError`` unless the shape has 2 axes.

    Example:
      >>> eye()(jax.random.key(0), (2, 3))
      Array([[1., 0., 0.],
             [0., 1., 0.]], dtype=float32)
    """

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        del key
        rule = "eye fills a kernel with 2 axes, (in, out)"
        check(len(shape) == 2, rule, fix="For a convolution use dirac().", shape=shape)
        inputs, outputs = shape
        return jnp.eye(inputs, outputs, dtype=dtype)

    return init


def dirac(groups: int = 1, *, in_axis: int = -2, out_axis: int = -1) -> Initializer:
    """Returns an initializer with which a convolution hands on its inputs.

    Same result as ``torch.nn.init.dirac_``: in each group as many channels as there are have a 1 at
    the window's centre ``size // 2`` and are 0 elsewhere.

    Args:
      groups: of the convolution.
      in_axis: where the input channels (of one group) are. For a transposed convolution PyTorch
        takes the output channels for them: exchange the axes.
      out_axis: where the output channels are.

    Raises:
      ValueError: if ``groups`` is less than 1; when called, unless the shape has 3 to 5 axes,
        ``(*window, in, out)``, the axes are different ones of it, and ``groups`` divides the output
        channels.

    Example:
      >>> dirac()(jax.random.key(0), (3, 1, 2))[1]
      Array([[1., 0.]], dtype=float32)

    Differs from:
      ``jax.nn.initializers.delta_orthogonal``: an orthogonal matrix, at ``(size - 1) // 2``.
    """
    check_positive(groups=groups)

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        del key
        rule = "dirac fills a kernel with 3 to 5 axes, (*window, in, out)"
        check(3 <= len(shape) <= 5, rule, fix="For a matrix use eye().", shape=shape)
        check_axes(shape, in_axis=in_axis, out_axis=out_axis)
        channels = shape[out_axis]
        rule = "groups must divide the output channels"
        check(channels % groups == 0, rule, groups=groups, channels=channels)
        out = np.arange(channels)
        source = out % max(channels // groups, 1)
        handed_on = source < shape[in_axis]
        kernel = jnp.moveaxis(jnp.zeros(shape, dtype), (in_axis, out_axis), (-2, -1))
        centre = tuple(size // 2 for size in kernel.shape[:-2])
        kernel = kernel.at[(*centre, source[handed_on], out[handed_on])].set(1)
        return jnp.moveaxis(kernel, (-2, -1), (in_axis, out_axis))

    return init


def sparse(sparsity: float, std: float = 0.01, *, out_axis: int = -1) -> Initializer:
    """Returns an initializer that draws from N(0, std²) and cuts connections of every input.

    Same law as ``torch.nn.init.sparse_``: of each input's connections ``ceil(sparsity * out)`` are
    0, at positions of its own. (PyTorch calls the inputs the columns, of its weight
    ``(out, in)``.)

    Args:
      sparsity: the part that is 0, in [0, 1].
      std: standard deviation of the others.
      out_axis: where the outputs are; 0 for an embedding, whose axes PyTorch has in this order.

    Raises:
      ValueError: if ``sparsity`` is not in [0, 1] (PyTorch takes -0.3 for 0.7 and 1.3 for 1), or
        ``std`` is negative; when called, unless the shape has 2 axes and ``out_axis`` is one.

    Example:
      >>> kernel = sparse(0.3)(jax.random.key(0), (2, 10))
      >>> (kernel == 0).sum(1)
      Array([3, 3], dtype=int32)

    Reference:
      J. Martens, "Deep Learning via Hessian-Free Optimization", ICML 2010 (section 5).
    """
    check_numbers("sparse(0.1)", sparsity=sparsity, std=std)
    check_probability(sparsity=sparsity)
    law = normal(0.0, std)

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        rule = "sparse fills a kernel with 2 axes, (in, out)"
        check(len(shape) == 2, rule, fix="Flatten the window first.", shape=shape)
        check_axes(shape, out_axis=out_axis)
        values_key, places_key = jax.random.split(key)
        count = math.ceil(sparsity * shape[out_axis])
        places = jax.lax.broadcasted_iota(jnp.int32, shape, out_axis % 2)
        places = jax.random.permutation(places_key, places, out_axis, independent=True)
        values = law(values_key, shape, dtype)
        return jnp.where(places < count, jnp.zeros((), values.dtype), values)

    return init


def orthogonal(gain: float = 1.0, *, out_axis: int = -1) -> Initializer:
    """Returns an initializer that draws a (semi-)orthogonal matrix, uniformly, times ``gain``.

    Same law as ``torch.nn.init.orthogonal_``: the kernel as a matrix of the outputs and all others
    has orthonormal rows or columns, whichever are fewer, from the QR decomposition of a normal
    matrix, with the signs of R's diagonal. It is that of ``jax.nn.initializers.orthogonal``, here
    drawn in float32 at least.

    Args:
      gain: factor, see :func:`calculate_gain`.
      out_axis: where the outputs are (PyTorch's axis 0, for a transposed convolution the inputs).

    Raises:
      ValueError: if ``gain`` is not a number; when called, if the shape has fewer than 2 axes or
        ``out_axis`` is none of them.

    Example:
      >>> kernel = orthogonal()(jax.random.key(0), (3, 3, 2, 5)).reshape(18, 5)
      >>> bool(jnp.allclose(kernel.T @ kernel, jnp.eye(5), atol=1e-6))
      True

    Reference:
      A. Saxe, J. McClelland, S. Ganguli, "Exact Solutions to the Nonlinear Dynamics of Learning in
      Deep Linear Neural Networks", 2013, arXiv:1312.6120; F. Mezzadri, "How to Generate Random
      Matrices from the Classical Compact Groups", 2006, arXiv:math-ph/0609050 (section 5).
    """
    check_numbers("orthogonal()", gain=gain)
    law = jax.nn.initializers.orthogonal(gain, out_axis)

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        check(len(shape) >= 2, "orthogonal fills a kernel with at least 2 axes", shape=shape)
        check_axes(shape, out_axis=out_axis)
        return jnp.asarray(law(key, shape, drawn_in(dtype)), dtype)

    return init
