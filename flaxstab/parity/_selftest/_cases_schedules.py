"""The pairs that faults are planted in: schedules, penalties and losses of class probabilities."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from flaxstab import functional, optim
from flaxstab._typing import Array
from flaxstab.parity._selftest._cases import function, normal
from flaxstab.parity._selftest._plant import Sides, torch_functional

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler

    Scheduler = Callable[[torch.optim.Optimizer], LRScheduler]

BASE, TOTAL, LENGTH = 0.1, 20, 6
_PART, _FIRST, _LAST = 0.3, 25.0, 1e4  # OneCycleLR's defaults


def _ours(name: str, *arguments: float) -> Callable[[Array], Array]:
    def rates(counts: Array) -> Array:
        return vars(optim)[name](*arguments)(counts)

    return rates


def _driven(make: "Scheduler") -> "Callable[[torch.Tensor], torch.Tensor]":
    """Returns the rates that torch's scheduler comes to, step by step."""

    def rates(counts: "torch.Tensor") -> "torch.Tensor":
        import torch

        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=BASE)
        scheduler, found = make(optimizer), []
        for _ in counts:
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if len(found) < len(counts):
                scheduler.step()
        return torch.tensor(found, dtype=torch.float64)

    return rates


def _plain(rate: Callable[[int], float]) -> "Callable[[torch.Tensor], torch.Tensor]":
    def rates(counts: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.tensor([rate(int(n)) for n in counts], dtype=torch.float64)

    return rates


def _between(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def _plain_cycle(step: int) -> float:
    peak, last = _PART * TOTAL - 1, TOTAL - 1
    if step <= peak:
        return _between(BASE / _FIRST, BASE, step / peak)
    return _between(BASE, BASE / _FIRST / _LAST, (step - peak) / (last - peak))


def _schedules() -> dict[str, Callable[[], Sides]]:
    def torchs(name: str, *arguments: float, **options: object) -> "Scheduler":
        def make(optimizer: "torch.optim.Optimizer") -> "LRScheduler":
            from torch.optim import lr_scheduler

            return vars(lr_scheduler)[name](optimizer, *arguments, **options)

        return make

    counts = np.arange(TOTAL)
    return {
        "cosine annealing": function(
            _ours("cosine_annealing", BASE, LENGTH),
            _driven(torchs("CosineAnnealingLR", LENGTH)),
            _plain(lambda n: _between(BASE, 0.0, n / LENGTH)), counts,
        ),
        "one cycle": function(
            _ours("one_cycle", BASE, TOTAL),
            _driven(torchs("OneCycleLR", BASE, TOTAL, cycle_momentum=False)),
            _plain(_plain_cycle), counts,
        ),
        "step schedule": function(
            _ours("step", BASE, LENGTH), _driven(torchs("StepLR", LENGTH)),
            _plain(lambda n: BASE * 0.1 ** (n // LENGTH)), counts,
        ),
    }  # fmt: skip


_LOGITS = normal(6, 5, seed=31, offset=0.0)
_SOFT = np.random.default_rng(32).dirichlet(np.ones(5), 6)
_WEIGHTS = normal(5, seed=33, offset=2.0, scale=0.3)


def _soft_weighted() -> Callable[[], Sides]:
    def theirs(x: "torch.Tensor", target: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch_functional().cross_entropy(x, target, torch.tensor(_WEIGHTS).to(x.dtype))

    def plain(x: "torch.Tensor", target: "torch.Tensor") -> "torch.Tensor":
        import torch

        log_p = x - torch.logsumexp(x, 1, keepdim=True)
        return -(target * torch.tensor(_WEIGHTS).to(x.dtype) * log_p).sum() / len(x)

    return function(
        lambda x, y: functional.cross_entropy(x, y, weight=jnp.asarray(_WEIGHTS, x.dtype)),
        theirs, plain, _LOGITS, _SOFT,
    )  # fmt: skip


def _penalties() -> dict[str, Callable[[], Sides]]:
    def both(x: "torch.Tensor") -> "torch.Tensor":
        return x.relu().sum() + (-x).relu().sum()

    def reference(name: str) -> "Callable[[torch.Tensor], torch.Tensor]":
        def penalty(x: "torch.Tensor") -> "torch.Tensor":
            from torch_ref import functional as plain

            return vars(plain)[name]([x])

        return penalty

    holed = normal(4, 3, seed=34, offset=0.0) * (np.arange(3) != 1)
    return {
        "l1 penalty": function(
            lambda x: functional.l1_penalty(x),  # noqa: PLW0108 - looked up when called
            reference("l1_penalty"), both, holed,
        ),
        "l2 penalty": function(
            lambda x: functional.l2_penalty(x),  # noqa: PLW0108 - looked up when called
            reference("l2_penalty"), lambda x: (x * x / 2).sum(), normal(4, 3, seed=34),
        ),
    }  # fmt: skip


def schedules() -> dict[str, Callable[[], Sides]]:
    """Returns the cases of schedules, penalties and losses of class probabilities."""
    return {
        **_schedules(),
        **_penalties(),
        "cross entropy of probabilities": _soft_weighted(),
    }
