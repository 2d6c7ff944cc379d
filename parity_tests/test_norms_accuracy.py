"""An offset spoils neither outputs, gradients nor statistics; nowhere worse than twice PyTorch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import norms
from parity_tests.support.cases import values
from parity_tests.support.layers import OFFSET_ERROR
from parity_tests.support.norm_accuracy import (
    MEANS,
    PAIRS,
    SHAPE,
    above,
    data,
    errors,
    runner,
    torch_finds,
    worse_than_torch,
)

EPS = 1e-5
SMALL = ((0.0, 1e-3), (1.0, 1e-3), (1e3, 1e-3))


@pytest.mark.parametrize("name", PAIRS)
def test_no_offset_spoils_output_gradients_or_statistics(name: str) -> None:
    run = runner(PAIRS[name].ours)
    for mean in MEANS:
        found = errors(PAIRS[name], run, *data(mean, 1.0), "float32")
        assert found["output"].ours <= OFFSET_ERROR, (mean, found["output"])
        assert above(found, OFFSET_ERROR) == set(), (mean, found)
        assert worse_than_torch(found) == set(), (mean, found)
    for mean, std in SMALL:
        found = errors(PAIRS[name], run, *data(mean, std), "float32")
        assert worse_than_torch(found) == set(), (mean, std, found)


@pytest.mark.parametrize("name", PAIRS)
def test_in_bfloat16_no_norm_is_worse_than_torchs(name: str) -> None:
    run = runner(PAIRS[name].ours)
    for mean, std in [*((mean, 1.0) for mean in MEANS), *SMALL]:
        found = errors(PAIRS[name], run, *data(mean, std), "bfloat16")
        assert worse_than_torch(found) == set(), (mean, std, found)


class OnePass(norms.BatchNorm):
    """The mean of squares minus the square of the mean."""

    def center(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = jnp.mean(x, (0, 1, 2), keepdims=True)
        return x - mean, jnp.maximum(jnp.mean(x * x, (0, 1, 2)) - jnp.square(mean[0, 0, 0]), 0)

    def __call__(self, x: jax.Array) -> jax.Array:
        y, var = self.center(x)
        self.mean[...] = 0.1 * jnp.mean(x, (0, 1, 2))
        rows = x.size // x.shape[-1]
        self.var[...] = 0.9 + 0.1 * var * rows / (rows - 1)
        scale, bias = (p.reshape(1, 1, 1, -1) for p in (self.scale[...], self.bias[...]))
        return y / jnp.sqrt(var + EPS).reshape(1, 1, 1, -1) * scale + bias


class Uncorrected(OnePass):
    """Two passes, without the mean of what the first mean left over."""

    def center(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = x - jnp.mean(x, (0, 1, 2), keepdims=True)
        return y, jnp.mean(y * y, (0, 1, 2))


class Joined(OnePass):
    """Both parts of the mean are added before they are subtracted: x - (m + c)."""

    def center(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shift = jax.lax.stop_gradient(jnp.mean(x, (0, 1, 2), keepdims=True))
        y = x - (shift + jnp.mean(x - shift, (0, 1, 2), keepdims=True))
        return y, jnp.mean(y * y, (0, 1, 2))


BY_ALL = {"output", "grad input", "grad weight"}


@pytest.mark.parametrize(
    ("planted", "caught", "worse"),
    [
        (OnePass, {*BY_ALL, "running_var"}, {*BY_ALL, "running_var"}),
        (Uncorrected, {*BY_ALL}, set()),
        (Joined, {*BY_ALL}, set()),
    ],
)
def test_plain_variances_are_caught_at_an_offset_alone(
    planted: type[nnx.Module], caught: set[str], worse: set[str]
) -> None:
    """What PyTorch does itself is no worse than PyTorch: the other bound is what catches it."""
    pair, run = PAIRS["batch"], runner(lambda: planted(32))
    near = errors(pair, run, *data(0.0, 1.0), "float32")
    assert (above(near, OFFSET_ERROR), worse_than_torch(near)) == (set(), set())
    far = errors(pair, run, *data(1e4, 1.0), "float32")
    assert caught <= above(far, OFFSET_ERROR)
    assert worse <= worse_than_torch(far)


def test_nan_is_worse_than_torch() -> None:
    run = runner(PAIRS["batch"].ours)
    x, g = data(0.0, 1.0)
    found = errors(
        PAIRS["batch"], lambda x, g: {n: a * jnp.nan for n, a in run(x, g).items()}, x, g, "float32"
    )
    assert worse_than_torch(found) == above(found, 1.0) == set(found)


ROUGH = np.random.default_rng(2).normal(0, 1, SHAPE)
# Which values PyTorch takes without NaN, at least in these norms.
EXTREME = {
    "a constant of 1e4": (np.full(SHAPE, 1e4), PAIRS.keys()),
    "neighbours of 1": (1 + np.finfo(np.float32).eps * np.round(ROUGH), PAIRS.keys()),
    "neighbours of 1e4": (1e4 + np.spacing(np.float32(1e4)) * np.round(ROUGH), PAIRS.keys()),
    "denormal": (1e-40 * ROUGH, PAIRS.keys()),
    "a square below the smallest": (1e-25 * ROUGH, PAIRS.keys()),
    "a square near the largest": (1e18 * ROUGH, PAIRS.keys()),
    "a square above the largest": (1e30 * ROUGH, ("batch", "instance")),
    "a constant of 1e30": (np.full(SHAPE, 1e30), ("batch", "instance")),
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_values_are_finite_where_torchs_are(name: str) -> None:
    """A negative variance would show as NaN; above 1e19 a variance in float32 is infinite."""
    x, g = EXTREME[name][0].astype(np.float32), data(0.0, 1.0)[1].astype(np.float32)
    for kind in EXTREME[name][1]:
        theirs = torch_finds(PAIRS[kind], torch.tensor(x), torch.tensor(g))
        ours = runner(PAIRS[kind].ours)(jnp.asarray(x), jnp.asarray(g))
        for quantity in ("output", "grad input", "grad weight"):
            assert np.isfinite(theirs[quantity]).all(), (kind, quantity)
            assert np.isfinite(ours[quantity]).all(), (kind, quantity)


@pytest.mark.parametrize("name", ["neighbours of 1", "neighbours of 1e4", "a constant of 1e4"])
@pytest.mark.parametrize("kind", PAIRS)
def test_values_a_few_bits_apart_are_normalised_exactly(name: str, kind: str) -> None:
    run = runner(PAIRS[kind].ours)
    found = errors(PAIRS[kind], run, EXTREME[name][0], data(0.0, 1.0)[1], "float32")
    assert worse_than_torch(found) == set(), found
    assert found["output"].ours <= OFFSET_ERROR


SETS = {"batch": (0, 1, 2), "layer": (3, 4), "group": (1, 2, 4), "instance": (1, 2)}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_constant_gives_the_centred_cotangent_and_no_scale_gradient(kind: str) -> None:
    """With x - mean = 0 it is (scale g - mean of it) / sqrt(eps): 316 times the cotangent."""
    g, scale = data(0.0, 1.0)[1].astype(np.float32), values(32, seed=3).astype(np.float32)
    term = (g.astype(np.float64) * scale).reshape(16, 8, 8, 4, 8)
    exact = ((term - term.mean(SETS[kind], keepdims=True)) / np.sqrt(EPS)).reshape(SHAPE)

    def scaled() -> nnx.Module:
        layer = PAIRS[kind].ours()
        layer.scale[...] = jnp.asarray(scale)
        return layer

    run = runner(scaled)
    for constant in (0.0, 3.0, 1234.5, 1e4):
        found = run(jnp.full(SHAPE, constant, jnp.float32), jnp.asarray(g))
        magnitude = np.abs(term).max() / np.sqrt(EPS)
        # Eight roundings on the way, as many as bits in the number of blocks that are added.
        bound = 8 * np.finfo(np.float32).eps * magnitude
        assert np.abs(np.asarray(found["grad input"], np.float64) - exact).max() <= bound
        np.testing.assert_array_equal(found["grad weight"], np.zeros(32, np.float32))


@pytest.mark.parametrize("kind", PAIRS)
def test_small_deviations_are_divided_by_torchs_eps(kind: str) -> None:
    """At std 1e-3 eps is 10 times the variance: Flax's 1e-6 would give 2.3 times the output."""
    run = runner(PAIRS[kind].ours)
    found = errors(PAIRS[kind], run, *data(3.0, 1e-3), "float32")["output"]
    # x - mean is exact to eps * std here, so the error is in eps of the output's own size.
    assert found.ours <= 8 * found.eps * found.size


