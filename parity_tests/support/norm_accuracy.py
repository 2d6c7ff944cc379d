"""Errors of both sides' norms at low precision against PyTorch in float64 on the same data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flaxstab import norms
from parity_tests.support.cases import values
from parity_tests.support.layers import channels_first, channels_last
from parity_tests.support.norm_grid import NAMES, Quantities, one_thread

SHAPE = (16, 8, 8, 32)
MEANS = (0.0, 1e1, 1e2, 1e3, 1e4)
STATISTICS = ("running_mean", "running_var")


class Pair(NamedTuple):
    """A layer and PyTorch's, for inputs of ``SHAPE``; ``image``: channels are on axis 1 there."""

    ours: Callable[[], nnx.Module]
    theirs: Callable[[], torch.nn.Module]
    image: bool = True


TRACKED = {"affine": True, "track_running_stats": True}
PAIRS = {
    "batch": Pair(lambda: norms.BatchNorm(32), lambda: torch.nn.BatchNorm2d(32)),
    "layer": Pair(lambda: norms.LayerNorm(32), lambda: torch.nn.LayerNorm(32), False),
    "group": Pair(lambda: norms.GroupNorm(4, 32), lambda: torch.nn.GroupNorm(4, 32)),
    "instance": Pair(
        lambda: norms.InstanceNorm(32, **TRACKED), lambda: torch.nn.InstanceNorm2d(32, **TRACKED)
    ),
}


class Errors(NamedTuple):
    """Of each quantity: our largest error, PyTorch's, its size, and its last bit's eps."""

    ours: float
    theirs: float
    size: float
    eps: float


def data(mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Values and cotangents."""
    return values(*SHAPE, offset=mean, scale=std), values(*SHAPE, seed=1, offset=0.5, scale=1.0)


def torch_finds(pair: Pair, x: torch.Tensor, cotangent: torch.Tensor) -> Quantities:
    """Output, gradients and statistics of one training step in the dtype of ``x``."""
    layer = pair.theirs()
    layer = layer.double() if x.dtype == torch.float64 else layer

    def theirs_of(tensor: torch.Tensor) -> torch.Tensor:
        return channels_first(tensor).contiguous() if pair.image else tensor.clone()

    def ours_of(tensor: torch.Tensor) -> torch.Tensor:
        return channels_last(tensor) if pair.image else tensor

    given = theirs_of(x).requires_grad_()
    with one_thread():
        y = layer(given)
        wanted = [given, *layer.parameters()]
        of_input, scale, bias = torch.autograd.grad(y, wanted, theirs_of(cotangent))
    found = {"output": ours_of(y), "grad input": ours_of(of_input)}
    found |= {"grad weight": scale, "grad bias": bias}
    found |= {name: t for name, t in layer.named_buffers() if name in STATISTICS}
    return {name: t.detach().double().numpy() for name, t in found.items()}


def runner(make: Callable[[], nnx.Module]) -> Callable[[jax.Array, jax.Array], Quantities]:
    """The same of our layer, compiled once for all data."""
    graph, params, rest = nnx.split(make(), nnx.Param, ...)

    @jax.jit
    def run(x: jax.Array, cotangent: jax.Array) -> dict[str, object]:
        def step(params: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
            layer = nnx.merge(graph, params, rest, copy=True)
            return layer(x), nnx.state(layer, nnx.BatchStat)

        y, pullback, state = jax.vjp(step, params, x, has_aux=True)
        own, of_input = pullback(cotangent)
        found = {"output": y, "grad input": of_input}
        found |= {f"grad {NAMES[n]}": a for n, a in nnx.to_pure_dict(own).items()}
        return found | {NAMES[n]: a for n, a in nnx.to_pure_dict(state).items()}

    return lambda x, g: {name: a for name, a in run(x, g).items() if name != "num_batches_tracked"}


def errors(
    pair: Pair,
    run: Callable[[jax.Array, jax.Array], Quantities],
    x: np.ndarray,
    cotangent: np.ndarray,
    dtype: str,
) -> dict[str, Errors]:
    """Both sides' errors on data rounded to a dtype."""
    kind = getattr(torch, dtype)
    low, g = (torch.tensor(a).to(kind) for a in (x, cotangent))
    exact = torch_finds(pair, low.double(), g.double())
    theirs = torch_finds(pair, low, g)
    ours = run(*(jnp.asarray(t.float().numpy(), dtype) for t in (low, g)))
    assert ours.keys() == theirs.keys() == exact.keys()
    largest = float(low.double().abs().max())
    # A sum of random terms is as large as the root of their squares, before they cancel.
    of_sums = float(np.sqrt((g.double().numpy() ** 2).sum((0, 1, 2)).max()))
    least = {"running_mean": 0.1 * largest, "grad weight": of_sums, "grad bias": of_sums}
    found = {}
    for name, truth in exact.items():
        own = np.asarray(ours[name], np.float64)
        size = max(float(np.abs(truth).max()), least.get(name, 0.0))
        gaps = (float(np.abs(side - truth).max()) for side in (own, theirs[name]))
        found[name] = Errors(*gaps, size, float(jnp.finfo(ours[name].dtype).eps))
    return found


def worse_than_torch(found: dict[str, Errors]) -> set[str]:
    """Quantities whose error is above twice PyTorch's and two eps of their size; NaN is above."""
    return {n for n, e in found.items() if not e.ours <= 2 * (e.theirs + e.eps * e.size)}


def above(found: dict[str, Errors], bound: float) -> set[str]:
    """Quantities whose error is above a bound in units of their size; or the size's own rounding.

    A running mean of 1e3 is a float32 number, with an error of its last digit.
    """
    return {
        n for n, e in found.items()
        if not e.ours <= bound * (min(e.size, 1.0) if n == "output" else e.size)
    }  # fmt: skip
