"""Models and layers for the tests of ``seed_parameters`` that need no torch."""

import copy
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from flaxstab import attention, linear, norms

RNGS = nnx.Rngs(0)


class Net(nnx.Module):
    """Attributes in no alphabetical order."""

    def __init__(self) -> None:
        self.stem = linear.Linear(3, 4, rngs=RNGS)
        self.norm = norms.LayerNorm(4)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=RNGS) for _ in range(11)])
        self.act = nnx.PReLU()
        self.drop = nnx.Dropout(0.1, rngs=RNGS)


def values(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def jitted(model: nnx.Module) -> nnx.Module:
    nnx.jit(lambda m: jax.tree.leaves(nnx.state(m)))(model)
    return model


REBUILT: dict[str, Callable[[nnx.Module], nnx.Module]] = {
    "split and merge": lambda model: nnx.merge(*nnx.split(model)),
    "clone": nnx.clone,
    "view": lambda model: nnx.view(model, deterministic=True),
    "jit": jitted,
    "deepcopy": copy.deepcopy,
    "jax.tree": lambda model: jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model)),
}

MAKERS: dict[str, Callable[[], nnx.Module]] = {
    "Linear": lambda: linear.Linear(2, 3, rngs=RNGS),
    "square": lambda: linear.Linear(2, 2, rngs=RNGS),
    "Linear, no bias": lambda: linear.Linear(2, 3, bias=False, rngs=RNGS),
    "Conv": lambda: linear.Conv(2, 3, 3, rngs=RNGS),
    "ConvTranspose": lambda: linear.ConvTranspose(2, 3, 3, rngs=RNGS),
    "Embed": lambda: linear.Embed(2, 3, rngs=RNGS),
    "MultiHeadAttention": lambda: attention.MultiHeadAttention(4, 2, rngs=RNGS),
    "nnx.Linear": lambda: nnx.Linear(2, 3, rngs=RNGS),
    "nnx.LinearGeneral": lambda: nnx.LinearGeneral(2, 3, rngs=RNGS),
    "nnx.Conv": lambda: nnx.Conv(2, 3, (3,), rngs=RNGS),
    "nnx.ConvTranspose": lambda: nnx.ConvTranspose(2, 3, (3,), rngs=RNGS),
    "nnx.Embed": lambda: nnx.Embed(2, 3, rngs=RNGS),
    "nnx.MultiHeadAttention": lambda: nnx.MultiHeadAttention(2, 4, rngs=RNGS),
    "nnx.LSTMCell": lambda: nnx.LSTMCell(2, 3, rngs=RNGS),
    "nnx.OptimizedLSTMCell": lambda: nnx.OptimizedLSTMCell(2, 3, rngs=RNGS),
    "nnx.SimpleCell": lambda: nnx.SimpleCell(2, 3, rngs=RNGS),
}


class Holder(nnx.Module):
    """A layer that something can be done to."""

    def __init__(self, make: Callable[[], nnx.Module]) -> None:
        self.layer = make()
        self.drop = nnx.Dropout(0.1, rngs=RNGS)
