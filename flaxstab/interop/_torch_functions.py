"""What PyTorch's layers without parameters compute, in JAX: activations, pools, shapes."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from flaxstab import functional
from flaxstab._checks import check
from flaxstab._dtypes import widest
from flaxstab._typing import Array, Shape

Place = Literal["last", "torch", "flat"]
"""Where a tensor's features lie: behind, where PyTorch has them, or it has two axes only."""


def moved(x: Array, place: Place | None) -> Array:
    """Returns an array with axis 1 last (``'last'``), or the last axis at 1 (``'torch'``).

    Arrays of two axes, and integers, which have no features, stay as they are.
    """
    if place is None or x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.moveaxis(x, 1, -1) if place == "last" else jnp.moveaxis(x, -1, 1)


@dataclass(frozen=True)
class Function:
    """A function of one array by the name of PyTorch's module, with that module's options.

    Args:
      name: of the class in ``torch.nn``.
      options: attributes of PyTorch's module and their values.
    """

    name: str
    options: tuple[tuple[str, object], ...] = ()

    def __call__(self, x: Array) -> Array:
        """Applies the function."""
        options = dict(self.options)
        if self.name in _ELEMENTWISE:
            # As PyTorch, which rounds the result to 16 bits and nothing before.
            wide = jnp.asarray(x, widest(x.dtype))
            return jnp.asarray(_ELEMENTWISE[self.name](wide, **options), x.dtype)
        name = re.sub("[123]d$", "", self.name)
        if name != self.name:
            axes = int(self.name[-2]) + 2
            fix = "Give it a batch axis, as in (N, ..., C)."
            check(x.ndim == axes, f"{self.name} takes {axes} axes", fix=fix, shape=x.shape)
        return _SHAPED[name](x, **options)


class Applied(nnx.Module):
    """A layer without parameters: a function, before and behind it a move of the features.

    Args:
      function: what is applied.
      before: where the features are moved to before, see :func:`moved`.
      after: where they are moved to behind.
    """

    def __init__(
        self, function: Function, before: Place | None = None, after: Place | None = None
    ) -> None:
        self.function = function
        self.before = before
        self.after = after

    def __call__(self, x: Array) -> Array:
        """Maps an array as PyTorch's module maps a tensor."""
        return moved(self.function(moved(x, self.before)), self.after)


def _celu(x: Array, alpha: float) -> Array:
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0, x) / alpha))


def _elu(x: Array, alpha: float) -> Array:
    # alpha, not 1, is PyTorch's slope at 0.
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0, x)))


def _gelu(x: Array, approximate: str) -> Array:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _hardshrink(x: Array, lambd: float) -> Array:
    return jnp.where(jnp.abs(x) <= lambd, 0, x)  # NaN stays, as in PyTorch


def _hardtanh(x: Array, min_val: float, max_val: float) -> Array:
    # A slope of 0 at both bounds: jnp.clip has one half.
    return jnp.where(x <= min_val, min_val, jnp.where(x >= max_val, max_val, x))


def _hardsigmoid(x: Array) -> Array:
    return _hardtanh(x / 6 + 0.5, 0.0, 1.0)


def _hardswish(x: Array) -> Array:
    return jnp.where(x <= -3, 0, jnp.where(x >= 3, x, x * (x + 3) / 6))


def _leaky_relu(x: Array, negative_slope: float) -> Array:
    # The slope below 0, at 0 too: jax.nn.leaky_relu has 1 there.
    return jnp.where(x > 0, x, negative_slope * x)


def _mish(x: Array) -> Array:
    return x * jnp.tanh(jnp.logaddexp(x, jnp.zeros_like(x)))


def _selu(x: Array) -> Array:
    return 1.0507009873554804934193349852946 * _elu(x, 1.6732632423543772848170429916717)


def _softplus(x: Array, beta: float, threshold: float) -> Array:
    linear = beta * x > threshold
    inside = jnp.where(linear, 0, beta * x)
    return jnp.where(linear, x, jnp.logaddexp(inside, jnp.zeros_like(x)) / beta)


def _softshrink(x: Array, lambd: float) -> Array:
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, 0 * x))


def _threshold(x: Array, threshold: float, value: float) -> Array:
    return jnp.where(x <= threshold, value, x)


_ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "CELU": _celu,
    "ELU": _elu,
    "GELU": _gelu,
    "GLU": lambda x, dim: jax.nn.glu(x, axis=dim),
    "Hardshrink": _hardshrink,
    "Hardsigmoid": _hardsigmoid,
    "Hardswish": _hardswish,
    "Hardtanh": _hardtanh,
    "LeakyReLU": _leaky_relu,
    "LogSigmoid": jax.nn.log_sigmoid,
    "LogSoftmax": lambda x, dim: jax.nn.log_softmax(x, axis=dim),
    "Mish": _mish,
    "ReLU": jax.nn.relu,
    "ReLU6": lambda x: _hardtanh(x, 0.0, 6.0),
    "SELU": _selu,
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
    "Softmax": lambda x, dim: jax.nn.softmax(x, axis=dim),
    "Softmin": lambda x, dim: jax.nn.softmax(-x, axis=dim),
    "Softplus": _softplus,
    "Softshrink": _softshrink,
    "Softsign": jax.nn.soft_sign,
    "Tanh": jnp.tanh,
    "Tanhshrink": lambda x: x - jnp.tanh(x),
    "Threshold": _threshold,
}


def _identity(x: Array) -> Array:
    return x


def _adaptive_avg_pool(x: Array, output_size: int | Shape | None) -> Array:
    space = x.shape[1:-1]
    sizes = output_size if isinstance(output_size, tuple) else (output_size,) * len(space)
    wanted = tuple(n if size is None else size for size, n in zip(sizes, space, strict=True))
    return functional.adaptive_avg_pool(x, wanted)


_Mode = Literal["edge", "reflect", "wrap"]


def _around(x: Array, padding: Shape) -> list[tuple[int, int]]:
    """Returns what is added before and behind each axis; PyTorch names the last axis first."""
    space = [(padding[2 * i], padding[2 * i + 1]) for i in reversed(range(x.ndim - 2))]
    return [(0, 0), *space, (0, 0)]


def _pad(x: Array, padding: Shape, mode: _Mode) -> Array:
    return jnp.pad(x, _around(x, padding), mode=mode)


def _fill(x: Array, padding: Shape, value: float = 0.0) -> Array:
    return jnp.pad(x, _around(x, padding), constant_values=value)


def _flatten(x: Array, start_dim: int, end_dim: int) -> Array:
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return x.reshape(*x.shape[:start], prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


def _unflatten(x: Array, dim: int, unflattened_size: Shape) -> Array:
    axis = dim % x.ndim
    return x.reshape(*x.shape[:axis], *unflattened_size, *x.shape[axis + 1 :])


_SHAPED: dict[str, Callable[..., Array]] = {
    "AdaptiveAvgPool": _adaptive_avg_pool,
    "AvgPool": functional.avg_pool,
    "CircularPad": lambda x, padding: _pad(x, padding, "wrap"),
    "ConstantPad": _fill,
    "Flatten": _flatten,
    "Identity": _identity,
    "MaxPool": functional.max_pool,
    "ReflectionPad": lambda x, padding: _pad(x, padding, "reflect"),
    "ReplicationPad": lambda x, padding: _pad(x, padding, "edge"),
    "Unflatten": _unflatten,
    "ZeroPad": _fill,
}
