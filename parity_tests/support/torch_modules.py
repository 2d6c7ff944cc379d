"""PyTorch modules with awkward options: what from_torch must carry, and what it must refuse."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

SHAPE = (3, 5, 4, 4)  # of a batch of images, features last
LONG = (3, 6, 4)  # of sequences with 4 channels


def _activations() -> nn.Module:
    """Every activation, each behind a layer that gives it values on both sides of its kinks."""
    found = [
        nn.CELU(0.7), nn.ELU(0.4), nn.GELU("tanh"), nn.GELU(), nn.Hardshrink(0.2),
        nn.Hardsigmoid(), nn.Hardswish(), nn.Hardtanh(-0.5, 2.0), nn.LeakyReLU(0.2),
        nn.LogSigmoid(), nn.Mish(), nn.PReLU(init=0.3), nn.ReLU(), nn.ReLU6(), nn.SELU(),
        nn.SiLU(), nn.Sigmoid(), nn.Softplus(2.0, 1.5), nn.Softshrink(0.1), nn.Softsign(),
        nn.Tanh(), nn.Tanhshrink(), nn.Threshold(0.1, -0.5),
    ]  # fmt: skip
    return nn.Sequential(*(part for act in found for part in (act, nn.Linear(4, 4))))


def _shared() -> nn.Module:
    layer, act = nn.Linear(4, 4), nn.LeakyReLU(0.3)
    return nn.Sequential(layer, act, layer, act)


class Case:
    """A module and the shape of its input, features last.

    Args:
      make: builds the module.
      shape: of the input.
    """

    def __init__(self, make: Callable[[], nn.Module], shape: tuple[int, ...] = SHAPE) -> None:
        self.make = make
        self.shape = shape


Net = nn.Sequential
CASES: dict[str, Case] = {
    "convolutional": Case(lambda: Net(
        nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(6, 1e-2, 0.3),
        nn.LeakyReLU(0.2), nn.MaxPool2d(2, 2, 1), nn.Flatten(), nn.Linear(24, 5),
        nn.BatchNorm1d(5, momentum=None), nn.GELU("tanh"),
    )),
    "padding modes": Case(lambda: Net(
        nn.Conv2d(4, 3, (3, 2), padding=(1, 2), dilation=(1, 2), padding_mode="reflect"),
        nn.Conv2d(3, 3, 3, padding="same", padding_mode="circular"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(4, 2, 2, padding="valid"),
    )),
    "transposed": Case(lambda: Net(
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, False, 2),
        nn.ConvTranspose2d(6, 2, (2, 3), output_padding=0),
    )),
    "one axis": Case(lambda: Net(
        nn.Conv1d(4, 6, 3, 2, 2, 2, 2, False, "circular"), nn.BatchNorm1d(6, affine=False),
        nn.ConvTranspose1d(6, 4, 3, 2, 1, 1, 2, False, 2), nn.InstanceNorm1d(4, 1e-3, affine=True),
        nn.MaxPool1d(3, 2, 1, 1, ceil_mode=True), nn.AdaptiveAvgPool1d(3),
        nn.AvgPool1d(2, 1, 1, ceil_mode=True, count_include_pad=False),
    ), (3, 9, 4)),
    "three axes": Case(lambda: Net(
        nn.Conv3d(2, 4, 2, (1, 2, 1), 1, 1, 2, False, "replicate"), nn.BatchNorm3d(4, 1e-3),
        nn.ConvTranspose3d(4, 2, 2, 2, 1, 1, 2, False, 2),
        nn.InstanceNorm3d(2, 1e-2, 0.2, True, True),
        nn.MaxPool3d(2, 1, 1, 1, ceil_mode=True), nn.AdaptiveAvgPool3d((2, None, 3)),
        nn.AvgPool3d(2, 1, 1, ceil_mode=True, count_include_pad=False, divisor_override=3),
    ), (2, 3, 2, 3, 2)),
    "pools": Case(lambda: Net(
        nn.Conv2d(4, 3, 1), nn.MaxPool2d(3, 1, 1, 2, ceil_mode=True),
        nn.ConstantPad2d((1, 0, 2, 1), 0.5),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False, divisor_override=4),
        nn.ZeroPad2d((0, 2, 1, 0)), nn.AdaptiveAvgPool2d((None, 2)), nn.ReflectionPad2d(1),
        nn.ReplicationPad2d((1, 0, 0, 2)), nn.CircularPad2d(1),
    )),
    # A convolution before each norm with statistics: of normalised data its mean would be 0.
    "norms": Case(lambda: Net(
        nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1),
        nn.InstanceNorm2d(4, 1e-3, 0.4, False, True), nn.InstanceNorm2d(4, 1e-2),
        nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4, 1e-3, 0.2, False),
        nn.SyncBatchNorm(4, track_running_stats=False),
        nn.InstanceNorm2d(4, affine=True, bias=False),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, bias=False), nn.GroupNorm(2, 4, 1e-2),
        nn.BatchNorm2d(4, 1e-3, track_running_stats=False), nn.GroupNorm(4, 4, affine=False),
        nn.BatchNorm2d(4, momentum=0.0),
    )),
    "features in two places": Case(lambda: Net(
        nn.Linear(4, 6), nn.Conv2d(4, 5, 3, padding=1), nn.LayerNorm(6, 1e-2),
        nn.RMSNorm((5, 6), 1e-3, False), nn.GroupNorm(5, 5), nn.RMSNorm(6, 1e-2), nn.Softmax(1),
        nn.LayerNorm((5, 6), bias=False), nn.LayerNorm(6, elementwise_affine=False),
        nn.LogSoftmax(-1), nn.Flatten(2), nn.Linear(30, 2, bias=False), nn.Softmin(2),
    )),
    "generator": Case(lambda: Net(
        nn.Linear(4, 16), nn.BatchNorm1d(16, 1e-3, 0.2, False), nn.Unflatten(1, (4, 2, 2)),
        nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Flatten(1, 2), nn.GLU(1), nn.Tanh(),
    ), (5, 4)),
    "nested and named": Case(lambda: Net(
        Net(nn.Conv2d(4, 4, 1), nn.Identity()), Net(),
        Net(OrderedDict(relu=nn.ReLU(), deeper=Net(nn.Conv2d(4, 2, 3), nn.Flatten()))),
        Net(OrderedDict(head=nn.Linear(12, 3))),
    )),
    "shared": Case(_shared, (3, 4)),
    "activations": Case(_activations, (16, 4)),
    "dropouts": Case(lambda: Net(
        nn.Dropout2d(0.4), nn.Dropout(0.2), nn.AlphaDropout(0.3), nn.Flatten(),
        nn.Linear(80, 6), nn.Dropout(0.7),
    )),
    "encoder": Case(lambda: Net(
        nn.TransformerEncoderLayer(6, 3, 8, 0.0, nn.GELU("tanh"), 1e-3, True, True, False),
        nn.TransformerEncoderLayer(6, 2, 5, 0.0, "gelu", batch_first=True), nn.Linear(6, 2),
    ), LONG),
}  # fmt: skip


def _hooked() -> nn.Module:
    net = Net(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].register_forward_hook(lambda *_: None)
    return net


def _tied() -> nn.Module:
    net = Net(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    return net


def _replaced() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, batch_first=True)
    layer.norm1 = nn.Identity()
    return layer


def _patched() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    return layer


def _retracked() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.track_running_stats = False
    return layer


def _uneven() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, batch_first=True)
    layer.dropout1.p = 0.3
    return layer


def _mixed() -> nn.Module:
    layer = nn.LayerNorm(4)
    layer.bias.data = layer.bias.data.bfloat16()
    return layer


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A layer with PyTorch's forward."""


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "upsample": (lambda: Net(nn.Identity(), nn.Upsample(scale_factor=2)), "'1' Upsample: jax.im"),
    "lstm": (lambda: nn.LSTM(2, 2), "LSTM: its twin is nnx.RNN"),
    "unknown": (lambda: Net(nn.ReLU(), Doubled(2, 2)), "'1' Doubled: it has a forward of its own"),
    "hook": (_hooked, "'1' Linear: it has a hook"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "it is parametrized"
    ),
    "patched": (_patched, "its forward was replaced"),
    "tied": (_tied, "'1' Linear: '0.weight' and '1.weight' are one tensor"),
    "replaced": (_replaced, "its part 'norm1' was replaced"),
    "retracked": (_retracked, "track_running_stats was changed"),
    "uneven": (_uneven, "drop with one probability"),
    "mixed": (_mixed, "it must have one dtype, got bfloat16, float32"),
    "lazy": (lambda: Net(nn.LazyLinear(3)), "'0' LazyLinear: 'weight' has no values yet"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "'weight' has no values yet"),
    "max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0), "max_norm changes the table"),
    "scaled": (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), "changes the gradient"),
    "sparse": (lambda: nn.Embedding(3, 2, sparse=True), "JAX has no sparse gradients"),
    "slopes": (lambda: nn.PReLU(3), "one slope for all channels"),
    "sequence first": (lambda: nn.MultiheadAttention(4, 2), r"\(N, L, C\). Build it with batch_f"),
    "sequence first layer": (lambda: nn.TransformerEncoderLayer(4, 2), "batch_first=True"),
    "indices": (lambda: Net(nn.MaxPool2d(2, return_indices=True)), "the places of the maxima"),
    "no dim": (lambda: Net(nn.Softmax()), "dim must be a number, got None"),
    "cutting": (lambda: Net(nn.ZeroPad2d((-1, 0, 0, 0))), "padding that cuts off"),
    "dropping": (lambda: Net(nn.Dropout(0.1)), "'0' Dropout: it drops.*Pass rngs="),
    "same": (lambda: nn.Conv2d(2, 2, 3), "alone it wants layout='image', got layout=None"),
}  # fmt: skip
