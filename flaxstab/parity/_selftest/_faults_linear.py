"""Faults of linear, convolution and embedding layers."""

from typing import TYPE_CHECKING

import jax.numpy as jnp

from flaxstab import functional
from flaxstab._typing import Array
from flaxstab.functional import _linear, _transposed
from flaxstab.functional._linear import Pairs
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


def _torch_conv(make: Function) -> Plant:
    def plant() -> Planted:
        import torch

        return replaced(torch.nn.Conv2d, "_conv_forward", make)

    return plant


def _torch_conv_argument(**changes: Function) -> Plant:
    def plant() -> Planted:
        import torch

        return argument(torch.nn.Conv2d, "_conv_forward", **changes)

    return plant


def _torch_linear(formula: Function) -> Plant:
    def plant() -> Planted:
        import torch

        return replaced(torch.nn.Linear, "forward", lambda _: formula)

    return plant


def _torch_in_place() -> Planted:
    import torch

    def make(original: Function) -> Function:
        def faulty(layer: "torch.nn.Linear", x: "torch.Tensor") -> "torch.Tensor":
            y = original(layer, x)
            x.data.mul_(1.5)
            return y

        return faulty

    return replaced(torch.nn.Linear, "forward", make)


def _torch_padded(before: int, after: int) -> Plant:
    """Plants the convolution of an image padded unevenly, at the layer's stride."""

    def faulty(
        layer: "torch.nn.Conv2d", x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor"
    ) -> "torch.Tensor":
        functional = torch_functional()
        padded = functional.pad(x, (before, after) * 2)
        return functional.conv2d(padded, weight, bias, layer.stride)

    return _torch_conv(lambda _: faulty)


def _undilated(
    layer: "torch.nn.Conv2d", x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor"
) -> "torch.Tensor":
    return torch_functional().conv2d(x, weight, bias, layer.stride, layer.padding)


def _conv_argument(**changes: Function) -> Plant:
    return lambda: argument(functional, "conv", **changes)


def _swapped_channels(x: Array) -> Array:
    """Deals the channels 0, 2, 1, 3 to the two groups."""
    return x[..., jnp.array([0, 2, 1, 3])]


def _conv_transpose_argument(**changes: Function) -> Plant:
    return lambda: argument(functional, "conv_transpose", **changes)


def _torch_kernel(change: Function) -> Plant:
    """Plants a change of the kernel (in, out, *window) of a transposed convolution."""

    def make(original: Function) -> Function:
        return lambda x, weight, *others: original(x, change(weight), *others)

    return lambda: replaced(torch_functional(), "conv_transpose2d", make)


def _longer_in_front(pairs: Pairs) -> Pairs:
    return tuple((high, low) for low, high in pairs)


def _torch_longer_in_front(original: Function) -> Function:
    """Keeps what lies one pixel before: of the case's padding 1 and output padding 1."""

    def faulty(
        x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor", stride: tuple[int, int],
        *_: object,
    ) -> "torch.Tensor":  # fmt: skip
        return original(x, weight, bias, stride)[:, :, :-1, :-1]

    return faulty


def _zero_row(original: Function) -> Function:
    def faulty(indices: Array, table: Array, padding_idx: int) -> Array:
        rows = original(indices, table, padding_idx=padding_idx)
        return jnp.where((indices == padding_idx)[..., None], 0, rows)

    return faulty


def _torch_zero_row(original: Function) -> Function:
    def faulty(
        ids: "torch.Tensor", weight: "torch.Tensor", padding_idx: int, *_: object
    ) -> "torch.Tensor":
        rows = original(ids, weight, padding_idx)
        return rows.masked_fill((ids == padding_idx)[..., None], 0)

    return faulty


def _torch_padding_row(change: Function) -> Plant:
    return lambda: argument(torch_functional(), "embedding", padding_idx=change)


