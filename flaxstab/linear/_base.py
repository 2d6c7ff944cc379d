"""What these layers share: parameters drawn with a key of the layer's streams."""

from flax import nnx

from flaxstab import initializers
from flaxstab._dtypes import floating
from flaxstab._typing import Array, DTypeLike, Initializer, Shape


def check_rngs(rngs: nnx.Rngs | None) -> nnx.Rngs:
    """Returns the source of a layer's keys.

    Raises:
      ValueError: if it is missing, or has no stream for parameters.
    """
    if rngs is None:
        raise ValueError("a layer with random weights needs rngs. Pass rngs=nnx.Rngs(seed).")
    is_rngs = isinstance(rngs, nnx.Rngs)
    if not is_rngs or not ("params" in rngs or "default" in rngs):
        raise ValueError(
            "rngs must be nnx.Rngs with a 'params' stream or a default one, got "
            f"{sorted(rngs) if is_rngs else type(rngs).__name__}. "
            "Pass nnx.Rngs(seed), or nnx.Rngs(params=…)."
        )
    return rngs


def drawn(
    rngs: nnx.Rngs | None,
    init: Initializer,
    shape: Shape,
    dtype: DTypeLike,
    *,
    role: str | None = None,
) -> nnx.Param[Array]:
    """Draws a parameter.

    Args:
      rngs: source of the key; the ``params`` stream is used.
      init: draws it.
      shape: its shape.
      dtype: its dtype.
      role: what it is, where neither the layer's type nor its name tells: kept as metadata.

    Raises:
      ValueError: if ``rngs`` is missing or no source, or ``dtype`` is no floating-point one.
    """
    key = check_rngs(rngs).params()
    value = init(key, shape, floating("param_dtype", dtype))
    return nnx.Param(value) if role is None else nnx.Param(value, role=role)


def drawn_bias(
    rngs: nnx.Rngs | None, init: Initializer | None, fan_in: int, size: int, dtype: DTypeLike
) -> nnx.Param[Array]:
    """Draws a bias, by default with PyTorch's law for the kernel's fan."""
    return drawn(rngs, init or initializers.torch_bias(fan_in), (size,), dtype)
