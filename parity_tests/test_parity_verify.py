"""verify: PyTorch's weights in the model, and the verdict of compare, in one call."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import interop, linear, norms, parity
from flaxstab.pytest_plugin import Parity
from parity_tests.support.cases import values


def ours(eps: float = 1e-5) -> nnx.Module:
    rngs = nnx.Rngs(0)
    return nnx.Sequential(linear.Linear(3, 4, rngs=rngs), norms.BatchNorm(4, eps))


def theirs() -> torch.nn.Module:
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[1].running_mean += 2
    module[1].num_batches_tracked += 5
    return module


X = values(8, 3)


def bits(model: nnx.Module) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in interop.state_dict(model).items()}


def test_the_model_gets_every_bit_and_the_report_is_that_of_compare() -> None:
    model, module = ours(), theirs()
    model.layers[1].eval()
    kept = {n: t.clone() for n, t in module.state_dict().items()}
    report = parity.verify(model, module, X)
    assert report.passed
    assert report.findings == parity.compare(ours(), module, X).findings
    assert bits(model) == {n: t.numpy().tobytes() for n, t in kept.items()}
    assert all(torch.equal(t, kept[n]) for n, t in module.state_dict().items())
    assert model.layers[1].use_running_average


def test_another_model_has_the_weights_and_does_not_pass() -> None:
    model = ours(1e-3)
    report = parity.verify(model, theirs(), X, dtypes=())
    assert not report.passed
    np.testing.assert_array_equal(model.layers[1].mean[...], 2)


def test_names_may_differ_and_random_streams_stay() -> None:
    model = nnx.Sequential(
        linear.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(3))
    )
    key = jax.random.key_data(model.layers[1].rngs.key[...])
    module = torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 4)})
    module.forward = lambda x: torch.nn.functional.dropout(module["fc"](x), 0.5, module.training)
    with pytest.raises(ValueError, match="must fit the Flax model"):
        parity.verify(model, module, X)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5))
    report = parity.verify(model, net, X, dtypes=(), rename=lambda name: name)
    assert report.passed
    np.testing.assert_array_equal(jax.random.key_data(model.layers[1].rngs.key[...]), key)


@pytest.mark.parametrize("fault", ["weights", "inputs"])
def test_nothing_is_changed_by_a_call_that_fails(fault: str) -> None:
    model, module = ours(), theirs()
    before = bits(model)
    if fault == "weights":
        module[1] = torch.nn.LayerNorm(5)
    with pytest.raises(ValueError, match=r"must fit the Flax model|in_features"):
        parity.verify(model, module, X if fault == "weights" else X[:, :2])
    assert bits(model) == before


def test_only_modules_are_taken() -> None:
    with pytest.raises(ValueError, match=r"flax_model must be an nnx.Module, got flax_model='fun"):
        parity.verify(lambda x: x, theirs(), X)
    with pytest.raises(ValueError, match=r"torch_model must be a torch.nn.Module, got .*compare"):
        parity.verify(ours(), torch.relu, X)


def test_the_fixture_has_it_and_fails_the_test() -> None:
    model = ours()
    assert Parity().verify(model, theirs(), X, dtypes=()).passed
    np.testing.assert_array_equal(model.layers[1].mean[...], 2)
    with pytest.raises(pytest.fail.Exception, match="semantics"):
        Parity().verify(ours(1e-3), theirs(), X, dtypes=())
