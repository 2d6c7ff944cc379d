"""``flaxstab.interop``: weights in and out, all or nothing, under PyTorch's names."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import dropout, interop, linear, models, norms
from flaxstab.interop import _rules, _state_dict
from torch_ref import models as torch_models

R = nnx.Rngs(0)
T = torch.nn

# Our layer, torch's layer: every supported type.
LAYERS: dict[str, tuple[Callable[[], nnx.Module], Callable[[], T.Module]]] = {
    "linear": (lambda: linear.Linear(3, 5, rngs=R), lambda: T.Linear(3, 5)),
    "linear no bias": (lambda: linear.Linear(3, 5, False, rngs=R), lambda: T.Linear(3, 5, False)),
    "square": (lambda: linear.Linear(4, 4, rngs=R), lambda: T.Linear(4, 4)),
    "conv1d": (lambda: linear.Conv(4, 6, (3,), rngs=R), lambda: T.Conv1d(4, 6, 3)),
    "conv2d": (lambda: linear.Conv(4, 6, (3, 2), rngs=R), lambda: T.Conv2d(4, 6, (3, 2))),
    "conv3d": (lambda: linear.Conv(4, 6, (3, 2, 1), rngs=R), lambda: T.Conv3d(4, 6, (3, 2, 1))),
    "groups": (
        lambda: linear.Conv(4, 6, 3, groups=2, rngs=R), lambda: T.Conv2d(4, 6, 3, groups=2)
    ),
    "batch": (lambda: norms.BatchNorm(4), lambda: T.BatchNorm2d(4)),
    "batch plain": (
        lambda: norms.BatchNorm(4, affine=False), lambda: T.BatchNorm2d(4, affine=False)
    ),
    "batch untracked": (
        lambda: norms.BatchNorm(4, track_running_stats=False),
        lambda: T.BatchNorm2d(4, track_running_stats=False),
    ),
    "ghost": (lambda: norms.GhostBatchNorm(4, 2), lambda: T.BatchNorm2d(4)),
    "instance": (lambda: norms.InstanceNorm(4), lambda: T.InstanceNorm2d(4)),
    "instance tracked": (
        lambda: norms.InstanceNorm(4, affine=True, track_running_stats=True),
        lambda: T.InstanceNorm2d(4, affine=True, track_running_stats=True),
    ),
    "layer": (lambda: norms.LayerNorm((3, 4)), lambda: T.LayerNorm((3, 4))),
    "layer no bias": (lambda: norms.LayerNorm(4, bias=False), lambda: T.LayerNorm(4, bias=False)),
    "group": (lambda: norms.GroupNorm(2, 4), lambda: T.GroupNorm(2, 4)),
    "dropout": (lambda: dropout.Dropout(0.5, rngs=R), lambda: T.Dropout(0.5)),
    "nnx linear": (lambda: nnx.Linear(3, 5, rngs=R), lambda: T.Linear(3, 5)),
    "nnx linear no bias": (
        lambda: nnx.Linear(3, 5, use_bias=False, rngs=R), lambda: T.Linear(3, 5, False)
    ),
    "nnx conv": (lambda: nnx.Conv(4, 6, (3, 2), rngs=R), lambda: T.Conv2d(4, 6, (3, 2))),
    "nnx layer": (lambda: nnx.LayerNorm(4, rngs=R), lambda: T.LayerNorm(4)),
    "nnx layer no bias": (
        lambda: nnx.LayerNorm(4, use_bias=False, rngs=R), lambda: T.LayerNorm(4, bias=False)
    ),
    "nnx group": (lambda: nnx.GroupNorm(4, num_groups=2, rngs=R), lambda: T.GroupNorm(2, 4)),
    "nnx rms": (lambda: nnx.RMSNorm(4, rngs=R), lambda: T.RMSNorm(4)),
    "nnx instance": (
        lambda: nnx.InstanceNorm(4, rngs=R), lambda: T.InstanceNorm2d(4, affine=True)
    ),
    "nnx embed": (lambda: nnx.Embed(7, 4, rngs=R), lambda: T.Embedding(7, 4)),
    "nnx dropout": (lambda: nnx.Dropout(0.5, rngs=R), lambda: T.Dropout(0.5)),
    "small cnn": (lambda: models.SmallCNN(rngs=R), torch_models.SmallCNN),
    "cnn bn": (lambda: models.CNN_BN(rngs=R), torch_models.CNN_BN),
    "cnn ln": (lambda: models.CNN_LN(rngs=R), torch_models.CNN_LN),
    "stable cnn": (
        lambda: models.StableCNN("batch", widths=(4, 6), image_size=8, rngs=R),
        lambda: torch_models.StableCNN("batch", widths=(4, 6), image_size=8),
    ),
}  # fmt: skip
MODULES = {
    "sequential": lambda: nnx.Sequential(
        linear.Linear(3, 4, rngs=R), jax.nn.relu, norms.LayerNorm(4)
    ),
    "toy deep": lambda: models.ToyDeep(rngs=R),
}


def shuffled(module: T.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """A state_dict of the module with values of its own in every tensor."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.tensor(np.asarray(rng.normal(3, 2, t.shape))).to(t.dtype)
        if t.is_floating_point()
        else torch.tensor(int(rng.integers(1, 100)))
        for name, t in module.state_dict().items()
    }