def evaluated(mean: np.ndarray, var: np.ndarray, x: jax.Array) -> jax.Array:
    layer = norms.BatchNorm(len(mean))
    layer.mean[...], layer.var[...] = jnp.asarray(mean), jnp.asarray(var)
    layer.eval()
    return layer(x)


def rounded(mean: np.ndarray, var: np.ndarray, x: jax.Array) -> jax.Array:
    """A fault: the statistics pass through bfloat16."""
    low = (np.asarray(jnp.asarray(a, x.dtype), np.float32) for a in (mean, var))
    return evaluated(*low, x)


@pytest.mark.parametrize(("evaluate", "right"), [(evaluated, True), (rounded, False)])
def test_evaluation_in_bfloat16_is_as_accurate_as_torchs(
    evaluate: Callable[..., jax.Array], right: bool
) -> None:
    """Mean 1000.3 and variance 1e-4: as bfloat16 the mean would be 1000, 30 deviations off."""
    mean, var = np.float32([1000.3, 999.1, 1002.0]), np.full(3, 1e-4, np.float32)
    x = torch.tensor(values(16, 3, offset=1e3, scale=8.0)).bfloat16()
    x[0] = 1000
    theirs = torch.nn.functional.batch_norm(x, torch.tensor(mean), torch.tensor(var))
    y = evaluate(mean, var, jnp.asarray(x.float().numpy(), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    exact = (x.double().numpy() - mean.astype(float)) / np.sqrt(var.astype(float) + EPS)
    ours, other = (
        np.abs(np.asarray(side, np.float64) - exact) for side in (y, theirs.double().numpy())
    )
    # An output's own rounding is half an eps of it.
    assert bool((ours <= np.maximum(other, jnp.finfo(y.dtype).eps * np.abs(exact))).all()) == right
    assert bool(ours.max() <= other.max()) == right
