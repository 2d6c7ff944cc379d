"""``locate``: the first layer that differs, each layer given what PyTorch's is given."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor, nn

from flaxstab import attention, dropout, linear, norms, parity
from flaxstab.parity import LayerError, Location
from parity_tests.support.cases import values
from parity_tests.support.pairs import Net, TorchNet, arrays_of, refusal

X = values(8, 4)
IMAGES = values(2, 4, 4, 4)  # as many rows and columns as channels: shapes alone do not tell


def of(location: Location, name: str, direction: str = "forward") -> LayerError:
    (found,) = [e for e in location.layers if (e.name, e.direction) == (name, direction)]
    return found


class Small(nnx.Module):
    """A block with a layer that is called twice, between a stem and a head; images."""

    def __init__(self, *, twice: Callable[[jax.Array], jax.Array] = lambda x: x) -> None:
        rngs = nnx.Rngs(0)
        self.stem = linear.Conv(4, 4, 3, padding=1, rngs=rngs)
        self.block = Block(rngs, twice)
        self.head = linear.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.block(self.stem(x)).mean((1, 2)))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, twice: Callable[[jax.Array], jax.Array]) -> None:
        self.bn = norms.BatchNorm(4)
        self.drop = dropout.Dropout(0.25, rngs=rngs)
        self.conv = linear.Conv(4, 4, 1, rngs=rngs)
        self.twice = twice

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.twice(self.drop(self.conv(jax.nn.relu(self.bn(self.conv(x))))))


class TorchSmall(nn.Module):
    """Its twin, with everything that a fault may change."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, eps: float = 1e-5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, 4, 3, padding=1)
        self.block = TorchBlock(norm(4, eps=eps))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class TorchBlock(nn.Module):
    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn, self.drop, self.conv = bn, nn.Dropout(0.25), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y.relu_()  # in place: the record of the norm's output must not change
        return x + self.drop(self.conv(y))


def small(
    ours: Small | None = None, theirs: TorchSmall | None = None, **options: object
) -> Location:
    return parity.locate(
        ours or Small(), theirs or TorchSmall(), IMAGES, layout="image", **options
    )  # fmt: skip


@pytest.fixture(scope="module")
def sound() -> Location:
    return small()


def test_no_layer_of_a_sound_pair_differs_and_all_are_judged(sound: Location) -> None:
    assert (sound.first, sound.direction, sound.notes) == ("", "", ())
    names = ["stem", "block.conv", "block.bn", "block.drop", "block", "head", "(model)"]
    ahead = [e.name for e in sound.layers if e.direction == "forward"]
    assert ahead == names
    assert [e.name for e in sound.layers[len(names) :]] == names[::-1]
    assert all(e.own < 1 and e.kind == "agrees" for e in sound.layers)
    assert all(e.inherited < 1 for e in sound.layers)  # NaN is not


def test_inputs_in_float32_are_computed_with_in_float64_on_both_sides() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(linear.Linear(4, 4, rngs=rngs), linear.Linear(4, 2, rngs=rngs))
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    found = parity.locate(model, module, X.astype(np.float32))
    assert {layer.kind for layer in found.layers} == {"agrees"}


def test_the_own_error_is_told_from_what_is_inherited() -> None:
    found = small(theirs=TorchSmall(eps=1.1e-5))
    assert (found.first, found.direction) == ("block.bn", "forward")
    assert of(found, "block.bn").kind == "own"
    assert of(found, "block.bn").own > 1e3
    for name in ("block.drop", "head"):
        assert (of(found, name).own < 1, of(found, name).kind) == (True, "inherited")
        assert of(found, name).inherited > 1e3
    assert of(found, "stem").inherited < 1
    assert of(found, "block").note == "it holds block.bn, which differs"


