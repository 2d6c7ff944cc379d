"""One table of layers, one list of contracts: every exported layer is a row, every row runs all."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxstab import attention, blocks, dropout, linear, norms
from parity_tests.support.cases import values
from parity_tests.support.contract_rows import ROWS, Row
from parity_tests.support.contracts import narrowings

STACK = 3


def exported() -> set[type[nnx.Module]]:
    modules = (norms, dropout, linear, attention, blocks)
    classes = [
        c
        for m in modules
        for _, c in inspect.getmembers(m, inspect.isclass)
        if c.__module__.startswith(m.__name__)
    ]
    return {c for c in classes if issubclass(c, nnx.Module) and not c.__name__.startswith("_")}


def without_row(rows: dict[str, Row]) -> set[type[nnx.Module]]:
    return exported() - {row.layer for row in rows.values()}


every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def test_every_exported_layer_has_a_row() -> None:
    assert without_row(ROWS) == set()


@pytest.mark.parametrize("name", ["Dropout", "Linear", "GroupNorm"])
def test_a_missing_row_is_noticed(name: str) -> None:
    rows = {n: row for n, row in ROWS.items() if n != name}
    assert without_row(rows) == {ROWS[name].layer}


def equal(a: object, b: object) -> None:
    """Two trees with the same leaves, bit for bit."""
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(_plain(left), _plain(right))


def near(a: object, b: object) -> None:
    """Two trees of float32 results of the same operations, which a compiler may have reordered."""
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (np.asarray(_plain(leaf), np.float64) for leaf in (left, right))
        # 64 eps: sums of 60 terms, or 256 of one size, whose order XLA chooses for every program.
        size = max(np.max(np.abs(y), initial=0), 1)
        assert np.max(np.abs(x - y), initial=0) <= 64 * np.finfo(np.float32).eps * size


def _plain(leaf: jax.Array) -> jax.Array:
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if key else leaf


def test_equal_and_near_can_fail() -> None:
    with pytest.raises(AssertionError):
        equal([jnp.ones(2)], [jnp.ones(2) * (1 + 2e-7)])
    near([jnp.ones(2)], [jnp.ones(2) * (1 + 2e-7)])
    for other in (1 + 1e-5, jnp.nan):
        with pytest.raises(AssertionError):
            near([jnp.ones(2)], [jnp.ones(2) * other])


@every_row
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_its_inputs_dtype_and_shape(row: Row, dtype: str) -> None:
    y = row.build()(row.input(dtype))
    assert (y.dtype, y.shape) == (row.output_dtype(dtype), row.shape)


@every_row
@pytest.mark.parametrize("evaluating", [False, True])
def test_dtype_overrides_the_inputs(row: Row, evaluating: bool) -> None:
    layer = row.build(dtype=jnp.bfloat16)
    if evaluating:
        layer.eval()
    assert layer(row.input()).dtype == jnp.bfloat16


@every_row
def test_param_dtype_is_that_of_every_parameter_and_statistic(row: Row) -> None:
    state = nnx.state(row.build(param_dtype=jnp.bfloat16), nnx.Any(nnx.Param, nnx.BatchStat))
    floats = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert {a.dtype for a in floats} <= {jnp.dtype(jnp.bfloat16)}


@every_row
def test_jit_traces_once(row: Row) -> None:
    layer, traces = row.build(), []

    @nnx.jit
    def run(layer: nnx.Module, x: jax.Array) -> object:
        traces.append(1)
        return layer(x)

    for seed in range(3):
        run(layer, row.input(seed=seed))
    assert len(traces) == 1


@every_row
def test_jit_computes_what_eager_calls_do(row: Row) -> None:
    eager, jitted, run = row.build(), row.build(), nnx.jit(lambda m, x: m(x))
    for seed in range(2):
        near(run(jitted, row.input(seed=seed)), eager(row.input(seed=seed)))
    near(nnx.state(jitted), nnx.state(eager))


def gradients(layer: nnx.Module, x: jax.Array) -> tuple[object, object]:
    """Gradients for parameters and input with a random cotangent."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params: jax.Array, x: jax.Array) -> object:
        y = nnx.merge(graph, params, rest, copy=True)(x)
        return jnp.sum(jnp.asarray(y, jnp.float32) * values(*y.shape, seed=1).astype(np.float32))

    return jax.grad(loss, (0, 1))(params, x)


@every_row
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("constant", [False, True])
def test_gradients_are_finite(row: Row, dtype: str, constant: object) -> None:
    x = jnp.full(row.shape, 3.0, dtype) if constant else row.input(dtype)
    found = jax.tree.leaves(gradients(row.build(), x))
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in found)
    assert found[-1].dtype == dtype


@every_row
def test_evaluation_is_repeatable_and_changes_nothing(row: Row) -> None:
    layer = row.build()
    layer(row.input(seed=1))
    layer.eval()
    before = jax.tree.map(jnp.copy, nnx.state(layer))
    first, second = layer(row.input()), layer(row.input())
    equal(first, second)
    equal(nnx.state(layer), before)


@every_row
def test_train_and_eval_are_obeyed(row: Row) -> None:
    x = row.input()
    training, evaluating = row.build(), row.build()
    evaluating.eval()
    differ = bool((training(x) != evaluating(x)).any())
    assert differ is bool(row.mode)
    evaluating.train()
    again = row.build()
    equal(evaluating(x), again(x))


