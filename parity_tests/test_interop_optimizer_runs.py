"""A training run that moves from torch to JAX and back is the run that stayed."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import functional, interop, linear, norms, optim
from parity_tests.support.cases import values
from parity_tests.test_interop_optimizer import (
    DECAY,
    arrays_of,
    assert_same_after,
    rate,
    state_of,
)

T = torch.nn
Tensors = Mapping[str, np.ndarray]
StateDict = dict[str, object]


BEFORE, AWAY, AFTER = 4, 5, 4
STEPS = BEFORE + AWAY + AFTER


class Net(nnx.Module):
    def __init__(self) -> None:
        kind = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.stem = linear.Conv(3, 4, 3, bias=False, **kind)
        self.norm = norms.BatchNorm(4, **kind)
        self.head = linear.Linear(4, 5, **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.norm(self.stem(x))).mean((1, 2)))


class Twin(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = T.Conv2d(3, 4, 3, bias=False)
        self.norm = T.BatchNorm2d(4)
        self.head = T.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(x)).relu().mean((2, 3)))


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for i in range(STEPS):
        yield values(6, 7, 7, 3, seed=i, offset=0.5), rng.integers(0, 5, 6)


def decay_groups(module: torch.nn.Module) -> torch.optim.Optimizer:
    """As the recipes do: kernels decay, norms and biases do not."""
    named = list(module.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in named if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for n, p in named if p.ndim == 1], "weight_decay": 0.0},
        ],
        amsgrad=True,
    )


GROUP_NAMES = [["stem.weight", "head.weight"], ["norm.weight", "norm.bias", "head.bias"]]


def train_torch(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int
) -> None:
    for i, (x, y) in list(enumerate(batches()))[first:last]:
        for group in optimizer.param_groups:
            group["lr"] = rate(i)
        optimizer.zero_grad()
        logits = module(torch.tensor(x).movedim(-1, 1))
        T.functional.cross_entropy(logits, torch.tensor(y)).backward()
        optimizer.step()


def train_jax(model: Net, optimizer: nnx.Optimizer, first: int, last: int) -> None:
    for x, y in list(batches())[first:last]:
        train_step(model, optimizer, x, y)


@nnx.jit
def train_step(model: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    def loss(model: Net) -> jax.Array:
        return functional.cross_entropy(model(x), y)

    optimizer.update(model, nnx.grad(loss)(model))


class Run(NamedTuple):
    """A run in torch that nothing interrupted.

    Attributes:
      net: the net where the others leave it.
      state: the optimizer's state there.
      end: every tensor at the end.
      state_at_end: of the optimizer.
    """

    net: Twin
    state: StateDict
    end: Tensors
    state_at_end: Tensors


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    torch.manual_seed(0)
    module = Twin().double()
    optimizer = decay_groups(module)
    train_torch(module, optimizer, 0, BEFORE)
    left = copy.deepcopy((module, optimizer.state_dict()))
    train_torch(module, optimizer, BEFORE, STEPS)
    with jax.enable_x64(True):
        yield Run(*left, arrays_of(module), state_of(optimizer))


@cache
def transformation() -> optax.GradientTransformation:
    mask = optim.decay_mask(Net())
    return optim.adamw(rate, weight_decay=DECAY, amsgrad=True, mask=mask)


States = dict[int, dict[str, object]]
Fault = Callable[[States], object]


def keep(_: States) -> None:
    """No fault."""


def there_and_back(
    run: Run, *, to_jax: Fault = keep, to_torch: Fault = keep
) -> tuple[Tensors, ...]:
    """Goes on in JAX and then in torch again, perhaps with a fault on the way."""
    model, given = Net(), copy.deepcopy(run.state)
    interop.load_state_dict(model, run.net.state_dict())
    optimizer = nnx.Optimizer(model, transformation(), wrt=nnx.Param)
    to_jax(given["state"])
    interop.load_optimizer_state_dict(optimizer, model, given, names=GROUP_NAMES)
    train_jax(model, optimizer, BEFORE, BEFORE + AWAY)
    back = Twin().double()
    back.load_state_dict(interop.to_tensors(interop.state_dict(model)))
    again = decay_groups(back)
    groups = again.state_dict()["param_groups"]
    taken = interop.optimizer_state_dict(optimizer, model, param_groups=groups, names=GROUP_NAMES)
    to_torch(taken["state"])
    again.load_state_dict(interop.to_tensors(taken))
    train_torch(back, again, BEFORE + AWAY, STEPS)
    return arrays_of(back), state_of(again)


def test_a_run_that_moves_to_jax_and_back_is_the_run_that_stayed(run: Run) -> None:
    tensors, state = there_and_back(run)
    assert_same_after(STEPS, tensors, run.end)
    assert_same_after(STEPS, state, run.state_at_end)


def lose_steps(states: States) -> None:
    for state in states.values():
        state["step"] = state["step"] * 0 + 1


def lose_a_step(states: States) -> None:
    for state in states.values():
        state["step"] = state["step"] - 1


def swap_moments(states: States) -> None:
    for state in states.values():
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], abs(state["exp_avg"])


def swap_parameters(states: States) -> None:
    states[2]["exp_avg"], states[3]["exp_avg"] = states[3]["exp_avg"], states[2]["exp_avg"]


def lose_peaks(states: States) -> None:
    for state in states.values():
        state["max_exp_avg_sq"] = state["exp_avg_sq"]


FAULTS = [lose_steps, lose_a_step, swap_moments, swap_parameters, lose_peaks]


@pytest.mark.parametrize("way", ["to_jax", "to_torch"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_of_runs_sees_what_is_lost_on_the_way(
    fault: Fault, way: str, run: Run
) -> None:
    tensors, _ = there_and_back(run, **{way: fault})
    with pytest.raises(AssertionError, match="is above the bound"):
        assert_same_after(STEPS, tensors, run.end)
