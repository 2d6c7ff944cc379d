"""``parity.trajectory``: a thousand steps in float64, the envelope of float32, and chaos."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import Tensor

from flaxstab import linear, optim, parity
from flaxstab.parity import Verdict
from parity_tests.support.cases import values
from parity_tests.support.pairs import failures, finding, set_weights
from parity_tests.support.training import RATE, ours, plain, small, theirs, torch_small

BATCHES = [
    (values(16, 4, seed=i, offset=0.5, scale=1.0), values(16, 2, seed=50 + i, offset=0.0))
    for i in range(10)
]
FLOAT32 = (np.float32,)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


LATE = 990


@pytest.mark.parametrize("late", [False, True], ids=["sound", "fault"])
def test_a_thousand_steps_agree_in_float64_and_a_late_fault_is_found(late: bool) -> None:
    """The fault is one of 1e-8 of the learning rate, after 990 steps that agree."""
    change = {LATE: 1 + 1e-8} if late else {}
    tx = optim.adamw(optax.piecewise_constant_schedule(1e-2, change))
    report = parity.trajectory(small(tx), torch_small(adamw), BATCHES, steps=1000)
    assert report.passed is not late, str(report)
    assert {f.dtype for f in report.findings} == {"float64"}
    if late:
        assert report.departure is not None
        assert (report.departure.step, report.departure.name[:6]) == (LATE + 1, "update")
    else:
        assert {f.verdict for f in report.findings} == {Verdict.AGREE}


def test_float32_stays_inside_its_envelope_for_a_hundred_steps() -> None:
    report = parity.trajectory(
        small(optim.adamw(1e-2)), torch_small(adamw), BATCHES, steps=100, dtypes=FLOAT32
    )
    assert report.passed, str(report)
    assert not any(f.side for f in report.findings)


def in_float32_only(factor: float) -> optax.GradientTransformation:
    """SGD whose learning rate is off, in the precision in which nothing else is."""

    def off(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return jax.tree.map(
            lambda g: g * jnp.asarray(factor if g.dtype == jnp.float32 else 1, g.dtype), updates
        )

    return optax.chain(optax.stateless(off), optax.sgd(RATE))


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.001, False)])
def test_a_learning_rate_off_by_a_thousandth_leaves_the_float32_envelope(
    factor: float, passes: bool
) -> None:
    report = parity.trajectory(
        small(in_float32_only(factor)), torch_small(plain), BATCHES, steps=100, dtypes=FLOAT32
    )
    assert not failures(report), "float64 sees nothing of it"
    assert report.passed is passes, str(report)
    if not passes:
        assert {"update last.bias", "param last.weight"} <= failures(report, "float32")
        assert (report.verdict, report.side) == (Verdict.JAX_WORSE, "jax")


GROWTH = 3.999
ONES = [(np.ones((1, 1)),)]


def logistic(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
    """Its gradient makes w the next value of the logistic map: every step doubles an error."""

    def loss_of(model: nnx.Module) -> jax.Array:
        w = jnp.sum(model(x))
        return (1 - GROWTH) / 2 * w**2 + GROWTH / 3 * w**3

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def torch_logistic(model: torch.nn.Module, optimizer: torch.optim.SGD, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    w = model(x).sum()
    loss = w * w * ((1 - GROWTH) / 2 + GROWTH / 3 * w)
    loss.backward()
    optimizer.step()
    return loss


def unit_rate(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1.0)


def chaotic(rate: float) -> parity.Report:
    start = set_weights(torch.nn.Linear(1, 1, bias=False), 0.3)
    model = linear.Linear(1, 1, bias=False, rngs=nnx.Rngs(0))
    return parity.trajectory(
        ours(optax.sgd(rate), model, logistic), theirs(unit_rate, start, torch_logistic), ONES,
        steps=40, dtypes=FLOAT32,
    )  # fmt: skip


def test_a_chaotic_training_is_ill_conditioned_and_no_fault() -> None:
    report = chaotic(1.0)
    assert report.passed, str(report)
    found = finding(report, "param weight")
    assert found.verdict == Verdict.ILL_CONDITIONED
    assert "perturbed runs differ by" in found.explanation


def test_a_fault_in_a_chaotic_training_is_found_before_chaos_hides_it() -> None:
    report = chaotic(1.0 + 1e-9)
    assert report.departure is not None
    assert report.departure.step == 1
    assert "param weight" in failures(report)
