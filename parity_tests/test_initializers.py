"""Initializers: the laws of ``torch.nn.init``, on Flax's shapes.

Draws are compared with the law in closed form; ``torch`` gives the gains and the fans. The n of
1.5 million is what it takes to find a mean or a standard deviation of normal draws that is 1 % of
the standard deviation off.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from scipy.stats import norm, truncnorm

from flaxstab import initializers
from flaxstab.parity import Budget, Evidence, HasCdf, HasMean, IsNormal
from parity_tests.support import random_checks

SHAPE = (5, 5, 200, 300)  # 1.5 million elements: (*window, in, out)
FAN_IN, FAN_OUT = 25 * 200, 25 * 300


def draw(
    init: Callable[..., object],
    shape: tuple[int, ...] = SHAPE,
    dtype: str = jnp.float32,
    seed: int = 0,
) -> np.ndarray:
    return np.asarray(init(jax.random.key(seed), shape, dtype), np.float64)


def assert_all(*checks: Evidence) -> None:
    assert all(found.passed for found in checks), "\n".join(map(str, checks))


def assert_uniform(x: np.ndarray, low: float, high: float, budget: Budget) -> None:
    """Draws of U(low, high): support, 0.1 % of them at either end, and distribution function."""
    u = (x - low) / (high - low)
    slack = np.finfo(np.float32).eps * max(abs(low), abs(high)) / (high - low)
    end = HasMean(0.001, discrepancy=0.001)
    assert_all(
        HasMean(0.0, discrepancy=1e-4).check((u < -slack) | (u > 1 + slack), budget),
        end.check(u < 0.001, budget),
        end.check(u > 0.999, budget),
        HasCdf(lambda u: np.clip(u, 0, 1), discrepancy=0.006).check(u, budget),
    )


def assert_normal(x: np.ndarray, mean: float, std: float, budget: Budget) -> None:
    """Draws of N(mean, std²): both moments to 1 %, distribution function, and no truncation."""
    z = (x - mean) / std
    tail = 2 * norm.sf(3.7)  # 320 of them; without a bound that does not grow with n
    assert_all(
        IsNormal(discrepancy=0.01).check(z, budget),
        HasCdf(norm.cdf, discrepancy=0.006).check(z, budget),
        HasMean(tail, discrepancy=tail).check(np.abs(z) > 3.7, budget),
    )


def bent(u: np.ndarray) -> np.ndarray:
    return np.abs(u) ** 1.02 * np.sign(u)


def truncated(u: np.ndarray) -> np.ndarray:
    """Truncated at two standard deviations, with the standard deviation 1."""
    return truncnorm.ppf((u + 1) / 2, -2, 2) / truncnorm.std(-2, 2)


def normal(u: np.ndarray) -> np.ndarray:
    return norm.ppf((u + 1) / 2)


@pytest.mark.parametrize(
    ("check", "law", "of"),
    [
        (assert_uniform, (-1, 1.01), lambda u: u),
        (assert_uniform, (-1.01, 1), lambda u: u),
        (assert_uniform, (-0.99, 1), lambda u: u),
        (assert_uniform, (-1, 1), bent),
        (assert_normal, (0, 1), lambda u: normal(u) * 1.01),
        (assert_normal, (0, 1), lambda u: normal(u) + 0.01),
        (assert_normal, (0, 1), truncated),
        (assert_normal, (0, 1), lambda u: np.clip(normal(u), -3.7, 3.7)),
        (assert_normal, (0, 1), lambda u: u * 3**0.5),
    ],
)
def test_the_checks_see_another_law(
    check: Callable[..., None],
    law: tuple[float, float],
    of: Callable[[np.ndarray], np.ndarray],
    budget: Budget,
) -> None:
    """1.6 million functions of U(-1, 1)."""
    samples = of(np.random.default_rng(0).uniform(-1, 1, 1_600_000))
    with pytest.raises(AssertionError, match="must lie in"):
        check(samples, *law, random_checks.for_faults(budget, 4))


@pytest.mark.parametrize(
    ("init", "value"),
    [(initializers.zeros, 0), (initializers.ones, 1), (initializers.constant(2.5), 2.5)],
)
def test_constants_fill(init: Callable[..., object], value: float) -> None:
    np.testing.assert_array_equal(draw(init, (3, 4)), np.full((3, 4), value))


@pytest.mark.parametrize(
    ("init", "bounds"),
    [(initializers.uniform(), (0, 1)), (initializers.uniform(-3.0, 5.0), (-3, 5))],
)
def test_uniform_has_torchs_defaults_and_law(
    init: Callable[..., object], bounds: tuple[float, float], budget: Budget
) -> None:
    assert_uniform(draw(init), *bounds, budget)


@pytest.mark.parametrize(
    ("init", "mean", "std"),
    [(initializers.normal(), 0, 1), (initializers.normal(-2.0, 0.5), -2, 0.5)],
)
def test_normal_has_torchs_defaults_and_law(
    init: Callable[..., object], mean: float, std: float, budget: Budget
) -> None:
    assert_normal(draw(init), mean, std, budget)


@pytest.mark.parametrize("gain", [None, 5 / 3])
def test_xavier_laws(gain: float | None, budget: Budget) -> None:
    options = () if gain is None else (gain,)
    std = (gain or 1) * math.sqrt(2 / (FAN_IN + FAN_OUT))
    bound = math.sqrt(3) * std
    assert_uniform(draw(initializers.xavier_uniform(*options)), -bound, bound, budget)
    assert_normal(draw(initializers.xavier_normal(*options)), 0, std, budget)


@pytest.mark.parametrize(
    ("options", "std"),
    [
        ({}, math.sqrt(2 / FAN_IN)),
        ({"mode": "fan_out"}, math.sqrt(2 / FAN_OUT)),
        ({"a": 0.5}, math.sqrt(2 / 1.25 / FAN_IN)),
        ({"a": 0.5, "nonlinearity": "relu"}, math.sqrt(2 / FAN_IN)),
        ({"nonlinearity": "tanh"}, 5 / 3 / math.sqrt(FAN_IN)),
        ({"in_axis": -1, "out_axis": -2}, math.sqrt(2 / FAN_OUT)),
    ],
    ids=str,
)
def test_kaiming_laws(options: dict[str, object], std: float, budget: Budget) -> None:
    bound = math.sqrt(3) * std
    assert_uniform(draw(initializers.kaiming_uniform(**options)), -bound, bound, budget)
    assert_normal(draw(initializers.kaiming_normal(**options)), 0, std, budget)


def test_torchs_layer_defaults(budget: Budget) -> None:
    bound = 1 / math.sqrt(FAN_IN)
    assert_uniform(draw(initializers.torch_weight()), -bound, bound, budget)
    assert_uniform(draw(initializers.torch_bias(FAN_IN), (1_500_000,)), -bound, bound, budget)
    np.testing.assert_array_equal(draw(initializers.torch_bias(0), (3,)), np.zeros(3))


def test_torchs_own_uniform_draws_pass_the_same_checks(budget: Budget) -> None:
    """The laws in this file are PyTorch's: its weights obey them too."""
    torch.manual_seed(0)
    weight = torch.nn.init.kaiming_uniform_(torch.empty(300, 200, 5, 5))
    bound = math.sqrt(6 / FAN_IN)
    assert_uniform(weight.double().numpy(), -bound, bound, budget)


