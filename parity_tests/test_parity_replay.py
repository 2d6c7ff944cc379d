"""Random layers draw alike on both sides: dropout of either kind, and layers of one's own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor

from flaxstab import dropout, linear, parity
from flaxstab.parity import _replay
from flaxstab.parity._verdict import judge_semantics
from parity_tests.support.cases import values
from parity_tests.support.pairs import failures, finding, refusal, torch_linear

X = values(16, 4)
IMAGES = values(4, 5, 5, 3)


class Stock(nnx.Module):
    """nnx's own dropout behind a linear layer."""

    def __init__(self, p: float = 0.25) -> None:
        self.lin = linear.Linear(4, 4, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(p, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.lin(x))


class TorchStock(torch.nn.Module):
    """Its twin; ``scale`` plants a fault."""

    def __init__(self, p: float = 0.25, scale: float = 1.0) -> None:
        super().__init__()
        self.lin, self.drop, self.scale = torch_linear(), torch.nn.Dropout(p), scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.lin(x))
        return self.scale * y if self.training else y


def test_nnx_dropout_drops_what_torchs_drops() -> None:
    report = parity.compare(Stock(), TorchStock(), X, dtypes=())
    assert report.passed, str(report)
    assert report.notes == ()
    wrong = parity.compare(Stock(), TorchStock(scale=0.75), X, dtypes=())
    gradients = {"grad input 0", "grad lin.weight", "grad lin.bias"}
    assert failures(wrong) == {"output", "step 2 output", "step 10 output", *gradients}


def test_lower_precisions_behind_nnx_dropout_are_explained() -> None:
    report = parity.compare(Stock(), TorchStock(), X)
    assert report.passed, str(report)
    (note,) = report.notes
    assert "float32 and below behind nnx.Dropout" in note
    assert parity.compare(Stock(0.0), TorchStock(0.0), X).notes == ()


def test_another_probability_is_refused() -> None:
    message = refusal(lambda: parity.compare(Stock(0.25), TorchStock(0.3), X))
    assert "got 'drop': Dropout(p=0.3" in message
    assert message.endswith("Give both the same probability, or set it to 0.")


