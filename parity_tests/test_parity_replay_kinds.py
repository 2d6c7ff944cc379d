"""Alpha dropout, drop path and recurrent dropout draw alike on both sides."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor

from flaxstab import dropout, parity
from flaxstab.parity import _replay
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same
from parity_tests.support.pairs import refusal
from torch_ref import dropout as torch_dropout

P = 0.4
X = values(24, 5, 6)
IMAGES = values(24, 3, 3, 5)


class Ours(nnx.Module):
    """A dropout, twice."""

    def __init__(self, layer: type[nnx.Module], p: float = P) -> None:
        self.drop = layer(p, rngs=nnx.Rngs(dropout=3))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(jnp.tanh(self.drop(x)))


class Same(nnx.Module):
    """Drops nothing."""

    def __init__(self, p: float, rngs: nnx.Rngs) -> None:
        del p, rngs

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Theirs(torch.nn.Module):
    """Its twin; ``moves`` puts the last axis in its place in arrays that have it at axis 1."""

    def __init__(self, drop: torch.nn.Module, *, moves: bool = False) -> None:
        super().__init__()
        self.drop, self.moves = drop, moves

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.moves else x
        y = self.drop(torch.tanh(self.drop(x)))
        return y.movedim(-1, 1) if self.moves else y


class DropPath(torch.nn.Module):
    """With the attributes and the results of timm's."""

    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        return torch_dropout.DropPath(self.drop_prob).train(self.training)(x)


class StochasticDepth(torch.nn.Module):
    """With the attributes and the results of torchvision's."""

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x: Tensor) -> Tensor:
        return torch_dropout.DropPath(self.p).train(self.training)(x)


Pair = tuple[type[nnx.Module], Callable[[float], torch.nn.Module]]
PAIRS: dict[str, Pair] = {
    "alpha": (dropout.AlphaDropout, torch.nn.AlphaDropout),
    "path": (dropout.DropPath, torch_dropout.DropPath),
    "path, timm": (dropout.DropPath, DropPath),
    "path, torchvision": (dropout.DropPath, StochasticDepth),
    "recurrent": (dropout.RecurrentDropout, torch_dropout.RecurrentDropout),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("layout", [None, "image"])
def test_a_layer_drops_what_its_twin_does(pair: Pair, layout: str | None) -> None:
    layer, twin = pair
    sequence = layer is dropout.RecurrentDropout  # (N, T, C) in torch too, whatever the layout
    x = IMAGES if layout and not sequence else X
    ours, theirs = Ours(layer), Theirs(twin(P), moves=sequence and layout is not None)
    with jax.enable_x64(True):
        for _ in range(2):  # two steps: the streams of a step begin where the last one ended
            with parity.replayed(ours, theirs, layout):
                given = torch.tensor(x)
                expected = theirs(given.movedim(-1, 1) if layout else given)
            expected = expected.movedim(1, -1) if layout else expected
            assert_same(ours(jnp.asarray(x)), expected)
            assert expected.unique().numel() < expected.numel()  # what is dropped is one number


class OwnRecurrentDropout(torch_dropout.RecurrentDropout):
    pass


@pytest.mark.parametrize(
    ("layer", "theirs"),
    [
        (dropout.AlphaDropout, torch.nn.Dropout(P)),
        (dropout.AlphaDropout, torch.nn.AlphaDropout(P, inplace=True)),
        (dropout.AlphaDropout, torch.nn.FeatureAlphaDropout(P)),
        (dropout.AlphaDropout, torch.nn.AlphaDropout(0.3)),
        (dropout.Dropout, torch_dropout.DropPath(P)),
        (dropout.DropPath, torch.nn.Dropout(P)),
        (dropout.DropPath, torch_dropout.DropPath(0.3)),
        (dropout.DropPath, DropPath(P, scale_by_keep=False)),
        (dropout.DropPath, StochasticDepth(P, "batch")),
        (dropout.RecurrentDropout, OwnRecurrentDropout(P)),
        (Same, torch_dropout.RecurrentDropout(P)),
        (Same, DropPath(P)),
    ],
)
def test_every_layer_needs_its_own_kind(layer: type[nnx.Module], theirs: torch.nn.Module) -> None:
    message = refusal(lambda: parity.compare(Ours(layer), Theirs(theirs), X))
    assert "every torch dropout must be" in message
    assert f"got 'drop': {type(theirs).__name__}(" in message


def test_what_drops_nothing_needs_no_counterpart() -> None:
    for theirs in (DropPath(0.0), torch_dropout.DropPath(0.0), torch.nn.AlphaDropout(0.0)):
        with parity.replayed(Ours(Same, 0.0), Theirs(theirs)):
            pass


def test_a_function_beside_drop_path_is_refused() -> None:
    message = refusal(lambda: parity.compare(jnp.tanh, Theirs(torch_dropout.DropPath(P)), X))
    assert "dropout is replayed for NNX modules only" in message


def test_a_mask_that_comes_twice_is_noticed_by_its_own_elements() -> None:
    """Few samples or features may meet by chance, however large a sample or long a sequence."""
    for layer, twin in (PAIRS["path"], PAIRS["recurrent"]):
        for samples, repeated in ((4, set()), (200, {"drop"})):
            draws = _replay.Draws()
            for _ in range(2):
                theirs = Theirs(twin(P))
                with parity.replayed(Ours(layer), theirs, None, draws):
                    theirs.drop(torch.ones(samples, 50, 2))
            assert draws.repeated == repeated


def test_the_new_kinds_are_registered_already() -> None:
    for layer, _ in PAIRS.values():
        with pytest.raises(ValueError, match="a module type is registered once"):
            parity.register_replay(layer, draw=np.ones, apply=torch.mul)