def test_torchs_own_normal_draws_pass_the_same_checks(budget: Budget) -> None:
    torch.manual_seed(0)
    weight = torch.empty(300, 200, 5, 5)
    std = math.sqrt(2 / (FAN_IN + FAN_OUT))
    assert_normal(torch.nn.init.xavier_normal_(weight).double().numpy(), 0, std, budget)
    assert_normal(torch.nn.init.normal_(weight).double().numpy(), 0, 1, budget)


@pytest.mark.parametrize(
    "shape", [(3, 7), (5, 3, 7), (3, 5, 4, 7), (2, 3, 1, 4, 6), (0, 5), (5, 0), (0, 3, 4)]
)
def test_fans_are_torchs_of_the_transposed_shape(shape: tuple[int, ...]) -> None:
    *window, channels_in, channels_out = shape
    weight = torch.empty(channels_out, channels_in, *window)
    expected = torch.nn.init._calculate_fan_in_and_fan_out(weight)
    assert initializers.fan_in_and_fan_out(shape) == expected
    moved = (channels_out, channels_in, *window)
    assert initializers.fan_in_and_fan_out(moved, in_axis=1, out_axis=0) == expected


def test_a_fan_needs_two_axes() -> None:
    with pytest.raises(ValueError, match=r"at least 2 axes, got shape=\(3,\)"):
        initializers.fan_in_and_fan_out((3,))
    with pytest.raises(ValueError, match="at least 2 axes"):
        initializers.xavier_normal()(jax.random.key(0), (3,))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 5)])
def test_shapes_without_elements_are_fine(shape: tuple[int, ...]) -> None:
    assert initializers.kaiming_normal()(jax.random.key(0), shape).shape == shape
    assert initializers.xavier_uniform()(jax.random.key(0), shape).shape == shape


LINEAR = [f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)]


