"""Every norm inside ``nnx.bridge.to_linen``: Linen's collections hold what the module would."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from flaxstab import norms
from parity_tests.support.cases import values

C = 4
X = jnp.asarray(values(6, 5, C), jnp.float32)
COTANGENT = jnp.asarray(values(6, 5, C, seed=1), jnp.float32)
# Arguments by class: the same build the module and its Linen wrapper.
ROWS: dict[str, tuple[tuple[object, ...], dict[str, object]]] = {
    "BatchNorm": ((C,), {}),
    "FrozenBatchNorm": ((C,), {}),
    "GhostBatchNorm": ((C, 4), {}),
    "GroupNorm": ((2, C), {}),
    "InstanceNorm": ((C,), {"affine": True, "track_running_stats": True}),
    "LayerNorm": ((C,), {}),
    "RMSNorm": ((C,), {}),
}


def exported() -> set[str]:
    return {
        name for name, kind in inspect.getmembers(norms, inspect.isclass)
        if issubclass(kind, nnx.Module)
    }  # fmt: skip


def by_module(layer: nnx.Module) -> tuple[jax.Array, dict[str, object], dict[str, object], object]:
    """Output, statistics, parameter gradients and input gradient of one call."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def call(params: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
        merged = nnx.merge(graph, params, rest, copy=True)
        return merged(x), nnx.state(merged, nnx.BatchStat)

    y, pullback, state = jax.vjp(call, params, X, has_aux=True)
    own, of_input = pullback(COTANGENT)
    return y, nnx.to_pure_dict(state), nnx.to_pure_dict(own), of_input


def by_linen(
    module: linen.Module, variables: dict[str, dict[str, object]]
) -> tuple[jax.Array, dict[str, object], dict[str, object], object]:
    """The same through ``apply``."""
    rest = {name: group for name, group in variables.items() if name != "params"}

    def call(params: dict[str, object], x: jax.Array) -> tuple[jax.Array, dict[str, object]]:
        return module.apply({"params": params, **rest}, x, mutable=["batch_stats"])

    y, pullback, state = jax.vjp(call, variables.get("params", {}), X, has_aux=True)
    own, of_input = pullback(COTANGENT)
    return y, state.get("batch_stats", {}), own, of_input


def same(ours: object, theirs: object) -> None:
    """Trees of the same names and the same bits: both run the same operations."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def filled(make: Callable[..., nnx.Module], *args: object, **options: object) -> nnx.Module:
    """A layer whose parameters and statistics are no defaults."""
    layer = make(*args, **options)
    for number, variable in enumerate(jax.tree.leaves(nnx.state(layer), is_leaf=_is_variable)):
        if jnp.issubdtype(variable.dtype, jnp.floating):
            variable[...] = jnp.asarray(
                np.abs(values(*variable.shape, seed=number)), variable.dtype
            )
    return layer


def linen_variables(layer: nnx.Module) -> dict[str, dict[str, object]]:
    """The layer's state in Linen's collections."""
    groups = {
        "params": nnx.to_pure_dict(nnx.state(layer, nnx.Param)),
        "batch_stats": nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)),
    }
    return {name: group for name, group in groups.items() if group}


def _is_variable(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)


def test_every_norm_has_a_row() -> None:
    assert exported() == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_norm_works_inside_to_linen(name: str) -> None:
    """Output, statistics and gradients of training, and evaluation, bit for bit."""
    args, options = ROWS[name]
    kind = getattr(norms, name)
    module, layer = nnx.bridge.to_linen(kind, *args, **options), filled(kind, *args, **options)
    created = module.init(jax.random.key(0), X)
    variables = linen_variables(layer)
    assert jax.tree.structure(created) == jax.tree.structure(variables)
    same(by_linen(module, variables), by_module(layer))
    trained = layer(X)
    same(module.apply(variables, X), trained)
    if "use_running_average" in inspect.signature(kind.__call__).parameters:
        after = linen_variables(layer)  # of the call before
        evaluated = module.apply(after, X, use_running_average=True)
        assert np.array_equal(evaluated, trained) == (kind is norms.FrozenBatchNorm)
        layer.eval()
        same(evaluated, layer(X))


def test_the_comparison_sees_other_statistics_and_other_names() -> None:
    layer = filled(norms.BatchNorm, C)
    variables, before = linen_variables(layer), by_module(layer)
    module = nnx.bridge.to_linen(norms.BatchNorm, C)
    variables["batch_stats"]["var"] = variables["batch_stats"]["var"] * 1.01
    with pytest.raises(AssertionError):
        same(by_linen(module, variables)[1], before[1])
    with pytest.raises(AssertionError):
        same({"mean": before[0]}, {"average": before[0]})
