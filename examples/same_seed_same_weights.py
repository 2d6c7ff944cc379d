"""The weights that ``torch.manual_seed(seed)`` gives, in Flax, with no PyTorch installed.

A small residual network and a small Transformer are built from one seed. Where PyTorch is installed
its twins are built as well, and every bit of every parameter is compared.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from _cli import Parser, leave, whole
from flax import nnx
from rich.console import Console
from rich.table import Table

from flaxstab import blocks, interop, linear, norms, torch_rng

Weights = Mapping[str, np.ndarray]
RNGS = nnx.Rngs(0)  # what the constructors draw from it is replaced
CLASSES, WORDS, WIDTH, HEADS, LENGTH = 10, 100, 32, 4, 16


class ResNet(nnx.Module):
    """A stem, three residual blocks, a head."""

    def __init__(self) -> None:
        self.stem = linear.Conv(3, 16, 3, padding=1, bias=False, rngs=RNGS)
        self.norm = norms.BatchNorm(16)
        widths = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        self.stages = nnx.List([blocks.BasicBlock(*sizes, rngs=RNGS) for sizes in widths])
        self.head = linear.Linear(64, CLASSES, rngs=RNGS)


class EncoderLayer(nnx.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self) -> None:
        self.ln1 = norms.LayerNorm(WIDTH)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, rngs=RNGS)
        self.ln2 = norms.LayerNorm(WIDTH)
        self.up = linear.Linear(WIDTH, 4 * WIDTH, rngs=RNGS)
        self.down = linear.Linear(4 * WIDTH, WIDTH, rngs=RNGS)


class Transformer(nnx.Module):
    """Words and positions, two layers, a head."""

    def __init__(self) -> None:
        self.words = linear.Embed(WORDS, WIDTH, padding_idx=0, rngs=RNGS)
        self.positions = linear.Embed(LENGTH, WIDTH, rngs=RNGS)
        self.layers = nnx.List([EncoderLayer() for _ in range(2)])
        self.norm = norms.LayerNorm(WIDTH)
        self.head = linear.Linear(WIDTH, WORDS, bias=False, rngs=RNGS)


class Twins(NamedTuple):
    """A model on both sides.

    Attributes:
      ours: builds the Flax model with the weights of a seed.
      theirs: builds PyTorch's model after ``torch.manual_seed(seed)``; returns its state_dict.
    """

    ours: Callable[[int], nnx.Module]
    theirs: Callable[[int], Weights]


def resnet(seed: int) -> nnx.Module:
    """Returns the residual network; its blocks end by drawing their convolutions again."""
    then = {blocks.BasicBlock: torch_rng.layer_rule("relu")}
    return torch_rng.seed_parameters(ResNet, seed, then=then)


def transformer(seed: int) -> nnx.Module:
    """Returns the Transformer."""
    return torch_rng.seed_parameters(Transformer, seed)


def torch_resnet(seed: int) -> Weights:
    """Builds the residual network with PyTorch."""
    import torch
    from torch import nn

    from torch_ref.blocks import BasicBlock

    torch.manual_seed(seed)
    model = nn.Module()
    model.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    model.norm = nn.BatchNorm2d(16)
    widths = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
    model.stages = nn.ModuleList([BasicBlock(*sizes) for sizes in widths])
    model.head = nn.Linear(64, CLASSES)
    return {name: interop.to_numpy(tensor) for name, tensor in model.state_dict().items()}


def torch_transformer(seed: int) -> Weights:
    """Builds the Transformer with PyTorch."""
    import torch
    from torch import nn

    def layer() -> nn.Module:
        made = nn.Module()
        made.ln1 = nn.LayerNorm(WIDTH)
        made.attn = nn.MultiheadAttention(WIDTH, HEADS)
        made.ln2 = nn.LayerNorm(WIDTH)
        made.up = nn.Linear(WIDTH, 4 * WIDTH)
        made.down = nn.Linear(4 * WIDTH, WIDTH)
        return made

    torch.manual_seed(seed)
    model = nn.Module()
    model.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
    model.positions = nn.Embedding(LENGTH, WIDTH)
    model.layers = nn.ModuleList([layer() for _ in range(2)])
    model.norm = nn.LayerNorm(WIDTH)
    model.head = nn.Linear(WIDTH, WORDS, bias=False)
    return {name: interop.to_numpy(tensor) for name, tensor in model.state_dict().items()}


MODELS = {
    "residual network": Twins(resnet, torch_resnet),
    "Transformer": Twins(transformer, torch_transformer),
}


def bits(weights: Weights) -> bytes:
    """Returns every bit of a model's parameters, in PyTorch's layouts, sorted by name."""
    return b"".join(np.ascontiguousarray(weights[name]).tobytes() for name in sorted(weights))


def differing(ours: Weights, theirs: Weights) -> int:
    """Returns how many bits of two models' parameters differ."""
    one, other = (np.frombuffer(bits(weights), np.uint8) for weights in (ours, theirs))
    if sorted(ours) != sorted(theirs) or one.size != other.size:
        raise ValueError("the models differ in structure")
    return int(np.unpackbits(one ^ other).sum())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code: 1 if a bit differs."""
    parser = Parser(description=__doc__.split("\n\n", maxsplit=1)[0])
    seeds = whole(-(2**63), 2**64 - 1)
    parser.add_argument("--seed", type=seeds, default=0, metavar="N", help="default: 0")
    seed = parser.parse_args(arguments).seed
    both = importlib.util.find_spec("torch") is not None

    table = Table(title=f"torch.manual_seed({seed})")
    table.add_column("model")
    table.add_column("numbers", justify="right")
    for column in ("SHA-256, JAX", "PyTorch")[: 1 + both]:
        table.add_column(column, no_wrap=True)
    if both:
        table.add_column("bits that differ", justify="right")
    wrong = 0
    for name, twins in MODELS.items():
        ours = interop.state_dict(twins.ours(seed))
        row = [name, f"{sum(a.size for a in ours.values()):,}", fingerprint(ours)]
        if both:
            theirs = twins.theirs(seed)
            differ = differing(ours, theirs)
            row += [fingerprint(theirs), f"{differ} of {8 * len(bits(ours)):,}"]
            wrong += differ
        table.add_row(*row)
    console = Console()
    console.print(table)
    if both:
        console.print(f"{wrong} bits differ.")
    else:
        console.print("PyTorch is not installed: nothing to compare with, and nothing needed.")
    return int(wrong > 0)


def fingerprint(weights: Weights) -> str:
    """Returns the first 12 digits of the SHA-256 of all bits."""
    return hashlib.sha256(bits(weights)).hexdigest()[:12]


if __name__ == "__main__":
    leave(main())
