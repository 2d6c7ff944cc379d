"""Linen variables by PyTorch's names: by layer type, all or nothing, and each computes the same."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import core
from flax import linen as nn

from flaxstab import interop
from flaxstab.interop import _entries, _linen
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same, image
from parity_tests.test_interop_rules import shuffled

T = torch.nn
KEY = jax.random.key(0)
Variables = Mapping[str, object]


def _init(module: nn.Module, *inputs: np.ndarray) -> Variables:
    return module.init({"params": KEY, "dropout": KEY}, *map(jnp.asarray, inputs))


def _places(module: nn.Module, variables: Variables, *inputs: np.ndarray) -> interop.Places:
    return interop.linen_places(module, variables, inputs, {}, mutable=False)


def _transposed(out: int, window: tuple[int, ...], flip: bool) -> nn.Module:
    padding = [(k - 2, k - 2) for k in window]  # torch's padding=1: dilation * (k - 1) - 1
    strides = (2,) * len(window)
    return nn.ConvTranspose(out, window, strides, padding, transpose_kernel=flip)


def plain(layer: T.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


def imaged(layer: T.Module, x: torch.Tensor) -> torch.Tensor:
    return image(layer)(x)


def looked_up(layer: T.Module, x: torch.Tensor) -> torch.Tensor:
    return layer((x.abs() % 7).long())


class LookUp(nn.Module):
    """Embeds rounded numbers, so that every layer here takes the same inputs."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        embed = nn.Embed(7, 7, param_dtype=x.dtype)
        return embed(jnp.asarray(jnp.abs(x) % 7, int))


