"""Features of flattened images, and norms over them: channels first in PyTorch, last in Flax."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import interop, linear, models, norms, parity
from flaxstab.interop import _flattened
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same
from parity_tests.test_interop_rules import shuffled

T = torch.nn
R = nnx.Rngs(0)
H, W, C = 2, 3, 4
IMAGE = (H, W, C)
Told = dict[str, tuple[int, ...] | None]


class Flat(nnx.Module):
    """A flattened image through every layer whose features a flattening orders."""

    def __init__(self) -> None:
        size = H * W * C
        self.batch, self.layer = norms.BatchNorm(size), norms.LayerNorm(size)
        self.rms, self.fc = norms.RMSNorm(size, 1e-5), linear.Linear(size, 5, rngs=R)
        self.out = linear.Linear(5, 5, rngs=R)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        return self.out(self.fc(self.rms(self.layer(self.batch(x)))))


class Stock(Flat):
    """The same of NNX's layers."""

    def __init__(self) -> None:
        size = H * W * C
        self.batch = nnx.BatchNorm(size, rngs=R)
        self.layer = nnx.LayerNorm(size, epsilon=1e-5, rngs=R)
        self.rms = nnx.RMSNorm(size, epsilon=1e-5, rngs=R)
        self.fc = nnx.LinearGeneral(size, 5, rngs=R)
        self.out = nnx.Linear(5, 5, rngs=R)


class TorchFlat(T.Module):
    def __init__(self) -> None:
        super().__init__()
        size = H * W * C
        self.batch, self.layer = T.BatchNorm1d(size), T.LayerNorm(size)
        self.rms, self.fc, self.out = T.RMSNorm(size, 1e-5), T.Linear(size, 5), T.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.fc(self.rms(self.layer(self.batch(x.flatten(1))))))


