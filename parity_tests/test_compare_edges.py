"""``flaxstab.parity`` at its edges: settings around it, unusual models, chaos, odd arguments."""

import re
from collections.abc import Iterator

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import linear, norms, parity
from parity_tests import test_compare_alarms as alarms
from parity_tests import test_compare_errors as errors
from parity_tests import test_compare_trajectories as chaos
from parity_tests.support.cases import values
from parity_tests.support.pairs import failures, refusal, set_weights, torch_linear
from parity_tests.support.training import ours, small, theirs, torch_small

X = values(8, 4)
IMAGES = values(2, 6, 6, 4)


def dense(**options: object) -> nnx.Linear:
    return nnx.Linear(4, 4, rngs=nnx.Rngs(0), **options)


@pytest.fixture
def fast_matmul() -> Iterator[None]:
    with jax.default_matmul_precision("BF16_BF16_F32"):
        yield


@pytest.mark.usefixtures("fast_matmul")
def test_a_fast_matmul_does_not_reach_float64() -> None:
    report = parity.compare(linear.Linear(4, 4, rngs=nnx.Rngs(0)), torch_linear(), X)
    assert report.passed, str(report)


@pytest.mark.usefixtures("fast_matmul")
def test_a_fast_matmul_does_not_excuse_a_cancelling_sum() -> None:
    report = parity.compare(
        lambda x: alarms.detour(x @ jnp.ones((4, 4), x.dtype)) + x,
        lambda x: x @ torch.ones(4, 4, dtype=x.dtype) + x,
        X,
    )
    assert {"output", "evaluation"} <= failures(report, "float32")


def test_saturation_is_no_fault() -> None:
    """1 - tanh(18)^2 is what is left of two ones."""
    report = parity.compare(jnp.tanh, torch.tanh, np.linspace(17.5, 18.9, 15)[None])
    assert report.passed, str(report)


def test_an_inner_float32_is_named_without_a_witness() -> None:
    report = parity.compare(dense(dtype=jnp.float32), torch_linear(), X, dtypes=())
    assert report.side == "jax", str(report)


class Evaluating(nnx.Module):
    def __init__(self) -> None:
        self.norm = norms.BatchNorm(4)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.norm.use_running_average:
            raise KeyError("in evaluation")
        return self.norm(x)


