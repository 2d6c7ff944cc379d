"""What is random: cases judged by their law, and the faults that only a law shows.

A comparison gives both sides the same weights and the same masks, and so cannot see them.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import dropout, functional, initializers, linear
from flaxstab._typing import Array, Initializer
from flaxstab.functional import _dropout
from flaxstab.parity._evidence import Budget, Evidence
from flaxstab.parity._selftest._cases import DROP
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
from flaxstab.parity._statistics import HasCdf, HasMean, IsNormal

if TYPE_CHECKING:
    import torch

_FANS = 256
_STD = math.sqrt(2 / _FANS)
_BOUND = 1 / math.sqrt(_FANS)
_ONE_PERCENT = 0.01

Draw = Callable[[int, int], np.ndarray]  # from how many samples are needed, and a seed


class Law(NamedTuple):
    """Two sides that draw from one law.

    Attributes:
      ours: draws on the JAX side.
      theirs: draws on the PyTorch side.
      claim: what the law is, and how small a discrepancy must be seen.
    """

    ours: Draw
    theirs: Draw
    claim: HasCdf | HasMean | IsNormal

    def evidence(self, seed: int) -> dict[str, Evidence]:
        """Returns what each side's draws say about the claim."""
        import torch

        found = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for side, draw in (("jax", self.ours), ("torch", self.theirs)):
                budget = Budget()
                found[side] = self.claim.check(
                    draw(self.claim.samples_needed(budget), seed), budget
                )
        return found