class Whole(nnx.Module):
    """Norms over all axes of an image."""

    def __init__(self, *shape: int) -> None:
        self.layer, self.rms = norms.LayerNorm(shape), norms.RMSNorm(shape, 1e-5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.rms(self.layer(x))


class TorchWhole(T.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.layer, self.rms = T.LayerNorm(shape), T.RMSNorm(shape, 1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rms(self.layer(x))


class Case(NamedTuple):
    ours: Callable[[], nnx.Module]
    theirs: Callable[[], T.Module]
    told: Told
    shape: tuple[int, ...]


def _whole(*shape: int) -> Case:
    first = (shape[-1], *shape[:-1])
    told: Told = dict.fromkeys(("layer", "rms"), shape)
    return Case(lambda: Whole(*shape), lambda: TorchWhole(*first), told, shape)


FLAT: Told = dict.fromkeys(("batch", "layer", "rms", "fc"), IMAGE)
CASES = {
    "flat": Case(Flat, TorchFlat, FLAT, IMAGE),
    "stock": Case(Stock, TorchFlat, FLAT, IMAGE),
    "image": _whole(*IMAGE),
    "cube": _whole(3, 3, 3),
    "sequence": _whole(3, 3),
    "volume": _whole(2, 1, 3, 4),
}


def _double(a: jax.Array) -> jax.Array:
    return jnp.asarray(a, float) if jnp.issubdtype(a.dtype, jnp.floating) else a


def _loaded(name: str, told: Told | None = None) -> tuple[np.ndarray, torch.Tensor]:
    """Returns both sides' outputs in float64, features last; checks that the weights come back."""
    case = CASES[name]
    told = case.told if told is None else told
    x, twin = values(2, *case.shape), case.theirs().double().eval()
    tensors = {n: t.abs() if "var" in n else t for n, t in shuffled(twin).items()}
    twin.load_state_dict(tensors)
    with jax.enable_x64(True):
        graph, state = nnx.split(case.ours())
        model = nnx.merge(graph, jax.tree.map(_double, state))
        model.eval()
        assert interop.load_state_dict(model, tensors, flattened=told).complete
        for key, array in interop.state_dict(model, flattened=told).items():
            assert array.tobytes() == np.ascontiguousarray(tensors[key].numpy()).tobytes(), key
        found = np.asarray(model(jnp.asarray(x)))
    assert np.isfinite(found).all()
    with torch.no_grad():
        expected = twin(torch.movedim(torch.tensor(x), -1, 1))
    return found, torch.movedim(expected, 1, -1) if expected.ndim > 2 else expected


@pytest.mark.parametrize("name", CASES)
def test_features_of_an_image_are_permuted_when_told(name: str) -> None:
    assert_same(*_loaded(name))


@pytest.mark.parametrize(("name", "left"), [*(("flat", n) for n in FLAT), ("cube", "layer")])
def test_a_layer_that_is_not_told_shows(name: str, left: str) -> None:
    with pytest.raises(AssertionError, match="is above the bound"):
        assert_same(*_loaded(name, {**CASES[name].told, left: None}))


def test_a_wrong_permutation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _flattened._permuted
    monkeypatch.setattr(_flattened, "_permuted", lambda entry, shape: plain(entry, shape[::-1]))
    with pytest.raises(AssertionError, match="is above the bound"):
        assert_same(*_loaded("flat"))


def test_the_report_says_how_features_travel() -> None:
    model = Flat()
    tensors = interop.state_dict(model, flattened=FLAT)
    report = interop.load_state_dict(model, tensors, flattened=FLAT)
    found = {e.name: e.transform for e in report.entries}
    assert found["layer.weight"] == "(C, *space) -> (*space, C)"
    assert found["fc.weight"] == "(out, in) -> (in, out), in: (C, *space) -> (*space, C)"
    assert found["fc.bias"] == found["out.bias"] == "as is"


def test_gradients_are_permuted_too() -> None:
    model = Flat()
    named = interop.Naming(model, flattened=FLAT).tensors(nnx.state(model))
    for name, array in interop.state_dict(model, flattened=FLAT).items():
        assert named[name].tobytes() == array.tobytes()
    assert (named["fc.weight"] != interop.state_dict(model)["fc.weight"]).any()


def test_norms_of_unequal_axes_go_as_they_are() -> None:
    model = Whole(*IMAGE)
    assert interop.state_dict(model)["layer.weight"].shape == IMAGE
    tensors = shuffled(TorchWhole(*IMAGE))
    assert interop.load_state_dict(model, tensors).complete
    assert model.layer.scale[...].tolist() == tensors["layer.weight"].tolist()
    message = (
        r"layer.weight \(4, 2, 3\) for \(2, 3, 4\); if its axes are an image's, "
        r"pass flattened=\{'layer': \(2, 3, 4\)\}"
    )
    with pytest.raises(ValueError, match=message):
        interop.load_state_dict(model, shuffled(TorchWhole(C, H, W)))


def test_axes_of_one_size_must_be_told() -> None:
    message = (
        r"must be told where they have one size, got 'layer' of \(3, 3, 3\)\. "
        r"Pass flattened=\{'layer': \(3, 3, 3\)\} if .* or \{'layer': None\} if both agree"
    )
    for read in (
        interop.state_dict,
        interop.Naming,
        lambda m: interop.load_state_dict(m, {}, strict=False),
    ):
        with pytest.raises(ValueError, match=message):
            read(Whole(3, 3, 3))
    for shape in ((1, 1), (3,), (3, 3, 1)):
        assert interop.state_dict(Whole(*shape))


def test_axes_of_one_size_go_as_they_are_when_both_agree() -> None:
    model, tensors = Whole(3, 3, 3), shuffled(TorchWhole(3, 3, 3))
    several = nnx.List([model, norms.LayerNorm((2, 3)), norms.LayerNorm(3)])
    assert interop.as_is(several) == {"0.layer": None, "0.rms": None}
    told = interop.as_is(model)
    assert interop.load_state_dict(model, tensors, flattened=told).complete
    assert model.layer.scale[...].tolist() == tensors["layer.weight"].tolist()
    back = interop.state_dict(model, flattened=told)
    assert back["rms.weight"].tolist() == tensors["rms.weight"].tolist()


def test_the_harness_takes_axes_of_one_size_as_they_are() -> None:
    twin = T.LayerNorm((3, 3))
    twin.load_state_dict(shuffled(twin))
    report = parity.compare(norms.LayerNorm((3, 3)), twin, values(2, 3, 3))
    assert report.passed, str(report)


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.one = linear.Linear(H * W * C, 2, rngs=R)
        self.two = self.one


def _no_scale() -> nnx.Module:
    return norms.LayerNorm(24, elementwise_affine=False)


@pytest.mark.parametrize(
    ("make", "told", "message"),
    [
        (Flat, {"fc2": IMAGE}, "must name layers as PyTorch does, got name='fc2'"),
        (Flat, {"fc.weight": IMAGE}, "must name layers as PyTorch does, got name='fc.weight'"),
        (Flat, {"fc": (2, 3, 5)}, r"order: \(\*space, C\), got layer='fc' .* It has 24 features"),
        (Flat, {"fc": (24,)}, r"order: \(\*space, C\), got layer='fc'"),
        (Flat, {"fc": (-2, -3, 4)}, r"order: \(\*space, C\), got layer='fc'"),
        (
            lambda: Whole(*IMAGE),
            {"layer": (C, H, W)},
            r"got layer='layer' .* Its axes are \(2, 3, 4\)",
        ),
        (
            lambda: nnx.List([linear.Conv(2, 2, 3, rngs=R)]),
            {"0": IMAGE},
            "must name linear layers, .* got layer='0'",
        ),
        (_no_scale, {"": IMAGE}, "with parameters, got layer=''"),
        (Tied, {"one": IMAGE, "two": (4, 3, 2)}, "one shape under all its names, got name='two'"),
    ],
)
def test_what_cannot_be_permuted_is_refused(
    make: Callable[[], nnx.Module], told: Told, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        interop.state_dict(make(), flattened=told)
    with pytest.raises(ValueError, match=message):
        interop.load_state_dict(make(), {}, strict=False, flattened=told)


def test_a_layer_of_two_names_may_be_told_under_either() -> None:
    for name in ("one", "two"):
        model = Tied()
        tensors = interop.state_dict(model, flattened={name: IMAGE})
        assert (tensors["one.weight"] != interop.state_dict(model)["one.weight"]).any()
        also = {n.replace("one", "two"): a for n, a in tensors.items()}
        assert interop.load_state_dict(model, also, flattened={name: IMAGE}).complete
        back = interop.state_dict(model, flattened={"one": IMAGE, "two": IMAGE})
        assert back["one.weight"].tobytes() == tensors["one.weight"].tobytes()


def test_one_name_of_a_stack_tells_all_its_layers() -> None:
    stack = models.Stack([norms.LayerNorm((3, 3)) for _ in range(2)])
    tensors = shuffled(T.ModuleList([T.LayerNorm((3, 3)) for _ in range(2)]))
    interop.load_state_dict(stack, tensors, flattened={"1": (3, 3)})
    for number in range(2):
        expected = tensors[f"{number}.weight"].T
        assert stack.block.scale[number].tolist() == expected.tolist()