@pytest.mark.parametrize(("ours", "theirs"), LAYERS.values(), ids=LAYERS)
def test_a_round_trip_gives_back_every_bit_under_torchs_names(
    ours: Callable[[], nnx.Module], theirs: Callable[[], T.Module]
) -> None:
    model, tensors = ours(), shuffled(theirs())
    report = interop.load_state_dict(model, tensors)
    assert report.complete
    assert set(report.loaded) == set(tensors)
    back = interop.state_dict(model)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].shape == tuple(tensor.shape)
        assert back[name].dtype == tensor.numpy().dtype
        assert back[name].tobytes() == np.ascontiguousarray(tensor.numpy()).tobytes(), name
    theirs().load_state_dict({n: torch.tensor(a) for n, a in back.items()}, strict=True)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_models_without_a_twin_go_out_and_in(make: Callable[[], nnx.Module]) -> None:
    source, target = make(), make()
    tensors = {n: a + 1 for n, a in interop.state_dict(source).items()}
    assert interop.load_state_dict(target, tensors).complete
    for name, array in interop.state_dict(target).items():
        assert array.tolist() == tensors[name].tolist()


def test_every_rule_has_a_row() -> None:
    tested = {type(ours()) for ours, _ in LAYERS.values()}
    assert set(_rules.RULES) - tested == {nnx.BatchNorm}  # it has no count: below


@pytest.mark.parametrize("name", ["square", "conv2d", "nnx linear"])
def test_the_layer_computes_what_torchs_computes(name: str) -> None:
    ours, theirs = (make() for make in LAYERS[name])
    tensors = shuffled(theirs)
    theirs.load_state_dict(tensors)
    interop.load_state_dict(ours, tensors)
    x = np.random.default_rng(2).normal(3, 2, (2, 6, 6, ours.kernel.shape[-2])).astype("float32")
    last = theirs.weight.ndim == 2
    given = x if last else np.moveaxis(x, -1, 1).copy()
    expected = theirs(torch.tensor(given)).detach().numpy()
    expected = expected if last else np.moveaxis(expected, 1, -1)
    found = np.asarray(ours(jnp.asarray(x)))
    terms = 1 + theirs.weight[0].numel()
    largest = np.abs(x).max() * theirs.weight.detach().abs().max().item()
    assert found.shape == expected.shape
    # each of the terms is rounded at most once per addition behind it
    bound = terms * np.finfo("float32").eps * terms * largest
    assert np.max(np.abs(found - expected)) <= bound


def test_a_missing_transpose_of_a_square_matrix_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = _rules._table_rule(_rules.Entry("kernel", "weight"), _rules.Entry("bias", "bias"))
    monkeypatch.setitem(_rules.RULES, linear.Linear, planted)
    with pytest.raises(AssertionError):
        test_the_layer_computes_what_torchs_computes("square")


def test_sequential_is_transparent_and_numbers_count_as_numbers() -> None:
    class Deep(nnx.Module):
        def __init__(self) -> None:
            self.blocks = nnx.List([linear.Linear(1, 1, False, rngs=R) for _ in range(12)])
            self.tail = nnx.Sequential(
                nnx.Sequential(linear.Linear(1, 2, False, rngs=R)), jax.nn.relu
            )

    assert list(interop.state_dict(Deep())) == [
        *(f"blocks.{n}.weight" for n in range(12)),
        "tail.0.0.weight",
    ]


def test_named_modules_have_torchs_names() -> None:
    ours = models.StableCNN(widths=(4, 6), image_size=8, rngs=R)
    names = interop.named_modules(ours)
    assert names[""] is ours
    assert names["blocks.1.drop"] is ours.blocks[1].drop
    assert isinstance(interop.named_modules(models.SmallCNN(rngs=R))["net.6"], linear.Linear)


