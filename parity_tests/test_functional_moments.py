"""Moments against loops and closed forms in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from flaxstab import functional
from parity_tests.support.cases import values
from parity_tests.support.layers import OFFSET_ERROR, assert_same

DEVICES = 8
ROWS = 6
CHANNELS = 3
# How many rows of its six every device keeps: none, one, some, all.
KEPT = (0, 1, 2, 6, 6, 3, 0, 5)


def kept_rows() -> np.ndarray:
    """Booleans (devices, rows, channels) of which device i keeps ``KEPT[i]`` rows."""
    kept = np.arange(ROWS) < np.array(KEPT)[:, None]
    return np.broadcast_to(kept[..., None], (DEVICES, ROWS, CHANNELS))


def by_loop(x: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, biased variance and count of the kept values of each column of (rows, channels)."""
    columns = [x[where[:, c], c] for c in range(x.shape[1])]
    means = [c.mean() for c in columns]
    variances = [((c - m) ** 2).mean() for c, m in zip(columns, means, strict=True)]
    return np.array(means), np.array(variances), np.array([float(len(c)) for c in columns])


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), (0, 1, 2), (1, 2, 3)])
def test_moments_are_mean_and_biased_variance(axes: tuple[int, ...]) -> None:
    x = values(3, 4, 5, 2)
    with jax.enable_x64(True):
        found = functional.moments(x, axes)
        assert_same(found.mean, x.mean(axes, keepdims=True))
        assert_same(found.var, x.var(axes, keepdims=True))
        centred = x - x.mean(axes, keepdims=True)
        assert_same(found.center(x), centred, size=np.abs(x).max())
    assert found.size == np.prod([x.shape[a] for a in axes])


def test_moments_count_only_what_where_keeps() -> None:
    x, where = values(7, CHANNELS), values(7, CHANNELS, seed=1, offset=0) > 0
    mean, var, count = by_loop(x, where)
    with jax.enable_x64(True):
        found = functional.moments(x, (0,), where=where)
        assert_same(found.mean[0], mean)
        assert_same(found.var[0], var)
        assert_same(found.size[0], count)


def test_moments_ignore_nan_where_nothing_is_kept() -> None:
    x, where = values(7, CHANNELS), values(7, CHANNELS, seed=1, offset=0) > 0
    mean, var, _ = by_loop(x, where)
    with jax.enable_x64(True):
        found = functional.moments(np.where(where, x, np.nan), (0,), where=where)
        assert_same(found.mean[0], mean)
        assert_same(found.var[0], var)


def test_where_broadcasts() -> None:
    x, where = values(7, CHANNELS), np.arange(7)[:, None] < 5
    with jax.enable_x64(True):
        found = functional.moments(x, (0,), where=where)
        assert_same(found.var[0], x[:5].var(0))


def test_moments_of_nothing_are_zero_and_finite() -> None:
    found = functional.moments(np.float32(values(4, 2)), (0,), where=np.zeros((4, 2), bool))
    np.testing.assert_array_equal([found.mean[0], found.var[0], found.size[0]], np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32")],
)
def test_moments_run_in_float32_or_wider(given: str, expected: object) -> None:
    found = functional.moments(jnp.asarray(values(4, 2), given), (0,))
    assert {part.dtype.name for part in found[:3]} == {expected}


def test_moments_of_bfloat16_add_up_beyond_its_eight_bits() -> None:
    """256 ones in bfloat16 arithmetic stay 256 when another is added."""
    found = functional.moments(jnp.ones((1000, 1), jnp.bfloat16), (0,))
    assert (found.mean.item(), found.var.item()) == (1.0, 0.0)


def _mesh() -> object:
    return jax.make_mesh((DEVICES,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))


def _spread(function: Callable[..., object], over: str, *arrays: jax.Array) -> object:
    """Runs a function of (rows, channels) on eight slices under vmap or on eight devices."""
    if over == "vmap":
        return jax.vmap(function, axis_name="devices")(*arrays)
    spec = PartitionSpec("devices")

    def one(*local: jax.Array) -> object:
        return jax.tree.map(lambda a: a[None], function(*(a[0] for a in local)))

    return jax.jit(jax.shard_map(one, mesh=_mesh(), in_specs=spec, out_specs=spec))(*arrays)


