"""The guard against gradients that are not finite, beside torch's ``if finite: step()``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch.optim import lr_scheduler

from flaxstab import norms, optim
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same

STEPS, WARMUP, PEAK = 30, 5, 0.1
SHAPES = {"bias": (3,), "kernel": (4, 3), "scale": (2, 3)}


def _gradients() -> dict[str, np.ndarray]:
    """Random gradients, of which every third step has one bad number in one tensor."""
    rng = np.random.default_rng(1)
    steps = {name: rng.normal(0.1, 1.0, (STEPS, *shape)) for name, shape in SHAPES.items()}
    for step in [1, 2, *range(4, STEPS, 3)]:
        name = list(SHAPES)[step % 3]
        steps[name][step].flat[step % 6 % steps[name][step].size] = (np.nan, np.inf, -np.inf)[
            step % 3 - 1
        ]
    return steps


def _params() -> dict[str, np.ndarray]:
    return {name: values(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}


def _optimizer() -> optax.GradientTransformation:
    schedule = optim.warmup_cosine(PEAK, WARMUP, STEPS)
    return optax.chain(optim.clip_grad_norm(1.0), optim.adamw(schedule, weight_decay=0.05))


def _run(
    tx: optax.GradientTransformation, params: dict[str, jax.Array], steps: dict[str, jax.Array]
) -> tuple[object, object]:
    def body(carry: tuple, gradients: dict[str, jax.Array]) -> tuple[tuple, object]:
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    _, trace = jax.lax.scan(body, (params, tx.init(params)), steps)
    return trace


def _torchs_run() -> tuple[list[dict[str, np.ndarray]], list[bool]]:
    params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in _params().items()}
    optimizer = torch.optim.AdamW(params.values(), lr=PEAK, weight_decay=0.05)
    rate = lambda n: float(  # noqa: E731
        n / WARMUP if n < WARMUP else (1 + np.cos(np.pi * (n - WARMUP) / (STEPS - WARMUP))) / 2
    )
    scheduler = lr_scheduler.LambdaLR(optimizer, rate)
    trace, taken = [], []
    for step in range(STEPS):
        for name, param in params.items():
            param.grad = torch.tensor(_gradients()[name][step])
        taken.append(all(bool(p.grad.isfinite().all()) for p in params.values()))
        if taken[-1]:
            torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            optimizer.step()
            scheduler.step()
        moments = ("exp_avg", "exp_avg_sq")
        trace.append({
            **{name: p.detach().numpy().copy() for name, p in params.items()},
            **{f"{name} {k}": optimizer.state[p][k].numpy().copy()
               for name, p in params.items() for k in moments},
            "step": float(optimizer.state[params["bias"]]["step"]),
        })  # fmt: skip
    return trace, taken


def test_30_steps_are_torchs_that_steps_only_if_all_is_finite() -> None:
    expected, taken = _torchs_run()
    assert 5 < sum(taken) < STEPS - 5
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        run = jax.jit(functools.partial(_run, optim.skip_nonfinite(_optimizer())))
        params, state = jax.tree.map(np.asarray, run(_params(), _gradients()))
    _, adam = state.inner_state
    for step, theirs in enumerate(expected):
        for name in SHAPES:
            assert_same(params[name][step], theirs[name])
            assert_same(adam.mu[name][step], theirs[f"{name} exp_avg"])
            assert_same(adam.nu[name][step], theirs[f"{name} exp_avg_sq"])
        assert adam.count[step] == theirs["step"]
    skipped = ~np.array(taken)
    np.testing.assert_array_equal(state.last_finite, taken)
    np.testing.assert_array_equal(state.total_notfinite, np.cumsum(skipped))
    since = np.maximum.accumulate(np.where(taken, np.arange(STEPS), -1))
    np.testing.assert_array_equal(state.notfinite_count, np.arange(STEPS) - since)


def test_without_the_guard_one_bad_number_is_everywhere_and_for_ever() -> None:
    params, _ = jax.jit(functools.partial(_run, _optimizer()))(_params(), _gradients())
    assert all(np.isnan(p[-1]).all() for p in params.values())


def _trees(dtype: str) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    gradients = {"w": jnp.ones((2, 3), dtype).at[1, 1].set(jnp.inf)}
    return {"w": jnp.ones(3)}, gradients


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_may_have_another_dtype_than_parameters_which_optaxs_guard_refuses(
    dtype: str,
) -> None:
    params, steps = _trees(dtype)
    trace, state = jax.jit(functools.partial(_run, optim.skip_nonfinite(optim.adamw())))(
        params, steps
    )
    assert trace["w"].dtype == jnp.float32
    assert (trace["w"][0] < 1).all()
    np.testing.assert_array_equal(trace["w"][0], trace["w"][1])
    assert state.total_notfinite.tolist() == [0, 1]
    guarded = optax.apply_if_finite(optim.adamw(), 5)
    with pytest.raises(TypeError, match="cond branches must have equal output types"):
        jax.jit(functools.partial(_run, guarded))(params, steps)


def test_large_float16_gradients_are_finite() -> None:
    """Their squares are not."""
    params, steps = {"w": jnp.ones(3)}, {"w": jnp.full((1, 3), 6e4, jnp.float16)}
    _, state = jax.jit(functools.partial(_run, optim.skip_nonfinite(optax.sgd(1.0))))(params, steps)
    assert state.total_notfinite.tolist() == [0]


def test_no_number_of_bad_steps_is_taken_where_optaxs_guard_gives_up() -> None:
    params, steps = {"w": jnp.ones(3)}, {"w": jnp.full((6, 3), jnp.nan)}
    ours = functools.partial(_run, optim.skip_nonfinite(optax.sgd(1.0)))
    optaxs = functools.partial(_run, optax.apply_if_finite(optax.sgd(1.0), 3))
    (kept, state), (lost, _) = jax.jit(lambda *a: (ours(*a), optaxs(*a)))(params, steps)
    np.testing.assert_array_equal(kept["w"], np.ones((6, 3)))
    assert state.notfinite_count.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isnan(lost["w"][3:]).all()


def test_absent_gradients_and_integers_are_left_alone() -> None:
    tx = optim.skip_nonfinite(optax.identity())
    gradients = {"absent": None, "count": jnp.arange(2), "w": jnp.ones(2)}
    state = tx.init(gradients)
    for update in (tx.update, jax.jit(tx.update)):
        updates, after = update(gradients, state)
        assert updates["absent"] is None
        assert int(after.total_notfinite) == 0
        updates, after = update({**gradients, "w": jnp.array([1.0, jnp.nan])}, state)
        assert updates["absent"] is None
        assert updates["count"].tolist() == [0, 0]
        assert updates["w"].tolist() == [0, 0]
        assert int(after.total_notfinite) == 1
    assert tx.update({}, tx.init({}))[1].last_finite


def test_around_multi_steps_the_guard_leaves_out_a_bad_micro_batch() -> None:
    """Inside it is too late: the mean of ``optax.MultiSteps`` never forgets NaN."""
    steps = {"w": jnp.array([1.0, jnp.nan, 3.0, 5.0, 7.0])[:, None]}
    params = {"w": jnp.zeros(1)}
    around = optim.skip_nonfinite(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    inside = optax.MultiSteps(optim.skip_nonfinite(optax.sgd(1.0)), 2).gradient_transformation()
    runs = jax.jit(lambda *a: [_run(tx, *a)[0]["w"] for tx in (around, inside)])(params, steps)
    # (1 + 3) / 2, then (5 + 7) / 2.
    assert [run[:, 0].tolist() for run in runs] == [[0, 0, -2, -2, -8], [0, 0, 0, 0, 0]]


class Net(nnx.Module):
    """A norm with statistics and a parameter behind it."""

    def __init__(self) -> None:
        self.norm = norms.BatchNorm(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.square(self.norm(x) - 1).mean()


def test_the_guard_works_in_nnx_optimizer_under_jit() -> None:
    model = Net()
    optimizer = nnx.Optimizer(model, optim.skip_nonfinite(optim.adamw(0.1)), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model: Net, optimizer: nnx.Optimizer, x: jax.Array) -> None:
        traces.append(1)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        gradients = nnx.grad(lambda p, r: nnx.merge(graph, p, r)(x))(params, rest)
        optimizer.update(model, gradients)

    good = jnp.asarray(values(4, 2), jnp.float32)
    step(model, optimizer, good)
    before = np.asarray(model.norm.scale[...]).copy()
    assert (before != 1).all()
    step(model, optimizer, good.at[0, 0].set(jnp.nan))
    np.testing.assert_array_equal(model.norm.scale[...], before)
    assert int(optimizer.opt_state.total_notfinite[...]) == 1
    assert np.isnan(model.norm.mean[...]).any()  # the docstring says that these are not guarded
    assert len(traces) == 1


def test_freezing_outside_the_guard_overlooks_gradients_of_frozen_parameters() -> None:
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    gradients, mask = {"a": jnp.ones(1), "b": jnp.full(1, jnp.nan)}, {"a": False, "b": True}
    outside = optim.freeze(optim.skip_nonfinite(optim.sgd(0.5)), mask)
    inside = optim.skip_nonfinite(optim.freeze(optim.sgd(0.5), mask))
    moved = [tx.update(gradients, tx.init(params), params)[0] for tx in (outside, inside)]
    assert [float(u["a"][0]) for u in moved] == [-0.5, 0.0]
    assert [float(u["b"][0]) for u in moved] == [0.0, 0.0]