class Biased(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            self.running_var.data.mul_(1.01)  # autograd holds on to the tensor
        return y


class Moving(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.training else 1.01 * y


class Steeper(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 1.01 * y - 0.01 * y.detach()


@pytest.mark.parametrize(
    ("norm", "direction", "quantity"),
    [
        (Biased, "forward", "step 1 running_var"),
        (Moving, "forward", "evaluation"),
        (Steeper, "backward", "grad "),
    ],
)
def test_statistics_evaluation_and_gradients_count(
    norm: type[nn.Module], direction: str, quantity: str
) -> None:
    found = small(theirs=TorchSmall(norm))
    assert (found.first, found.direction) == ("block.bn", direction)
    assert found.error is not None
    assert found.error.note.startswith(quantity)


def test_what_no_layer_does_is_found_in_the_smallest_module_around_it() -> None:
    found = small(Small(twice=lambda x: 2 * x))
    assert (found.first, found.direction) == ("block", "forward")
    assert of(found, "block.conv").own < 1
    assert of(found, "(model)").kind == "unknown"


def test_a_lower_precision_is_judged_against_float64() -> None:
    class Narrow(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.dtype == torch.float64 else y.bfloat16().to(y.dtype)

    assert small(theirs=TorchSmall(Narrow)).first == ""
    found = small(theirs=TorchSmall(Narrow), dtype="float32")
    assert (found.first, found.direction) == ("block.bn", "forward")
    assert "in float32" in of(found, "block.bn").note


def test_modules_of_other_names_are_matched_by_their_tensors() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.bn = nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8, eps=2e-5)
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.bn(self.fc(x))))

    def renamed(name: str) -> str:
        return name.replace("fc.", "stem.").replace("bn.", "norm.").replace("out.", "head.")

    found = parity.locate(Net(0.0), Other(), X, rename=renamed)
    assert found.first == "bn"
    assert {e.name for e in found.layers} == {"fc", "bn", "out", "(model)"}
    without = parity.locate(Net(0.0), Other(), X, weights="torch", rename=renamed, seed=1)
    assert without.first == "bn"


class Attending(nnx.Module):
    def __init__(self) -> None:
        self.attn = attention.MultiHeadAttention(4, 2, 0.25, rngs=nnx.Rngs(0))
        self.own = linear.Linear(4, 4, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = ~jnp.tri(x.shape[1], dtype=bool)
        return self.own(self.attn(x, attn_mask=mask))


class TorchAttending(nn.Module):
    def __init__(self, extra: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(4, 2, 0.25, batch_first=True)
        self.own = Two(4, 4) if extra else nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y = self.attn(x, x, x, attn_mask=mask, need_weights=False)[0]
        return self.own(y, x) if isinstance(self.own, Two) else self.own(y)


class Two(nn.Linear):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return super().forward(x) + 0 * other


def test_keyword_arguments_and_masks_are_given_and_draws_replayed() -> None:
    found = parity.locate(Attending(), TorchAttending(extra=False), values(2, 3, 4))
    assert found.first == ""
    assert of(found, "attn").kind == of(found, "attn", "backward").kind == "agrees"


def test_a_layer_that_cannot_be_run_alone_is_told() -> None:
    found = parity.locate(Attending(), TorchAttending(extra=True), values(2, 3, 4))
    assert found.first == ""
    assert of(found, "own").kind == "unknown"
    assert of(found, "own").note == "it is given 2 arrays in PyTorch and 1 in Flax"
    assert "not run alone: own" in str(found)


class Recomputing(nnx.Module):
    """Calls its layers inside transformations, where values are not to be had by hand."""

    def __init__(self) -> None:
        self.first = linear.Linear(4, 4, rngs=nnx.Rngs(0))
        self.second = linear.Linear(4, 4, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.remat(lambda layer, x: jnp.tanh(layer(x)))(self.first, x)
        return nnx.jit(lambda layer, x: layer(x))(self.second, x)


class TorchRecomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_values_inside_transformations_are_captured() -> None:
    found = parity.locate(Recomputing(), TorchRecomputing(), X)
    assert found.first == ""
    assert all(e.inherited < 1 for e in found.layers)


def test_neither_model_is_changed() -> None:
    ours, theirs = Net(), TorchNet()
    before = arrays_of(ours), {n: t.clone() for n, t in theirs.state_dict().items()}
    call = vars(linear.Linear)["__call__"]
    parity.locate(ours, theirs, X)
    assert all(np.array_equal(a, b) for a, b in zip(before[0], arrays_of(ours), strict=True))
    assert all(torch.equal(a, theirs.state_dict()[n]) for n, a in before[1].items())
    assert vars(linear.Linear)["__call__"] is call
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in theirs.modules())
    assert "parity_name" not in vars(ours.stem)


def test_a_failing_comparison_says_where_when_it_is_asked() -> None:
    theirs = TorchNet()
    theirs.norm.eps = 2e-5
    report = parity.compare(Net(), theirs, X, dtypes=())
    line = "first layer that differs: norm (forward, own error "
    assert line in str(report)
    assert report.location is report.location
    assert len(str(report).splitlines()) < 24
    sound = parity.compare(Net(), TorchNet(), X, dtypes=())
    assert sound.location is None
    layer = parity.compare(linear.Linear(4, 4, rngs=nnx.Rngs(0)), nn.Linear(4, 4), X, dtypes=())
    assert layer.where is None


def test_functions_have_no_layers() -> None:
    message = refusal(lambda: parity.locate(jnp.tanh, torch.tanh, X))
    assert message.startswith("layers are found in an nnx.Module and a torch.nn.Module")
    assert "dtypes must be a sequence of float32" in refusal(
        lambda: parity.locate(Net(), TorchNet(), X, dtype="int8")
    )
