"""What these layers share: parameters drawn with a key of the layer's streams."""

from flax import nnx

from flaxstab import initializers
from flaxstab._dtypes import floating
from flaxstab._typing import Array, DTypeLike, Initializer, Shape


def drawn(
    rngs: nnx.Rngs | None, init: Initializer, shape: Shape, dtype: DTypeLike
) -> nnx.Param[Array]:
    """Draws a parameter.

    Raises:
      ValueError: if ``rngs`` is missing or ``dtype`` is no floating-point one.
    """
    if rngs is None:
        raise ValueError("a layer with random weights needs rngs. Pass rngs=nnx.Rngs(seed).")
    return nnx.Param(init(rngs.params(), shape, floating("param_dtype", dtype)))


def drawn_bias(
    rngs: nnx.Rngs | None, init: Initializer | None, fan_in: int, size: int, dtype: DTypeLike
) -> nnx.Param[Array]:
    """Draws a bias, by default with PyTorch's law for the kernel's fan."""
    return drawn(rngs, init or initializers.torch_bias(fan_in), (size,), dtype)
