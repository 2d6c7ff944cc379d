"""Faults of gradient clipping."""

from importlib import import_module
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from flaxstab import optim
from flaxstab.optim import _clip
from flaxstab.parity._selftest._plant import (
    Fault,
    Function,
    Plant,
    Planted,
    argument,
    replaced,
    result,
)

if TYPE_CHECKING:
    import torch


def _each_alone(max_norm: float) -> optax.GradientTransformation:
    """Clips every tensor by its own norm."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        norm = lambda g: jnp.sqrt(jnp.sum(jnp.square(g)))  # noqa: E731
        scaled = lambda g: g * jnp.minimum(1.0, max_norm / (norm(g) + 1e-6))  # noqa: E731
        return jax.tree.map(scaled, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _torch_clip(make: Function) -> Plant:
    def plant() -> Planted:
        import torch

        return replaced(torch.nn.utils, "clip_grad_norm_", make)

    return plant


def _torch_clip_each(original: Function) -> Function:
    def faulty(params: "list[torch.Tensor]", max_norm: float) -> None:
        for parameter in params:
            original([parameter], max_norm)

    return faulty


def _torch_by_value(params: "list[torch.Tensor]", value: float) -> None:
    for parameter in params:
        parameter.grad.clamp_(-value, value)


def _torch_no_summand() -> Planted:
    import torch

    less = lambda norm: norm - 1e-6  # noqa: E731
    return argument(torch.nn.utils.clip_grad, "_clip_grads_with_norm_", total_norm=less)


def _torch_low_norm() -> Planted:
    def norm(tensors: "list[torch.Tensor]", *_: object) -> "torch.Tensor":
        return sum((t * t).sum() for t in tensors) ** 0.5

    return replaced(import_module("torch.nn.utils.clip_grad"), "_get_total_norm", lambda _: norm)


CLIP = (
    Fault(
        "clip by value", "clipping keeps the direction", "clip by norm", "gradient",
        lambda: replaced(optim, "clip_grad_norm", lambda _: optax.clip),
        _torch_clip(lambda _: _torch_by_value),
    ),
    Fault(
        "clip without 1e-6", "the norm is divided with 1e-6 added", "clip by norm", "gradient",
        lambda: result(_clip, "_total_norm", lambda norm: norm - 1e-6),
        _torch_no_summand,
    ),
    Fault(
        "squares in float16", "the norm is computed in float32", "clip by norm, float16",
        "gradient",
        lambda: replaced(_clip, "widest", lambda _: jnp.result_type),
        _torch_low_norm,
    ),
    Fault(
        "each tensor clipped alone", "the norm is that of all gradients", "clip by norm",
        "gradient",
        lambda: replaced(optim, "clip_grad_norm", lambda _: _each_alone),
        _torch_clip(_torch_clip_each),
    ),
)  # fmt: skip
