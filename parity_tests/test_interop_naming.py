"""``flaxstab.interop.Naming`` calls gradients and moments what PyTorch calls them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import interop, linear, norms, parity
from parity_tests.support.cases import values


class Net(nnx.Module):
    def __init__(self) -> None:
        self.lin = linear.Linear(3, 4, rngs=nnx.Rngs(0))
        self.norm = norms.BatchNorm(4)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.lin(x))


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


def test_all_variables_are_the_state_dict() -> None:
    model = Net()
    assert same(interop.Naming(model).tensors(nnx.state(model)), interop.state_dict(model))


def test_a_tree_with_some_of_the_paths_gives_those_tensors() -> None:
    model = Net()
    naming, params = interop.Naming(model), nnx.state(model, nnx.Param)
    found = naming.tensors(params)
    assert set(found) == {"lin.weight", "lin.bias", "norm.weight", "norm.bias"}
    doubled = naming.tensors(jax.tree.map(lambda a: 2 * a, params))
    assert same(doubled, {name: 2 * array for name, array in found.items()})
    assert set(naming.tensors(nnx.state(model, nnx.BatchStat))) == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    }  # fmt: skip


def test_moments_of_an_optimizer_are_plain_arrays() -> None:
    model = Net()
    state = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param).opt_state
    adam = next(part for part in nnx.as_pure(state) if isinstance(part, optax.ScaleByAdamState))
    assert interop.Naming(model).tensors(adam.mu)["lin.weight"].shape == (4, 3)


class Cell(nnx.Module):
    def __init__(self) -> None:
        self.cell = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array, h: jax.Array, c: jax.Array) -> jax.Array:
        return self.cell((c, h), x)[1]


class TorchCell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.nn.LSTMCell(3, 4)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.cell(x, (h, c))[0]


def test_the_gradient_of_a_sum_of_biases_is_that_of_both() -> None:
    model = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    naming = interop.Naming(model)
    assert naming.tensors(ones)["bias_hh"].tolist() == [0.0] * 16
    assert naming.tensors(ones, gradients=True)["bias_hh"].tolist() == [1.0] * 16
    inputs = values(5, 3), values(5, 4, seed=1), values(5, 4, seed=2)
    report = parity.compare(Cell(), TorchCell(), *inputs)
    assert report.passed, str(report)
    assert "grad cell.bias_hh" in {finding.name for finding in report.findings}


def test_a_variable_without_a_rule_is_refused() -> None:
    class Own(nnx.Module):
        def __init__(self) -> None:
            self.gain = nnx.Param(jnp.ones(()))

    with pytest.raises(ValueError, match="got 'gain'"):
        interop.Naming(Own())
