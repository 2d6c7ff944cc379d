"""Faults of attention."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from flaxstab import attention, functional
from flaxstab._typing import Array
from flaxstab.functional import _attention
from flaxstab.parity import _replay_attention
from flaxstab.parity._selftest._cases_attention import QUERIES
from flaxstab.parity._selftest._plant import (
    Fault,
    Function,
    Plant,
    argument,
    replaced,
    torch_functional,
)

if TYPE_CHECKING:
    import torch

_DEALT_IN_TURN = (0, 2, 1, 3)  # two heads of two samples


def _torch_mask(change: Function) -> Plant:
    """Plants a change of the mask, a float one by then, in the inner function of PyTorch's."""
    return lambda: argument(torch_functional(), "multi_head_attention_forward", attn_mask=change)


def _torch_core(make: Function) -> Plant:
    return lambda: replaced(torch_functional(), "scaled_dot_product_attention", make)


def _turned_round(original: Function) -> Function:
    def faulty(mask: "torch.Tensor", **options: object) -> "torch.Tensor":
        import torch

        boolean = mask is not None and mask.dtype == torch.bool
        return original(mask=~mask if boolean else mask, **options)

    return faulty


def _averaging(original: Function) -> Function:
    del original

    def faulty(logits: Array) -> Array:
        return jax.nn.softmax(jnp.maximum(logits, jnp.finfo(logits.dtype).min))

    return faulty


def _torch_averaging(original: Function) -> Function:
    def faulty(
        q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor", mask: "torch.Tensor", *rest: object
    ) -> "torch.Tensor":
        import torch

        return original(q, k, v, mask.clamp(min=torch.finfo(mask.dtype).min), *rest)

    return faulty


def _torch_unscaled(original: Function) -> Function:
    return lambda *given: original(*given, scale=1.0)


def _bottom_right(original: Function) -> Function:
    def faulty(q: Array, k: Array, v: Array, **options: object) -> Array:
        more = k.shape[1] - QUERIES
        hidden = ~jnp.tri(QUERIES, k.shape[1], more, dtype=bool)
        return original(q, k, v, **{**options, "mask": hidden, "is_causal": False})

    return faulty


def _torch_bottom_right(original: Function) -> Function:
    def faulty(
        q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor", *rest: object
    ) -> "torch.Tensor":
        import torch

        del rest
        shown = torch.ones(QUERIES, k.shape[2], dtype=torch.bool)
        return original(q, k, v, shown.tril(k.shape[2] - QUERIES))

    return faulty


def _read_as_booleans(mask: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.zeros_like(mask).masked_fill(mask != 0, -torch.inf)


def _torch_shared(original: Function) -> Function:
    def faulty(exchange: object, *given: object) -> "torch.Tensor":
        kept = vars(_replay_attention.Exchange)["kept"]
        shared = lambda *args: kept(*args)[:, :1].expand(args[-1])  # noqa: E731
        with replaced(_replay_attention.Exchange, "kept", lambda _: shared):
            return original(exchange, *given)

    return faulty


ATTENTION = (
    Fault(
        "mask turned round", "true in a mask means ignored", "attention", "output",
        lambda: argument(functional, "attention", mask=lambda masks: [~mask for mask in masks]),
        lambda: replaced(torch_functional(), "_canonical_mask", _turned_round),
    ),
    Fault(
        "mask's heads dealt in turn", "a mask of heads has those of a sample side by side",
        "attention", "output",
        lambda: argument(
            attention, "_attention_mask", mask=lambda mask: mask[jnp.array(_DEALT_IN_TURN)]
        ),
        _torch_mask(lambda mask: mask[list(_DEALT_IN_TURN)]),
    ),
    Fault(
        "products not scaled", "logits are scaled by the root of the head's size", "attention",
        "output",
        lambda: argument(functional, "attention", scale=lambda _: 1.0),
        _torch_core(_torch_unscaled),
    ),
    Fault(
        "a blind query averages", "a query that sees no key gives 0", "attention", "output",
        lambda: replaced(_attention, "_probabilities", _averaging),
        _torch_core(_torch_averaging),
    ),
    Fault(
        "causal from the bottom right", "query 0 sees key 0 alone", "attention, causal", "output",
        lambda: replaced(functional, "attention", _bottom_right),
        _torch_core(_torch_bottom_right),
    ),
    Fault(
        "float mask read as booleans", "a float mask is added to the logits", "attention, dropout",
        "evaluation",
        lambda: argument(attention, "_attention_mask", mask=lambda mask: mask != 0),
        _torch_mask(_read_as_booleans),
    ),
    Fault(
        "dropout shared by the heads", "each head drops for itself", "attention, dropout", "output",
        lambda: argument(
            _attention, "dropout", mask=lambda kept: jnp.broadcast_to(kept[:, :1], kept.shape)
        ),
        lambda: replaced(_replay_attention.Exchange, "attention", _torch_shared),
    ),
)  # fmt: skip
