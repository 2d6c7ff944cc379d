"""Four small networks in both frameworks, in whose layers faults are planted."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from flaxstab import blocks, functional, linear, models, norms
from flaxstab._typing import Array
from flaxstab.parity._selftest._cases import normal
from flaxstab.parity._selftest._plant import Sides

if TYPE_CHECKING:
    import torch

_CLASSES, _WIDTH, _GROUPS, _HEADS = 3, 4, 2, 2


class _PreAct(nnx.Module):
    """A stem, two pre-activation blocks, a norm, a head."""

    def __init__(self) -> None:
        rngs, wide = nnx.Rngs(0), 2 * _WIDTH
        self.stem = linear.Conv(3, _WIDTH, 3, padding=1, bias=True, rngs=rngs)
        self.block1 = blocks.PreActResBlock(_WIDTH, _WIDTH, _GROUPS, rngs=rngs)
        self.block2 = blocks.PreActResBlock(_WIDTH, wide, _GROUPS, 2, rngs=rngs)
        self.norm = norms.GroupNorm(_GROUPS, wide)
        self.head = linear.Linear(wide, _CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.norm(self.block2(self.block1(self.stem(x))))
        return self.head(functional.relu(x).mean((1, 2)))


class _Encoder(nnx.Module):
    """Two Transformer encoder layers between two linear ones."""

    def __init__(self) -> None:
        rngs, d = nnx.Rngs(0), 2 * _WIDTH
        layer = functools.partial(blocks.TransformerEncoderLayer, d, _HEADS, 2 * d, 0.0, rngs=rngs)
        self.embed = linear.Linear(d, d, rngs=rngs)
        self.layer1, self.layer2 = layer(norm_first=True), layer()
        self.head = linear.Linear(d, _CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(self.layer2(self.layer1(self.embed(x))))


class _Mixing(nnx.Module):
    """Norm, two linear layers around a GELU, added to the input."""

    def __init__(self, d: int, rngs: nnx.Rngs) -> None:
        self.norm = norms.LayerNorm(d)
        self.up, self.down = linear.Linear(d, d, rngs=rngs), linear.Linear(d, d, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class _Perceptron(nnx.Module):
    """Three such blocks and a head."""

    def __init__(self) -> None:
        rngs, d = nnx.Rngs(0), 2 * _WIDTH
        self.block1, self.block2 = _Mixing(d, rngs), _Mixing(d, rngs)
        self.block3 = _Mixing(d, rngs)
        self.norm = norms.LayerNorm(d)
        self.head = linear.Linear(d, _CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(self.norm(self.block3(self.block2(self.block1(x)))))


def networks() -> dict[str, Callable[[], Sides]]:
    """Returns the networks, each a function that builds its sides anew."""
    return {
        "ResNet, batch norm": _resnet,
        "pre-activation CNN, group norm": _preact,
        "Transformer encoder": _encoder,
        "MLP, layer norm": _perceptron,
    }


def _sides(ours: nnx.Module, theirs: "torch.nn.Module", x: np.ndarray) -> Sides:
    """Moves all parameters, for scales of 1 and biases of 0 hide what is done to them."""
    import torch

    rng = np.random.default_rng(11)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.tensor(rng.normal(0.0, 0.2, parameter.shape)))
    return Sides(ours, theirs, (x,), copy.deepcopy(theirs), "image" if x.ndim == 4 else None)


def _resnet() -> Sides:
    import torch

    from torch_ref.resnet import ResNet

    torch.manual_seed(0)
    theirs = ResNet("basic", (1, 1), _CLASSES, "cifar", _WIDTH)
    size = dataclasses.replace(models.RESNET18, layers=(1, 1), width=_WIDTH)
    ours = models.ResNet(size, _CLASSES, stem="cifar", rngs=nnx.Rngs(0))
    return _sides(ours, theirs, normal(3, 6, 6, 3))


def _preact() -> Sides:
    import torch
    from torch import nn

    from torch_ref.blocks import PreActResBlock

    class PreAct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, _WIDTH, 3, padding=1)
            self.block1 = PreActResBlock(_WIDTH, _WIDTH, _GROUPS)
            self.block2 = PreActResBlock(_WIDTH, 2 * _WIDTH, _GROUPS, 2)
            self.norm = nn.GroupNorm(_GROUPS, 2 * _WIDTH)
            self.head = nn.Linear(2 * _WIDTH, _CLASSES)

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            x = self.norm(self.block2(self.block1(self.stem(x))))
            return self.head(torch.relu(x).mean((2, 3)))

    torch.manual_seed(0)
    return _sides(_PreAct(), PreAct(), normal(3, 6, 6, 3))


def _encoder() -> Sides:
    import torch
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            d = 2 * _WIDTH
            layer = functools.partial(
                nn.TransformerEncoderLayer, d, _HEADS, 2 * d, 0.0, batch_first=True
            )
            self.embed = nn.Linear(d, d)
            self.layer1, self.layer2 = layer(norm_first=True), layer()
            self.head = nn.Linear(d, _CLASSES)

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            return self.head(self.layer2(self.layer1(self.embed(x))))

    torch.manual_seed(0)
    return _sides(_Encoder(), Encoder(), normal(2, 5, 2 * _WIDTH, offset=0.5, scale=1.0))


def _perceptron() -> Sides:
    import torch
    from torch import nn

    class Mixing(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, d), nn.Linear(d, d)

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    class Perceptron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            d = 2 * _WIDTH
            self.block1, self.block2, self.block3 = Mixing(d), Mixing(d), Mixing(d)
            self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, _CLASSES)

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            return self.head(self.norm(self.block3(self.block2(self.block1(x)))))

    torch.manual_seed(0)
    return _sides(_Perceptron(), Perceptron(), normal(4, 3, 2 * _WIDTH))
