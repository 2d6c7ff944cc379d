"""Faults that the comparison is known not to see, each with the reason.

They are planted like the others, so that the day on which one is seen does not pass unnoticed.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from flaxstab import functional
from flaxstab._typing import Array
from flaxstab.functional import Moments, RunningStats, _standardize
from flaxstab.functional._moments import Sets
from flaxstab.parity._selftest._faults_precision import bfloat16_of
from flaxstab.parity._selftest._plant import (
    Fault,
    Function,
    Planted,
    replaced,
    result,
    torch_functional,
)

if TYPE_CHECKING:
    import torch


def _torch_constant(original: Function) -> Function:
    def faulty(
        x: "torch.Tensor", mean: object, var: object, weight: object, bias: object,
        training: bool, *others: float,
    ) -> "torch.Tensor":  # fmt: skip
        y = original(x, mean, var, weight, bias, training, *others)
        return y if training else y.detach()

    return faulty


def _low_statistics(original: Function) -> Function:
    def faulty(x: Array, running: RunningStats, *others: Array, **options: object) -> Array:
        mean, var = (a.astype(x.dtype).astype(a.dtype) for a in running[:2])
        return original(x, running._replace(mean=mean, var=var), *others, **options)

    return faulty


def _torch_low_statistics(original: Function) -> Function:
    def faulty(
        x: "torch.Tensor", mean: "torch.Tensor", var: "torch.Tensor", weight: object, bias: object,
        training: bool, *others: float,
    ) -> "torch.Tensor":  # fmt: skip
        if not training:
            mean, var = (a.to(x.dtype).to(a.dtype) for a in (mean, var))
        return original(x, mean, var, weight, bias, training, *others)

    return faulty


def _kept_low(running: RunningStats) -> RunningStats:
    """Remembers in bfloat16, except in a float64 run."""
    if running.mean.dtype != jnp.float32:
        return running
    mean, var = (a.astype(jnp.bfloat16).astype(a.dtype) for a in running[:2])
    return running._replace(mean=mean, var=var)


def _torch_statistics_low() -> Planted:
    from torch.nn.modules.batchnorm import _BatchNorm

    def make(original: Function) -> Function:
        def faulty(layer: "torch.nn.BatchNorm2d", x: "torch.Tensor") -> "torch.Tensor":
            y = original(layer, x)
            for kept in (layer.running_mean, layer.running_var):
                if kept.dtype.itemsize == 4:
                    kept.data.copy_(kept.bfloat16())
            return y

        return faulty

    return replaced(_BatchNorm, "forward", make)


def _rounded_moments(original: Function) -> Function:
    def faulty(x: Array, sets: Sets) -> Moments:
        found = original(x, sets)
        low = lambda a: bfloat16_of(a).astype(a.dtype)  # noqa: E731
        return Moments(low(found.mean), jnp.zeros_like(found.mean), low(found.var), found.size)

    return faulty


def _torch_rounded_moments(
    x: "torch.Tensor", shape: object, weight: "torch.Tensor", bias: "torch.Tensor", eps: float
) -> "torch.Tensor":
    del shape
    wide = x.float() if x.dtype.itemsize < 4 else x
    mean, var = wide.mean(-1, True), wide.var(-1, correction=0, keepdim=True)
    mean, var = (a.to(x.dtype).to(wide.dtype) for a in (mean, var))
    return ((wide - mean) / (var + eps).sqrt() * weight + bias).to(x.dtype)


_NO_GRADIENT = "gradients are compared in training alone"
_BELOW = "rounding the inputs to bfloat16, which the bound allows twice, may do as much"

LIMITS = (
    Fault(
        "no gradient in evaluation", "evaluation can be differentiated", "batch norm", "evaluation",
        lambda: result(functional, "batch_norm_inference", jax.lax.stop_gradient),
        lambda: replaced(torch_functional(), "batch_norm", _torch_constant),
        _NO_GRADIENT,
    ),
    Fault(
        "evaluation by bfloat16 statistics", "statistics are never cast down",
        "batch norm, bfloat16", "evaluation",
        lambda: replaced(functional, "batch_norm_inference", _low_statistics),
        lambda: replaced(torch_functional(), "batch_norm", _torch_low_statistics),
        _BELOW,
    ),
    Fault(
        "statistics kept in bfloat16", "statistics stay in float32", "batch norm, bfloat16",
        "step",
        lambda: result(RunningStats, "update", _kept_low),
        _torch_statistics_low,
        _BELOW,
    ),
    Fault(
        "moments rounded to bfloat16", "statistics are never cast down", "layer norm, bfloat16",
        "output",
        lambda: replaced(_standardize, "local_moments", _rounded_moments),
        lambda: replaced(torch_functional(), "layer_norm", lambda _: _torch_rounded_moments),
        _BELOW,
    ),
)  # fmt: skip