def _state(model: nnx.Module) -> list[list[float]]:
    return [np.asarray(leaf).ravel().tolist() for leaf in interop.state_dict(model).values()]


class Two(nnx.Module):
    def __init__(self) -> None:
        self.first = linear.Linear(3, 4, rngs=R)
        self.last = norms.BatchNorm(4)


def _torch_two() -> dict[str, torch.Tensor]:
    return shuffled(T.ModuleDict({"first": T.Linear(3, 4), "last": T.BatchNorm1d(4)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("last.bias"), "6 tensors loaded; 1 missing: last.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "7 tensors loaded; 1 unexpected: extra"),
        (
            lambda t: t.update({"last.bias": torch.ones(5)}),
            r"6 tensors loaded; 1 mismatched: last.bias \(5,\) for \(4,\)",
        ),
        (
            lambda t: t.update({"first.weight": torch.ones(3, 4)}),
            r"6 tensors loaded; 1 mismatched: first.weight \(3, 4\) for \(4, 3\)",
        ),
    ],
)
def test_a_misfit_is_named_and_nothing_is_loaded(
    change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    model, tensors = Two(), _torch_two()
    change(tensors)
    before = _state(model)
    with pytest.raises(ValueError, match=rf"must fit the model, got {message}\. Pass rename="):
        interop.load_state_dict(model, tensors)
    assert _state(model) == before


def test_without_strict_what_fits_is_loaded_and_the_rest_reported() -> None:
    model, tensors = Two(), _torch_two()
    untouched = model.last.bias[...].tolist()
    tensors |= {"extra": torch.ones(1), "first.bias": torch.ones(9)}
    del tensors["last.bias"]
    report = interop.load_state_dict(model, tensors, strict=False)
    assert report == interop.LoadReport(
        (
            "first.weight",
            *(
                f"last.{n}"
                for n in ("weight", "running_mean", "running_var", "num_batches_tracked")
            ),
        ),
        ("last.bias",),
        ("extra",),
        ("first.bias (9,) for (4,)",),
    )
    assert not report.complete
    assert str(report) == (
        "5 tensors loaded; 1 missing: last.bias; 1 unexpected: extra; "
        "1 mismatched: first.bias (9,) for (4,)"
    )
    assert model.last.bias[...].tolist() == untouched
    assert model.first.kernel[...].T.tolist() == tensors["first.weight"].tolist()


def test_rename_maps_the_names_of_the_state_dict() -> None:
    model, tensors = Two(), _torch_two()
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    report = interop.load_state_dict(model, prefixed, rename=lambda n: n.removeprefix("module."))
    assert report.complete
    assert model.last.scale[...].tolist() == tensors["last.weight"].tolist()


def test_a_rename_that_makes_two_names_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rename must keep names apart, got 'x' twice"):
        interop.load_state_dict(Two(), _torch_two(), rename=lambda _: "x")


def test_values_take_the_dtype_of_the_model() -> None:
    model = linear.Linear(3, 4, param_dtype=jnp.bfloat16, rngs=R)
    interop.load_state_dict(model, {"weight": np.full((4, 3), 1.5), "bias": np.zeros(4, "float64")})
    assert model.kernel[...].dtype == jnp.bfloat16
    assert model.kernel[...].tolist() == [[1.5] * 4] * 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_model_does_not_share_memory_with_the_state_dict(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        models_of_sizes = [norms.BatchNorm(n, param_dtype=dtype) for n in (4, 64, 1024)]
        for model in models_of_sizes:
            twin = T.BatchNorm1d(model.num_features, dtype=getattr(torch, dtype))
            tensors = twin.state_dict()
            interop.load_state_dict(model, tensors)
            with torch.no_grad():
                for tensor in tensors.values():
                    tensor.add_(7)
            assert np.unique(model.mean[...]).tolist() == [0.0]
            assert np.unique(model.scale[...]).tolist() == [1.0]


def test_stock_batch_norm_has_no_count() -> None:
    model = nnx.BatchNorm(4, rngs=R)
    tensors = shuffled(T.BatchNorm1d(4))
    report = interop.load_state_dict(model, tensors)
    assert report.ignored == ("num_batches_tracked",)
    assert report.complete
    assert "1 ignored: num_batches_tracked" in str(report)
    assert model.var[...].tolist() == tensors["running_var"].tolist()
    assert "num_batches_tracked" not in interop.state_dict(model)


class Own(nnx.Module):
    def __init__(self) -> None:
        self.inner = linear.Linear(2, 2, rngs=R)
        self.gamma = nnx.Param(jnp.ones((2,)))


class Listed(nnx.Module):
    def __init__(self) -> None:
        self.tokens = nnx.List([nnx.Param(jnp.ones((2, 3)))])


class OwnSequential(nnx.Sequential):
    def __init__(self) -> None:
        super().__init__(linear.Linear(2, 2, rngs=R))
        self.gamma = nnx.Param(jnp.ones((2,)))


def own_attribute() -> nnx.Module:
    model = linear.Linear(2, 2, rngs=R)
    model.extra = nnx.Param(jnp.ones(5))
    return model


def test_a_sequential_goes_by_its_own_name() -> None:
    names = interop.named_modules(nnx.Sequential(linear.Linear(2, 2, rngs=R)))
    assert isinstance(names[""], nnx.Sequential)
    assert isinstance(names["0"], linear.Linear)


def test_tensors_with_gradients_and_in_bfloat16_are_loaded() -> None:
    twin = T.Linear(3, 2)
    model = linear.Linear(3, 2, rngs=R)
    assert interop.load_state_dict(model, dict(twin.named_parameters())).complete
    np.testing.assert_array_equal(model.kernel[...], twin.weight.detach().numpy().T)
    twin.bfloat16()
    assert interop.load_state_dict(model, twin.state_dict()).complete
    np.testing.assert_array_equal(model.kernel[...], twin.weight.detach().float().numpy().T)


def test_a_module_instead_of_its_state_dict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a mapping .* Pass module\.state_dict\(\)"):
        interop.load_state_dict(linear.Linear(3, 2, rngs=R), T.Linear(3, 2))


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (Own, r"'gamma' \(2,\)"),
        (lambda: nnx.List([Own()]), r"'0.gamma' \(2,\)"),
        (Listed, r"'tokens.0' \(2, 3\)"),
        (OwnSequential, r"'gamma' \(2,\)"),
        (own_attribute, r"'extra' \(5,\)"),
        (lambda: nnx.Dict(cache=nnx.Cache(jnp.ones(7))), r"'cache' \(7,\)"),
    ],
)
def test_a_variable_without_a_rule_is_named(make: Callable[[], nnx.Module], where: str) -> None:
    model = make()
    message = rf"a rule that carries it, got {where}\. Call flaxstab\.interop\.register"
    with pytest.raises(ValueError, match=message):
        interop.state_dict(model)
    with pytest.raises(ValueError, match=message):
        interop.load_state_dict(model, {})


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(_rules.RULES)
    for module in (_rules, _state_dict):
        monkeypatch.setattr(module, "RULES", known)


@pytest.mark.usefixtures("rules")
def test_a_registered_type_is_carried_and_its_submodules_walked() -> None:
    interop.register(
        Own,
        to_torch=lambda m: {"gain": np.asarray(m.gamma[...])},
        to_flax=lambda _, tensors: {"gamma": tensors["gain"]} if "gain" in tensors else {},
    )
    model = Own()
    assert list(interop.state_dict(model)) == ["gain", "inner.weight", "inner.bias"]
    tensors = {"gain": np.array([5.0, 6.0]), **interop.state_dict(model.inner)}
    tensors |= {f"inner.{n}": tensors.pop(n) for n in ("weight", "bias")}
    assert interop.load_state_dict(model, tensors).complete
    assert model.gamma[...].tolist() == [5.0, 6.0]
    with pytest.raises(ValueError, match="registered once, got module_type='Own'"):
        interop.register(Own, to_torch=lambda _: {}, to_flax=lambda _, __: {})


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gamma": np.ones((3,))}, r"right shape, got 'gamma' \(3,\) for \(2,\)"),
        ({"delta": np.ones((2,))}, "variables of the module, got 'delta' of Own"),
    ],
)
def test_a_wrong_rule_is_named_and_nothing_is_loaded(
    values: dict[str, np.ndarray], message: str
) -> None:
    interop.register(
        Own,
        to_torch=lambda m: {"gain": np.asarray(m.gamma[...])},
        to_flax=lambda _, __: {"gamma": np.ones(2), **values},
    )
    model = nnx.List([linear.Linear(2, 2, rngs=R), Own()])
    tensors = {name: array + 1 for name, array in interop.state_dict(model).items()}
    before = _state(model)
    with pytest.raises(ValueError, match=message):
        interop.load_state_dict(model, tensors)
    assert _state(model) == before
