"""Which values a batch's statistics come from: masks, devices, sharded arrays; and how exact."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flaxstab import functional, norms
from parity_tests.support.cases import values
from parity_tests.support.layers import OFFSET_ERROR, assert_same

C = 4
DEVICES = 8
EPS = 1e-5
MOMENTUM = 0.1


def double(
    make: Callable[..., object] = norms.BatchNorm, *args: object, **options: object
) -> object:
    """A layer with float64 parameters that are not the defaults."""
    layer = make(*(args or (C,)), param_dtype=jnp.float64, **options)
    layer.scale[...], layer.bias[...] = values(C, seed=8), values(C, seed=9)
    return layer


def expected(x: jax.Array, kept: int) -> object:
    """Output and running statistics after one step, from the kept values of each column."""
    columns = [x[kept[:, c], c] for c in range(C)]
    mean, var, unbiased = (
        np.array([f(c) for c in columns]) for f in (np.mean, np.var, lambda c: np.var(c, ddof=1))
    )
    y = (x - mean) / np.sqrt(var + EPS) * values(C, seed=8) + values(C, seed=9)
    return y, MOMENTUM * mean, 1 - MOMENTUM + MOMENTUM * unbiased


def test_a_mask_of_true_changes_nothing() -> None:
    x = values(5, 3, C)
    with jax.enable_x64(True):
        plain, masked = double(), double()
        assert_same(masked(jnp.asarray(x), mask=np.ones((5, 3, 1), bool)), plain(jnp.asarray(x)))
        assert_same(masked.mean[...], plain.mean[...])
        assert_same(masked.var[...], plain.var[...])
    assert masked.count[...] == plain.count[...]


def test_statistics_come_from_the_kept_values_and_every_value_is_normalised() -> None:
    x, mask = values(6, 2, C), values(6, 2, C, seed=1, offset=0) > 0
    y, mean, var = expected(x.reshape(-1, C), mask.reshape(-1, C))
    with jax.enable_x64(True):
        layer = double()
        assert_same(layer(jnp.asarray(x), mask=mask), y.reshape(x.shape))
        assert_same(layer.mean[...], mean)
        assert_same(layer.var[...], var)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kept", [0, 1])
def test_a_channel_with_fewer_than_two_kept_values_keeps_its_statistics(
    kept: int, momentum: float | None
) -> None:
    x = values(6, C)
    mask = np.ones(x.shape, bool)
    mask[kept:, 2] = False
    layer = norms.BatchNorm(C, momentum=momentum)
    layer.mean[...], layer.var[...] = jnp.full(C, 7.0), jnp.full(C, 5.0)
    y = layer(jnp.asarray(x, jnp.float32), mask=mask)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(layer.mean[...] == 7, np.arange(C) == 2)
    np.testing.assert_array_equal(layer.var[...] == 5, np.arange(C) == 2)
    assert layer.count[...] == 1


# How many rows of its six each of eight devices keeps.
KEPT = np.arange(6) < np.array([0, 1, 2, 6, 6, 3, 0, 5])[:, None]


def _mesh() -> object:
    return jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("over", ["vmap", "shard_map"])
@pytest.mark.parametrize("masked", [False, True])
def test_synchronised_statistics_are_those_of_the_whole_batch(over: str, masked: bool) -> None:
    x = values(DEVICES, 6, C)
    rows = KEPT if masked else np.ones_like(KEPT)
    mask = np.broadcast_to(rows[..., None], x.shape)
    y, mean, var = expected(x.reshape(-1, C), mask.reshape(-1, C))
    with jax.enable_x64(True):
        graph, params, stats = nnx.split(double(axis_name="batch"), nnx.Param, ...)

        def local(params: jax.Array, stats: jax.Array, x: jax.Array, mask: np.ndarray) -> object:
            layer = nnx.merge(graph, params, stats)
            out = layer(x, mask=mask if masked else None)
            return out, nnx.state(layer, nnx.BatchStat)

        if over == "vmap":
            run = jax.vmap(local, (None, None, 0, 0), (0, None), axis_name="batch")
        else:
            split, same = PartitionSpec("batch"), PartitionSpec()

            def one(params: jax.Array, stats: jax.Array, x: jax.Array, mask: np.ndarray) -> object:
                out, stats = local(params, stats, x[0], mask[0])
                return out[None], stats

            run = jax.shard_map(
                one, mesh=_mesh(), in_specs=(same, same, split, split), out_specs=(split, same)
            )
        out, stats = jax.jit(run)(params, stats, jnp.asarray(x), mask)
        assert_same(out, y.reshape(x.shape))
        assert_same(stats["mean"][...], mean)
        assert_same(stats["var"][...], var)
    assert stats["count"][...] == 1


def test_plain_jit_on_a_sharded_batch_uses_the_global_statistics() -> None:
    x = values(2 * DEVICES, C)
    y, mean, var = expected(x, np.ones(x.shape, bool))
    with jax.enable_x64(True):
        layer = double()
        sharded = jax.device_put(x, NamedSharding(_mesh(), PartitionSpec("batch")))
        assert_same(nnx.jit(lambda m, x: m(x))(layer, sharded), y)
        assert_same(layer.mean[...], mean)
        assert_same(layer.var[...], var)


# What test_norms_accuracy leaves out. The data's deviation is 1, so errors are in units of it.

MEANS = (0.0, 1e1, 1e2, 1e3, 1e4)


def one_pass(x: jax.Array, axes: tuple[int, ...]) -> object:
    mean = jnp.mean(x, axes, keepdims=True)
    var = jnp.maximum(jnp.mean(x * x, axes, keepdims=True) - mean * mean, 0)
    return (x - mean) / jnp.sqrt(var + EPS)


def two_pass(x: jax.Array, axes: tuple[int, ...]) -> object:
    mean = jnp.mean(x, axes, keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.mean((x - mean) ** 2, axes, keepdims=True) + EPS)


SHAPE = (16, 8, 8, 32)
# For each norm: the function of (*SHAPE) and the axes of a float64 array (16, 8, 8, 4, 8) it uses.
NORMS = {
    "layer over space": (norms.LayerNorm((8, 8, 32)), (1, 2, 3, 4)),
    "one group": (norms.GroupNorm(1, 32), (1, 2, 3, 4)),
    "ghost": (norms.GhostBatchNorm(32, 16), (0, 1, 2)),
    "masked batch": (lambda x: norms.BatchNorm(32)(x, mask=np.ones(SHAPE, bool)), (0, 1, 2)),
}


def output_error(norm: Callable[..., object], axes: tuple[int, ...], mean: float) -> float:
    """The largest error of a norm of float32 data against float64."""
    x = values(*SHAPE, offset=mean, scale=1.0).astype(np.float32)
    wide = x.astype(np.float64).reshape(16, 8, 8, 4, 8)
    exact = (wide - wide.mean(axes, keepdims=True)) / np.sqrt(wide.var(axes, keepdims=True) + EPS)
    return float(np.abs(np.asarray(norm(jnp.asarray(x)), np.float64) - exact.reshape(SHAPE)).max())


@pytest.mark.parametrize("name", NORMS)
def test_no_offset_spoils_a_norm(name: str) -> None:
    norm, axes = NORMS[name]
    for mean in MEANS:
        assert output_error(norm, axes, mean) <= OFFSET_ERROR, mean


@pytest.mark.parametrize("planted", [one_pass, two_pass])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 3)])
def test_the_offset_test_rejects_a_plain_variance(
    planted: Callable[..., object], axes: tuple[int, ...]
) -> None:
    wide_axes = axes if axes == (0, 1, 2) else (1, 2, 3, 4)
    assert output_error(lambda x: planted(x, axes), wide_axes, 0.0) <= OFFSET_ERROR
    assert output_error(lambda x: planted(x, axes), wide_axes, 1e4) > OFFSET_ERROR


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_running_statistics_stay_in_param_dtype(dtype: str) -> None:
    with jax.enable_x64(True):
        layer = norms.BatchNorm(C, param_dtype=dtype)
        layer(jnp.asarray(values(5, C), jnp.bfloat16))
        assert {layer.mean[...].dtype.name, layer.var[...].dtype.name} == {dtype}


def test_what_the_mask_leaves_out_reaches_neither_output_nor_gradient() -> None:
    x = values(6, C).astype(np.float32)
    mask = np.array([True, True, False, True, False, True])[:, None]
    cotangent = values(6, C, seed=1).astype(np.float32) * mask

    def gradients(padding: float) -> tuple[jax.Array, ...]:
        def loss(x: jax.Array, scale: jax.Array) -> jax.Array:
            y, _ = functional.batch_norm(x, scale, mask=jnp.asarray(mask))
            return jnp.sum(jnp.where(mask, y, 0) * cotangent)

        return jax.grad(loss, (0, 1))(jnp.where(mask, x, padding), jnp.ones(C))

    expected = gradients(0.0)
    for padding in (np.nan, np.inf, 1e30):
        for found, wanted in zip(gradients(padding), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_an_integer_dtype_is_refused_when_the_layer_is_built(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a floating-point dtype, got {name}="):
        norms.BatchNorm(C, **{name: jnp.int32})
