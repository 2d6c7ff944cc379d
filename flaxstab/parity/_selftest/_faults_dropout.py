"""Faults of dropout."""

from typing import TYPE_CHECKING

import jax.numpy as jnp

from flaxstab import dropout, functional
from flaxstab._typing import Array
from flaxstab.parity._selftest._cases import DROP
from flaxstab.parity._selftest._cases_dropout import state_mask
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


def _mask_function(formula: Function) -> Plant:
    """Plants a formula of (x, mask, p) in the torch twin's dropout with a given mask."""

    def plant() -> Planted:
        from torch_ref import functional as reference

        return replaced(reference, "inverted_dropout", lambda _: formula)

    return plant


def _torch_dropping_always(name: str) -> Plant:
    def plant() -> Planted:
        import torch

        def forward(layer: "torch.nn.Dropout", x: "torch.Tensor") -> "torch.Tensor":
            return torch_functional().dropout(x, layer.p, training=True)

        return replaced(getattr(torch.nn, name), "forward", lambda _: forward)

    return plant


def _torch_training(name: str) -> Plant:
    """Makes a layer of the torch twin drop in evaluation, too."""

    def plant() -> Planted:
        from torch_ref import dropout as reference

        return replaced(
            getattr(reference, name), "forward", lambda f: lambda layer, x: f(layer.train(), x)
        )

    return plant


def _alpha_formula(formula: Function) -> Plant:
    def plant() -> Planted:
        from torch_ref import dropout as reference

        return replaced(reference, "alpha_dropout", lambda _: formula)

    return plant


def _alpha_unshifted(x: "torch.Tensor", mask: "torch.Tensor", p: float) -> "torch.Tensor":
    alpha = 1.7580993408473766
    return (x * mask - alpha * (1 - mask)) / ((1 - p) * (1 + p * alpha**2)) ** 0.5


def _unshifted(x: Array, p: float, mask: Array) -> Array:
    alpha = 1.7580993408473766
    return jnp.where(mask, x, -alpha) / ((1 - p) * (1 + p * alpha**2)) ** 0.5


def _lstm_function(name: str, make: Function) -> Plant:
    """Plants a fault in a function of the torch twin's LSTM or of its cell."""

    def plant() -> Planted:
        import torch

        from torch_ref import dropout as reference

        owner = {"LSTMCell": torch.nn.LSTMCell, "VariationalLSTM": reference.VariationalLSTM}[name]
        return replaced(owner, "forward", make)

    return plant


def _both_states(original: Function) -> Function:
    def faulty(
        cell: dropout.RecurrentDropoutCell, inner: tuple[Array, Array], mask: Array
    ) -> object:
        c, h = original(cell, inner, mask)
        return functional.dropout(c, cell.drop.p, mask), h

    return faulty


def _torch_both_states(original: Function) -> Function:
    def faulty(
        cell: "torch.nn.LSTMCell", x: "torch.Tensor", state: "tuple[torch.Tensor, torch.Tensor]"
    ) -> object:
        import torch

        h, c = state
        scale = torch.tensor(state_mask(cell.hidden_size)).to(c.dtype) / (1 - DROP)
        return original(cell, x, (h, c * scale))

    return faulty


def _outputs(original: Function) -> Function:
    def faulty(cell: dropout.RecurrentDropoutCell, carry: object, x: Array) -> object:
        (inner, mask), y = original(cell, carry, x)
        return (inner, mask), functional.dropout(y, cell.drop.p, mask)

    return faulty


def _torch_outputs(original: Function) -> Function:
    def faulty(lstm: object, x: "torch.Tensor", *masks: "torch.Tensor") -> "torch.Tensor":
        return original(lstm, x, *masks) * masks[1][:, None] / (1 - DROP)

    return faulty


_ELEMENTS = [
    Fault(
        "dropout without scale", "what is kept grows by 1 / (1 - p)", "dropout, mask given",
        "output",
        lambda: result(functional, "dropout", lambda y: y * 0.75),
        _mask_function(lambda x, mask, _: x * mask),
    ),
    Fault(
        "dropout scale 1 % off", "what is kept grows by 1 / (1 - p)", "dropout, mask given",
        "output",
        lambda: result(functional, "dropout", lambda y: y * 1.01),
        _mask_function(lambda x, mask, p: x * (mask * 1.01 / (1 - p))),
    ),
    Fault(
        "mask of what to drop", "true keeps", "dropout, mask given", "output",
        lambda: argument(functional, "dropout", mask=lambda mask: ~mask),
        _mask_function(lambda x, mask, p: x * ((1 - mask) / (1 - p))),
    ),
    Fault(
        "dropout in evaluation", "evaluation is the identity", "dropout", "evaluation",
        lambda: argument(dropout.Dropout, "__call__", deterministic=lambda _: False),
        _torch_dropping_always("Dropout"),
    ),
    Fault(
        "channel dropout in evaluation", "evaluation is the identity", "channel dropout",
        "evaluation",
        lambda: argument(dropout.ChannelDropout, "__call__", deterministic=lambda _: False),
        _torch_dropping_always("Dropout2d"),
    ),
    Fault(
        "alpha dropout in evaluation", "evaluation is the identity", "dropout in evaluation",
        "output",
        lambda: argument(dropout.AlphaDropout, "__call__", deterministic=lambda _: False),
        _torch_dropping_always("AlphaDropout"),
    ),
    Fault(
        "drop path in evaluation", "evaluation is the identity", "dropout in evaluation", "output",
        lambda: argument(dropout.DropPath, "__call__", deterministic=lambda _: False),
        _torch_training("DropPath"),
    ),
    Fault(
        "recurrent dropout in evaluation", "evaluation is the identity", "dropout in evaluation",
        "output",
        lambda: argument(dropout.RecurrentDropout, "__call__", deterministic=lambda _: False),
        _torch_training("RecurrentDropout"),
    ),
    Fault(
        "alpha dropout to 0", "alpha dropout drops to SELU's limit", "alpha dropout, mask given",
        "output",
        lambda: replaced(functional, "alpha_dropout", lambda _: functional.dropout),
        _alpha_formula(lambda x, mask, p: x * (mask / (1 - p))),
    ),
    Fault(
        "alpha dropout not shifted", "alpha dropout keeps mean 0", "alpha dropout, mask given",
        "output",
        lambda: replaced(functional, "alpha_dropout", lambda _: _unshifted),
        _alpha_formula(_alpha_unshifted),
    ),
]  # fmt: skip

_RECURRENT = [
    Fault(
        "cell state dropped", "the cell state of an LSTM is not dropped", "LSTM, masks given",
        "output",
        lambda: replaced(dropout.RecurrentDropoutCell, "_dropped", _both_states),
        _lstm_function("LSTMCell", _torch_both_states),
    ),
    Fault(
        "outputs dropped", "a cell's outputs are not dropped", "LSTM, masks given", "output",
        lambda: replaced(dropout.RecurrentDropoutCell, "__call__", _outputs),
        _lstm_function("VariationalLSTM", _torch_outputs),
    ),
]  # fmt: skip

DROPOUT = (*_ELEMENTS, *_RECURRENT)
