"""``flaxstab.optim``'s schedules against ``torch.optim.lr_scheduler``."""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import lr_scheduler

from flaxstab import optim
from parity_tests.support.layers import assert_same
from torch_ref import training

STEPS = 2000
BASE = 0.1
# LinearLR refuses 0; the smallest normal float64 is 0 for every step behind the first.
TINY = float(np.finfo(np.float64).tiny)
EPS32 = float(jnp.finfo(jnp.float32).eps)
# The angle and its constant, the sine (2 ulp), its square, the span, a product and a sum.
ROUNDINGS = 8

Scheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def torchs_rates(make: Scheduler, base: float = BASE, steps: int = STEPS) -> np.ndarray:
    """The rate of every step of a torch scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=base)
    scheduler = make(optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return np.array(rates)


def _cosine(*arguments: float) -> Scheduler:
    return lambda o: lr_scheduler.CosineAnnealingLR(o, *arguments)


def _linear(steps: int, start: float) -> Scheduler:
    return lambda o: lr_scheduler.LinearLR(o, start, total_iters=steps)


def _one_cycle(*arguments: float, **options: float) -> Scheduler:
    return lambda o: lr_scheduler.OneCycleLR(
        o, BASE, *arguments, **options, cycle_momentum=False
    )  # fmt: skip


def _warmup_cosine(warmup: int, total: int, end: float) -> Scheduler:
    """The two torch schedulers in a row."""

    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        linear = lr_scheduler.LinearLR(optimizer, start_factor=TINY, total_iters=warmup)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=end)
        return lr_scheduler.SequentialLR(optimizer, [linear, cosine], [warmup])

    return make


class Case(NamedTuple):
    """A schedule, torch's scheduler, and for how many steps that runs."""

    ours: Callable[[], optax.Schedule]
    theirs: Scheduler
    steps: int = STEPS


def _document(warmup: int, steps_per_epoch: int, epochs: int) -> Case:
    """The printed loop's trace, whose scheduler torch drives."""
    trace = training.learning_rate_trace(epochs, steps_per_epoch, warmup)
    ours = functools.partial(
        optim.document_schedule, training.PEAK, warmup, steps_per_epoch, epochs
    )
    return Case(ours, lambda _: trace, len(trace))


def _case(make: Callable[..., optax.Schedule], *arguments: object, **options: object) -> Callable:
    return functools.partial(make, BASE, *arguments, **options)


def _joined() -> optax.Schedule:
    parts = [optim.linear_warmup(BASE, 300, 0.01), optim.cosine_annealing(BASE, 600, 1e-4)]
    return optax.join_schedules(parts, [300])


def _torch_joined(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [_linear(300, 0.01)(optimizer), _cosine(600, 1e-4)(optimizer)]
    return lr_scheduler.SequentialLR(optimizer, parts, [300])


CASES = {
    **{
        f"cosine of {T}": Case(_case(optim.cosine_annealing, T, low), _cosine(T, low))
        for T, low in ((1, 0.0), (2, 0.01), (50, 1e-3), (333, 0.0), (1000, 1e-6), (3000, 0.0))
    },
    **{
        f"warmup {warmup}, cosine to {total}": Case(
            _case(optim.warmup_cosine, warmup, total, end),
            _warmup_cosine(warmup, total, end),
            total + 1,
        )
        for warmup, total, end in ((500, 1999, 0.0), (1, 3, 0.05), (6, 7, 0.0), (10, 110, 1e-6))
    },
    "cosine from step 0": Case(_case(optim.warmup_cosine, 0, 1999), _cosine(1999)),
    **{
        f"linear over {n}": Case(_case(optim.linear_warmup, n, part), _linear(n, part))
        for n, part in ((5, 1 / 3), (1500, 1e-3), (1, 1.0))
    },
    "linear, then cosine": Case(_joined, _torch_joined),
    "step": Case(_case(optim.step, 700), lambda o: lr_scheduler.StepLR(o, 700)),
    "step, often": Case(_case(optim.step, 1, 0.99), lambda o: lr_scheduler.StepLR(o, 1, 0.99)),
    "step up": Case(_case(optim.step, 900, 2.0), lambda o: lr_scheduler.StepLR(o, 900, 2.0)),
    "step to 0": Case(_case(optim.step, 9, 0.0), lambda o: lr_scheduler.StepLR(o, 9, 0.0)),
    "one cycle": Case(_case(optim.one_cycle, STEPS), _one_cycle(STEPS)),
    **{
        f"one cycle of {n}, climbing {part}": Case(
            _case(optim.one_cycle, n, part, 10.0, 100.0),
            _one_cycle(n, pct_start=part, div_factor=10.0, final_div_factor=100.0),
            n,
        )
        for n, part in ((STEPS, 0.0), (STEPS, 1.0), (STEPS, 0.123), (20, 0.3), (7, 0.1), (1, 0.3))
    },
    **{
        f"document, {warmup} of {epochs} x {size}": _document(warmup, size, epochs)
        for warmup, size, epochs in (
            (500, 120, 10), (500, 20, 100), (0, 7, 5), (1, 7, 5), (2, 7, 5), (8, 7, 5), (9, 7, 5),
            (35, 7, 5), (1000, 7, 5), (3, 1, 2000), (3, 50, 1),
        )
    },
}  # fmt: skip


@functools.cache
def theirs(name: str) -> np.ndarray:
    case = CASES[name]
    made = case.theirs(torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=BASE))
    return np.array(made) if isinstance(made, list) else torchs_rates(case.theirs, steps=case.steps)


