"""How long ``flaxstab.parity.compare`` takes on a ResNet-18 beside its PyTorch twin."""

import time

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor

from flaxstab import functional, linear, norms, parity

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # width and stride, two blocks each
BATCH, SIZE, CLASSES = 4, 64, 1000


class Block(nnx.Module):
    """The basic block of ResNet."""

    def __init__(self, inputs: int, width: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv1 = linear.Conv(inputs, width, 3, stride, 1, bias=False, rngs=rngs)
        self.norm1 = norms.BatchNorm(width)
        self.conv2 = linear.Conv(width, width, 3, 1, 1, bias=False, rngs=rngs)
        self.norm2 = norms.BatchNorm(width)
        moves = stride > 1 or inputs != width
        self.skip = (
            nnx.Sequential(
                linear.Conv(inputs, width, 1, stride, bias=False, rngs=rngs), norms.BatchNorm(width)
            )
            if moves
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, inputs) to (N, H / stride, W / stride, width)."""
        branch = nnx.relu(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        return nnx.relu(branch + (x if self.skip is None else self.skip(x)))


class ResNet(nnx.Module):
    """ResNet-18."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = linear.Conv(3, 64, 7, 2, 3, bias=False, rngs=rngs)
        self.norm = norms.BatchNorm(64)
        self.blocks = nnx.List([Block(*sizes, rngs) for sizes in block_sizes()])
        self.head = linear.Linear(512, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (N, H, W, 3) to logits (N, classes)."""
        x = functional.max_pool(nnx.relu(self.norm(self.conv(x))), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class TorchBlock(torch.nn.Module):
    """The basic block of ResNet, channels first."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = torch.nn.BatchNorm2d(width)
        self.skip = None
        if stride > 1 or inputs != width:
            conv = torch.nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.skip = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, width, H / stride, W / stride)."""
        branch = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(branch + (x if self.skip is None else self.skip(x)))


class TorchResNet(torch.nn.Module):
    """ResNet-18, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.norm = torch.nn.BatchNorm2d(64)
        self.blocks = torch.nn.ModuleList([TorchBlock(*sizes) for sizes in block_sizes()])
        self.head = torch.nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, classes)."""
        x = torch.nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def block_sizes() -> list[tuple[int, int, int]]:
    """Returns inputs, width and stride of each block."""
    inputs, sizes = 64, []
    for width, stride in STAGES:
        sizes += [(inputs, width, stride), (width, width, 1)]
        inputs = width
    return sizes


def main() -> None:
    """Prints the report and the seconds it took, compilation included."""
    torch.manual_seed(0)
    images = np.random.default_rng(0).normal(0.5, 1.0, (BATCH, SIZE, SIZE, 3))
    ours, theirs = ResNet(nnx.Rngs(0)), TorchResNet()
    start = time.perf_counter()
    report = parity.compare(ours, theirs, images, layout="image")
    seconds = time.perf_counter() - start
    print(report)
    print(f"{seconds:.0f} s for {len(report.findings)} quantities, jax {jax.__version__}")


if __name__ == "__main__":
    main()
