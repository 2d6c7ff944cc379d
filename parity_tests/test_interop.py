"""``flaxstab.interop``: weights in and out, all or nothing, under PyTorch's names."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import interop, linear, models, norms
from flaxstab.interop import _rules
from parity_tests.test_interop_rules import shuffled

R = nnx.Rngs(0)
T = torch.nn

MODULES = {
    "sequential": lambda: nnx.Sequential(
        linear.Linear(3, 4, rngs=R), jax.nn.relu, norms.LayerNorm(4)
    ),
    "toy deep": lambda: models.ToyDeep(rngs=R),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_models_without_a_twin_go_out_and_in(make: Callable[[], nnx.Module]) -> None:
    source, target = make(), make()
    tensors = {n: a + 1 for n, a in interop.state_dict(source).items()}
    assert interop.load_state_dict(target, tensors).complete
    for name, array in interop.state_dict(target).items():
        assert array.tolist() == tensors[name].tolist()


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


def state_of(model: nnx.Module) -> list[list[float]]:
    return [np.asarray(leaf).ravel().tolist() for leaf in interop.state_dict(model).values()]


class Two(nnx.Module):
    def __init__(self) -> None:
        self.first = linear.Linear(3, 4, rngs=R)
        self.last = norms.BatchNorm(4)


def torch_two() -> dict[str, torch.Tensor]:
    return shuffled(T.ModuleDict({"first": T.Linear(3, 4), "last": T.BatchNorm1d(4)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("last.bias"), r"6 that fit\n  1 missing: last.bias"),
        (lambda t: t.update(extra=torch.ones(1)), r"7 that fit\n  1 unexpected: extra"),
        (
            lambda t: t.update({"last.bias": torch.ones(5)}),
            r"6 that fit\n  1 mismatched: last.bias \(5,\) for \(4,\)",
        ),
        (
            lambda t: t.update({"first.weight": torch.arange(12.0).reshape(3, 4)}),
            r"6 that fit\n  1 mismatched: first.weight \(3, 4\) for \(4, 3\)",
        ),
    ],
)
def test_a_misfit_is_named_and_nothing_is_loaded(
    change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    model, tensors = Two(), torch_two()
    change(tensors)
    before = state_of(model)
    with pytest.raises(
        ValueError, match=rf"must fit the model, got {message}\nNothing was loaded. Pass"
    ):
        interop.load_state_dict(model, tensors)
    assert state_of(model) == before


def test_without_strict_what_fits_is_loaded_and_the_rest_reported() -> None:
    model, tensors = Two(), torch_two()
    untouched = model.last.bias[...].tolist()
    tensors |= {"extra": torch.ones(1), "first.bias": torch.ones(9)}
    del tensors["last.bias"]
    report = interop.load_state_dict(model, tensors, strict=False)
    assert report.loaded == (
        "first.weight",
        *(f"last.{n}" for n in ("weight", "running_mean", "running_var", "num_batches_tracked")),
    )
    assert report.missing == ("last.bias",)
    assert report.unexpected == ("extra",)
    assert report.mismatched == ("first.bias (9,) for (4,)",)
    assert not report.ignored
    assert not report.complete
    assert str(report) == (
        "5 tensors loaded\n  1 missing: last.bias\n  1 unexpected: extra\n  "
        "1 mismatched: first.bias (9,) for (4,)"
    )
    assert model.last.bias[...].tolist() == untouched
    assert model.first.kernel[...].T.tolist() == tensors["first.weight"].tolist()


def test_rename_maps_the_names_of_the_state_dict() -> None:
    model, tensors = Two(), torch_two()
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    report = interop.load_state_dict(model, prefixed, rename=lambda n: n.removeprefix("module."))
    assert report.complete
    assert model.last.scale[...].tolist() == tensors["last.weight"].tolist()


def test_a_rename_that_makes_two_names_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rename must keep names apart, got 'x' twice"):
        interop.load_state_dict(Two(), torch_two(), rename=lambda _: "x")


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
        (Own, r"'gamma' \(2,\) of Own"),
        (lambda: nnx.List([Own()]), r"'0.gamma' \(2,\) of Own"),
        (Listed, r"'tokens.0' \(2, 3\) of List"),
        (OwnSequential, r"'gamma' \(2,\) of OwnSequential"),
        (own_attribute, r"'extra' \(5,\) of Linear"),
        (lambda: nnx.Dict(cache=nnx.Cache(jnp.ones(7))), r"'cache' \(7,\) of Dict"),
    ],
)
def test_a_variable_without_a_rule_is_named(make: Callable[[], nnx.Module], where: str) -> None:
    model = make()
    message = rf"a rule that carries it, got {where}\. Call flaxstab\.interop\.register"
    with pytest.raises(ValueError, match=message):
        interop.state_dict(model)
    with pytest.raises(ValueError, match=message):
        interop.load_state_dict(model, {})


def _grouped() -> nnx.Module:
    return nnx.MultiHeadAttention(4, 4, num_kv_heads=2, rngs=R)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nnx.GRUCell(3, 4, rngs=R), "no place for b_hn.* '0' GRUCell"),
        (lambda: nnx.RNN(nnx.GRUCell(3, 4, rngs=R)), "no place for b_hn.* '0.cell' GRUCell"),
        (lambda: nnx.SimpleCell(3, 4, residual=True, rngs=R), "no residual, got '0' SimpleCell"),
        (
            lambda: nnx.RNN(nnx.SimpleCell(3, 4, residual=True, rngs=R)),
            "no residual, got '0.cell' SimpleCell",
        ),
        (
            lambda: nnx.Bidirectional(*(nnx.RNN(nnx.GRUCell(3, 4, rngs=R)) for _ in range(2))),
            "no place for b_hn.* '0.backward_rnn.cell' GRUCell",
        ),
        (_grouped, "has num_kv_heads = num_heads, got '0' MultiHeadAttention"),
        (
            lambda: nnx.MultiHeadAttention(2, 4, 8, rngs=R),
            "in_features = qkv_features = out_features, got '0' MultiHeadAttention",
        ),
        (lambda: nnx.MultiHeadAttention(2, 4, normalize_qk=True, rngs=R), "no normalize_qk, got"),
        (lambda: nnx.LinearGeneral(3, (2, 2), rngs=R), "to one axis, got '0' LinearGeneral"),
        (lambda: nnx.LinearGeneral((3, 2), 4, axis=(-2, -1), rngs=R), "got '0' LinearGeneral"),
        (lambda: nnx.LinearGeneral(3, 4, axis=1, rngs=R), "got '0' LinearGeneral"),
        (lambda: nnx.LinearGeneral(3, 4, batch_axis={0: 2}, rngs=R), "got '0' LinearGeneral"),
        (
            lambda: nnx.Einsum("ab,bc->ac", (3, 4), (4,), rngs=R),
            r"got '0.bias' \(4,\) of Einsum",
        ),
        (lambda: nnx.LoRA(3, 2, 4, rngs=R), r"got '0.lora_a' \(3, 2\) of LoRA"),
        (lambda: nnx.LoRALinear(3, 4, lora_rank=2, rngs=R), r"'0.bias' \(4,\) of LoRALinear"),
        (
            lambda: nnx.WeightNorm(nnx.Linear(3, 4, rngs=R), rngs=R),
            r"got .*0\.scales.* \(4,\) of WeightNorm",
        ),
        (
            lambda: nnx.SpectralNorm(nnx.Linear(3, 4, rngs=R), rngs=R),
            r"got .*0\.batch_stats.* of SpectralNorm",
        ),
        (
            lambda: nnx.Conv(2, 2, (3,), mask=jnp.ones((3, 2, 2)), rngs=R),
            r"got '0.mask' \(3, 2, 2\) of Conv",
        ),
    ],
)
def test_a_layer_that_torch_has_not_is_refused_by_name(
    make: Callable[[], nnx.Module], reason: str
) -> None:
    model = nnx.List([make(), linear.Linear(2, 2, rngs=R)])
    with pytest.raises(ValueError, match=reason):
        interop.state_dict(model)
    with pytest.raises(ValueError, match=reason):
        interop.load_state_dict(model, {}, strict=False)


class OwnCell(nnx.SimpleCell):
    """A cell of the user's own."""


