"""The same small network in both frameworks, and questions that tests ask of a report."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor

from flaxstab import dropout, linear, norms, parity

FLOAT64 = "float64"


class BiasedBatchNorm(torch.nn.BatchNorm2d):
    """Follows the biased variance, as stock flax.nnx and flax.linen do."""

    def forward(self, x: Tensor) -> Tensor:
        before, count = self.running_var.clone(), x.numel() // x.shape[1]
        y = super().forward(x)
        if self.training:
            taken = (self.running_var - 0.9 * before) / 0.1
            self.running_var = 0.9 * before + 0.1 * taken * (count - 1) / count
        return y


class Net(nnx.Module):
    """Linear, BatchNorm, ReLU, Dropout and a head."""

    def __init__(self, p: float = 0.25, seed: int = 0, *, bias: bool = False) -> None:
        rngs = nnx.Rngs(seed)
        self.stem = linear.Linear(4, 8, bias, rngs=rngs)
        self.norm = norms.BatchNorm(8)
        self.drop = dropout.Dropout(p, rngs=rngs)
        self.head = linear.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.drop(jax.nn.relu(self.norm(self.stem(x)))))


class TorchNet(torch.nn.Module):
    """Its twin."""

    def __init__(self, p: float = 0.25, seed: int = 0, *, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = torch.nn.Linear(4, 8, bias), torch.nn.BatchNorm1d(8)
        self.drop, self.head = torch.nn.Dropout(p), torch.nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.stem(x)))))


def torch_linear(seed: int = 0, width: int = 4) -> torch.nn.Linear:
    """Returns a linear layer whose weights do not depend on the tests before."""
    torch.manual_seed(seed)
    return torch.nn.Linear(4, width)


def failures(report: parity.Report, dtype: str = FLOAT64) -> set[str]:
    """Returns the names of the quantities that do not pass at a precision."""
    return {f.name for f in report.findings if f.dtype == dtype and not f.passed}


def finding(report: parity.Report, name: str, dtype: str = FLOAT64) -> parity.Finding:
    """Returns the one finding of a name and a precision."""
    (found,) = [f for f in report.findings if (f.name, f.dtype) == (name, dtype)]
    return found


def faults(report: parity.Report) -> set[tuple[str, str]]:
    """Returns name and side of every finding that blames a side or does not pass."""
    return {(f.name, f.side) for f in report.findings if f.side or not f.passed}


def refusal(call: Callable[[], object]) -> str:
    """Returns the message of the ``ValueError`` that a call raises, which must be no chain."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller matches the message
        call()
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    return str(error)


def set_weights(module: torch.nn.Module, value: float) -> torch.nn.Module:
    """Fills every parameter of a module and returns it."""
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, value)
    return module


def arrays_of(module: nnx.Module) -> list[np.ndarray]:
    """Returns copies of everything that an NNX module holds, random streams included."""
    leaves = jax.tree.leaves(nnx.state(module))
    return [
        np.array(
            jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
        )
        for a in leaves
    ]