@every_row
def test_a_view_changes_the_mode_and_not_the_layer(row: Row) -> None:
    x, layer, evaluating = row.input(), row.build(), row.build()
    if not row.mode:
        accepts = "set_view" in vars(row.layer)
        assert accepts == (row.layer is norms.FrozenBatchNorm)
        seen = nnx.view(layer, use_running_average=True) if accepts else layer
        equal(seen(x), layer(x))
        return
    evaluating.eval()
    view = nnx.view(layer, **{row.mode: True})
    equal(view(x), evaluating(x))
    equal(layer(x), row.build()(x))


@every_row
def test_split_and_merge_give_the_same_layer(row: Row) -> None:
    layer, twin = row.build(), row.build()
    graph, state = nnx.split(layer)
    merged = nnx.merge(graph, state)
    assert hash(graph) == hash(nnx.split(merged)[0])
    equal(merged(row.input()), twin(row.input()))
    equal(nnx.state(merged), nnx.state(twin))


@every_row
def test_a_layer_carries_its_state_through_plain_jit(row: Row) -> None:
    graph, state = nnx.split(row.build())
    twin = row.build()

    @jax.jit
    def run(state: jax.Array, x: jax.Array) -> object:
        layer = nnx.merge(graph, state)
        return layer(x), nnx.state(layer)

    for seed in range(2):
        y, state = run(state, row.input(seed=seed))
        near(y, twin(row.input(seed=seed)))
    near(state, nnx.state(twin))


def stacked(row: Row) -> tuple[nnx.Module, list[nnx.Module]]:
    """Three layers with a leading axis of their own, and the same ones apart."""
    layers = [row.build(seed) for seed in range(STACK)]
    states = [nnx.state(layer) for layer in layers]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return nnx.merge(nnx.graphdef(layers[0]), together), layers


@every_row
def test_stacked_layers_are_scanned(row: Row) -> None:
    stack, layers = stacked(row)

    @nnx.scan(length=STACK, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x: jax.Array, layer: nnx.Module) -> object:
        return layer(x)

    x = row.input()
    y = run(x, stack)
    for layer in layers:
        x = layer(x)
    near(y, x)
    near(nnx.state(stack), jax.tree.map(lambda *a: jnp.stack(a), *map(nnx.state, layers)))


@every_row
def test_stacked_layers_are_mapped(row: Row) -> None:
    stack, layers = stacked(row)
    x = jnp.stack([row.input(seed=seed) for seed in range(STACK)])
    y = nnx.vmap(lambda layer, x: layer(x))(stack, x)
    near(y, jnp.stack([layer(part) for layer, part in zip(layers, x, strict=True)]))
    near(nnx.state(stack), jax.tree.map(lambda *a: jnp.stack(a), *map(nnx.state, layers)))


@every_row
def test_remat_changes_neither_output_nor_gradient(row: Row) -> None:
    def loss(layer: nnx.Module, x: jax.Array) -> object:
        return jnp.sum(layer(x) * values(*row.shape, seed=1).astype(np.float32))

    plain, again = row.build(), row.build()
    found = nnx.value_and_grad(nnx.remat(loss), argnums=1)(again, row.input())
    near(found, nnx.value_and_grad(loss, argnums=1)(plain, row.input()))
    near(nnx.state(again), nnx.state(plain))


TREE_CONTRACTS = [
    test_jit_traces_once,
    test_jit_computes_what_eager_calls_do,
    test_train_and_eval_are_obeyed,
    test_a_view_changes_the_mode_and_not_the_layer,
    test_split_and_merge_give_the_same_layer,
    test_a_layer_carries_its_state_through_plain_jit,
    test_stacked_layers_are_scanned,
    test_stacked_layers_are_mapped,
    test_remat_changes_neither_output_nor_gradient,
]


@every_row
@pytest.mark.parametrize("contract", TREE_CONTRACTS, ids=lambda c: c.__name__)
def test_every_contract_holds_in_tree_mode(row: Row, contract: Callable[..., object]) -> None:
    """As with NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false in the environment."""
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        contract(row)


@every_row
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("evaluating", [False, True])
def test_no_layer_promotes_dtypes_implicitly(row: Row, dtype: str, evaluating: bool) -> None:
    layer = row.build()
    if evaluating:
        layer.eval()
    with jax.numpy_dtype_promotion("strict"):
        assert layer(row.input(dtype)).dtype == row.output_dtype(dtype)


@every_row
@pytest.mark.parametrize("evaluating", [False, True])
def test_nothing_passes_through_float32_in_a_float64_run(row: Row, evaluating: bool) -> None:
    with jax.enable_x64(True):
        layer = row.build(param_dtype=jnp.float64)
        if evaluating:
            layer.eval()
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def run(params: jax.Array, x: jax.Array) -> object:
            merged = nnx.merge(graph, params, rest, copy=True)
            return merged(x), nnx.state(merged, nnx.BatchStat)

        def gradient(params: jax.Array, x: jax.Array) -> object:
            return jax.grad(lambda p, x: jnp.sum(run(p, x)[0] ** 2), (0, 1))(params, x)

        x = row.input(jnp.float64)
        for function in (run, gradient):
            assert narrowings(jax.make_jaxpr(function)(params, x)) == []
        y, statistics = run(params, x)
        assert y.dtype == jnp.float64
        assert {a.dtype for a in jax.tree.leaves(statistics)} <= {
            jnp.dtype(jnp.float64), jnp.dtype(jnp.int32)
        }  # fmt: skip
