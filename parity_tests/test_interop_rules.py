"""Every layer's rule: each bit goes there and back, and the layer computes torch's function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import attention, dropout, interop, linear, norms
from flaxstab.interop import _entries, _rules
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same
from parity_tests.support.twin_options import OPTIONS
from parity_tests.support.twins import EXACT, LAYERS, R, Row, T

MAKERS = EXACT | OPTIONS


def shuffled(module: T.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """A state_dict of the module with values of its own in every tensor."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.tensor(np.asarray(rng.normal(1, 0.5, t.shape))).to(t.dtype)
        if t.is_floating_point()
        else torch.tensor(int(rng.integers(1, 100)))
        for name, t in module.state_dict().items()
    }


@pytest.mark.parametrize(("ours", "theirs"), MAKERS.values(), ids=MAKERS)
def test_a_round_trip_gives_back_every_bit_under_torchs_names(
    ours: Callable[[], nnx.Module], theirs: Callable[[], T.Module]
) -> None:
    model, tensors = ours(), shuffled(theirs())
    for name in tensors:
        if "bias_hh" in name:  # of the two biases only the sum matters, and only that is kept
            tensors[name] = torch.zeros_like(tensors[name])
            tensors[name.replace("bias_hh", "bias_ih")][0] = -0.0
    report = interop.load_state_dict(model, tensors)
    assert report.complete
    assert set(report.loaded) == set(tensors)
    assert not report.rounded
    back = interop.state_dict(model)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].shape == tuple(tensor.shape)
        assert back[name].dtype == tensor.numpy().dtype
        assert back[name].tobytes() == np.ascontiguousarray(tensor.numpy()).tobytes(), name
    theirs().load_state_dict({n: torch.tensor(a) for n, a in back.items()}, strict=True)


def _variables(model: nnx.Module) -> dict[tuple[object, ...], np.ndarray]:
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return {path: np.asarray(variable[...]) for path, variable in state}


@pytest.mark.parametrize("ours", [row.ours for row in LAYERS.values()], ids=LAYERS)
def test_the_way_out_and_in_gives_back_every_bit(ours: Callable[[], nnx.Module]) -> None:
    source, target = ours(), ours()
    drawn = nnx.to_flat_state(nnx.state(source, nnx.Not(nnx.RngState)))
    for seed, (_, variable) in enumerate(drawn):
        new = values(*variable.shape, seed=seed)
        variable[...] = jnp.asarray(new, variable[...].dtype)
    nnx.update(source, nnx.from_flat_state(drawn))
    expected, before = _variables(source), _variables(target)
    assert all((expected[path] != array).any() for path, array in before.items())
    report = interop.load_state_dict(target, interop.state_dict(source))
    assert report.complete
    found = _variables(target)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype
        assert found[path].tobytes() == array.tobytes(), path
    listed = {v for e in report.entries for v in e.variable.split(", ")}
    assert listed == {".".join(map(str, path)) for path in expected}


def _in_float64(row: Row) -> tuple[np.ndarray, torch.Tensor]:
    """Returns both sides' outputs for a random state_dict and random inputs."""
    inputs = [values(*shape, seed=n) for n, shape in enumerate(row.shapes)]
    inputs = [x - 3 if isinstance(row.theirs(), T.PReLU) else x for x in inputs]
    theirs = row.theirs().double()
    theirs.load_state_dict(shuffled(theirs))
    with jax.enable_x64(True):
        graph, state = nnx.split(row.ours())
        floats = jax.tree.map(
            lambda a: jnp.asarray(a, float) if jnp.issubdtype(a.dtype, jnp.floating) else a, state
        )
        ours = nnx.merge(graph, floats)
        for _, module in nnx.iter_modules(ours):  # some pin a dtype, or start a carry in one
            for setting in {"dtype", "param_dtype"} & vars(module).keys():
                value = vars(module)[setting]
                setattr(module, setting, jnp.float64 if value == jnp.float32 else value)
        interop.load_state_dict(ours, theirs.state_dict())
        found = np.asarray(row.call(ours, *map(jnp.asarray, inputs)))
    with torch.no_grad():
        return found, row.twin(theirs, *map(torch.tensor, inputs))


@pytest.mark.parametrize("name", LAYERS)
def test_the_loaded_layer_computes_torchs_function(name: str) -> None:
    assert_same(*_in_float64(LAYERS[name]))


@pytest.mark.parametrize(
    ("name", "module", "entry"),
    [
        ("square", linear.Linear, _entries.one("kernel", "weight")),
        ("conv2d square", linear.Conv, _entries.TRANSPOSED._replace(
            to_torch=_entries.FLIPPED.to_torch, to_flax=_entries.FLIPPED.to_flax)),
        ("nnx conv transpose flipped square", nnx.ConvTranspose, _entries.KERNEL),
        ("nnx conv transpose transposed square", nnx.ConvTranspose, _entries.FLIPPED),
        ("conv transpose square", linear.ConvTranspose, _entries.KERNEL),
        ("conv transpose square", linear.ConvTranspose, _entries.FLIPPED),
        ("nnx linear general", nnx.LinearGeneral, _entries.one("kernel", "weight")),
    ],
)  # fmt: skip
def test_a_wrong_layout_of_a_square_kernel_is_caught(
    name: str, module: type[nnx.Module], entry: _entries.Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_rules.RULES, module, _rules.Rule(lambda _: (entry, _entries.BIAS)))
    with pytest.raises(AssertionError, match="is above the bound"):
        assert_same(*_in_float64(LAYERS[name]))


def test_every_rule_has_a_row() -> None:
    tested = {type(row.ours()) for row in LAYERS.values()}
    refused = {nnx.GRUCell}  # test_a_layer_that_torch_has_not_is_refused_by_name
    by_doctests = {t for t in _rules.RULES if t.__module__ == _rules.__name__}
    # Models register their bare parameters themselves: test_models_transformers.
    by_models = {t for t in _rules.RULES if t.__module__.startswith("flaxstab.models.")}
    by_tests = {t for t in _rules.RULES if t.__module__.startswith("parity_tests.")}
    assert set(_rules.RULES) - by_doctests - by_models - by_tests == tested | refused


def test_every_layer_has_a_rule_or_is_refused() -> None:
    containers = {"Module", "List", "Dict", "Sequential", "RNNCellBase"}
    # test_a_layer_that_torch_has_not_is_refused_by_name; RoPE is newer, and holds a cache
    refused = {"Einsum", "LoRA", "LoRALinear", "WeightNorm", "SpectralNorm", "RoPE"}
    places = (nnx, linear, norms, dropout)
    exported = [v for place in places for v in vars(place).values()]
    exported.append(attention.MultiHeadAttention)
    layers = {v for v in exported if isinstance(v, type) and issubclass(v, nnx.Module)}
    names = {layer.__name__ for layer in layers - _rules.RULES.keys()}
    assert {name for name in names if not name.startswith("_")} <= containers | refused


def test_the_sum_of_two_biases_is_kept() -> None:
    model = nnx.OptimizedLSTMCell(3, 4, rngs=R)
    tensors = shuffled(T.LSTMCell(3, 4))
    report = interop.load_state_dict(model, tensors)
    entry = next(e for e in report.entries if e.name == "bias_hh")
    assert entry.variable == "dense_h.bias"
    assert entry.transform == "the sum, split by gate"
    out = interop.state_dict(model)
    assert out["bias_ih"].tolist() == (tensors["bias_ih"] + tensors["bias_hh"]).tolist()
    assert not out["bias_hh"].any()