class Later(torch.nn.BatchNorm1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and self.training:
            raise KeyError("in a later step")
        return super().forward(x)


class Odd(nnx.Module):
    def __init__(this) -> None:  # noqa: N805
        this.conv = linear.Conv(5, 4, 3, rngs=nnx.Rngs(0))

    def __call__(this, x: jax.Array) -> jax.Array:  # noqa: N805
        return this.conv(x)


class LinenBlock(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return flax.linen.Conv(4, (3, 3), padding="VALID", name="conv")(x)


def test_an_error_inside_a_linen_model_names_the_submodule() -> None:
    module = LinenBlock()
    side = parity.Linen(module, module.init(jax.random.key(0), jnp.ones((2, 6, 6, 5))))
    message = refusal(
        lambda: parity.compare(side, torch.nn.Conv2d(5, 4, 3), IMAGES, layout="image", weights=None)
    )
    assert re.search(r"the Flax side must run on its inputs, got \w+ in conv \(Conv, line", message)


def test_an_error_outside_the_first_step_names_the_side() -> None:
    flax_side = refusal(
        lambda: parity.compare(Evaluating(), torch.nn.BatchNorm1d(4), X, weights=None)
    )
    assert "the Flax side" in flax_side
    assert "the PyTorch side" in refusal(lambda: parity.compare(norms.BatchNorm(4), Later(4), X))


def test_an_error_in_a_flax_training_step_names_the_side() -> None:
    off = errors.OURS._replace(step=errors.total_of_three)
    assert "the Flax side" in refusal(lambda: parity.compare(off, errors.THEIRS, X))


def test_a_flax_optimizer_that_is_none_is_refused() -> None:
    off = errors.OURS._replace(optimizer=lambda _: 3)
    assert "must make an nnx.Optimizer" in refusal(lambda: parity.compare(off, errors.THEIRS, X))


def test_a_module_instead_of_an_optimizer_factory_is_refused() -> None:
    message = refusal(lambda: parity.compare(optax.sgd(0.1), torch.nn.Linear(4, 4), X))
    assert "must make a torch.optim.Optimizer" in message


@pytest.mark.parametrize("dtypes", [("foo",), np.float32, "float32", (np.float64,)])
def test_dtypes_that_are_none_are_refused(dtypes: object) -> None:
    message = refusal(lambda: parity.compare(jnp.abs, torch.abs, X, dtypes=dtypes))
    assert "dtypes must be a sequence of float32" in message


def test_a_tolerance_outside_a_sequence_is_refused() -> None:
    alone = parity.Tolerance("output", 2, "why")
    message = refusal(lambda: parity.compare(jnp.abs, torch.abs, X, tolerances=alone))
    assert "tolerances must be a sequence of parity.Tolerance" in message


def test_the_receiver_may_have_any_name() -> None:
    message = refusal(
        lambda: parity.compare(
            Odd(), torch.nn.Conv2d(4, 4, 3), IMAGES, layout="image", weights=None
        )
    )
    assert "in conv (Conv" in message


class Masked(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.mask


@pytest.mark.parametrize("twin", [Masked(), torch_linear().requires_grad_(False)])
def test_buffers_outside_the_state_dict_and_frozen_parameters_are_no_fault(
    twin: torch.nn.Module,
) -> None:
    report = parity.compare(linear.Linear(4, 4, rngs=nnx.Rngs(0)), twin, X, dtypes=())
    assert report.passed, str(report)
    assert "grad weight" in {finding.name for finding in report.findings}


def test_a_module_may_work_in_place_on_its_input() -> None:
    twin = torch.nn.ReLU(inplace=True)
    assert parity.compare(jax.nn.relu, twin, X - 3, dtypes=()).passed


def test_no_grad_around_the_comparison_changes_nothing() -> None:
    with torch.no_grad():
        assert parity.compare(jnp.tanh, torch.tanh, X, dtypes=()).passed


class Sowing(nnx.Module):
    def __init__(self) -> None:
        self.lin = linear.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.lin(x)
        self.sow(nnx.Intermediate, "hidden", y)
        return y


class TorchSowing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_intermediates_that_a_model_sows_are_left_alone() -> None:
    assert parity.compare(Sowing(), TorchSowing(), X, dtypes=()).passed


def test_a_comparison_of_nothing_is_refused() -> None:
    message = refusal(lambda: parity.compare(lambda _: None, lambda _: None, np.arange(3)))
    assert "there must be something to compare" in message
    assert str(parity.Report(())) == "agree:  of 0 quantities"


def test_chaos_is_no_fault_when_nothing_is_left_to_compare() -> None:
    start = set_weights(torch.nn.Linear(1, 1, bias=False), 0.3)
    model = linear.Linear(1, 1, bias=False, rngs=nnx.Rngs(0))
    report = parity.trajectory(
        ours(optax.sgd(1.0), model, chaos.logistic),
        theirs(chaos.unit_rate, start, chaos.torch_logistic),
        chaos.ONES,
        steps=100,
        dtypes=(np.float32,),
    )
    assert report.passed, str(report)
    assert parity.Verdict.ILL_CONDITIONED in {finding.verdict for finding in report.findings}


@pytest.mark.parametrize("rate", [3.0, 30.0])
def test_a_training_that_diverges_is_no_fault(rate: float) -> None:
    report = parity.trajectory(
        small(optax.sgd(rate)),
        torch_small(lambda m: torch.optim.SGD(m.parameters(), lr=rate)),
        chaos.BATCHES,
        steps=100,
        dtypes=(np.float32,),
    )
    assert report.passed, str(report)
