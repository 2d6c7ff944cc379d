"""Faults of a whole training step."""

from collections.abc import Callable

import jax
from flax import nnx

from flaxstab import functional, optim
from flaxstab._typing import Array
from flaxstab.parity._selftest import _cases_training as cases
from flaxstab.parity._selftest._faults_optim import leaf_update, torch_update
from flaxstab.parity._selftest._plant import (
    Fault,
    Planted,
    argument,
    replaced,
    result,
    torch_functional,
)


def _torch_accumulated() -> Planted:
    import torch

    return replaced(torch.optim.Optimizer, "zero_grad", lambda _: lambda *_: None)


def _doubled(gradients: object) -> object:
    return jax.tree.map(lambda g: 2 * g, gradients)


def _torch_lost() -> Planted:
    clone = lambda tensor: tensor.clone()  # noqa: E731
    return argument(torch_functional(), "batch_norm", running_mean=clone, running_var=clone)


def _later(schedule: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda count: schedule(count + 1)


def _torch_later() -> Planted:
    import torch

    one_on = lambda rate: lambda step: rate(step + 1)  # noqa: E731
    return argument(torch.optim.lr_scheduler.LambdaLR, "__init__", lr_lambda=one_on)


STEPS = (
    Fault(
        "loss 1 % too large", "the loss has torch's scale", "training step", "loss",
        lambda: result(functional, "cross_entropy", lambda loss: 1.01 * loss),
        lambda: result(torch_functional(), "cross_entropy", lambda loss: 1.01 * loss),
    ),
    Fault(
        "gradients added up", "a step sees its own gradient", "training step", "exp_avg",
        lambda: argument(nnx.Optimizer, "update", grads=_doubled),  # added twice
        _torch_accumulated,
    ),
    Fault(
        "statistics lost in the step", "a step keeps the statistics", "training step", "buffer",
        lambda: replaced(cases, "keep", lambda _: lambda *_: None),
        _torch_lost,
    ),
    Fault(
        "schedule one step on", "the first step takes the schedule at 0", "training step",
        "update",
        lambda: result(optim, "warmup_cosine", _later),
        _torch_later,
    ),
    Fault(
        "decay by the peak rate", "decay follows the schedule", "training step", "update",
        leaf_update(lambda u, p, _, decay: u - cases.PEAK * decay * p),
        torch_update(
            lambda old, p, _, decay: p - cases.PEAK * decay * old, weight_decay=0.0
        ),
    ),
)  # fmt: skip