def test_a_recurrent_layer_of_an_unknown_cell_is_a_mere_container() -> None:
    model = nnx.RNN(OwnCell(3, 4, rngs=R))
    names = ["cell.dense_h.weight", "cell.dense_i.weight", "cell.dense_i.bias"]
    assert list(interop.state_dict(model)) == names
    both = nnx.Bidirectional(nnx.RNN(nnx.LSTMCell(3, 4, rngs=R)), model)
    found = list(interop.state_dict(both))
    assert found[0] == "backward_rnn.cell.dense_h.weight"
    assert found[-1] == "forward_rnn.bias_hh_l0"


def test_an_attention_cache_is_refused() -> None:
    model = nnx.MultiHeadAttention(2, 4, rngs=R)
    model.init_cache((1, 3, 4))
    with pytest.raises(ValueError, match=r"got 'cache_index' \(\) of MultiHeadAttention"):
        interop.state_dict(model)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rules, "RULES", dict(_rules.RULES))


@pytest.mark.usefixtures("rules")
def test_a_registered_type_is_carried_and_its_submodules_walked() -> None:
    interop.register(
        Own,
        to_torch=lambda m: {"gain": np.asarray(m.gamma[...])},
        to_flax=lambda _, tensors: {"gamma": tensors["gain"]},
    )
    model = Own()
    assert list(interop.state_dict(model)) == ["gain", "inner.weight", "inner.bias"]
    tensors = {"gain": np.array([5.0, 6.0]), **interop.state_dict(model.inner)}
    tensors |= {f"inner.{n}": tensors.pop(n) for n in ("weight", "bias")}
    assert interop.load_state_dict(model, tensors).complete
    assert model.gamma[...].tolist() == [5.0, 6.0]
    del tensors["gain"]  # the rule is not asked for what it cannot give
    assert interop.load_state_dict(model, tensors, strict=False).missing == ("gain",)
    with pytest.raises(ValueError, match="registered once, got module_type='Own'"):
        interop.register(Own, to_torch=lambda _: {}, to_flax=lambda _, __: {})


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            lambda tensors: {"gamma": tensors["gain"][:1]},
            r"right shape, got variable='gamma' and shape=\(1,\) and needed=\(2,\)",
        ),
        (
            lambda _: {"delta": np.ones((2,))},
            "variables of the module, got attribute='delta' and module_type='Own'",
        ),
    ],
)
def test_a_wrong_rule_is_named_and_nothing_is_loaded(
    values: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], message: str
) -> None:
    interop.register(
        Own,
        to_torch=lambda m: {"gain": np.asarray(m.gamma[...])},
        to_flax=lambda _, tensors: values(tensors),
    )
    model = nnx.List([linear.Linear(2, 2, rngs=R), Own()])
    tensors = {f"{i}.weight": np.full((2, 2), 9.0) for i in ("0", "1.inner")}
    tensors |= {f"{i}.bias": np.full((2,), 9.0) for i in ("0", "1.inner")}
    before = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(nnx.state(model))]
    with pytest.raises(ValueError, match=message):
        interop.load_state_dict(model, {**tensors, "1.gain": np.ones(2)})
    assert [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(nnx.state(model))] == before