X = (2, 5, 6, 4)
LAYERS = {
    "dense": (nn.Dense(5), T.Linear(3, 5), (2, 3), plain),
    "dense no bias": (nn.Dense(5, use_bias=False), T.Linear(3, 5, bias=False), (2, 3), plain),
    "dense square": (nn.Dense(4), T.Linear(4, 4), (2, 4), plain),
    "conv1d": (nn.Conv(6, (3,), padding="VALID"), T.Conv1d(4, 6, 3), (2, 7, 4), imaged),
    "conv": (nn.Conv(6, (3, 2), padding="VALID"), T.Conv2d(4, 6, (3, 2)), X, imaged),
    "conv square": (nn.Conv(4, (4, 4), padding="VALID"), T.Conv2d(4, 4, 4), X, imaged),
    "conv groups": (
        nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2),
        T.Conv2d(4, 6, 3, groups=2), X, imaged,
    ),
    "conv transpose": (
        _transposed(6, (3, 2), False), T.ConvTranspose2d(4, 6, (3, 2), 2, 1), X, imaged
    ),
    "conv transpose square": (
        _transposed(4, (4, 4), False), T.ConvTranspose2d(4, 4, 4, 2, 1), X, imaged
    ),
    "conv transpose transposed": (
        _transposed(6, (3, 2), True), T.ConvTranspose2d(4, 6, (3, 2), 2, 1), X, imaged
    ),
    "conv transpose transposed square": (
        _transposed(4, (4, 4), True), T.ConvTranspose2d(4, 4, 4, 2, 1), X, imaged
    ),
    "batch": (nn.BatchNorm(use_running_average=True), T.BatchNorm2d(4), X, imaged),
    "batch plain": (
        nn.BatchNorm(True, use_scale=False, use_bias=False), T.BatchNorm2d(4, affine=False),
        X, imaged,
    ),
    "layer": (nn.LayerNorm(1e-5), T.LayerNorm(4), X, plain),
    "layer no bias": (nn.LayerNorm(1e-5, use_bias=False), T.LayerNorm(4, bias=False), X, plain),
    "group": (nn.GroupNorm(2, epsilon=1e-5), T.GroupNorm(2, 4), X, imaged),
    "instance": (
        nn.InstanceNorm(epsilon=1e-5), T.InstanceNorm2d(4, affine=True), X, imaged
    ),
    "rms": (nn.RMSNorm(1e-5), T.RMSNorm(4, 1e-5), X, plain),
    "embed": (LookUp(), T.ModuleDict({"Embed_0": T.Embedding(7, 7)}), X,
              lambda t, x: looked_up(t["Embed_0"], x)),
    "prelu": (nn.PReLU(), T.PReLU(), X, plain),
    "dropout": (nn.Dropout(0.5, deterministic=True), T.Dropout(0.5), X, plain),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_the_loaded_layer_computes_torchs_function_and_keeps_every_bit(name: str) -> None:
    module, theirs, shape, twin = LAYERS[name]
    x = values(*shape) - (3 if name == "prelu" else 0)
    theirs = theirs.double().eval()
    tensors = shuffled(theirs)
    theirs.load_state_dict(tensors)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda a: jnp.asarray(a, float), _init(module, x))
        places = _places(module, variables, x)
        loaded, report = interop.load_linen_state_dict(places, variables, tensors)
        found = np.asarray(module.apply(loaded, x))
        back = interop.linen_state_dict(places, loaded)
    assert set(report.loaded) | set(report.ignored) == tensors.keys()
    assert report.ignored == (("num_batches_tracked",) if "batch" in name else ())
    assert set(back) == set(report.loaded)
    for key, array in back.items():
        assert array.tobytes() == np.ascontiguousarray(tensors[key].numpy()).tobytes(), key
        assert torch.tensor(array).shape == tensors[key].shape
    with torch.no_grad():
        assert_same(found, twin(theirs, torch.tensor(x)))


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("dense square", _entries.one("kernel", "weight")),
        ("conv transpose square", _entries.KERNEL),
        ("conv transpose transposed square", _entries.FLIPPED),
    ],
)
def test_a_wrong_layout_of_a_square_kernel_is_caught(
    name: str, entry: _entries.Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = _linen._params(entry, _entries.BIAS)
    monkeypatch.setitem(_linen.LINEN_KINDS, type(LAYERS[name][0]), planted)
    with pytest.raises(AssertionError, match="is above the bound"):
        test_the_loaded_layer_computes_torchs_function_and_keeps_every_bit(name)


def test_every_kind_has_a_row() -> None:
    tested = {type(row[0]) for row in LAYERS.values()}
    assert set(_linen.LINEN_KINDS) - tested == {nn.Embed}  # inside LookUp


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Net(nn.Module):
    block: Callable[..., nn.Module] = Block

    def setup(self) -> None:
        self.body = self.block()
        self.head = nn.Sequential([nn.Dense(5), nn.relu, nn.LayerNorm()])

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.head(self.body(x, train))


NET = Net()
NAMES = [
    "body.Conv_0.weight",
    "body.Conv_0.bias",
    "body.BatchNorm_0.weight",
    "body.BatchNorm_0.bias",
    "body.BatchNorm_0.running_mean",
    "body.BatchNorm_0.running_var",
    "head.layers_0.weight",
    "head.layers_0.bias",
    "head.layers_2.weight",
    "head.layers_2.bias",
]


def _net(module: nn.Module = NET) -> tuple[interop.Places, Variables]:
    x = jnp.zeros((2, 6, 6, 4))
    variables = module.init({"params": KEY, "dropout": KEY}, x, True)
    arguments = {"train": True, "rngs": {"dropout": KEY}}
    places = interop.linen_places(module, variables, (x,), arguments, mutable=["batch_stats"])
    return places, variables


@pytest.mark.parametrize("block", [Block, nn.remat(Block, static_argnums=(2,))])
def test_layers_are_found_wherever_they_are_called(block: Callable[..., nn.Module]) -> None:
    places, variables = _net(Net(block))
    assert list(interop.linen_state_dict(places, variables)) == NAMES


def test_a_part_of_the_variables_is_named_alike() -> None:
    places, variables = _net()
    stats = interop.linen_state_dict(places, {"batch_stats": variables["batch_stats"]})
    assert list(stats) == [name for name in NAMES if "running" in name]
    gradients = jax.tree.map(lambda a: a + 1, {"params": {"head": variables["params"]["head"]}})
    named = interop.linen_state_dict(places, core.freeze(gradients))
    assert list(named) == [name for name in NAMES if "head" in name]
    kernel = gradients["params"]["head"]["layers_0"]["kernel"]
    assert named["head.layers_0.weight"].tolist() == kernel.T.tolist()
    assert interop.linen_state_dict(places, {}) == {}


def test_loading_returns_a_new_tree_of_the_same_kind() -> None:
    places, variables = _net()
    variables = core.freeze(variables)
    before = [np.asarray(a).tolist() for a in jax.tree.leaves(variables)]
    tensors = {f"m.{n}": a + 1 for n, a in interop.linen_state_dict(places, variables).items()}
    tensors["m.body.BatchNorm_0.num_batches_tracked"] = np.asarray(3)
    loaded, report = interop.load_linen_state_dict(
        places, variables, tensors, rename=lambda name: name.removeprefix("m.")
    )
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    for old, new in zip(jax.tree.leaves(variables), jax.tree.leaves(loaded), strict=True):
        assert new.dtype == old.dtype
        assert new.tolist() == (old + 1).tolist()
    assert [np.asarray(a).tolist() for a in jax.tree.leaves(variables)] == before
    assert str(report) == "10 tensors loaded; 1 ignored: body.BatchNorm_0.num_batches_tracked"
    entry = next(e for e in report.entries if e.name == "head.layers_0.weight")
    assert entry[:3] == (
        "m.head.layers_0.weight", "head.layers_0.weight", "params.head.layers_0.kernel"
    )  # fmt: skip


def test_the_new_tree_does_not_share_memory_with_the_state_dict() -> None:
    module, x = nn.BatchNorm(True), np.zeros((1, 1024), "float32")
    variables = _init(module, x)
    tensors = T.BatchNorm1d(1024).state_dict()
    loaded, _ = interop.load_linen_state_dict(_places(module, variables, x), variables, tensors)
    for tensor in tensors.values():
        tensor.add_(7)
    assert np.unique(loaded["batch_stats"]["mean"]).tolist() == [0.0]
    assert np.unique(loaded["params"]["scale"]).tolist() == [1.0]


def test_a_misfit_is_named_and_nothing_is_loaded() -> None:
    places, variables = _net()
    tensors = interop.linen_state_dict(places, variables)
    tensors["head.layers_0.weight"] = tensors["head.layers_0.weight"].T
    tensors["extra"] = tensors.pop("head.layers_2.bias")
    message = (
        r"8 that fit\n  1 missing: head.layers_2.bias \(perhaps extra\)\n  "
        r"1 unexpected: extra \(perhaps head.layers_2.bias\)\n  "
        r"1 mismatched: head.layers_0.weight \(4, 5\) for \(5, 4\)\nNothing was loaded\."
    )
    with pytest.raises(ValueError, match=message):
        interop.load_linen_state_dict(places, variables, tensors)


def test_boxed_variables_stay_boxed() -> None:
    module = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.ones, ("a", "b")))
    x = np.zeros((2, 4))
    variables = _init(module, x)
    places = _places(module, variables, x)
    tensors = {"weight": np.arange(16.0, dtype="float32").reshape(4, 4), "bias": np.zeros(4)}
    loaded, _ = interop.load_linen_state_dict(places, variables, tensors)
    assert isinstance(loaded["params"]["kernel"], nn.Partitioned)
    assert loaded["params"]["kernel"].value.tolist() == tensors["weight"].T.tolist()