@pytest.mark.parametrize("over", ["vmap", "shard_map"])
def test_combined_moments_are_those_of_the_concatenated_batch(over: str) -> None:
    x, where = values(DEVICES, ROWS, CHANNELS), kept_rows()
    mean, var, count = by_loop(x.reshape(-1, CHANNELS), where.reshape(-1, CHANNELS))

    def local(x: jax.Array, where: jax.Array) -> object:
        found = functional.moments(x, (0,), where=where, axis_name="devices")
        return found.mean[0], found.var[0], jnp.broadcast_to(found.size, found.var.shape)[0]

    with jax.enable_x64(True):
        means, variances, counts = _spread(local, over, x, where)
    for device in range(DEVICES):
        assert_same(means[device], mean)
        assert_same(variances[device], var)
        assert_same(counts[device], count)


@pytest.mark.parametrize("over", ["vmap", "shard_map"])
def test_combined_moments_without_where_count_every_value(over: str) -> None:
    x = values(DEVICES, ROWS, CHANNELS)

    def local(x: jax.Array) -> object:
        found = functional.moments(x, (0,), axis_name="devices")
        return found.var[0], jnp.asarray(found.size)

    with jax.enable_x64(True):
        variances, counts = _spread(local, over, x)
    assert_same(variances[0], x.reshape(-1, CHANNELS).var(0))
    assert set(counts.tolist()) == {DEVICES * ROWS}


def test_combined_moments_are_known_to_be_equal_on_all_devices() -> None:
    """shard_map refuses an output without the axis unless it can prove that."""

    def local(x: jax.Array) -> object:
        found = functional.moments(x[0], (0,), axis_name="devices")
        return found.shift, found.residual, found.var

    in_specs, out_specs = PartitionSpec("devices"), PartitionSpec()
    x = values(DEVICES, ROWS, CHANNELS)
    run = jax.shard_map(local, mesh=_mesh(), in_specs=in_specs, out_specs=out_specs)
    with jax.enable_x64(True):
        assert_same(jax.jit(run)(x)[2][0], x.reshape(-1, CHANNELS).var(0))


@pytest.mark.parametrize("over", ["vmap", "shard_map"])
def test_combined_moments_have_the_gradient_of_the_concatenated_batch(over: str) -> None:
    x, where = values(DEVICES, ROWS, CHANNELS), kept_rows()
    weight = values(DEVICES, ROWS, CHANNELS, seed=1)
    flat, kept, w = (a.reshape(-1, CHANNELS) for a in (x, where, weight))
    mean, _, count = by_loop(flat, kept)
    # loss = sum(w * (x - mean)) + DEVICES * sum(var), kept values only in mean and var
    gradient = w - kept * w.sum(0) / count + DEVICES * kept * 2 * (flat - mean) / count

    def local(x: jax.Array, where: jax.Array, weight: np.ndarray | None) -> object:
        found = functional.moments(x, (0,), where=where, axis_name="devices")
        return jnp.sum(weight * found.center(x)) + jnp.sum(found.var)

    with jax.enable_x64(True):
        found = jax.grad(lambda x: jnp.sum(_spread(local, over, x, where, weight)))(jnp.asarray(x))
        assert_same(found.reshape(-1, CHANNELS), gradient, size=np.abs(w).sum())


