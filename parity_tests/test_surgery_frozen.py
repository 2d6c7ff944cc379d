"""Batch normalisation is frozen, unfrozen and synchronised, in stacks too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flaxstab import norms, surgery
from parity_tests.support.normed import CONVERSIONS, C, Net, X, drawn, norms_of
from parity_tests.test_contracts import equal, near
from parity_tests.test_surgery import mode

__all__ = ["mode"]  # the fixture


def arrays_of(model: nnx.Module) -> dict[tuple[object, ...], np.ndarray]:
    found = nnx.iter_graph(model, graph=True)
    return {path: np.asarray(v[...]) for path, v in found if isinstance(v, nnx.Variable)}


@pytest.mark.usefixtures("mode")
def test_a_frozen_model_computes_what_the_model_does_in_evaluation() -> None:
    model = drawn(Net())
    model.eval()
    expected = model(X)
    frozen = surgery.freeze_batch_norm(model)
    frozen.train()
    kinds = [type(layer) for layer in norms_of(frozen).values()]
    assert kinds.count(norms.FrozenBatchNorm) == 5
    near(frozen(X), expected)  # stock nnx.BatchNorm multiplies in another order
    again = surgery.freeze_batch_norm(frozen)
    equal(again(X), frozen(X))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_freezing_and_back_gives_the_same_evaluation_to_the_bit(options: dict[str, bool]) -> None:
    layer = drawn(norms.BatchNorm(C, 1e-3, 0.3, **options))
    layer.eval()
    expected = layer(X)
    frozen = surgery.freeze_batch_norm(layer)
    back = surgery.unfreeze_batch_norm(frozen, 0.3)
    equal(frozen(X), expected)
    equal(back(X), expected)  # in evaluation, as it was
    assert (back.momentum, back.eps, int(back.count[...])) == (0.3, 1e-3, 0)
    assert {type(back.scale), type(back.bias)} == {nnx.Param}
    frozen.train()
    frozen(X)
    back = surgery.unfreeze_batch_norm(frozen)
    layer.train()
    layer.momentum = 0.1
    equal(back(X), layer(X))  # in training, as train() said
    equal((back.mean[...], back.var[...]), (layer.mean[...], layer.var[...]))


@pytest.mark.usefixtures("mode")
def test_training_changes_nothing_that_is_frozen() -> None:
    model = surgery.freeze_batch_norm(drawn(Net()))
    model.train()
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
    assert set(nnx.state(model, nnx.Param)) == {"conv", "other"}

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        graph_loss = lambda p: jnp.sum(nnx.merge(graph, p, rest, copy=True)(x) ** 2)  # noqa: E731
        loss, gradients = nnx.value_and_grad(graph_loss)(params)
        optimizer.update(model, gradients)
        return loss

    before = arrays_of(model)
    assert np.isfinite(step(model, optimizer, X))
    after = arrays_of(model)
    assert len(before) == 23
    for path, old in before.items():
        assert (old != after[path]).any() == (path[0] in ("conv", "other")), path


def test_training_a_model_that_is_not_frozen_changes_it() -> None:
    """The fault that the test above must see."""
    model = drawn(Net())
    before = np.asarray(model.norm.mean[...])
    model(X)
    assert (np.asarray(model.norm.mean[...]) != before).all()
    assert "norm" in nnx.state(model, nnx.Param)


# Stacked layers.


def stack(**options: object) -> nnx.Module:
    """Three layers with a leading axis."""
    return nnx.vmap(lambda _: norms.BatchNorm(C, **options))(jnp.arange(3))


def run(layers: nnx.Module, x: jax.Array) -> jax.Array:
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def through(x: jax.Array, layer: nnx.Module) -> jax.Array:
        return layer(x)

    return through(x, layers)


@pytest.mark.parametrize(
    ("convert", "affine"), [("group", True), ("freeze", True), ("freeze", False)]
)
def test_stacked_layers_are_converted_one_by_one(convert: str, affine: bool) -> None:
    layers = drawn(stack(affine=affine))
    new = CONVERSIONS[convert](layers)
    found, x = run(new, X), X
    graph, state = nnx.split(layers)
    for n in range(3):
        layer = nnx.merge(graph, jax.tree.map(lambda leaf, n=n: leaf[n], state))
        x = CONVERSIONS[convert](layer)(x)
    near(found, x)


def test_stacked_layers_are_frozen_and_back() -> None:
    layers = drawn(stack())
    layers.eval()
    back = surgery.unfreeze_batch_norm(surgery.freeze_batch_norm(layers))
    assert back.count.shape == (3,)
    equal(run(back, X), run(layers, X))
    back.train()
    run(back, X)
    assert back.count[...].tolist() == [1, 1, 1]


def test_a_stack_that_would_break_is_refused() -> None:
    model = nnx.Dict(stages=stack())
    with pytest.raises(ValueError, match=r"'stages' BatchNorm is a stack of layers \(3,\): every"):
        surgery.replace_norms(model, lambda _: norms.GroupNorm(2, C))
    behind = nnx.vmap(lambda _: nnx.BatchNorm(C, rngs=nnx.Rngs(0)), out_axes=1)(jnp.arange(3))
    with pytest.raises(ValueError, match="stacked layers must have the stack's axes in front"):
        surgery.freeze_batch_norm(behind)


# Synchronisation.


def test_synchronised_layers_have_the_statistics_of_the_whole_batch() -> None:
    model = nnx.List(
        [drawn(norms.BatchNorm(C)), norms.GhostBatchNorm(C, 2), norms.FrozenBatchNorm(C)]
    )
    model[0].eval()
    synced = surgery.convert_sync_batch_norm(model, "data")
    assert (synced[0].axis_name, model[0].axis_name) == ("data", None)
    assert synced[0].use_running_average
    assert [type(layer) for layer in synced] == [type(layer) for layer in model]
    assert ["axis_name" in vars(layer) for layer in synced] == [True, False, False]
    local = surgery.convert_sync_batch_norm(synced, None)
    assert local[0].axis_name is None
    synced.train()
    local.train()
    parts = X.reshape(2, 3, 3, 3, C)
    together = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="data")
    y = together(synced[0], parts).reshape(X.shape)
    whole = local[0](X)
    near(y, whole)
    near(nnx.state(synced[0]), nnx.state(local[0]))
    with pytest.raises(AssertionError):
        near(jnp.concatenate([local[0](part) for part in parts]), whole)


def test_a_stock_layer_that_is_synchronised_already_stays() -> None:
    layer = nnx.BatchNorm(C, axis_name="data", rngs=nnx.Rngs(0))
    assert surgery.convert_sync_batch_norm(layer, "data").axis_name == "data"