@functools.cache
def ours(*, x64: bool) -> dict[str, np.ndarray]:
    """Every case at every step, in one program."""

    def rates(counts: jax.Array) -> dict[str, jax.Array]:
        return {name: case.ours()(counts) for name, case in CASES.items()}

    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        return jax.tree.map(np.asarray, jax.jit(rates)(jnp.arange(STEPS)))


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_has_torchs_value_in_every_step(name: str) -> None:
    assert_same(ours(x64=True)[name][: CASES[name].steps], theirs(name))


@pytest.mark.parametrize("name", CASES)
def test_float32_rates_keep_their_digits_down_to_the_last_step(name: str) -> None:
    found, exact = ours(x64=False)[name][: CASES[name].steps], theirs(name)
    assert found.dtype == np.float32
    # A power's error grows with its logarithm; where torch's cosine is 0, so is ours.
    drops = np.abs(np.log(np.maximum(exact, TINY) / BASE)) if "step" in name else 0
    error = np.abs(found.astype(np.float64) - exact)
    normal = exact > np.finfo(np.float32).tiny / EPS32
    assert np.all((error <= (ROUNDINGS + drops) * EPS32 * exact)[normal])
    assert np.all(found[~normal] <= np.finfo(np.float32).tiny / EPS32)


def test_optaxs_float32_cosine_does_not_keep_its_digits() -> None:
    counts, exact = jnp.arange(STEPS), theirs("warmup 500, cosine to 1999")[:1999]
    planted = optax.warmup_cosine_decay_schedule(0.0, BASE, 500, 1999)(counts)[:1999]
    error = np.abs(np.asarray(planted, np.float64) - exact) / exact
    assert max(error[-10:]) > 100 * ROUNDINGS * EPS32
    last = optax.warmup_cosine_decay_schedule(0.0, 1.0, 1000, 100_000)(99_999)
    assert float(last) == 0  # off by 100 %, as the docstring says


def test_torchs_one_cycle_has_its_peak_and_its_end_a_step_before_optaxs() -> None:
    both = {"ours": optim.one_cycle(1.0, 20), "optax": optax.cosine_onecycle_schedule(20, 1.0)}
    rates = {name: jax.vmap(schedule)(jnp.arange(21)) for name, schedule in both.items()}
    assert np.argmax(theirs("one cycle of 20, climbing 0.3")) == 5
    assert {name: int(jnp.argmax(r)) for name, r in rates.items()} == {"ours": 5, "optax": 6}
    assert {name: int(jnp.argmin(r)) for name, r in rates.items()} == {"ours": 19, "optax": 20}


def test_the_printed_schedule_stays_1_52_times_above_the_cosine_over_epochs() -> None:
    rates = ours(x64=True)["document, 500 of 10 x 120"]
    cosine = [(1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)]
    excess = rates[499:1200] / (training.PEAK * np.repeat(cosine, 120)[499:])
    assert excess.min().round(2) == excess.max().round(2) == 1.52


ENDS = {
    "warmup cosine": (optim.warmup_cosine(BASE, 10, 110), 110, 0.0),
    "warmup cosine above 0": (optim.warmup_cosine(BASE, 10, 110, 0.025), 110, 0.025),
    "linear": (optim.linear_warmup(BASE, 110, 0.5), 110, BASE),
    "one cycle": (optim.one_cycle(BASE, 111), 110, BASE / 25e4),
    "document": (optim.document_schedule(BASE, 10, 11, 10), 110, 0.0),
}


@pytest.mark.parametrize("counter", [jnp.int32, jnp.uint32], ids=["signed", "unsigned"])
def test_behind_the_end_a_schedule_stays(counter: type) -> None:
    """Counted as ``nnx.Optimizer`` counts, too: unsigned."""
    later = jnp.asarray([110, 111, 1000, 2**30], counter)
    found = jax.jit(lambda counts: {name: f(counts) for name, (f, *_) in ENDS.items()})(later)
    for name, (_, _, end) in ENDS.items():
        error = np.abs(np.asarray(found[name], np.float64) - end)
        assert error.max() <= ROUNDINGS * EPS32 * end, name


