"""Channel dropout draws alike on both sides: whole channels of a sample, wherever they lie."""

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
from parity_tests.support.pairs import refusal

IMAGES = values(4, 5, 5, 3)


class Channels(nnx.Module):
    """Channel dropout, twice."""

    def __init__(self, layer: type[nnx.Module] = dropout.ChannelDropout, p: float = 0.4) -> None:
        self.drop = layer(p, rngs=nnx.Rngs(dropout=3))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(jnp.tanh(self.drop(x)))


class TorchChannels(torch.nn.Module):
    def __init__(self, drop: torch.nn.Module, *, moves: bool = False) -> None:
        super().__init__()
        self.drop, self.moves = drop, moves

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(-1, 1) if self.moves else x
        y = self.drop(torch.tanh(self.drop(x)))
        return y.movedim(1, -1) if self.moves else y


RANKS = {1: torch.nn.Dropout1d, 2: torch.nn.Dropout2d, 3: torch.nn.Dropout3d}


def kept(ours: Channels, theirs: TorchChannels, x: np.ndarray, layout: str) -> list[np.ndarray]:
    """Returns what either side keeps in one step, features last."""
    with parity.replayed(ours, theirs, layout):
        given = torch.tensor(x).movedim(-1, 1) if layout else torch.tensor(x)
        replayed = theirs(given)
    replayed = replayed.movedim(1, -1) if layout else replayed
    return [np.asarray(ours(jnp.asarray(x, jnp.float32))) != 0, replayed.numpy() != 0]


@pytest.mark.parametrize("layout", ["image", None])
@pytest.mark.parametrize("rank", RANKS)
def test_channel_dropout_drops_the_channels_that_torchs_drops(rank: int, layout: str) -> None:
    """Without a layout the torch model moves the channels itself."""
    ours, theirs = Channels(), TorchChannels(RANKS[rank](0.4), moves=layout is None)
    for _ in range(2):  # two steps: the streams of a step begin where the last one ended
        found, replayed = kept(ours, theirs, values(4, *(3,) * rank, 12), layout)
        np.testing.assert_array_equal(found, replayed)
        assert 0 < found.sum() < found.size


def test_channel_dropout_is_compared_like_any_layer() -> None:
    theirs = TorchChannels(torch.nn.Dropout2d(0.4))
    report = parity.compare(Channels(), theirs, IMAGES, layout="image", dtypes=())
    assert report.passed, str(report)


def test_channel_dropout_of_the_wrong_axis_is_found() -> None:
    """On arrays with features last torch's drops rows."""
    wrong = TorchChannels(torch.nn.Dropout2d(0.4))
    found, replayed = kept(Channels(), wrong, values(4, 12, 12, 12), None)
    assert (found != replayed).any()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dropout.Dropout, torch.nn.Dropout2d(0.4)),
        (dropout.ChannelDropout, torch.nn.Dropout(0.4)),
        (dropout.ChannelDropout, torch.nn.Dropout2d(0.4, inplace=True)),
        (dropout.ChannelDropout, torch.nn.Dropout2d(0.5)),
    ],
)
def test_channel_dropout_needs_its_own_kind(
    ours: type[nnx.Module], theirs: torch.nn.Module
) -> None:
    message = refusal(
        lambda: parity.compare(Channels(ours), TorchChannels(theirs), IMAGES, layout="image")
    )
    assert "Dropout2d or Dropout3d with a flaxstab ChannelDropout, got 'drop'" in message


def replay_once(drop: torch.nn.Module, x: Tensor, draws: _replay.Draws | None = None) -> Tensor:
    theirs = TorchChannels(drop)
    with parity.replayed(Channels(), theirs, None, draws):
        return theirs.drop(x)


def test_a_sample_without_batch_axis_is_not_replayed() -> None:
    """Torch would take four axes under Dropout3d for one sample, and drop along the first."""
    with pytest.raises(ValueError, match=r"Dropout3d must get 5 axes, .* got shape=\(2, 3, 4, 4\)"):
        replay_once(torch.nn.Dropout3d(0.4), torch.ones(2, 3, 4, 4))


def test_a_channel_mask_that_comes_twice_is_noticed_by_its_channels() -> None:
    """Few channels may meet by chance, however large the image."""
    for channels, repeated in ((4, set()), (64, {"drop"})):
        draws = _replay.Draws()
        for _ in range(2):
            replay_once(torch.nn.Dropout2d(0.4), torch.ones(2, channels, 8, 8), draws)
        assert draws.repeated == repeated
