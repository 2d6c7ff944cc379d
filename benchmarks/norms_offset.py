"""Output error of norms on float32 data of standard deviation 1 at means 0 to 1e4: prints a table.

Run it with the versions that you want to know about: ``python benchmarks/norms_offset.py`` prints
the table of ``docs/norms.md``. The truth is float64 on the same float32 data.
"""

import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flaxstab import norms

MEANS = (0.0, 1e1, 1e2, 1e3, 1e4)
EPS = 1e-5
IMAGES, TOKENS, GROUPS = (32, 16, 16, 64), (512, 768), 8
PACKAGES = ("jax", "flax", "torch")
RNGS = nnx.Rngs(0)
Layer = Callable[[jax.Array], jax.Array]


class Kind(NamedTuple):
    """One norm in four implementations.

    Attributes:
      shape: of the data.
      exact: the norm in float64.
      ours: flaxstab's layer.
      theirs: PyTorch's module.
      stock: builds flax.nnx's; takes ``use_fast_variance``.
    """

    shape: tuple[int, ...]
    exact: Callable[[np.ndarray], np.ndarray]
    ours: Layer
    theirs: torch.nn.Module
    stock: Callable[..., Layer]


def over(*axes: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns normalisation over axes, in float64."""

    def normalise(x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axes, keepdims=True)
        return centred / np.sqrt(x.var(axes, keepdims=True) + EPS)

    return normalise


def by_groups(x: np.ndarray) -> np.ndarray:
    """Normalises images per sample and group of channels, in float64."""
    grouped = x.reshape(*x.shape[:-1], GROUPS, -1)
    return over(1, 2, 4)(grouped).reshape(x.shape)


CHANNELS, WIDTH = IMAGES[-1], TOKENS[-1]
KINDS = {
    "BatchNorm": Kind(
        IMAGES, over(0, 1, 2), norms.BatchNorm(CHANNELS), torch.nn.BatchNorm2d(CHANNELS),
        lambda **o: nnx.BatchNorm(CHANNELS, epsilon=EPS, rngs=RNGS, **o),
    ),
    "LayerNorm": Kind(
        TOKENS, over(1), norms.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH),
        lambda **o: nnx.LayerNorm(WIDTH, epsilon=EPS, rngs=RNGS, **o),
    ),
    "GroupNorm": Kind(
        IMAGES, by_groups, norms.GroupNorm(GROUPS, CHANNELS), torch.nn.GroupNorm(GROUPS, CHANNELS),
        lambda **o: nnx.GroupNorm(CHANNELS, num_groups=GROUPS, epsilon=EPS, rngs=RNGS, **o),
    ),
    "InstanceNorm": Kind(
        IMAGES, over(1, 2), norms.InstanceNorm(CHANNELS), torch.nn.InstanceNorm2d(CHANNELS),
        lambda **o: nnx.InstanceNorm(CHANNELS, epsilon=EPS, rngs=RNGS, **o),
    ),
}  # fmt: skip


def by_torch(module: torch.nn.Module) -> Layer:
    """Returns PyTorch's module as a function of features-last arrays."""

    def call(x: jax.Array) -> jax.Array:
        given = torch.tensor(np.asarray(x))
        with torch.no_grad():
            if x.ndim == 2:
                return jnp.asarray(module(given).numpy())
            # Contiguous: in channels_last memory PyTorch's GroupNorm is off by 2 at mean 1e3.
            return jnp.asarray(module(given.movedim(-1, 1).contiguous()).movedim(1, -1).numpy())

    return call


def errors(kind: Kind, mean: float) -> list[float]:
    """Returns the largest output errors: ours, PyTorch's, nnx's by default, nnx's two-pass."""
    x = np.random.default_rng(0).normal(mean, 1.0, kind.shape).astype(np.float32)
    exact = kind.exact(x.astype(np.float64))
    stock = (kind.stock(), kind.stock(use_fast_variance=False))
    layers = (kind.ours, by_torch(kind.theirs), *stock)
    return [float(np.abs(np.asarray(f(jnp.asarray(x)), np.float64) - exact).max()) for f in layers]


def row(name: str, mean: float) -> str:
    """Returns a line of the table."""
    figures = " | ".join(f"{error:.1e}" for error in errors(KINDS[name], mean))
    return f"| {name} | {mean:g} | {figures} |"


def main() -> None:
    """Prints the table and the versions."""
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print(f"{found}, CPU\n")
    print("| norm | mean | flaxstab | torch | nnx | nnx, `use_fast_variance=False` |")
    print("|---|---|---|---|---|---|")
    for name in KINDS:
        for mean in MEANS:
            print(row(name, mean))


if __name__ == "__main__":
    main()
