"""The pairs that faults are planted in: optimizers, clipping and a whole training step."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import functional, linear, norms, optim
from flaxstab._typing import Array
from flaxstab.parity._selftest import _witness as witness
from flaxstab.parity._selftest import _witness_optim as plain
from flaxstab.parity._selftest._cases import drawn, normal
from flaxstab.parity._selftest._plant import Build, Sides, torch_functional

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LambdaLR

PEAK = 0.01
WARMUP, TOTAL = 4, 12
DECAY = 0.05
MAX_NORM = 1.0
MOMENTUM, DAMPENING = 0.9, 0.3


def _params() -> tuple[np.ndarray, ...]:
    """A kernel and a bias."""
    return normal(4, 3, seed=21, offset=0.5), normal(3, seed=22, offset=0.5)


def _adamw(*, amsgrad: bool = False) -> Callable[[], Sides]:
    def theirs(params: "list[torch.nn.Parameter]") -> "torch.optim.Optimizer":
        import torch

        return torch.optim.AdamW(params, lr=PEAK, weight_decay=DECAY, amsgrad=amsgrad)

    return lambda: Sides(
        optim.adamw(PEAK, weight_decay=DECAY, amsgrad=amsgrad),
        theirs,
        _params(),
        lambda params: plain.adamw(params, PEAK, DECAY, amsgrad=amsgrad),
    )


def _new_adamw() -> Sides:
    """AdamW on a bias that starts at 0, where float32 keeps an update's digits."""
    return _adamw()()._replace(inputs=(np.zeros(5),), dtypes=(np.float32,))


def _adam() -> Sides:
    """Adam with every option that AdamW's cases leave out."""

    def theirs(params: "list[torch.nn.Parameter]") -> "torch.optim.Optimizer":
        import torch

        options = {"weight_decay": DECAY, "amsgrad": True, "maximize": True}
        return torch.optim.Adam(params, lr=PEAK, **options)

    return Sides(
        optim.adam(PEAK, weight_decay=DECAY, amsgrad=True, maximize=True),
        theirs,
        _params(),
        lambda params: plain.adam(params, PEAK, DECAY),
    )


def _sgd(
    *, dampening: float = 0.0, nesterov: bool = False, maximize: bool = False
) -> Callable[[], Sides]:
    def theirs(params: "list[torch.nn.Parameter]") -> "torch.optim.Optimizer":
        import torch

        return torch.optim.SGD(
            params, PEAK, MOMENTUM, dampening, DECAY, nesterov, maximize=maximize
        )

    return lambda: Sides(
        optim.sgd(PEAK, MOMENTUM, dampening, DECAY, nesterov, maximize),
        theirs,
        _params(),
        lambda params: plain.sgd(
            params, PEAK, MOMENTUM, DECAY,
            dampening=dampening, nesterov=nesterov, maximize=maximize,
        ),
    )  # fmt: skip


def _groups(params: "list[torch.nn.Parameter]") -> "list[dict[str, object]]":
    matrices = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim == 1]
    return [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]


def _masked_adamw() -> Sides:
    def theirs(params: "list[torch.nn.Parameter]") -> "torch.optim.Optimizer":
        import torch

        return torch.optim.AdamW(_groups(params), lr=PEAK)

    def mask(params: list[Array]) -> list[bool]:
        return [p.ndim > 1 for p in params]

    return Sides(
        optim.adamw(PEAK, weight_decay=DECAY, mask=mask),
        theirs,
        _params(),
        lambda params: plain.adamw(_groups(params), PEAK, DECAY),
    )


def _clip() -> Sides:
    def theirs(params: "list[torch.nn.Parameter]") -> object:
        import torch

        return torch.nn.utils.clip_grad_norm_(params, MAX_NORM)

    return Sides(
        optim.clip_grad_norm(MAX_NORM),
        theirs,
        _params(),
        lambda params: plain.clip(params, MAX_NORM),
    )


