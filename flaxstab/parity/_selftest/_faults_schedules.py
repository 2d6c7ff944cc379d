"""Faults of schedules, penalties and losses of class probabilities."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp

from flaxstab import functional, optim
from flaxstab._typing import Array
from flaxstab.functional import _losses
from flaxstab.parity._selftest import _cases_schedules as cases
from flaxstab.parity._selftest._plant import (
    Fault,
    Function,
    Plant,
    Planted,
    argument,
    replaced,
    result,
    torch_functional,
)

if TYPE_CHECKING:
    import torch


def _torch_scheduler(name: str, plant: Callable[[type], Planted]) -> Plant:
    def planted() -> Planted:
        from torch.optim import lr_scheduler

        return plant(vars(lr_scheduler)[name])

    return planted


def _stays_down(schedule: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda count: schedule(jnp.minimum(count, cases.LENGTH))


def _torch_stays_down(original: Function) -> Function:
    def faulty(self: "torch.optim.lr_scheduler.CosineAnnealingLR") -> list[float]:
        return [self.eta_min] if self.last_epoch > self.T_max else original(self)

    return faulty


def _later(total: int) -> int:
    """Puts the peak at ``pct_start * total_steps``, and the end as far behind."""
    return total + 1


def _by_weight(original: Function) -> Function:
    def faulty(log_p: Array, target: Array, weight: Array, smoothing: float) -> tuple[Array, Array]:
        losses, _ = original(log_p, target, weight, smoothing)
        return losses, jnp.sum(target @ weight)

    return faulty


def _torch_by_weight(original: Function) -> Function:
    def faulty(x: "torch.Tensor", target: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
        return original(x, target, weight, reduction="sum") / (target @ weight).sum()

    return faulty


def _slope_1_at_0(_: Function) -> Function:
    return lambda x: jnp.sum(jnp.abs(x))


def _torch_slope_1_at_0(_: Function) -> Function:
    def faulty(parameters: "list[torch.Tensor]") -> "torch.Tensor":
        import torch

        (x,) = parameters
        return torch.where(x >= 0, x, -x).sum()

    return faulty


def _reference(plant: Callable[[object], Planted]) -> Plant:
    def planted() -> Planted:
        from torch_ref import functional as plain

        return plant(plain)

    return planted


SCHEDULES = (
    Fault(
        "cosine that stays down", "torch's cosine climbs again", "cosine annealing", "output",
        lambda: result(optim, "cosine_annealing", _stays_down),
        _torch_scheduler(
            "CosineAnnealingLR", lambda owner: replaced(owner, "get_lr", _torch_stays_down)
        ),
    ),
    Fault(
        "cycle one step long", "the peak is at pct * T - 1, the end at T - 1", "one cycle",
        "output",
        lambda: argument(optim, "one_cycle", total_steps=_later),
        _torch_scheduler(
            "OneCycleLR", lambda owner: argument(owner, "__init__", total_steps=_later)
        ),
    ),
    Fault(
        "drop one step late", "the rate drops at step_size", "step schedule", "output",
        lambda: result(optim, "step", lambda schedule: lambda n: schedule(jnp.maximum(n - 1, 0))),
        _torch_scheduler(
            "StepLR", lambda owner: argument(owner, "__init__", step_size=lambda n: n + 1)
        ),
    ),
    Fault(
        "mean of probabilities by weight", "probabilities are averaged over samples",
        "cross entropy of probabilities", "output",
        lambda: replaced(_losses, "_soft", _by_weight),
        lambda: replaced(torch_functional(), "cross_entropy", _torch_by_weight),
    ),
    Fault(
        "slope 1 of |0|", "the slope of |x| at 0 is 0", "l1 penalty", "grad",
        lambda: replaced(functional, "l1_penalty", _slope_1_at_0),
        _reference(lambda owner: replaced(owner, "l1_penalty", _torch_slope_1_at_0)),
    ),
    Fault(
        "squares without the half", "the gradient of the L2 penalty is the parameter",
        "l2 penalty", "grad",
        lambda: result(functional, "l2_penalty", lambda penalty: 2 * penalty),
        _reference(lambda owner: result(owner, "l2_penalty", lambda penalty: 2 * penalty)),
    ),
)  # fmt: skip
