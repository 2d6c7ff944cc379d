"""The mistakes that are planted in single layers, and the kinds of layers that can make them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
from flax import nnx

from flaxstab import linear, norms
from flaxstab.attention import MultiHeadAttention
from flaxstab.parity._selftest._faults_attention import ATTENTION
from flaxstab.parity._selftest._faults_linear import LINEAR
from flaxstab.parity._selftest._faults_norms import NORMS
from flaxstab.parity._selftest._plant import Function, Plant

if TYPE_CHECKING:
    import torch


class Kind(NamedTuple):
    """A kind of layer that faults are planted in.

    Attributes:
      flax: its class, and the method that every use of it runs through.
      torch: the name of PyTorch's class.
    """

    flax: tuple[type[nnx.Module], str]
    torch: str


KINDS = {
    "batch norm": Kind((norms.BatchNorm, "__call__"), "BatchNorm2d"),
    "group norm": Kind((norms.GroupNorm, "__call__"), "GroupNorm"),
    "layer norm": Kind((norms.LayerNorm, "__call__"), "LayerNorm"),
    "linear": Kind((linear.Linear, "__call__"), "Linear"),
    "conv": Kind((linear.Conv, "__call__"), "Conv2d"),
    "attention": Kind((MultiHeadAttention, "attend"), "MultiheadAttention"),
}
_CASES = {**{kind: kind for kind in KINDS}, "conv, stride 2": "conv"}
_LEFT_OUT = (  # what one layer of these networks cannot show
    "mask turned round", "mask's heads dealt in turn", "a blind query averages",  # no masks
    "input changed in place",  # of a layer whose input nobody else uses
    "statistics as constants",  # JAX takes its rule after the layer has returned
)  # fmt: skip


def _large_window(layer: "torch.nn.Module") -> bool:
    return vars(layer)["kernel_size"] == (3, 3)


def _halving(layer: "torch.nn.Module") -> bool:
    return _large_window(layer) and vars(layer)["stride"] == (2, 2)


def _square(layer: "torch.nn.Module") -> bool:
    return vars(layer)["in_features"] == vars(layer)["out_features"]


def _biased(layer: "torch.nn.Module") -> bool:
    return next((True for n, _ in layer.named_parameters() if n == "bias"), False)


NEEDS: dict[str, Callable[["torch.nn.Module"], bool]] = {
    "flipped kernel": _large_window,
    "kernel axes swapped": _large_window,
    "conv without bias": _biased,
    "SAME padding at stride 2": _halving,
    "windows one pixel early": _halving,
    "transposed square kernel": _square,
}


class Mistake(NamedTuple):
    """A mistake of one layer.

    Attributes:
      name: what it is.
      kind: of layer; '' if every kind makes it.
      direction: in which it shows first.
      jax: from the layer's call to the faulty call, on JAX's side.
      torch: the same on PyTorch's.
    """

    name: str
    kind: str
    direction: str
    jax: Callable[[Function], Function]
    torch: Callable[[Function], Function]


def _during(plant: Plant | None) -> Callable[[Function], Function]:
    """Returns what plants a fault of the table while one layer runs."""

    def make(call: Function) -> Function:
        def faulty(*args: object, **named: object) -> object:
            if plant is None:
                raise ValueError("this side cannot have that fault")
            with plant():
                return call(*args, **named)

        return faulty

    return make


def _changing(change: Callable[..., object]) -> Callable[[Function], Function]:
    """Returns what changes every result of one layer."""

    def make(call: Function) -> Function:
        return lambda *args, **named: jax.tree.map(change, call(*args, **named))

    return make


def mistakes() -> tuple[Mistake, ...]:
    """Returns the mistakes of the table that a layer of a network can make, and three of all."""
    known = [f for f in (*NORMS, *LINEAR, *ATTENTION) if f.case in _CASES]
    return (
        *(
            Mistake(
                f.name, _CASES[f.case], "backward" if f.check.startswith("grad") else "forward",
                _during(f.jax), _during(f.torch),
            )
            for f in known if f.name not in _LEFT_OUT
        ),
        Mistake(
            "result 1e-9 too large", "", "forward",
            _changing(lambda y: y * (1 + 1e-9)), _changing(lambda y: y * (1 + 1e-9)),
        ),
        Mistake(
            "gradient 1 % too large", "", "backward",
            _changing(lambda y: y * 1.01 - jax.lax.stop_gradient(y * 0.01)),
            _changing(lambda y: y * 1.01 - (y * 0.01).detach()),
        ),
        Mistake(
            "gradient cut", "", "backward",
            _changing(jax.lax.stop_gradient), _changing(lambda y: y.detach() + 0 * y),
        ),
    )  # fmt: skip