class _Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = linear.Linear(4, 6, rngs=rngs)
        self.norm = norms.BatchNorm(6)
        self.last = linear.Linear(6, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.last(functional.gelu(self.norm(self.first(x))))


def keep(model: nnx.Module, after: object) -> None:
    """Gives the model the statistics of the step."""
    nnx.update(model, after)


def _step() -> Callable[..., Array]:
    def step(
        model: nnx.Module, optimizer: "nnx.Optimizer[nnx.Module]", x: Array, y: Array
    ) -> Array:
        graph, params, *rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params: object) -> tuple[Array, object]:
            merged = nnx.merge(graph, params, *rest, copy=True)
            loss = functional.cross_entropy(merged(x), y)
            return loss, nnx.state(merged, nnx.Not(nnx.Param))

        (loss, after), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        keep(model, after)
        optimizer.update(model, gradients)
        return loss

    return step


def _rate(step: int) -> float:
    """The factor of the peak: a climb, then half a cosine."""
    if step < WARMUP:
        return step / WARMUP
    return (1 + math.cos(math.pi * (step - WARMUP) / (TOTAL - WARMUP))) / 2


def _torch_net() -> "type[torch.nn.Module]":
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)
            self.norm = torch.nn.BatchNorm1d(6)

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            y = torch_functional().gelu(self.norm(self.first(x)))
            return self.last(y)

    return Net


def _torch_optimizer(
    model: "torch.nn.Module",
) -> "tuple[torch.optim.Optimizer, LambdaLR]":
    import torch

    optimizer = torch.optim.AdamW(_groups(list(model.parameters())), lr=PEAK)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)


def _torch_step(
    model: "torch.nn.Module", made: "tuple[torch.optim.Optimizer, LambdaLR]",
    x: "torch.Tensor", y: "torch.Tensor",
) -> "torch.Tensor":  # fmt: skip
    optimizer, scheduler = made
    optimizer.zero_grad()
    loss = torch_functional().cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    scheduler.step()
    return loss.detach()


def _plain_optimizer(model: "torch.nn.Module") -> "torch.optim.Optimizer":
    return plain.adamw(_groups(list(model.parameters())), PEAK, DECAY, rate=_rate)


def _plain_step(
    model: "torch.nn.Module", optimizer: "torch.optim.Optimizer",
    x: "torch.Tensor", y: "torch.Tensor",
) -> "torch.Tensor":  # fmt: skip
    import torch

    hidden = x @ model.first.weight.T + model.first.bias
    hidden = witness.gelu(witness.batch_norm(model.norm, hidden))
    logits = hidden @ model.last.weight.T + model.last.bias
    loss = witness.cross_entropy(logits, y, 0.0)
    params = list(model.parameters())
    for parameter, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
        parameter.grad = gradient
    optimizer.step()
    return loss.detach()


def _train_step() -> Callable[[], Sides]:
    from flaxstab.parity import TrainStep

    def optimizer(model: nnx.Module) -> "nnx.Optimizer[nnx.Module]":
        schedule = optim.warmup_cosine(PEAK, WARMUP, TOTAL)
        tx = optim.adamw(
            schedule, weight_decay=DECAY, mask=lambda p: jax.tree.map(lambda a: jnp.ndim(a) > 1, p)
        )
        return nnx.Optimizer(model, tx, wrt=nnx.Param)

    return Build(
        lambda: TrainStep(_Net(), optimizer, _step()),
        lambda: TrainStep(drawn(_torch_net()()), _torch_optimizer, _torch_step),
        (normal(12, 4, seed=23), np.arange(12) * 5 % 3),
        lambda theirs: TrainStep(theirs.model, _plain_optimizer, _plain_step),
    )


def training() -> dict[str, Callable[[], Sides]]:
    """Returns the cases of optimizers and training steps, each a function that builds its sides."""
    return {
        "adamw": _adamw(),
        "adamw, float32": _new_adamw,
        "adamw, amsgrad": _adamw(amsgrad=True),
        "adamw, masked": _masked_adamw,
        "adam, climbing": _adam,
        "sgd": _sgd(nesterov=True),
        "sgd, dampened": _sgd(dampening=DAMPENING, maximize=True),
        "clip by norm": _clip,
        "clip by norm, float16": lambda: _clip()._replace(dtypes=(jnp.float16,)),
        "training step": _train_step(),
    }