def _kaiming() -> Law:
    def ours(n: int, seed: int) -> np.ndarray:
        return np.asarray(
            initializers.kaiming_normal()(jax.random.key(seed), (_FANS, -(-n // _FANS)))
        )

    def theirs(n: int, _: int) -> np.ndarray:
        import torch

        return torch.nn.init.kaiming_normal_(torch.empty(-(-n // _FANS), _FANS)).numpy()

    return Law(ours, theirs, IsNormal(0.0, _STD, discrepancy=_ONE_PERCENT))


def _uniform(x: np.ndarray) -> np.ndarray:
    """The distribution function of torch's weights behind ``_FANS`` inputs."""
    return np.clip((x + _BOUND) / (2 * _BOUND), 0, 1)


def _weights() -> Law:
    def ours(n: int, seed: int) -> np.ndarray:
        return np.asarray(linear.Linear(_FANS, -(-n // _FANS), rngs=nnx.Rngs(seed)).kernel[...])

    def theirs(n: int, _: int) -> np.ndarray:
        import torch

        return torch.nn.Linear(_FANS, -(-n // _FANS)).weight.detach().numpy()

    return Law(ours, theirs, HasCdf(_uniform, discrepancy=2 * _ONE_PERCENT))


def _transposed_weights() -> Law:
    def ours(n: int, seed: int) -> np.ndarray:
        rows = -(-n // _FANS)
        return np.asarray(
            linear.ConvTranspose(rows, _FANS // 4, 2, rngs=nnx.Rngs(seed)).kernel[...]
        )

    def theirs(n: int, _: int) -> np.ndarray:
        import torch

        return torch.nn.ConvTranspose2d(-(-n // _FANS), _FANS // 4, 2).weight.detach().numpy()

    return Law(ours, theirs, HasCdf(_uniform, discrepancy=2 * _ONE_PERCENT))


def _rows() -> Law:
    def ours(n: int, seed: int) -> np.ndarray:
        return np.asarray(linear.Embed(-(-n // _FANS), _FANS, rngs=nnx.Rngs(seed)).embedding[...])

    def theirs(n: int, _: int) -> np.ndarray:
        import torch

        return torch.nn.Embedding(-(-n // _FANS), _FANS).weight.detach().numpy()

    return Law(ours, theirs, IsNormal(0.0, 1.0, discrepancy=_ONE_PERCENT))


def _dropped(
    calls: int, statistic: Callable[..., np.ndarray], claim: HasMean, size: int = 1
) -> Law:
    """Builds the case of a statistic of what dropout makes of ones in some calls."""

    def ours(n: int, seed: int) -> np.ndarray:
        layer = dropout.Dropout(DROP, rngs=nnx.Rngs(seed))
        return statistic(*(np.asarray(layer(jnp.ones(size * n))) for _ in range(calls)))

    def theirs(n: int, _: int) -> np.ndarray:
        import torch

        layer = torch.nn.Dropout(DROP)
        return statistic(*(layer(torch.ones(size * n)).numpy() for _ in range(calls)))

    return Law(ours, theirs, claim)


def _two_alike(
    ours: type[dropout.DropPath | dropout.RecurrentDropout], shape: tuple[int, ...]
) -> Law:
    """Builds the case of a layer by which two elements of a sample drop together."""

    def both(y: np.ndarray) -> np.ndarray:
        return (y.reshape(-1, 2) == 0).all(1)

    def draw(n: int, seed: int) -> np.ndarray:
        y = ours(DROP, rngs=nnx.Rngs(seed))(jnp.ones((n, *shape)))
        return both(np.asarray(y))

    def theirs(n: int, _: int) -> np.ndarray:
        import torch

        from torch_ref import dropout as reference

        layer = getattr(reference, ours.__name__)(DROP)
        return both(layer(torch.ones(n, *shape)).numpy())

    return Law(draw, theirs, HasMean(DROP, discrepancy=_ONE_PERCENT))


def _alpha() -> Law:
    """The square of what alpha dropout makes of numbers 1 and -1: their variance is 1."""

    def signs(n: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).choice([-1.0, 1.0], n).astype(np.float32)

    def ours(n: int, seed: int) -> np.ndarray:
        layer = dropout.AlphaDropout(DROP, rngs=nnx.Rngs(seed))
        return np.square(np.asarray(layer(jnp.asarray(signs(n, seed)))))

    def theirs(n: int, seed: int) -> np.ndarray:
        import torch

        return torch.nn.AlphaDropout(DROP)(torch.tensor(signs(n, seed))).numpy() ** 2

    return Law(ours, theirs, HasMean(1.0, low=0.0, high=4.0, discrepancy=2 * _ONE_PERCENT))


def laws() -> dict[str, Callable[[], Law]]:
    """Returns the cases of laws, each a function that builds its sides."""
    same = DROP**2 + (1 - DROP) ** 2
    most = float(np.float32(1 / (1 - DROP)))
    return {
        "kaiming_normal": _kaiming,
        "weights of Linear": _weights,
        "weights of ConvTranspose": _transposed_weights,
        "rows of Embed": _rows,
        "drop rate": lambda: _dropped(
            1, lambda y: y == 0, HasMean(DROP, discrepancy=_ONE_PERCENT * DROP)
        ),
        "masks of two calls": lambda: _dropped(
            2, lambda y, z: (y == 0) == (z == 0), HasMean(same, discrepancy=_ONE_PERCENT)
        ),
        "mean behind dropout": lambda: _dropped(
            1, lambda y: y, HasMean(1.0, low=0.0, high=most, discrepancy=_ONE_PERCENT)
        ),
        "neighbours in a mask": lambda: _dropped(
            1,
            lambda y: (y[::2] == 0) == (y[1::2] == 0),
            HasMean(same, discrepancy=_ONE_PERCENT),
            size=2,
        ),
        "elements of a sample": lambda: _two_alike(dropout.DropPath, (2,)),
        "steps of a sequence": lambda: _two_alike(dropout.RecurrentDropout, (2, 1)),
        "variance behind alpha dropout": _alpha,
    }


def _wider(make: Function) -> Function:
    """Returns an initializer's maker whose draws are 1 % wider."""

    def made() -> Function:
        return lambda key, shape: make()(key, shape) * (1 + _ONE_PERCENT)

    return made


def _torch_wider() -> Planted:
    import torch

    grow = lambda tensor: tensor.mul_(1 + _ONE_PERCENT)  # noqa: E731
    return result(torch.nn.init, "kaiming_normal_", grow)


def _centred() -> Initializer:
    return initializers.normal(0.0, _BOUND / math.sqrt(3))


def _torch_centred() -> Planted:
    import torch

    def normal(tensor: "torch.Tensor", **_: float) -> "torch.Tensor":
        with torch.no_grad():
            return tensor.normal_(0.0, _BOUND / math.sqrt(3))

    return replaced(torch.nn.init, "kaiming_uniform_", lambda _: normal)


def _torch_fan_out() -> Planted:
    import torch

    return argument(torch.nn.init, "kaiming_uniform_", mode=lambda _: "fan_out")


def _torch_narrow() -> Planted:
    import torch

    return argument(torch.nn.init, "normal_", std=lambda _: 1 / math.sqrt(_FANS))


def _narrow(make: Function) -> Function:
    """Returns Flax's law of embeddings in place of torch's."""

    def made(padding_idx: int | None) -> Function:
        return lambda *draw: make(padding_idx)(*draw) / math.sqrt(_FANS)

    return made


def _torch_dropout(make: Function) -> Planted:
    import torch

    return replaced(torch.nn.Dropout, "forward", make)


def _torch_repeated(original: Function) -> Function:
    def faulty(layer: "torch.nn.Dropout", x: "torch.Tensor") -> "torch.Tensor":
        import torch

        torch.manual_seed(3)
        return original(layer, x)

    return faulty


def _shared(mask: Function) -> Function:
    """Gives every second element the fate of the one before it."""

    def faulty(key: Array, p: float, shape: tuple[int, ...]) -> Array:
        return jnp.repeat(mask(key, p, (shape[0] // 2,)), 2)

    return faulty


def _torch_shared(original: Function) -> Function:
    def faulty(layer: "torch.nn.Dropout", x: "torch.Tensor") -> "torch.Tensor":
        return original(layer, x[::2]).repeat_interleave(2)

    return faulty


def _torch_elements(name: str) -> Plant:
    """Makes a layer of the torch twin drop elements."""

    def plant() -> Planted:
        from torch_ref import dropout as reference

        def forward(layer: "torch.nn.Module", x: "torch.Tensor") -> "torch.Tensor":
            return torch_functional().dropout(x, layer.p, layer.training)

        return replaced(getattr(reference, name), "forward", lambda _: forward)

    return plant


def _more(p: float) -> float:
    return p * (1 + _ONE_PERCENT)


LAWS = (
    Fault(
        "standard deviation 1 % off", "initializers have torch's law", "kaiming_normal", "law",
        lambda: replaced(initializers, "kaiming_normal", _wider),
        _torch_wider,
    ),
    Fault(
        "normal for uniform", "weights start uniform", "weights of Linear", "law",
        lambda: replaced(initializers, "torch_weight", lambda _: _centred),
        _torch_centred,
    ),
    Fault(
        "fan of the input", "a transposed kernel's fan counts the outputs",
        "weights of ConvTranspose", "law",
        lambda: argument(
            initializers, "torch_weight", in_axis=lambda _: -2, out_axis=lambda _: -1
        ),
        _torch_fan_out,
    ),
    Fault(
        "embedding by its width", "an embedding starts as N(0, 1)", "rows of Embed", "law",
        lambda: replaced(initializers, "torch_embedding", _narrow),
        _torch_narrow,
    ),
    Fault(
        "drop rate 1 % off", "p is the probability of dropping", "drop rate", "law",
        lambda: argument(_dropout, "dropout_mask", p=_more),
        lambda: argument(torch_functional(), "dropout", p=_more),
    ),
    Fault(
        "repeated mask", "every call draws a mask", "masks of two calls", "law",
        lambda: argument(_dropout, "dropout_mask", key=lambda _: jax.random.key(3)),
        lambda: _torch_dropout(_torch_repeated),
    ),
    Fault(
        "mean 1 % off behind dropout", "dropout keeps the mean", "mean behind dropout", "law",
        lambda: result(_dropout, "dropout", lambda y: y * (1 - _ONE_PERCENT)),
        lambda: result(torch_functional(), "dropout", lambda y: y * (1 - _ONE_PERCENT)),
    ),
    Fault(
        "two elements dropped as one", "elements are dropped independently",
        "neighbours in a mask", "law",
        lambda: replaced(_dropout, "dropout_mask", _shared),
        lambda: _torch_dropout(_torch_shared),
    ),
    Fault(
        "drop path of elements", "drop path drops whole samples", "elements of a sample", "law",
        lambda: argument(functional, "random_dropout", shape=lambda _: None),
        _torch_elements("DropPath"),
    ),
    Fault(
        "a mask for every step", "a sequence has one mask", "steps of a sequence", "law",
        lambda: argument(functional, "random_dropout", shape=lambda _: None),
        _torch_elements("RecurrentDropout"),
    ),
    Fault(
        "variance 2 % off", "alpha dropout keeps the variance", "variance behind alpha dropout",
        "law",
        lambda: result(_dropout, "alpha_dropout", lambda y: y * (1 - _ONE_PERCENT)),
        lambda: result(torch_functional(), "alpha_dropout", lambda y: y * (1 - _ONE_PERCENT)),
    ),
)  # fmt: skip
