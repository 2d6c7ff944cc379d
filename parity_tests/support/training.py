"""Training steps of the small networks in both frameworks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import torch
from flax import nnx

from flaxstab import linear, parity
from parity_tests.support.pairs import Net, TorchNet, torch_linear

RATE = 0.1


def step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Does one step on the mean squared error."""

    def loss_of(model: nnx.Module) -> jax.Array:
        return jnp.mean((model(x) - y) ** 2)

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def torch_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | tuple[torch.optim.Optimizer, object],
    x: torch.Tensor,
    y: torch.Tensor,
) -> torch.Tensor:
    """Does one step on the mean squared error, and one of the scheduler if there is one."""
    first, *schedulers = optimizer if isinstance(optimizer, tuple) else (optimizer,)
    first.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    first.step()
    for scheduler in schedulers:
        scheduler.step()
    return loss


def ours(
    tx: optax.GradientTransformation | None = None,
    model: nnx.Module | None = None,
    step: Callable[..., jax.Array] = step,
) -> parity.TrainStep:
    """Returns JAX's side: by default SGD with momentum on :class:`Net`."""
    chosen = optax.sgd(RATE, momentum=0.9) if tx is None else tx
    return parity.TrainStep(
        Net() if model is None else model,
        lambda model: nnx.Optimizer(model, chosen, wrt=nnx.Param),
        step,
    )


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    """Returns SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)


def theirs(
    optimizer: Callable[[torch.nn.Module], object] = sgd,
    model: torch.nn.Module | None = None,
    step: Callable[..., torch.Tensor] = torch_step,
) -> parity.TrainStep:
    """Returns PyTorch's side: by default SGD with momentum on :class:`TorchNet`."""
    return parity.TrainStep(TorchNet() if model is None else model, optimizer, step)


class MLP(nnx.Module):
    """Two layers: compiles fast, and its training is not chaotic."""

    def __init__(self) -> None:
        self.first = linear.Linear(4, 6, rngs=nnx.Rngs(0))
        self.last = linear.Linear(6, 2, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.first(x)))


class TorchMLP(torch.nn.Module):
    """Its twin."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch_linear(0, 6), torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def small(
    tx: optax.GradientTransformation, step: Callable[..., jax.Array] = step
) -> parity.TrainStep:
    """Returns JAX's side of a step of :class:`MLP`."""
    return ours(tx, MLP(), step)


def torch_small(
    optimizer: Callable[[torch.nn.Module], object],
    step: Callable[..., torch.Tensor] = torch_step,
) -> parity.TrainStep:
    """Returns PyTorch's side of a step of :class:`MLP`."""
    return theirs(optimizer, TorchMLP(), step)


def plain(model: torch.nn.Module) -> torch.optim.SGD:
    """Returns SGD."""
    return torch.optim.SGD(model.parameters(), lr=RATE)
