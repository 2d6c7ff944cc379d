"""Norms at their edges: nothing to normalise, one value, a batch of ones on many devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from flaxstab import functional, norms
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same
from parity_tests.support.norm_grid import Twin, differences, run_ours, run_torch, twin

C = 4
EMPTY = {"affine": True, "track_running_stats": True}


def empty_twins(rows: int) -> dict[str, Twin]:
    """Those whose PyTorch counterpart takes an empty input."""

    def make(ours: type[nnx.Module], theirs: type[torch.nn.Module], *args: object) -> Twin:
        options = EMPTY if ours is norms.InstanceNorm else {}
        return twin(ours, theirs, *args, groups=lambda _: [], **options)

    found = {
        "batch": make(norms.BatchNorm, torch.nn.BatchNorm1d, C),
        "group": make(norms.GroupNorm, torch.nn.GroupNorm, 2, C),
        "instance": make(norms.InstanceNorm, torch.nn.InstanceNorm1d, C),
    }
    return {n: t for n, t in found.items() if rows or n != "instance"}


@pytest.mark.parametrize("shape", [(2, 0, C), (0, 3, C), (0, 0, C)], ids=str)
def test_an_empty_input_changes_what_it_changes_in_torch(shape: tuple[int, ...]) -> None:
    """Ten steps: BatchNorm counts them, no statistic moves and no gradient is anything but 0."""
    xs = np.zeros((10, *shape))
    with jax.enable_x64(True):
        cases = empty_twins(shape[0])
        theirs = [run_torch(case, xs, xs[0]) for case in cases.values()]
        ours = run_ours(list(cases.values()), xs, xs[0])
    for name, own, other in zip(cases, ours, theirs, strict=True):
        if np.isnan(other["grad weight"]).any():
            # Of no space at all PyTorch's GroupNorm makes NaN.
            assert (name, shape) == ("group", (2, 0, C))
            other["grad weight"] = np.zeros(C)
        assert differences(own, other, {}) == [], name


def test_an_empty_batch_leaves_instance_norms_statistics_which_torchs_makes_nan() -> None:
    theirs = torch.nn.InstanceNorm1d(C, track_running_stats=True)
    theirs(torch.zeros(0, C, 3))
    assert theirs.running_mean.isnan().all()
    layer = norms.InstanceNorm(C, track_running_stats=True)
    assert layer(jnp.zeros((0, 3, C))).shape == (0, 3, C)
    np.testing.assert_array_equal(layer.mean[...], np.zeros(C))
    np.testing.assert_array_equal(layer.var[...], np.ones(C))


def test_an_empty_batch_counts_once_for_ghosts() -> None:
    layer = norms.GhostBatchNorm(C, 2)
    layer(jnp.zeros((0, C)))
    assert layer.count[...] == 1


def spread(over: str, layer: nnx.Module, x: jax.Array) -> tuple[jax.Array, nnx.State]:
    """Runs a layer on the slices of an array of (devices, rows, C): the outputs, one state."""
    graph, state = nnx.split(layer)

    def local(state: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
        merged = nnx.merge(graph, state, copy=True)
        return merged(x), nnx.state(merged, nnx.BatchStat)

    if over == "vmap":
        return jax.vmap(local, (None, 0), (0, None), axis_name="batch")(state, x)
    mesh = jax.make_mesh((len(x),), ("batch",), axis_types=(AxisType.Auto,))
    split, same = PartitionSpec("batch"), PartitionSpec()

    def one(state: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
        y, after = local(state, x[0])
        return y[None], after

    run = jax.shard_map(one, mesh=mesh, in_specs=(same, split), out_specs=(split, same))
    return jax.jit(run)(state, x)


@pytest.mark.parametrize("over", ["vmap", "shard_map"])
def test_one_value_on_each_of_four_devices_is_a_batch_of_four(over: str) -> None:
    x = values(4, 1, C)
    theirs = torch.nn.BatchNorm1d(C).double()
    expected = theirs(torch.tensor(x[:, 0]))
    with jax.enable_x64(True):
        layer = norms.BatchNorm(C, axis_name="batch", param_dtype=jnp.float64)
        y, state = spread(over, layer, jnp.asarray(x))
        assert_same(y[:, 0], expected, np.abs(x).max())
        assert_same(state["mean"][...], theirs.running_mean)
        assert_same(state["var"][...], theirs.running_var)
    assert state["count"][...] == 1


def test_one_value_on_one_device_is_refused_also_with_an_axis() -> None:
    layer = norms.BatchNorm(C, axis_name="batch")
    with pytest.raises(ValueError, match="more than 1 value per channel in training"):
        spread("vmap", layer, jnp.ones((1, 1, C)))


@pytest.mark.parametrize(
    "make",
    [
        norms.BatchNorm,
        lambda c: norms.GhostBatchNorm(c, 3),
        lambda c: norms.InstanceNorm(c, track_running_stats=True),
    ],
)
def test_a_call_may_override_the_mode(make: Callable[[int], nnx.Module]) -> None:
    x = jnp.asarray(values(5, 3, C), jnp.float32)
    training, evaluating, layer = make(C), make(C), make(C)
    trained = training(x)
    evaluating.eval()
    evaluated = evaluating(x)
    assert not np.array_equal(trained, evaluated)
    np.testing.assert_array_equal(layer(x, use_running_average=True), evaluated)
    np.testing.assert_array_equal(layer.mean[...], np.zeros(C))
    assert layer.count[...] == 0
    layer.eval()
    np.testing.assert_array_equal(layer(x, use_running_average=False), trained)
    np.testing.assert_array_equal(layer.mean[...], training.mean[...])
    assert layer.count[...] == training.count[...]


@pytest.mark.parametrize(
    "make",
    [
        lambda c: norms.BatchNorm(c, track_running_stats=False),
        lambda c: norms.InstanceNorm(c, affine=True),
    ],
)
def test_without_statistics_evaluation_is_training(make: Callable[[int], nnx.Module]) -> None:
    x = jnp.asarray(values(5, 3, C), jnp.float32)
    layer = make(C)
    assert jax.tree.leaves(nnx.state(layer, nnx.BatchStat)) == []
    trained = layer(x)
    layer.eval()
    np.testing.assert_array_equal(layer(x), trained)
    np.testing.assert_array_equal(layer(x, use_running_average=True), trained)
    with pytest.raises(ValueError, match="more than 1"):
        layer(x[:1, :1])


def test_more_ghosts_make_no_longer_program() -> None:
    statistics = functional.RunningStats(jnp.zeros(C), jnp.ones(C), jnp.zeros((), jnp.int32))

    def lines(rows: int) -> int:
        run = lambda x: functional.ghost_batch_norm(x, 2, running=statistics)  # noqa: E731
        return len(jax.jit(run).lower(jnp.zeros((rows, C))).as_text().splitlines())

    assert lines(64) == lines(8)


def test_a_traced_eps_is_refused() -> None:
    run = jax.jit(lambda eps: functional.layer_norm(jnp.ones((2, C)), (C,), eps=eps))
    with pytest.raises(ValueError, match=r"eps must be a number, got .*it cannot be traced"):
        run(1e-5)
