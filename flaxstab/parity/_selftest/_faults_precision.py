"""Faults of precision, and values that are no numbers."""

from functools import reduce
from operator import add
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from flaxstab import functional
from flaxstab._typing import Array
from flaxstab.functional import Moments, _standardize
from flaxstab.functional._moments import Sets
from flaxstab.parity._selftest._plant import (
    Fault,
    Function,
    Plant,
    Planted,
    argument,
    replaced,
    result,
    torch_functional,
)

if TYPE_CHECKING:
    import torch


def _torch_linear(x_change: Function | None = None, y_change: Function | None = None) -> Plant:
    def plant() -> Planted:
        import torch

        def make(original: Function) -> Function:
            def faulty(layer: "torch.nn.Linear", x: "torch.Tensor") -> "torch.Tensor":
                y = original(layer, x if x_change is None else x_change(x))
                return y if y_change is None else y_change(y)

            return faulty

        return replaced(torch.nn.Linear, "forward", make)

    return plant


def _promoted(y: Array) -> Array:
    return y.astype(jnp.promote_types(y.dtype, jnp.float32))


def _torch_promoted(y: "torch.Tensor") -> "torch.Tensor":
    return y if y.dtype.itemsize >= 4 else y.float()


def _tf32(x: Array) -> Array:
    """Rounds float32 to 10 bits, as matrix units do."""
    return jax.lax.reduce_precision(x, 8, 10) if x.dtype == jnp.float32 else x


def _torch_tf32(x: "torch.Tensor") -> "torch.Tensor":
    import torch

    if x.dtype != torch.float32:
        return x
    with torch.no_grad():
        scaled = x * (2**13 + 1)  # Veltkamp's splitting
        rounded = scaled - (scaled - x)
    return x + (rounded - x.detach())


def bfloat16_of(x: Array) -> Array:
    """Returns what was widened from bfloat16 as it was; float64 stays."""
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


def _low_moments(x: Array, sets: Sets) -> Moments:
    """Adds up one element after the other in the input's own dtype."""
    del sets
    x, wide, features = bfloat16_of(x), x.dtype, x.shape[-1]

    def average(values: Array) -> Array:
        start = jnp.zeros(values.shape[:-1], values.dtype)
        total, _ = jax.lax.scan(lambda total, v: (total + v, None), start, values.T)
        return total[:, None] / features

    mean = average(x)
    var = average((x - mean) * (x - mean)).astype(wide)
    return Moments(mean.astype(wide), jnp.zeros_like(var), var, features)


def _torch_low_sums(
    x: "torch.Tensor", shape: object, weight: "torch.Tensor", bias: "torch.Tensor", eps: float
) -> "torch.Tensor":
    del shape
    features = x.shape[-1]

    def average(values: "torch.Tensor") -> "torch.Tensor":
        return reduce(add, values.split(1, -1)) / features

    mean = average(x)
    var = average((x - mean) * (x - mean))
    return (x - mean) / (var + eps).sqrt() * weight + bias


def _shiftless(logits: Array, axis: int) -> Array:
    return logits - jnp.log(jnp.sum(jnp.exp(logits), axis, keepdims=True))


def _torch_shiftless(logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    kept = labels >= 0
    logits, labels = logits[kept], labels[kept]
    losses = logits.exp().sum(1).log() - logits[range(len(labels)), labels]
    return losses.mean()


PRECISION = (
    Fault(
        "float32 inside a float64 run", "float64 passes through nothing narrower", "linear",
        "output",
        lambda: result(functional, "linear", lambda y: y.astype(jnp.float32).astype(y.dtype)),
        _torch_linear(y_change=lambda y: y.float().to(y.dtype)),
    ),
    Fault(
        "TF32 products", "float32 has float32's digits", "linear, float32", "output",
        lambda: argument(functional, "linear", x=_tf32, kernel=_tf32),
        _torch_linear(x_change=_torch_tf32),
    ),
    Fault(
        "output in float32", "the output has the input's dtype", "linear, bfloat16", "output",
        lambda: result(functional, "linear", _promoted),
        _torch_linear(y_change=_torch_promoted),
    ),
    Fault(
        "sums in bfloat16", "statistics run in float32", "layer norm, bfloat16", "output",
        lambda: replaced(_standardize, "local_moments", lambda _: _low_moments),
        lambda: replaced(torch_functional(), "layer_norm", lambda _: _torch_low_sums),
    ),
    Fault(
        "softmax without shift", "large logits overflow nothing", "cross entropy, large logits",
        "output",
        lambda: replaced(jax.nn, "log_softmax", lambda _: _shiftless),
        lambda: replaced(torch_functional(), "cross_entropy", lambda _: _torch_shiftless),
    ),
    Fault(
        "NaN dropped", "NaN stays NaN", "linear of NaN", "output",
        lambda: argument(functional, "linear", x=lambda x: jnp.where(jnp.isnan(x), 0, x)),
        _torch_linear(x_change=lambda x: x.nan_to_num()),
    ),
)  # fmt: skip
