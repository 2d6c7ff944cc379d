"""``flaxstab.optim``'s schedules against ``torch.optim.lr_scheduler``."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import lr_scheduler

from flaxstab import optim
from flaxstab.parity._verdict import judge_semantics
from torch_ref import training

# LinearLR refuses 0; the smallest normal float64 is 0 for every step behind the first.
TINY = float(np.finfo(np.float64).tiny)
EPS32 = float(jnp.finfo(jnp.float32).eps)


def torchs_rates(peak: float, warmup: int, total: int, end: float) -> np.ndarray:
    """The rate of every step, 0 to ``total``, of the two torch schedulers in a row."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=peak)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=end)
    scheduler = cosine
    if warmup:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=peak)
        linear = lr_scheduler.LinearLR(optimizer, start_factor=TINY, total_iters=warmup)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=end)
        scheduler = lr_scheduler.SequentialLR(optimizer, [linear, cosine], [warmup])
    rates = []
    for _ in range(total + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize(
    ("peak", "warmup", "total", "end"),
    [
        (0.1, 10, 110, 0.0),
        (3e-4, 500, 1200, 1e-6),
        (1.0, 0, 7, 0.0),
        (2.0, 1, 3, 0.5),
        (0.1, 6, 7, 0),
    ],
)
def test_warmup_cosine_has_torchs_values_in_every_step(
    peak: float, warmup: int, total: int, end: float
) -> None:
    with jax.enable_x64(True):
        schedule = optim.warmup_cosine(peak, warmup, total, end)
        rates = np.array([float(schedule(step)) for step in range(total + 1)])
    finding = judge_semantics("rate", rates, torchs_rates(peak, warmup, total, end), peak)
    assert finding.passed, finding.explanation
    assert rates[0] == (0.0 if warmup else peak)
    assert rates[-1] == end


@pytest.mark.parametrize("warmup", [0, 10])
def test_torch_ref_warms_up_by_the_same_rule(warmup: int) -> None:
    with jax.enable_x64(True):
        schedule = optim.warmup_cosine(0.1, warmup, 50, 0.01)
        rates = np.array([float(schedule(step)) for step in range(60)])
    meant = [training.warmup_cosine(step, warmup, 50, 0.1, 0.01) for step in range(60)]
    assert judge_semantics("rate", rates, np.array(meant), 0.1).passed


def test_the_end_defaults_to_0_and_the_rate_stays_there_where_torchs_climbs_again() -> None:
    schedule = optim.warmup_cosine(0.1, 10, 110)
    for step in (110, 111, 1000, 10**6):
        assert float(schedule(step)) == 0.0
        assert float(optim.warmup_cosine(0.1, 10, 110, 0.025)(step)) == np.float32(0.025)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for _ in range(150):
        optimizer.step()
        cosine.step()
    assert optimizer.param_groups[0]["lr"] > 0.04


def _relative_errors(schedule: optax.Schedule, total: int, warmup: int) -> list[float]:
    errors = []
    for left in (100, 10, 1):
        exact = math.sin(math.pi / 2 * left / (total - warmup)) ** 2
        errors.append(abs(float(schedule(total - left)) / exact - 1))
    return errors


def test_near_the_end_float32_rates_keep_their_digits() -> None:
    total, warmup = 100_000, 1000
    bound = 8 * EPS32  # the angle, its sine (2 ulp), the square and the factor: below 8 roundings
    assert max(_relative_errors(optim.warmup_cosine(1.0, warmup, total), total, warmup)) <= bound
    planted = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, total)
    assert min(_relative_errors(planted, total, warmup)) > 10 * bound


def test_steps_above_2_to_the_24_are_not_rounded() -> None:
    total = 2**25
    schedule = optim.warmup_cosine(1.0, 0, total)
    assert max(_relative_errors(schedule, total, 0)) <= 8 * EPS32


def test_the_rate_is_float32_or_float64_by_jaxs_mode_and_counts_may_be_traced() -> None:
    schedule = optim.warmup_cosine(0.1, 10, 110)
    assert schedule(3).dtype == jnp.float32
    counts = jnp.arange(120)
    traced = jax.jit(jax.vmap(schedule))(counts)
    for step in (0, 9, 10, 60, 119):
        # XLA may fuse under jit: one rounding more or less.
        assert abs(float(traced[step]) - float(schedule(step))) <= EPS32 * 0.1
    with jax.enable_x64(True):
        assert schedule(3).dtype == jnp.float64


def test_the_rate_may_be_traced_too() -> None:
    rate = jax.jit(lambda peak: optim.warmup_cosine(peak, 10, 110)(5))(jnp.float32(0.5))
    assert float(rate) == 0.25


def test_adamw_follows_the_schedule_from_step_0() -> None:
    schedule = optim.warmup_cosine(0.5, 2, 6)
    tx = optim.adamw(schedule, weight_decay=1.0)
    params, still = {"w": jnp.ones(())}, {"w": jnp.zeros(())}
    state = tx.init(params)
    for step in range(6):
        updates, state = tx.update(still, state, params)
        assert float(updates["w"]) == -float(schedule(step))


@pytest.mark.parametrize(("warmup", "total"), [(10, 10), (11, 10), (-1, 10), (0, 0)])
def test_steps_that_do_not_fit_are_refused(warmup: int, total: int) -> None:
    message = (
        "warmup_steps must be at least 0 and below total_steps, "
        f"got warmup_steps={warmup} and total_steps={total}"
    )
    with pytest.raises(ValueError, match=message):
        optim.warmup_cosine(0.1, warmup, total)


def test_traced_steps_pass_unchecked() -> None:
    def rate(total: jax.Array) -> jax.Array:
        return optim.warmup_cosine(0.1, 5, total)(jnp.asarray(10))

    assert float(jax.jit(rate)(jnp.asarray(15))) == float(rate(15))