def test_the_end_defaults_to_0_where_torchs_cosine_climbs_again() -> None:
    assert float(optim.warmup_cosine(BASE, 10, 110)(110)) == 0
    assert theirs("cosine of 50")[75] > BASE / 2


def test_steps_above_2_to_the_24_are_not_rounded() -> None:
    end, left = 2**25, np.array([100, 10, 1])
    counts = jnp.asarray(end - left)
    cosine = np.sin(np.pi / 2 * left / end) ** 2
    exact = {
        "warmup_cosine": cosine,
        "cosine_annealing": cosine,
        "one_cycle": np.sin(np.pi / 2 * (left - 1) / (0.7 * end)) ** 2 + 1e-11,
        "step": np.array([1.0, 1.0, 0.1]),
    }
    found = {
        "warmup_cosine": optim.warmup_cosine(1.0, 0, end)(counts),
        "cosine_annealing": optim.cosine_annealing(1.0, end)(counts),
        "one_cycle": optim.one_cycle(1.0, end, final_div_factor=4e9)(counts),
        "step": optim.step(1.0, end - 1)(counts),
    }
    for name, rates in found.items():
        error = np.abs(np.asarray(rates, np.float64) / exact[name] - 1)
        assert error.max() <= ROUNDINGS * EPS32, name


ARGUMENTS: dict[str, tuple[Callable[..., optax.Schedule], tuple[float, ...]]] = {
    "warmup_cosine": (optim.warmup_cosine, (0.5, 10, 110, 0.01)),
    "cosine_annealing": (optim.cosine_annealing, (0.5, 70, 0.01)),
    "linear_warmup": (optim.linear_warmup, (0.5, 10, 0.25)),
    "step": (optim.step, (0.5, 30, 0.1)),
    "one_cycle": (optim.one_cycle, (0.5, 110, 0.3, 25.0, 1e4)),
    "document_schedule": (optim.document_schedule, (0.5, 25, 11, 10)),
}


@pytest.mark.parametrize("x64", [False, True])
def test_every_argument_may_be_traced(x64: bool) -> None:
    def rates(
        counts: jax.Array, arguments: dict[str, tuple[jax.Array, ...]]
    ) -> dict[str, jax.Array]:
        return {name: f(*arguments[name])(counts) for name, (f, _) in ARGUMENTS.items()}

    known = {name: arguments for name, (_, arguments) in ARGUMENTS.items()}
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        counts = jnp.arange(130)
        traced = jax.jit(rates)(counts, jax.tree.map(jnp.asarray, known))
        plain = jax.jit(functools.partial(rates, arguments=known))(counts)
    for name, expected in jax.tree.map(np.asarray, plain).items():
        found = np.asarray(traced[name])
        assert found.dtype == expected.dtype == (np.float64 if x64 else np.float32)
        # 0.1 and its logarithm are rounded once more if traced.
        bound = 2 * ROUNDINGS * np.finfo(found.dtype).eps * expected
        assert np.all(np.abs(found - expected) <= bound), name


def test_counts_may_be_integers_arrays_and_traced() -> None:
    compiled = jax.jit(jax.vmap(lambda count: [f(*a)(count) for f, a in ARGUMENTS.values()]))
    for (f, arguments), rates in zip(ARGUMENTS.values(), compiled(jnp.arange(120)), strict=True):
        for count in (0, 61, 119):
            # XLA may fuse under jit: one rounding more or less.
            found = float(f(*arguments)(count))
            assert abs(float(rates[count]) - found) <= 2 * EPS32 * found
    assert optim.step(0.5, 30)(np.int64(3)).dtype == jnp.float32


def test_a_number_may_be_numpys() -> None:
    with jax.numpy_dtype_promotion("strict"):
        for f, arguments in ARGUMENTS.values():
            found = f(*(np.asarray(a)[()] for a in arguments))(np.int64(17))
            assert found == f(*arguments)(17)


def test_known_arrays_may_be_arguments_in_a_jitted_function() -> None:
    counts = jnp.arange(130)
    arrays = {name: list(map(jnp.asarray, arguments)) for name, (_, arguments) in ARGUMENTS.items()}
    numbers = {name: [a.item() for a in given] for name, given in arrays.items()}
    found, expected = (
        jax.jit(lambda n, given=given: {k: f(*given[k])(n) for k, (f, _) in ARGUMENTS.items()})(
            counts
        )
        for given in (arrays, numbers)
    )
    for name, rates in expected.items():
        np.testing.assert_array_equal(found[name], rates)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_count_below_0_is_0(name: str) -> None:
    make, arguments = ARGUMENTS[name]
    rates = make(*arguments)(jnp.array([-1000, -1, 0]))
    assert rates[0] == rates[1] == rates[2]
    assert make(*arguments)(-1) == make(*arguments)(-0.5) == rates[2]