class Gain(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4)(x) * self.param("gain", nn.initializers.ones, ())


class OwnDense(nn.Dense):
    """A layer of the user's own."""


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(4)
        scan = nn.scan(
            lambda layer, carry, _: (layer(carry), None),
            variable_axes={"params": 0}, split_rngs={"params": True}, length=3,
        )  # fmt: skip
        return scan(dense, x, None)[0]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Gain(), r"a rule that carries it, got 'params.gain' \(\) of Gain\."),
        (OwnDense(4), r"got 'params\.\w+' .* of OwnDense\."),
        (nn.Sequential([nn.DenseGeneral(4)]), r"'params.layers_0.\w+' .* of DenseGeneral\."),
        (nn.WeightNorm(nn.Dense(4)), "of Dense and WeightNorm"),
        (nn.SpectralNorm(nn.Dense(4)), "of Dense and SpectralNorm"),
        (Scanned(), r"where Dense sees \(4,.*: nn.scan or nn.vmap stacks them"),
        (nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4))), "have no mask, got '' Conv with one"),
    ],
)
def test_a_variable_without_a_rule_is_named(module: nn.Module, message: str) -> None:
    x = np.zeros((2, 5, 4), "float32")
    arguments = {"update_stats": False} if isinstance(module, nn.SpectralNorm) else {}
    variables = module.init(KEY, x, **arguments)

    def name() -> object:
        places = interop.linen_places(module, variables, (x,), arguments, mutable=False)
        return interop.linen_state_dict(places, variables)

    with pytest.raises(ValueError, match=message):
        name()


class Settings(nn.Module):
    def gain(self) -> float:
        return 2.0


class Detached(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4)(x) * Settings(parent=None).gain()


def test_a_module_without_variables_or_a_place_does_no_harm() -> None:
    module, x = Detached(), np.zeros((2, 4))
    variables = _init(module, x)
    places = _places(module, variables, x)
    assert list(interop.linen_state_dict(places, variables)) == ["Dense_0.weight", "Dense_0.bias"]


def test_a_layer_that_the_call_does_not_meet_is_named() -> None:
    module, x = nn.Sequential([nn.Dense(4), nn.Dense(4)]), np.zeros((2, 4))
    variables = _init(module, x)
    places = _places(nn.Sequential([nn.Dense(4)]), variables, x)
    message = r"that the call meets, got 'params.layers_1.\w+' .* of a module that was not called"
    with pytest.raises(ValueError, match=message):
        interop.linen_state_dict(places, variables)


def test_another_collection_is_named() -> None:
    places, variables = _net()
    head = {"layers_0": {"kernel": jnp.ones((4, 5))}}
    with pytest.raises(ValueError, match=r"got 'cache.head.layers_0.kernel' \(4, 5\) of Dense"):
        interop.linen_state_dict(places, {**variables, "cache": {"head": head}})
