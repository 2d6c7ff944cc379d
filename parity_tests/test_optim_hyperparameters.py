"""``flaxstab.optim.adamw`` with hyper-parameters that change: traced, injected and scheduled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flaxstab import optim
from parity_tests.support.cases import values

# An update is a quotient of two moments, two corrections, a root, eps and the rate: fewer than 16
# roundings of float32, each half an eps of the update.
UPDATE_BOUND = 16 * float(jnp.finfo(jnp.float32).eps) / 2


def _trees() -> tuple[optax.Params, optax.Updates]:
    shapes = {"kernel": (5, 4), "bias": (4,)}
    params = {n: jnp.asarray(values(*shape, seed=1), "float32") for n, shape in shapes.items()}
    gradient = {n: jnp.asarray(values(*shape, seed=2), "float32") for n, shape in shapes.items()}
    return params, gradient


CHANGES = 100


@pytest.mark.parametrize("make", [optim.adamw, optim.adam, optim.sgd], ids=lambda f: f.__name__)
def test_rates_and_decays_that_change_compile_nothing(make: Callable[..., object]) -> None:
    params, gradient = _trees()

    @jax.jit
    def update(rate: jax.Array, decay: jax.Array) -> optax.Updates:
        tx = make(rate, weight_decay=decay)
        return tx.update(gradient, tx.init(params), params)[0]

    for n in range(CHANGES):
        rate, decay = 0.8**n, 0.25 * n
        given = update(jnp.float32(rate), jnp.float32(decay))
        if n % 25 == 1:
            tx = make(rate, weight_decay=decay)
            expected, _ = tx.update(gradient, tx.init(params), params)
            for name, array in expected.items():
                # XLA fuses multiply-add under jit (DESIGN, known effects): one rounding less.
                bound = UPDATE_BOUND * float(jnp.max(jnp.abs(array)))
                assert float(jnp.max(jnp.abs(given[name] - array))) <= bound
    assert update._cache_size() == 1
    update(jnp.float32(0.1), 0.5)  # a Python number: the count would show it
    assert update._cache_size() == 2


def test_traced_betas_and_eps_pass_unchecked() -> None:
    params, gradient = {"w": jnp.ones(2)}, {"w": jnp.array([0.5, -2.0])}

    @jax.jit
    def update(beta: jax.Array, eps: jax.Array) -> optax.Updates:
        tx = optim.adamw(0.1, (beta, beta), eps)
        return tx.update(gradient, tx.init(params), params)[0]

    tx = optim.adamw(0.1, (0.5, 0.5), 0.25)
    expected, _ = tx.update(gradient, tx.init(params), params)
    assert update(jnp.float32(0.5), jnp.float32(0.25))["w"].round(6).tolist() == (
        expected["w"].round(6).tolist()
    )
    # What would be refused if it were known is computed: nothing can be raised under jit.
    assert update(jnp.float32(-0.5), jnp.float32(-1.0))["w"].shape == (2,)


class _Tiny(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.full((2, 3), 2.0, jnp.float32))
        self.bias = nnx.Param(jnp.full((3,), 2.0, jnp.float32))


@pytest.mark.parametrize("jit", [nnx.jit, lambda step: step], ids=["nnx.jit", "eager"])
def test_injected_hyperparameters_change_in_nnx_optimizer_without_retracing(jit: object) -> None:
    model, traces = _Tiny(), []
    mask = optim.decay_mask(model)
    tx = optax.inject_hyperparams(optim.adamw, static_args=("mask",))(
        learning_rate=0.5, weight_decay=0.5, mask=mask
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @jit
    def step(model: _Tiny, optimizer: nnx.Optimizer) -> None:
        traces.append(None)
        optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))

    size = 2.0
    changes = CHANGES if jit is nnx.jit else 5
    for n in range(changes):
        rate, decay = 0.5 ** (n % 4) / 8, 0.5 ** (n % 3)
        optimizer.opt_state.hyperparams["learning_rate"][...] = jnp.float32(rate)
        optimizer.opt_state.hyperparams["weight_decay"][...] = jnp.float32(decay)
        step(model, optimizer)
        size *= 1 - rate * decay
        # A step rounds the product and the difference: one eps of the parameter at most.
        bound = (n + 1) * float(jnp.finfo(jnp.float32).eps) * size
        assert np.max(np.abs(np.asarray(model.kernel[...], np.float64) - size)) <= bound
        assert model.bias[...].tolist() == [2.0] * 3
    assert len(traces) == (1 if jit is nnx.jit else changes)


def test_a_schedule_sees_the_number_of_steps_taken_so_far() -> None:
    seen = []

    def schedule(count: jax.Array) -> jax.Array:
        seen.append(int(count))
        return jnp.asarray(0.1)

    params = {"w": jnp.ones(2)}
    tx = optim.adamw(schedule, weight_decay=schedule)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    assert seen == [0, 0, 1, 1, 2, 2]


def test_an_injected_mask_that_is_not_static_is_refused_with_the_fix() -> None:
    model = _Tiny()
    tx = optax.inject_hyperparams(optim.adamw)(mask=optim.decay_mask(model))
    with pytest.raises(ValueError, match="static_args"):
        tx.init(nnx.state(model, nnx.Param))


def test_injected_clipping_changes_without_retracing() -> None:
    _, gradient = _trees()
    static = ("norm_type", "error_if_nonfinite")
    tx = optax.inject_hyperparams(optim.clip_grad_norm, static_args=static)(max_norm=1.0)
    state, traces = tx.init(gradient), []

    @jax.jit
    def update(state: optax.OptState) -> tuple[optax.Updates, optax.OptState]:
        traces.append(None)
        return tx.update(gradient, state)

    for n in range(20):
        state.hyperparams["max_norm"] = jnp.float32(0.5**n)
        clipped, state = update(state)
        norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in clipped.values()))
        total = float(state.inner_state.norm)
        exact = 0.5**n * total / (total + 1e-6)  # torch's formula
        assert abs(norm / exact - 1) <= UPDATE_BOUND
    assert len(traces) == 1


def test_a_traced_norm_type_is_refused_with_the_fix() -> None:
    _, gradient = _trees()
    tx = optax.inject_hyperparams(optim.clip_grad_norm)(max_norm=1.0)
    state = tx.init(gradient)
    with pytest.raises(ValueError, match=r"norm_type must be a plain number, .*'norm_type',"):
        jax.jit(tx.update)(gradient, state)


def test_every_number_of_sgd_can_be_injected() -> None:
    """A momentum of 0 that is an array keeps a buffer; the update is undampened, as PyTorch's."""
    params, gradient = _trees()
    tx = optax.inject_hyperparams(optim.sgd)(learning_rate=0.5, momentum=0.0, dampening=0.5)
    state = tx.init(params)
    update = jax.jit(tx.update)
    # Twice without momentum, where the buffer is the gradient; then half of each, and so again.
    for momentum in (0.0, 0.0, 0.5, 0.5):
        state.hyperparams["momentum"] = jnp.float32(momentum)
        updates, state = update(gradient, state, params)
        for name, g in gradient.items():
            assert updates[name].tolist() == (-0.5 * g).tolist()
            assert state.inner_state.trace[name].tolist() == g.tolist()
    assert update._cache_size() == 1