_AFFINE = [
    Fault(
        "transposed square kernel", "a kernel maps from its first axis to its second", "linear",
        "output",
        lambda: argument(functional, "linear", kernel=lambda kernel: kernel.T),
        _torch_linear(lambda layer, x: x @ layer.weight + layer.bias),
    ),
    Fault(
        "linear without bias", "the bias is added", "linear", "output",
        lambda: argument(functional, "linear", bias=lambda _: None),
        _torch_linear(lambda layer, x: x @ layer.weight.T),
    ),
    Fault(
        "1e-9 too large", "float64 agrees to 1e-12", "linear", "output",
        lambda: result(functional, "linear", lambda y: y * (1 + 1e-9)),
        _torch_linear(lambda layer, x: (x @ layer.weight.T + layer.bias) * (1 + 1e-9)),
    ),
    Fault(
        "input changed in place", "an input is left as it is", "linear", "grad weight",
        None,  # JAX's arrays do not change
        _torch_in_place,
    ),
    Fault(
        "flipped kernel", "a convolution is a correlation", "conv", "output",
        _conv_argument(kernel=lambda kernel: kernel[::-1, ::-1]),
        _torch_conv_argument(weight=lambda weight: weight.flip(2, 3)),
    ),
    Fault(
        "kernel axes swapped", "the window's axes keep their order", "conv", "output",
        _conv_argument(kernel=lambda kernel: kernel.swapaxes(0, 1)),
        _torch_conv_argument(weight=lambda weight: weight.mT),
    ),
    Fault(
        "conv without bias", "the bias is added", "conv", "output",
        _conv_argument(bias=lambda _: None),
        _torch_conv_argument(bias=lambda _: None),
    ),
    Fault(
        "SAME padding at stride 2", "padding=1 pads on both sides", "conv, stride 2", "output",
        lambda: result(_linear, "padding_pairs", lambda _: ((0, 1), (0, 1))),
        _torch_padded(0, 1),
    ),
    Fault(
        "windows one pixel early", "the first window starts at -padding", "conv, stride 2",
        "output",
        lambda: result(_linear, "padding_pairs", lambda _: ((2, 0), (2, 0))),
        _torch_padded(2, 0),
    ),
    Fault(
        "dilation ignored", "dilation spaces the window", "conv, dilated", "output",
        _conv_argument(dilation=lambda _: 1),
        _torch_conv(lambda _: _undilated),
    ),
    Fault(
        "channels dealt to groups in turn", "a group is neighbouring channels", "conv in groups",
        "output",
        _conv_argument(x=_swapped_channels),
        _torch_conv_argument(input=lambda x: x[:, [0, 2, 1, 3]]),
    ),
]  # fmt: skip

_TRANSPOSED = [
    Fault(
        "transposed kernel flipped", "a transposed convolution spreads the kernel as it is",
        "conv transpose", "output",
        _conv_transpose_argument(kernel=lambda kernel: kernel[::-1, ::-1]),
        _torch_kernel(lambda weight: weight.flip(2, 3)),
    ),
    Fault(
        "in and out swapped", "a transposed kernel's first channels are the input's",
        "conv transpose", "output",
        _conv_transpose_argument(kernel=lambda kernel: kernel.swapaxes(-1, -2)),
        _torch_kernel(lambda weight: weight.swapaxes(0, 1)),
    ),
    Fault(
        "output padding in front", "output padding is added behind", "conv transpose", "output",
        lambda: result(_transposed, "transposed_pairs", _longer_in_front),
        lambda: replaced(torch_functional(), "conv_transpose2d", _torch_longer_in_front),
    ),
    Fault(
        "transposed groups dealt in turn", "a group's outputs are neighbouring channels",
        "conv transpose in groups", "output",
        lambda: result(functional, "conv_transpose", _swapped_channels),
        lambda: result(torch_functional(), "conv_transpose2d", lambda y: y[:, [0, 2, 1, 3]]),
    ),
]  # fmt: skip

_EMBEDDING = [
    Fault(
        "padding row learns", "the padding row gets no gradient", "embedding", "grad weight",
        lambda: argument(functional, "embedding", padding_idx=lambda _: None),
        _torch_padding_row(lambda _: None),
    ),
    Fault(
        "padding row read as 0", "the padding row is looked up like any other", "embedding",
        "output",
        lambda: replaced(functional, "embedding", _zero_row),
        lambda: replaced(torch_functional(), "embedding", _torch_zero_row),
    ),
    Fault(
        "padding row one off", "padding_idx counts from 0", "embedding", "grad weight",
        lambda: argument(functional, "embedding", padding_idx=lambda row: row - 1),
        _torch_padding_row(lambda row: row - 1),
    ),
]  # fmt: skip

LINEAR = (*_AFFINE, *_TRANSPOSED, *_EMBEDDING)
