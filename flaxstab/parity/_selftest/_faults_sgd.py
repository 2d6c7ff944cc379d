"""Faults of stochastic gradient descent."""

from importlib import import_module
from typing import TYPE_CHECKING

from flaxstab._typing import Array
from flaxstab.optim import _sgd
from flaxstab.parity._selftest import _cases_training as cases
from flaxstab.parity._selftest._plant import (
    Fault,
    Function,
    Plant,
    Planted,
    argument,
    replaced,
    told,
)

if TYPE_CHECKING:
    import torch


def _torch_sgd(make: Function) -> Plant:
    """Plants a change of one step on lists of parameters, gradients and buffers."""

    def plant() -> Planted:
        return replaced(import_module("torch.optim.sgd"), "_single_tensor_sgd", make)

    return plant


def _torch_argument(**changes: Function) -> Plant:
    def plant() -> Planted:
        return argument(import_module("torch.optim.sgd"), "_single_tensor_sgd", **changes)

    return plant


def _torch_from_zero(original: Function) -> Function:
    """Starts every buffer at 0, so that its first gradient is dampened like the others."""

    def faulty(
        params: "list[torch.Tensor]", grads: object, buffers: "list[torch.Tensor | None]",
        *others: object, **options: object,
    ) -> None:  # fmt: skip
        for i, buffer in enumerate(buffers):
            buffers[i] = params[i].new_zeros(params[i].shape) if buffer is None else buffer
        original(params, grads, buffers, *others, **options)

    return faulty


def _averaged(original: Function) -> Function:
    def faulty(nesterov: bool, terms: _sgd._Terms, g: Array, buffer: Array) -> tuple[Array, ...]:
        return original(nesterov, terms._replace(weight=1 - terms.momentum), g, buffer)

    return faulty


def _torch_averaged(original: Function) -> Function:
    def faulty(*args: object, **options: object) -> None:
        return _torch_from_zero(original)(*args, **{**options, "dampening": cases.MOMENTUM})

    return faulty


def _behind(original: Function) -> Function:
    """Looks ahead along the old buffer."""

    def faulty(nesterov: bool, terms: _sgd._Terms, g: Array, buffer: Array) -> tuple[Array, ...]:
        _, after = original(nesterov, terms, g, buffer)
        return -terms.rate * (g + terms.momentum * buffer), after

    return faulty


def _torch_behind(original: Function) -> Function:
    def faulty(
        params: "list[torch.Tensor]", grads: "list[torch.Tensor]",
        buffers: "list[torch.Tensor | None]", *others: object, lr: float, weight_decay: float,
        **options: object,
    ) -> None:  # fmt: skip
        before = [p.clone() for p in params]
        olds = [0 if buffer is None else buffer.clone() for buffer in buffers]
        original(params, grads, buffers, *others, lr=lr, weight_decay=weight_decay, **options)
        for p, old, g, buffer in zip(params, before, grads, olds, strict=True):
            p.copy_(old - lr * (g + weight_decay * old + cases.MOMENTUM * buffer))

    return faulty


def _torch_decoupled(original: Function) -> Function:
    def faulty(params: "list[torch.Tensor]", *lists: object, **options: float) -> None:
        for p in params:
            p.mul_(1 - options["lr"] * options["weight_decay"])
        original(params, *lists, **{**options, "weight_decay": 0.0})

    return faulty


SGD = (
    Fault(
        "first buffer dampened", "the buffer starts as the first gradient", "sgd, dampened",
        "momentum_buffer",
        lambda: argument(_sgd, "_terms", step=lambda step: step + 1),
        _torch_sgd(_torch_from_zero),
    ),
    Fault(
        "gradients averaged", "the buffer adds gradients up", "sgd", "momentum_buffer",
        lambda: replaced(_sgd, "_step", _averaged),
        _torch_sgd(_torch_averaged),
    ),
    Fault(
        "Nesterov along the old buffer", "Nesterov's step takes the new buffer", "sgd", "update",
        lambda: replaced(_sgd, "_step", _behind),
        _torch_sgd(_torch_behind),
    ),
    Fault(
        "decay behind the buffer", "L2 passes through the buffer", "sgd", "momentum_buffer",
        told(_sgd, coupled=False),
        _torch_sgd(_torch_decoupled),
    ),
    Fault(
        "maximize ignored by SGD", "maximize climbs", "sgd, dampened", "momentum_buffer",
        told(_sgd, maximize=False),
        _torch_argument(maximize=lambda _: False),
    ),
    Fault(
        "decay climbs, too", "maximize leaves decay alone", "sgd, dampened", "momentum_buffer",
        told(_sgd, weight_decay=-cases.DECAY),
        _torch_argument(weight_decay=lambda decay: -decay),
    ),
)  # fmt: skip