@pytest.mark.parametrize("mean", [0.0, 1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("how", ["plain", "where", "axis"])
def test_an_offset_spoils_neither_centre_nor_variance(mean: float, how: str) -> None:
    x = values(DEVICES, 512, 4, offset=mean, scale=1.0).astype("float32")
    flat = x.reshape(-1, 4).astype("float64")
    if how == "axis":
        found = jax.vmap(
            lambda x: functional.moments(x, (0,), axis_name="devices"), axis_name="devices"
        )(x)
        centred, var = found.center(jnp.asarray(x)), found.var[0, 0]
    else:
        where = np.ones(x.shape, bool) if how == "where" else None
        found = functional.moments(x, (0, 1), where=where)
        centred, var = found.center(jnp.asarray(x)), found.var[0, 0]
    error = np.abs(np.reshape(centred, (-1, 4)) - (flat - flat.mean(0))).max()
    assert error <= OFFSET_ERROR
    assert np.abs(var - flat.var(0)).max() <= OFFSET_ERROR


def _loss(x: jax.Array, w: jax.Array, where: jax.Array = None) -> object:
    """Sum of w * (x - mean) plus the cubes of the variances."""
    found = functional.moments(x, (0,), where=where)
    return jnp.sum(w * found.center(x)) + jnp.sum(found.var**3)


def _gradient(x: jax.Array, w: jax.Array, where: jax.Array) -> object:
    mean, var, n = by_loop(x, where)
    return w - where * w.sum(0) / n + where * 3 * var**2 * 2 * (x - mean) / n


def _second(x: jax.Array, where: jax.Array, v: jax.Array) -> object:
    """The Hessian of ``_loss`` times v: var' = 2 (x - mean) / n, var'' = 2 / n (I - 1 1' / n)."""
    mean, var, n = by_loop(x, where)
    first = where * 2 * (x - mean) / n
    along = (first * v).sum(0)
    v_mean = (where * v).sum(0) / n
    return 6 * var * first * along + 3 * var**2 * where * 2 * (v - v_mean) / n


@pytest.mark.parametrize("masked", [False, True])
def test_moments_have_the_exact_gradient(masked: bool) -> None:
    x, w, v = (values(9, CHANNELS, seed=s) for s in range(3))
    where = values(9, CHANNELS, seed=4, offset=0) > 0 if masked else np.ones(x.shape, bool)
    given = where if masked else None
    gradient, second = _gradient(x, w, where), _second(x, where, v)
    with jax.enable_x64(True):

        def loss(x: jax.Array) -> object:
            return _loss(x, w, given)

        a, b = jnp.asarray(x), jnp.asarray(v)
        size = np.abs(gradient).max() * x.size
        assert_same(jax.grad(loss)(a), gradient, size)
        assert_same(jax.jvp(loss, (a,), (b,))[1], np.sum(gradient * v), size * np.abs(v).max())
        curvature = np.abs(second).max() * x.size
        assert_same(jax.jvp(jax.grad(loss), (a,), (b,))[1], second, curvature)
        reverse = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) * b))(a)
        assert_same(reverse, second, curvature)


def test_the_gradient_survives_an_offset_in_float32() -> None:
    """The gradient of var is 2 (x - mean) / n, whose error is the centre's."""
    x = values(512, 4, offset=1e4, scale=1.0).astype("float32")
    exact = x.astype("float64") - x.astype("float64").mean(0)
    found = jax.grad(lambda x: jnp.sum(functional.moments(x, (0,)).var))(jnp.asarray(x))
    assert np.abs(np.asarray(found, "float64") * 512 / 2 - exact).max() <= OFFSET_ERROR


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("space", [(), (5,), (4, 3)])
def test_group_moments_are_those_of_every_sample_and_group(
    groups: int, space: tuple[int, ...]
) -> None:
    x = values(2, *space, 6)
    with jax.enable_x64(True):
        found = functional.group_moments(x, groups)
        width = 6 // groups
        for n in range(2):
            for c in range(6):
                start = c // width * width
                group = x[n, ..., start : start + width]
                assert_same(found.mean[n, ..., c].ravel(), group.mean()[None])
                assert_same(found.var[n, ..., c].ravel(), group.var()[None])
                assert found.size == group.size


@pytest.mark.parametrize("groups", [0, 4, 7])
def test_groups_must_divide_the_channels(groups: int) -> None:
    with pytest.raises(ValueError, match=f"must divide the channels, got num_groups={groups}"):
        functional.group_moments(jnp.ones((2, 6)), groups)
