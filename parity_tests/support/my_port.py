"""The port that README tests: a small network and its PyTorch twin."""

import jax
import torch
from flax import nnx
from torch import Tensor

from flaxstab import linear, norms


class Net(nnx.Module):
    """Convolution, batch normalisation, ReLU, pooled head."""

    def __init__(self, rngs: nnx.Rngs, momentum: float = 0.1) -> None:
        self.conv = linear.Conv(3, 8, 3, padding=1, bias=False, rngs=rngs)
        self.norm = norms.BatchNorm(8, momentum=momentum)
        self.head = linear.Linear(8, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (N, H, W, 3) to logits (N, 10)."""
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class TorchNet(torch.nn.Module):
    """The same with channels first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, 10)."""
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
