"""How often devices exchange numbers for batch normalisation: counted in compiled programs.

Of a stack of three layers, since XLA merges the exchanges of a single one.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flaxstab import functional
from flaxstab._typing import Array
from flaxstab.functional import RunningStats
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same

LAYERS, C = 3, 4
RUNNING = RunningStats(jnp.zeros(C), jnp.ones(C), jnp.zeros((), jnp.int32))
Layer = Callable[[Array, Array, Array, str | None], tuple[Array, RunningStats]]


def plain(x: Array, scale: Array, bias: Array, axis_name: str | None) -> tuple[Array, RunningStats]:
    y, running = functional.batch_norm(x, scale, bias, RUNNING, axis_name=axis_name)
    assert running is not None
    return jax.nn.relu(y), running


def fused(x: Array, scale: Array, bias: Array, axis_name: str | None) -> tuple[Array, RunningStats]:
    norm = lambda x: functional.batch_norm(x, scale, bias, RUNNING, axis_name=axis_name)  # noqa: E731
    y, running = functional.norm_act(norm, jax.nn.relu, x)
    assert running is not None
    return y, running


def twice(x: Array, scale: Array, bias: Array, axis_name: str | None) -> tuple[Array, RunningStats]:
    """Exchanges the mean, then the variance, and leaves the derivative to JAX."""
    assert axis_name is not None
    axes = tuple(range(x.ndim - 1))
    mean = jax.lax.pmean(jnp.mean(x, axes, keepdims=True), axis_name)
    var = jax.lax.pmean(jnp.mean((x - mean) ** 2, axes, keepdims=True), axis_name)
    found = functional.Moments(mean, jnp.zeros_like(mean), var, 1)
    y = functional.normalize(x, found, scale, bias, eps=1e-5)
    return jax.nn.relu(y), RUNNING._replace(var=var[0, 0, 0])


def stack(
    layer: Layer, x: Array, parameters: Array, axis_name: str | None
) -> tuple[Array, list[RunningStats]]:
    """Three layers, between which the values change; cubed, or the cotangent would be constant."""
    statistics = []
    for matrix, scale, bias in parameters:
        x, running = layer(jnp.dot(x, matrix), scale[0], bias[0], axis_name)
        statistics.append(running)
    return jnp.sum(x**3), statistics


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))


def exchanges(layer: Layer, *, named: bool, backward: bool) -> int:
    """Counts the all-reduces of the stack on a batch spread over eight devices.

    The gradient is that of the input, so that none belongs to the parameters.
    """
    over, everywhere = PartitionSpec("devices"), PartitionSpec()
    shape = (16, 3, 3, C)
    parameters = jnp.asarray(values(LAYERS, 3, C, C), jnp.float32)
    axis_name = "devices" if named else None

    def forward(x: Array) -> object:
        return stack(layer, x, parameters, axis_name)[1]

    def both(x: Array) -> object:
        return jax.grad(lambda x: stack(layer, x, parameters, axis_name), has_aux=True)(x)

    run = both if backward else forward
    if named:
        outputs = (over, everywhere) if backward else everywhere
        run = jax.shard_map(run, mesh=mesh(), in_specs=over, out_specs=outputs)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh(), over))
    program = jax.jit(run).lower(x).compile().as_text()
    return len(re.findall(r" all-reduce(?:-start)?\(", program))


@pytest.mark.parametrize("layer", [plain, fused])
def test_synchronised_batch_norm_exchanges_once_forward_and_once_backward(layer: Layer) -> None:
    assert exchanges(layer, named=True, backward=False) == LAYERS
    assert exchanges(layer, named=True, backward=True) == 2 * LAYERS


@pytest.mark.parametrize("layer", [plain, fused])
def test_batch_norm_on_a_sharded_batch_exchanges_three_times(layer: Layer) -> None:
    assert exchanges(layer, named=False, backward=False) == 2 * LAYERS
    assert exchanges(layer, named=False, backward=True) <= 3 * LAYERS


def test_the_parameters_gradients_cost_one_exchange_in_all() -> None:
    """A training step: their sums wait for each other and leave together."""
    over, everywhere = PartitionSpec("devices"), PartitionSpec()
    run = jax.shard_map(
        lambda x, parameters: jax.grad(
            lambda p: stack(plain, x, p, "devices"), has_aux=True
        )(parameters),
        mesh=mesh(), in_specs=(over, everywhere), out_specs=everywhere,
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((16, 3, 3, C), jnp.float32, sharding=NamedSharding(mesh(), over))
    program = jax.jit(run).lower(x, jnp.ones((LAYERS, 3, C, C))).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) <= 2 * LAYERS + 1


TRANSFORMS: dict[str, Callable[[Callable[..., Array]], Callable[..., Array]]] = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=1)[0],
    "grad": lambda f: jax.grad(lambda x: jnp.sum(f(x) ** 2)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_mapped_layer_is_differentiated_after_any_transformation(name: str) -> None:
    """JAX differentiates what was traced inside of vmap, where the axis is no longer known."""
    jax.clear_caches()  # it remembers derivatives, also those that it could not take anew
    x = values(4, 3, C)
    layer = jax.vmap(
        lambda x: functional.batch_norm(x, axis_name="devices")[0], axis_name="devices"
    )
    whole = lambda x: functional.batch_norm(x.reshape(-1, C))[0].reshape(x.shape)  # noqa: E731
    transform = TRANSFORMS[name]
    with jax.enable_x64(True):
        found, expected = (
            jax.grad(lambda x, f=f: jnp.sum(transform(f)(x) ** 3))(jnp.asarray(x))
            for f in (layer, whole)
        )
        assert_same(found, expected, size=float(x.size))


def test_the_count_notices_statistics_that_are_exchanged_apart() -> None:
    assert exchanges(twice, named=True, backward=False) > LAYERS
    assert exchanges(twice, named=True, backward=True) > 2 * LAYERS


def per_sample(x: Array, *affine: object) -> tuple[Array, RunningStats]:
    del affine
    return functional.group_norm(functional.layer_norm(x, (C,)), 2), RUNNING


def test_norms_within_a_sample_exchange_nothing() -> None:
    def gradient(x: Array) -> Array:
        parameters = jnp.asarray(values(LAYERS, 3, C, C), jnp.float32)
        return jax.grad(lambda x: stack(per_sample, x, parameters, None)[0])(x)

    sharding = NamedSharding(mesh(), PartitionSpec("devices"))
    x = jax.ShapeDtypeStruct((16, 3, 3, C), jnp.float32, sharding=sharding)
    program = jax.jit(gradient, out_shardings=sharding).lower(x).compile().as_text()
    assert not re.search(r"all-(reduce|gather|to-all)", program)


def test_gradients_of_uneven_shards_are_those_of_the_concatenated_batch() -> None:
    """Device i holds i + 1 of at most 8 rows; the rest is masked out."""
    x, cotangent = values(8, 8, C), values(8, 8, C, seed=1, offset=0.5)
    mask = np.tril(np.ones((8, 8), bool))[..., None]
    scale, bias = values(C, seed=2), values(C, seed=3)

    def loss(x: Array, scale: Array, bias: Array, mask: Array, cotangent: Array) -> Array:
        y, _ = functional.batch_norm(x, scale, bias, mask=mask, axis_name="devices")
        return jnp.sum(jnp.where(mask, y * cotangent, 0))

    def spread(x: Array, scale: Array, bias: Array) -> Array:
        over, everywhere = PartitionSpec("devices"), PartitionSpec()
        run = jax.shard_map(
            lambda x, scale, bias, *rest: jax.lax.psum(loss(x, scale, bias, *rest), "devices"),
            mesh=mesh(), in_specs=(over, everywhere, everywhere, over, over), out_specs=everywhere,
        )  # fmt: skip
        return run(*(a.reshape(-1, C) for a in (x,)), scale, bias, mask.reshape(-1, 1),
                   cotangent.reshape(-1, C))  # fmt: skip

    def mapped(x: Array, scale: Array, bias: Array) -> Array:
        one = lambda x, *rest: loss(x, scale, bias, *rest)  # noqa: E731
        return jnp.sum(jax.vmap(one, axis_name="devices")(x, mask, cotangent))

    def whole(x: Array, scale: Array, bias: Array) -> Array:
        kept = np.broadcast_to(mask, x.shape)[..., 0]
        y, _ = functional.batch_norm(x[kept], scale, bias)
        return jnp.sum(y * cotangent[kept])

    with jax.enable_x64(True):
        arrays = tuple(map(jnp.asarray, (x, scale, bias)))
        expected = jax.grad(whole, argnums=(0, 1, 2))(*arrays)
        for found in (spread, mapped):
            gradients = jax.jit(jax.grad(found, argnums=(0, 1, 2)))(*arrays)
            for ours, theirs in zip(gradients, expected, strict=True):
                assert_same(ours, theirs, size=np.abs(cotangent).sum())
