"""Faults of activations, pooling and losses."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from flaxstab import functional
from flaxstab._typing import Array
from flaxstab.functional import _losses
from flaxstab.parity._selftest._plant import (
    Fault,
    Function,
    Plant,
    argument,
    replaced,
    result,
    torch_functional,
)

if TYPE_CHECKING:
    import torch


def _other_slope(original: Function) -> Function:
    def faulty(x: Array) -> Array:
        near = jax.nn.gelu(x, approximate=True)
        return near + jax.lax.stop_gradient(original(x) - near)

    return faulty


def _torch_other_slope(original: Function) -> Function:
    def faulty(x: "torch.Tensor") -> "torch.Tensor":
        near = original(x, approximate="tanh")
        return near + (original(x) - near).detach()

    return faulty


def _cropped_zeros(original: Function) -> Function:
    """Pads a maximum by zeros."""

    def faulty(x: Array, size: int, stride: int, padding: int) -> Array:
        frame = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        return original(jnp.pad(x, frame), size, stride, 0)

    return faulty


def _torch_cropped_zeros(original: Function) -> Function:
    def faulty(x: "torch.Tensor", size: int, stride: int, padding: int) -> "torch.Tensor":
        return original(torch_functional().pad(x, (padding,) * 4), size, stride, 0)

    return faulty


def _apart(x: "Array | torch.Tensor", mean: Function) -> "list[Array | torch.Tensor]":
    """Averages windows that end before the next begins: 0 to 2, 2 to 4, 4 to 7 of 7."""
    return [mean(x, slice(*ends)) for ends in ((0, 2), (2, 4), (4, 7))]


def _disjoint(original: Function) -> Function:
    del original

    def faulty(x: Array, size: int) -> Array:
        del size
        x = jnp.stack(_apart(x, lambda x, cut: x[:, cut].mean(1)), 1)
        return jnp.stack(_apart(x, lambda x, cut: x[:, :, cut].mean(2)), 2)

    return faulty


def _torch_disjoint(original: Function) -> Function:
    del original

    def faulty(x: "torch.Tensor", size: int) -> "torch.Tensor":
        import torch

        del size
        x = torch.stack(_apart(x, lambda x, cut: x[:, :, cut].mean(2)), 2)
        return torch.stack(_apart(x, lambda x, cut: x[:, :, :, cut].mean(3)), 3)

    return faulty


_SHAPES = [
    Fault(
        "tanh GELU", "GELU is the exact one", "gelu", "output",
        lambda: replaced(functional, "gelu", lambda _: lambda x: jax.nn.gelu(x, approximate=True)),
        lambda: replaced(
            torch_functional(), "gelu", lambda f: lambda x: f(x, approximate="tanh")
        ),
    ),
    Fault(
        "gradient of the tanh GELU", "a gradient is that of the value", "gelu", "grad input",
        lambda: replaced(functional, "gelu", _other_slope),
        lambda: replaced(torch_functional(), "gelu", _torch_other_slope),
    ),
    Fault(
        "maximum over zeros", "padding never wins a maximum", "max pool", "output",
        lambda: replaced(functional, "max_pool", _cropped_zeros),
        lambda: replaced(torch_functional(), "max_pool2d", _torch_cropped_zeros),
    ),
    Fault(
        "infinity clipped", "infinity stays infinite", "max pool of infinity", "output",
        lambda: result(functional, "max_pool", lambda y: jnp.clip(y, max=jnp.finfo(y.dtype).max)),
        lambda: result(torch_functional(), "max_pool2d", lambda y: y.nan_to_num()),
    ),
    Fault(
        "padding not counted", "an average counts the padding", "avg pool", "output",
        lambda: argument(functional, "avg_pool", count_include_pad=lambda _: False),
        lambda: replaced(
            torch_functional(), "avg_pool2d",
            lambda f: lambda *args: f(*args, count_include_pad=False),
        ),
    ),
    Fault(
        "adaptive windows apart", "adaptive windows may overlap", "adaptive avg pool", "output",
        lambda: replaced(functional, "adaptive_avg_pool", _disjoint),
        lambda: replaced(torch_functional(), "adaptive_avg_pool2d", _torch_disjoint),
    ),
]  # fmt: skip


def _among_others(smoothing: float) -> float:
    """The smoothing that gives e / (K - 1) to the other classes and none of e to the label's."""
    return smoothing * 5 / 4  # of the case's K = 5 classes


def _all_counted(original: Function) -> Function:
    def faulty(*arguments: Array) -> tuple[Array, Array]:
        losses, total = original(*arguments)
        return losses, jnp.asarray(losses.size, total.dtype)

    return faulty


def _torch_all_counted(original: Function) -> Function:
    def faulty(logits: "torch.Tensor", labels: "torch.Tensor", **options: float) -> "torch.Tensor":
        return original(logits, labels, reduction="sum", **options) / len(labels)

    return faulty


def _entropy_argument(**changes: Function) -> tuple[Plant, Plant]:
    return (
        lambda: argument(functional, "cross_entropy", **changes),
        lambda: argument(torch_functional(), "cross_entropy", **changes),
    )


_LOSSES = [
    Fault(
        "smoothing over K - 1", "smoothing spreads over all classes", "cross entropy", "output",
        *_entropy_argument(label_smoothing=_among_others),
    ),
    Fault(
        "ignored labels counted", "the mean is over the labels that count", "cross entropy",
        "output",
        lambda: replaced(_losses, "_hard", _all_counted),
        lambda: replaced(torch_functional(), "cross_entropy", _torch_all_counted),
    ),
    Fault(
        "sum for mean", "the default reduction is the mean", "cross entropy", "output",
        *_entropy_argument(reduction=lambda _: "sum"),
    ),
    Fault(
        "mean over samples", "a weighted mean divides by the weights",
        "cross entropy, classes weighted", "output",
        lambda: replaced(_losses, "_hard", _all_counted),
        lambda: replaced(torch_functional(), "cross_entropy", _torch_all_counted),
    ),
]  # fmt: skip

LAYERS = (*_SHAPES, *_LOSSES)