@pytest.mark.parametrize("name", [*LINEAR, "linear", "sigmoid", "tanh", "relu", "selu"])
def test_gains_are_torchs(name: str) -> None:
    assert initializers.calculate_gain(name) == torch.nn.init.calculate_gain(name)


@pytest.mark.parametrize("slope", [None, 0, 0.0, 0.01, 0.3, 1.0, math.sqrt(5)])
def test_the_gain_of_leaky_relu_is_torchs(slope: float | None) -> None:
    expected = torch.nn.init.calculate_gain("leaky_relu", slope)
    assert initializers.calculate_gain("leaky_relu", slope) == expected


@pytest.mark.parametrize("name", ["gelu", "silu", "identity", "ReLU", ""])
def test_what_has_no_gain_in_torch_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="nonlinearity"):
        torch.nn.init.calculate_gain(name)
    with pytest.raises(ValueError, match=r"nonlinearity must be one of linear, .* use 'relu'\."):
        initializers.calculate_gain(name)


@pytest.mark.parametrize("init", [initializers.kaiming_normal, initializers.kaiming_uniform])
def test_bad_options_are_refused_at_once(init: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="mode must be 'fan_in' or 'fan_out', got mode='fan_avg'"):
        init(mode="fan_avg")
    with pytest.raises(ValueError, match="nonlinearity must be one of"):
        init(nonlinearity="gelu")


EVERY = {
    "zeros": initializers.zeros,
    "ones": initializers.ones,
    "constant": initializers.constant(0.1),
    "uniform": initializers.uniform(),
    "normal": initializers.normal(),
    "xavier_uniform": initializers.xavier_uniform(),
    "xavier_normal": initializers.xavier_normal(),
    "kaiming_uniform": initializers.kaiming_uniform(),
    "kaiming_normal": initializers.kaiming_normal(),
    "torch_weight": initializers.torch_weight(),
    "torch_bias": initializers.torch_bias(9),
}


def test_every_initializer_is_in_the_table() -> None:
    helpers = {"calculate_gain", "fan_in_and_fan_out", "check", "widest", "get_args"}
    functions = {n for n, v in vars(initializers).items() if type(v) is type(draw)}
    assert {n for n in functions if not n.startswith("_")} - helpers == set(EVERY)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", EVERY)
def test_low_precision_is_drawn_in_float32_and_cast(name: str, dtype: str) -> None:
    init = EVERY[name]
    low = init(jax.random.key(0), (64, 64), dtype)
    assert low.dtype == dtype
    np.testing.assert_array_equal(low, jnp.asarray(init(jax.random.key(0), (64, 64)), dtype))


def test_bfloat16_normals_have_more_than_128_values(budget: Budget) -> None:
    """Drawn in bfloat16, as JAX does, a million normals have 128 values and none above 2.9.

    That none of 1.5 million is above 3.7 has the probability 1e-140. Rounding them to bfloat16
    widens the law by less than 1e-5.
    """
    low = draw(initializers.normal(), dtype=jnp.bfloat16)
    assert len(np.unique(low)) > 2000
    assert_all(IsNormal(discrepancy=0.01).check(low, budget))
    assert np.abs(low).max() > 3.7


@pytest.mark.parametrize("name", EVERY)
def test_float64_is_drawn_in_float64(name: str) -> None:
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0))
        found, again = (np.asarray(EVERY[name](key, (8, 9), jnp.float64)) for key in keys)
    assert found.dtype == np.float64
    random = name not in ("zeros", "ones", "constant")
    assert bool((np.asarray(found, np.float32) != found).any()) is (random or name == "constant")
    assert bool((found != again).any()) is random


@pytest.mark.parametrize("name", EVERY)
def test_initializers_serve_every_layer(name: str) -> None:
    init, key = EVERY[name], jax.random.key(0)
    dense = nnx.Linear(6, 4, kernel_init=init, rngs=nnx.Rngs(0))
    conv = nnx.Conv(6, 4, (3, 3), kernel_init=init, rngs=nnx.Rngs(0))
    params = linen.Dense(4, kernel_init=init).init(key, jnp.ones((1, 6)))["params"]
    shapes = dense.kernel[...].shape, conv.kernel[...].shape, params["kernel"].shape
    assert shapes == ((6, 4), (3, 3, 6, 4), (6, 4))


@pytest.mark.parametrize("name", EVERY)
def test_jit_does_not_change_the_draw(name: str) -> None:
    """To rounding: under jit XLA may fuse the multiplication and the addition."""
    run = jax.jit(lambda key: EVERY[name](key, (8, 9)))
    eager = draw(EVERY[name], (8, 9))
    error = np.abs(np.asarray(run(jax.random.key(0)), np.float64) - eager).max()
    assert error <= 2 * np.finfo(np.float32).eps * np.abs(eager).max()