def test_one_known_length_is_checked_beside_a_traced_one() -> None:
    with pytest.raises(ValueError, match="0 <= warmup_steps < total_steps"):
        jax.jit(lambda total: optim.warmup_cosine(0.1, -1, total)(0))(10)


def test_torch_ref_warms_up_by_the_same_rule() -> None:
    counts = range(60)
    with jax.enable_x64(True):
        for warmup in (0, 10):
            rates = optim.warmup_cosine(0.1, warmup, 50, 0.01)(np.arange(60))
            meant = [training.warmup_cosine(step, warmup, 50, 0.1, 0.01) for step in counts]
            assert_same(rates, np.array(meant))


def test_adamw_follows_the_schedule_from_step_0() -> None:
    schedule = optim.warmup_cosine(0.5, 2, 6)
    tx = optim.adamw(schedule, weight_decay=1.0)
    params, still = {"w": jnp.ones(())}, {"w": jnp.zeros(())}

    def body(state: object, _: None) -> tuple[object, jax.Array]:
        updates, state = tx.update(still, state, params)
        return state, updates["w"]

    _, updates = jax.lax.scan(body, tx.init(params), length=6)
    assert np.all(np.abs(updates + schedule(jnp.arange(6))) <= EPS32 * 0.5)


RATES = (-0.1, math.inf, math.nan)
BAD = [
    *((name, 0, rate, "must be finite and at least 0") for name in ARGUMENTS for rate in RATES),
    ("warmup_cosine", 3, -1.0, "end must be finite and at least 0, got end=-1.0"),
    ("cosine_annealing", 2, -1.0, "eta_min must be finite and at least 0"),
    ("cosine_annealing", 1, 0, "T_max must be an integer of at least 1, got T_max=0"),
    ("cosine_annealing", 1, 2.5, "T_max must be an integer of at least 1"),
    ("linear_warmup", 1, 0, "warmup_steps must be an integer of at least 1"),
    ("linear_warmup", 2, 1.5, "start_factor must lie in [0, 1], got start_factor=1.5"),
    ("linear_warmup", 2, -0.5, "start_factor must lie in [0, 1]"),
    ("step", 1, 0, "step_size must be an integer of at least 1"),
    ("step", 1, True, "step_size must be an integer of at least 1"),
    ("step", 2, -0.1, "gamma must be finite and at least 0"),
    ("one_cycle", 1, 0, "total_steps must be an integer of at least 1"),
    ("one_cycle", 2, 1.1, "pct_start must lie in [0, 1], got pct_start=1.1"),
    ("one_cycle", 3, 0.0, "div_factor must be finite and above 0, got div_factor=0.0"),
    ("one_cycle", 4, -1.0, "final_div_factor must be finite and above 0"),
    ("document_schedule", 1, -1, "warmup must be an integer of at least 0, got warmup=-1"),
    ("document_schedule", 2, 0, "steps_per_epoch must be an integer of at least 1"),
    ("document_schedule", 3, 0.5, "epochs must be an integer of at least 1"),
]


@pytest.mark.parametrize(("name", "place", "value", "message"), BAD)
def test_a_bad_value_is_refused(name: str, place: int, value: float, message: str) -> None:
    make, arguments = ARGUMENTS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        make(*arguments[:place], value, *arguments[place + 1 :])
    with pytest.raises(ValueError, match=re.escape(message.partition(", got")[0])):
        make(*arguments[:place], jnp.asarray(value), *arguments[place + 1 :])

    @jax.jit
    def within(count: jax.Array) -> jax.Array:
        return make(*arguments[:place], known, *arguments[place + 1 :])(count)

    known = jnp.asarray(value)  # but JAX traces what is computed of it
    with pytest.raises(ValueError, match=re.escape(message.partition(", got")[0])):
        within(3)


@pytest.mark.parametrize(("warmup", "total"), [(10, 10), (11, 10), (-1, 10), (0, 0), (0.5, 10)])
def test_steps_that_do_not_fit_are_refused(warmup: float, total: int) -> None:
    message = (
        "warmup_steps and total_steps must be integers with 0 <= warmup_steps < total_steps, "
        f"got warmup_steps={warmup} and total_steps={total}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        optim.warmup_cosine(0.1, warmup, total)


def test_every_schedule_is_tested() -> None:
    made = {case.ours.func for case in CASES.values() if isinstance(case.ours, functools.partial)}
    assert made == {f for f, _ in ARGUMENTS.values()}
    assert all(getattr(optim, name) is f for name, (f, _) in ARGUMENTS.items())