class Noise(nnx.Module):
    """Adds normal noise in training."""

    def __init__(self, std: float = 0.5, *, advances: bool = True) -> None:
        self.std, self.advances = std, advances
        self.rngs = nnx.Rngs(noise=2).noise.fork()
        self.deterministic = False

    def __call__(self, x: jax.Array) -> jax.Array:
        return x if self.deterministic else x + self.std * self.drawn(x.shape)

    def drawn(self, shape: tuple[int, ...]) -> jax.Array:
        if not self.advances:
            return jax.random.normal(self.rngs.key[...], shape, jnp.float32)
        return jax.random.normal(self.rngs(), shape, jnp.float32)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Obeys ``model.train()`` and ``model.eval()``."""
        self.deterministic = self.deterministic if deterministic is None else deterministic


class TorchNoise(torch.nn.Module):
    def __init__(self, std: float = 0.5) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x) if self.training else x


class Noisy(nnx.Module):
    """The same noise layer twice."""

    def __init__(self, *, advances: bool = True) -> None:
        self.noise = Noise(advances=advances)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.noise(jnp.tanh(self.noise(x)))


class TorchNoisy(torch.nn.Module):
    def __init__(self, std: float = 0.5) -> None:
        super().__init__()
        self.noise = TorchNoise(std)

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(torch.tanh(self.noise(x)))


class TorchOnce(TorchNoisy):
    """Takes the noise of the first call for the second, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.noise(x)
        return torch.tanh(y) + (y - x)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teaches the harness the noise layer, for one test."""
    monkeypatch.setattr(_replay, "_REPLAYS", dict(_replay._REPLAYS))
    parity.register_replay(
        Noise,
        draw=lambda layer, shape: layer.drawn(shape),
        apply=lambda module, x, draw: x + module.std * draw.to(x.dtype),
    )


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize(("x", "layout"), [(X, None), (IMAGES, "image")], ids=["rows", "images"])
def test_a_registered_layer_is_replayed_exactly(x: np.ndarray, layout: str | None) -> None:
    report = parity.compare(Noisy(), TorchNoisy(), x, layout=layout)
    assert report.passed, str(report)


@pytest.mark.usefixtures("noise")
def test_another_deviation_of_the_noise_is_found() -> None:
    report = parity.compare(Noisy(), TorchNoisy(0.5 * (1 + 1e-9)), X, dtypes=())
    assert {"output", "grad input 0"} <= failures(report)
    assert "evaluation" not in failures(report)


@pytest.mark.usefixtures("noise")
def test_a_layer_that_is_called_twice_draws_twice() -> None:
    assert parity.compare(Noisy(), TorchNoisy(), X, dtypes=()).passed
    report = parity.compare(Noisy(), TorchOnce(), X, dtypes=())
    assert "output" in failures(report)


def test_without_a_registration_the_noise_differs() -> None:
    report = parity.compare(Noisy(), TorchNoisy(), X, dtypes=())
    assert "output" in failures(report)


@pytest.mark.usefixtures("noise")
def test_a_type_is_registered_once() -> None:
    for kind in (Noise, dropout.Dropout, dropout.ChannelDropout, nnx.Dropout):
        message = refusal(
            lambda kind=kind: parity.register_replay(kind, draw=np.ones, apply=torch.mul)
        )
        assert f"got module_type='{kind.__name__}'" in message


class Fixed(nnx.Module):
    """Dropout whose stream stands still."""

    def __init__(self, p: float) -> None:
        self.drop = dropout.Dropout(p, rngs=nnx.Rngs(dropout=0))

    def __call__(self, x: jax.Array) -> jax.Array:
        count = self.drop.rngs.count[...]
        y = self.drop(x)
        self.drop.rngs.count[...] = count
        return y


class TorchDrop(torch.nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


def drawn(
    model: nnx.Module, rows: int, steps: int, p: float = 0.4, *, advance: bool = True
) -> set[str]:
    """Replays some steps; returns the layers that drew the same mask twice."""
    draws = _replay.Draws()
    module = TorchDrop(p)
    for _ in range(steps):
        with parity.replayed(model, module, None, draws):
            module(torch.ones(rows, 8))
        if advance:
            model(jnp.ones((rows, 8)))
    return draws.repeated


def test_a_mask_that_comes_twice_is_noticed() -> None:
    assert drawn(Fixed(0.4), rows=8, steps=2) == {"drop"}
    assert drawn(Dropping(0.4), rows=8, steps=2, advance=False) == {"drop"}
    assert drawn(Dropping(0.4), rows=8, steps=50) == set()


class Dropping(nnx.Module):
    def __init__(self, p: float) -> None:
        self.drop = dropout.Dropout(p, rngs=nnx.Rngs(dropout=0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(x)


@pytest.mark.parametrize(("p", "rows"), [(0.0, 8), (1.0, 8), (0.4, 1)])
def test_masks_that_must_be_equal_or_may_be_by_chance_say_nothing(p: float, rows: int) -> None:
    assert drawn(Fixed(p), rows=rows, steps=5, p=p) == set()


Build = Callable[[], nnx.Module]


@pytest.mark.parametrize("build", [Stock, lambda: Dropping(0.4)], ids=["nnx", "ours"])
def test_a_second_comparison_draws_what_the_first_drew(build: Build) -> None:
    """The model that was given does not advance, so a report can be repeated."""
    model = build()
    module = TorchStock() if isinstance(model, Stock) else TorchDrop(0.4)
    reports = [parity.compare(model, module, X, dtypes=()) for _ in range(2)]
    assert reports[0] == reports[1]
    assert reports[0].passed
    assert finding(reports[0], "output").passed


class Twice(nnx.Module):
    def __init__(self, p: float = 0.4) -> None:
        self.drop = dropout.Dropout(p, rngs=nnx.Rngs(dropout=3))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.drop(x))


class TorchTwice(torch.nn.Module):
    def __init__(self, p: float = 0.4) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.drop(x))


@pytest.mark.parametrize("layout", ["image", None])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_replayed_drops_the_same_elements_in_every_call(layout: str, p: float) -> None:
    ours, theirs = Twice(p), TorchTwice(p)
    x = values(2, 5, 6, 3)
    given = np.moveaxis(x, -1, 1).copy() if layout else x
    with jax.enable_x64(True):
        for _ in range(2):  # two steps: the streams of a step begin where the last one ended
            with parity.replayed(ours, theirs, layout):
                replayed = theirs(torch.tensor(given)).numpy()
            found = np.asarray(ours(jnp.asarray(x)))
            torchs = np.moveaxis(replayed, 1, -1) if layout else replayed
            size = float(np.max(np.abs(found), initial=0))
            assert judge_semantics("output", found, torchs, size).passed
            assert (found == 0).any() == (p > 0)


def test_replayed_reads_the_streams_and_leaves_nothing_behind() -> None:
    ours, theirs = Twice(), TorchTwice()
    before = int(ours.drop.rngs.count[...])
    with parity.replayed(ours, theirs):
        theirs(torch.ones(4, 4))
        theirs.eval()
        assert torch.equal(theirs(torch.ones(4, 4)), torch.ones(4, 4))
        theirs.train()
    assert int(ours.drop.rngs.count[...]) == before
    torch.manual_seed(0)
    first = theirs(torch.ones(50))
    assert not torch.equal(first, theirs(torch.ones(50)))
    assert not theirs.drop._forward_hooks


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        (lambda: TorchTwice(0.5), "drop"),
        (lambda: torch.nn.Sequential(torch.nn.Dropout(0.4)), "0"),
    ],
)
def test_replayed_names_a_layer_without_counterpart(theirs: object, name: str) -> None:
    model = theirs()
    p = next(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    with (
        pytest.raises(ValueError, match=f"got '{name}': .*p={p}"),
        parity.replayed(Twice(), model),
    ):
        pass


@pytest.mark.parametrize(
    "layer",
    [torch.nn.Dropout(0.3, inplace=True), torch.nn.Dropout1d(0.3), torch.nn.AlphaDropout(0.3)],
)
def test_dropout_that_cannot_be_replayed_is_refused(layer: torch.nn.Module) -> None:
    class Ours(nnx.Module):
        def __init__(self) -> None:
            self.drop = dropout.Dropout(0.3, rngs=nnx.Rngs(0))

    theirs = torch.nn.Module()
    theirs.drop = layer
    with (
        pytest.raises(ValueError, match=r"must be a torch\.nn\.Dropout, not in place"),
        parity.replayed(Ours(), theirs),
    ):
        pass


def test_fair_masks_are_not_called_repeated() -> None:
    """Two masks of 64 elements with p = 0.1 are equal with probability 3e-6: 20,000 masks meet."""
    rng, draws = np.random.default_rng(0), _replay.Draws()
    for layer in range(20):
        for _ in range(1000):
            draws.add(str(layer), rng.random(64) >= 0.1)
    assert not draws.repeated


def test_repeated_noise_of_either_sign_is_noticed() -> None:
    for seed in range(20):
        noise, draws = np.random.default_rng(seed).normal(size=100), _replay.Draws()
        draws.add("noise", noise)
        assert not draws.repeated
        draws.add("noise", noise)
        assert draws.repeated == {"noise"}
