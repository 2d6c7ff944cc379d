"""Faults that could hide, and sound pairs that could alarm: each was found by a reviewer once."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import Tensor

from flaxstab import dropout, interop, linear, norms, parity
from flaxstab.interop._rules import RULES
from flaxstab.parity import Verdict
from parity_tests.support.cases import values
from parity_tests.support.pairs import failures, refusal

X = values(8, 6, offset=0.5, scale=1.0)
LOWER = np.tril(np.ones((8, 6), bool))


def test_masked_scores_hide_no_other_element() -> None:
    report = parity.compare(
        lambda q, m: jnp.where(m, 1.5 * q, -1e30), lambda q, m: torch.where(m, q, -1e30), X, LOWER
    )
    assert "output" in failures(report)


def test_one_large_row_hides_no_other() -> None:
    large = X * np.where(np.arange(8) == 3, 1e13, 1.0)[:, None]
    factor = np.where(np.arange(8) == 3, 1.0, 1.5)[:, None]
    report = parity.compare(
        lambda x: x * jnp.asarray(factor, x.dtype), torch.clone, large, dtypes=()
    )
    assert "output" in failures(report)


@pytest.mark.parametrize("size", [10**13, 2**60])
def test_integers_must_be_equal(size: int) -> None:
    given = np.array([size, 5])
    added = np.array([0, 1]) if size < 2**53 else np.array([1, 0])
    both = (X, given)
    report = parity.compare(
        lambda x, i: (x, i + jnp.asarray(added)), lambda x, i: (x, i), *both, dtypes=()
    )
    assert failures(report) == {"output[1]", "evaluation[1]"}
    assert parity.compare(lambda x, i: (x, i), lambda x, i: (x, i), *both, dtypes=()).passed


def test_an_output_of_another_kind_is_found() -> None:
    report = parity.compare(lambda x: (x, x > 0), lambda x: (x, (x > 0) * 1.0), X, dtypes=())
    assert failures(report) == {"output[1]", "evaluation[1]"}


class Dropping(nnx.Module):
    def __init__(self) -> None:
        self.drop = dropout.Dropout(0.4, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(x)


class OwnDropout(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = 0.4

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) > self.p)


class TorchDropping(torch.nn.Module):
    def __init__(self, drop: torch.nn.Module) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


@pytest.mark.parametrize("drop", [OwnDropout(), torch.nn.Identity()])
def test_only_torchs_own_dropout_is_replayed(drop: torch.nn.Module) -> None:
    message = refusal(lambda: parity.compare(Dropping(), TorchDropping(drop), X))
    assert "'drop'" in message
    assert "every torch dropout must be a torch.nn.Dropout" in message


def test_a_mask_of_zeros_and_ones_is_not_moved() -> None:
    """Moved, it would cross the comparison with 1 and excuse everything."""
    mask = (np.arange(6) % 2).astype(np.float64) * np.ones((8, 1))
    report = parity.compare(
        lambda x, m: jnp.where(m == 1, 1.001 * x, 0.0),
        lambda x, m: torch.where(m == 1, x, 0.0 * x),
        X, mask,
    )  # fmt: skip
    assert "output" in failures(report)


def test_an_overflow_on_both_sides_hides_no_other_element() -> None:
    given = np.array([[0.5, 1.0, 2.0, 12.0]])
    report = parity.compare(
        lambda x: jnp.exp(x) * (1.2 if x.dtype == jnp.float16 else 1.0),
        torch.exp, given, dtypes=(jnp.float16,),
    )  # fmt: skip
    assert "output" in failures(report, "float16")


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_inputs_outside_a_dtype_are_refused(scale: float) -> None:
    message = refusal(lambda: parity.compare(lambda x: 2 * x, lambda x: 3 * x, scale * X))
    assert "inputs must lie within the range of float32" in message
    assert failures(parity.compare(lambda x: 2 * x, lambda x: 3 * x, scale * X, dtypes=()))


class Warming(nnx.Module):
    def __init__(self) -> None:
        self.norm = norms.BatchNorm(6)

    def __call__(self, x: jax.Array) -> jax.Array:
        seen = self.norm.count[...]
        y = self.norm(x)
        return jnp.where((seen > 0) & (not self.norm.use_running_average), 1.5 * y, y)


class TorchWarming(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_an_output_that_changes_from_step_to_step_is_found() -> None:
    report = parity.compare(Warming(), TorchWarming(), X, dtypes=())
    assert failures(report) == {"step 2 output", "step 10 output"}


class Scale(nnx.Module):
    def __init__(self) -> None:
        self.gain = nnx.Param(jnp.full((6,), 2.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gain[None].astype(x.dtype)


class TorchScale(torch.nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.gain, self.factor = torch.nn.Parameter(torch.full((6,), 2.0)), factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + (self.factor - 1) * (self.gain - self.gain.detach())


@pytest.fixture
def registered() -> Iterator[None]:
    interop.register(
        Scale,
        to_torch=lambda module: {"gain": np.asarray(module.gain[...])},
        to_flax=lambda _, tensors: {"gain": tensors["gain"]},
    )
    yield
    del RULES[Scale]


@pytest.mark.usefixtures("registered")
def test_gradients_of_registered_types_are_compared() -> None:
    assert parity.compare(Scale(), TorchScale(), X).passed
    wrong = parity.compare(Scale(), TorchScale(1.5), X, dtypes=())
    assert failures(wrong) == {"grad gain"}


def test_a_state_that_has_no_name_in_pytorch_is_noted() -> None:
    tx = optax.chain(optax.sgd(0.1), optax.ema(0.9))
    report = parity.compare(tx, lambda ps: torch.optim.SGD(ps, lr=0.1), X, dtypes=())
    assert any("of no name in PyTorch" in note for note in report.notes)


def test_a_step_count_that_is_off_is_found_and_printed() -> None:
    def off(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(params, lr=1e-2)

        def count_twice(*_: object) -> None:
            for entry in optimizer.state.values():
                entry["step"] += 1

        optimizer.register_step_post_hook(count_twice)
        return optimizer

    report = parity.compare(optax.adam(1e-2), off, X, dtypes=())
    assert "step 0" in failures(report)
    assert "step 0" in str(report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(6))
def test_two_samples_raise_no_alarm_in_any_precision(seed: int, dtype: str) -> None:
    pair = values(2, 6, seed=seed, offset=0.5, scale=1.0)
    report = parity.compare(norms.BatchNorm(6), torch.nn.BatchNorm1d(6), pair, dtypes=(dtype,))
    assert report.passed, str(report)


def test_labels_of_pixels_keep_their_axes() -> None:
    images, labels = values(2, 4, 5, 3), np.arange(40).reshape(2, 4, 5) % 3

    def ours(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, y[..., None], -1)[..., 0].sum((1, 2))

    def theirs(x: Tensor, y: Tensor) -> Tensor:
        return x.gather(1, y[:, None])[:, 0].sum((1, 2))

    report = parity.compare(ours, theirs, images, labels, layout="image")
    assert report.passed, str(report)


class Buffered(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_buffer("mask", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.mask


def test_a_constant_that_pytorch_keeps_as_a_buffer_is_noted() -> None:
    report = parity.compare(linear.Linear(6, 6, rngs=nnx.Rngs(0)), Buffered(), X)
    assert report.passed, str(report)
    assert report.notes == ("mask (the Flax layer does without)",)


def test_a_slope_at_a_kink_names_nobody() -> None:
    report = parity.compare(
        lambda x: jnp.maximum(x, 0), torch.relu, np.array([[0.0, 1.0, -1.0]]), dtypes=()
    )
    assert report.verdict == Verdict.SEMANTICS_DIFFER  # 1/2 and 0 at 0: a matter of convention
    assert report.side == ""


def test_seeds_of_the_caller_are_not_those_of_the_cotangents() -> None:
    """A cotangent equal to the standardised input has no gradient through a norm."""
    given = np.random.default_rng(0).normal(3.0, 2.0, (16, 6))
    report = parity.compare(norms.BatchNorm(6), torch.nn.BatchNorm1d(6), given)
    found = {(f.name, f.dtype): f.verdict for f in report.findings}
    assert found["grad input 0", "float64"] == Verdict.AGREE


def test_a_tolerance_that_names_nothing_is_told() -> None:
    allowed = (parity.Tolerance("outptu", 10, "a typing error"),)
    report = parity.compare(jnp.tanh, torch.tanh, X, dtypes=(), tolerances=allowed)
    assert report.notes == ("the tolerance for 'outptu' (no quantity has such a name)",)
