"""What XLA makes of the optimizers: bytes, kernels, temporaries, donated buffers."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxstab import optim

LEAVES, SIZE = 20, 5_000
SCALARS = 64 / SIZE  # bytes per parameter, if each leaf reads 16 float32 scalars


def compiled(tx: optax.GradientTransformation) -> jax.stages.Compiled:
    params = {f"p{i:02d}": jnp.ones(SIZE) for i in range(LEAVES)}

    def step(params: optax.Params, state: optax.OptState, gradients: optax.Updates) -> object:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()


def fusions(program: jax.stages.Compiled) -> int:
    return len(re.findall(r" fusion\(", program.as_text()))


def bytes_per_parameter(program: jax.stages.Compiled) -> float:
    return program.cost_analysis()["bytes accessed"] / (LEAVES * SIZE)


def masked(make: Callable[..., object]) -> optax.GradientTransformation:
    return make(1e-3, weight_decay=1e-2, mask={f"p{i:02d}": i % 2 == 0 for i in range(LEAVES)})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: masked(optim.adamw), lambda: masked(optax.adamw)),
        (lambda: optim.adam(1e-3), lambda: optax.adam(1e-3)),
        (lambda: optim.sgd(0.1, 0.9), lambda: optax.sgd(0.1, 0.9)),
        (
            lambda: optax.chain(optim.clip_grad_norm(1.0), optim.adamw()),
            lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        ),
    ],
    ids=["masked adamw", "adam", "sgd", "clipped adamw"],
)
def test_a_step_moves_no_more_and_launches_no_more_than_optaxs(
    ours: Callable[[], object], theirs: Callable[[], object]
) -> None:
    mine, other = compiled(ours()), compiled(theirs())
    assert bytes_per_parameter(mine) <= bytes_per_parameter(other) + SCALARS
    assert fusions(mine) <= fusions(other) + 4  # scalars, for all leaves together
    # Of the size of a scalar or two for each leaf, never of a parameter.
    temporaries = mine.memory_analysis().temp_size_in_bytes
    assert temporaries <= max(other.memory_analysis().temp_size_in_bytes, 16 * LEAVES)


def test_all_of_parameters_and_moments_is_updated_in_place() -> None:
    for tx, copies in ((masked(optim.adamw), 3), (optim.sgd(0.1, 0.9), 2), (optim.sgd(0.1), 1)):
        aliased = compiled(tx).memory_analysis().alias_size_in_bytes
        assert copies * 4 * LEAVES * SIZE <= aliased <= copies * 4 * LEAVES * SIZE + 16


def test_moments_and_updates_are_sharded_as_the_parameters() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    params = {"w": jax.device_put(jnp.ones((16, 4)), spec)}
    for tx in (optim.adamw(1e-3, amsgrad=True), optim.sgd(0.1, 0.9)):
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(params, state, params)
        large = [
            a for tree in (state, after, updates) for a in jax.tree.leaves(tree) if a.ndim == 2
        ]
        assert len(large) >= 3
        assert all(a.sharding.is_equivalent_to(spec, 2) for a in large)


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
def test_no_dtype_is_promoted_implicitly(low: str) -> None:
    """Low-precision parameters and gradients, float32 rates that are traced, float32 moments."""
    params = {"a": jnp.ones(3, low), "b": jnp.ones(2)}
    gradients = {"a": jnp.ones(3), "b": jnp.ones(2, low)}

    @jax.jit
    def step(rate: jax.Array) -> list[optax.Updates]:
        options = {"weight_decay": rate, "maximize": True}
        txs = [
            optim.adamw(rate, (rate, rate), rate, amsgrad=True, **options),
            optim.adam(rate, state_dtype=jnp.float32, **options),
            optim.sgd(rate, rate, rate, state_dtype=jnp.bfloat16, **options),
            optim.freeze(
                optax.chain(optim.clip_grad_norm(rate), optim.sgd(rate)), {"a": False, "b": True}
            ),
            optax.chain(optim.clip_grad_value(rate), optim.scale_updates({"a": 0.5, "b": 0.5})),
        ]
        return [tx.update(gradients, tx.init(params), params)[0] for tx in txs]

    with jax.numpy_dtype_promotion("strict"):
        *found, last = step(jnp.float32(0.5))
    for updates in found:
        assert {n: u.dtype for n, u in updates.items()} == {n: p.dtype for n, p in params.items()}
    assert {n: u.dtype for n, u in last.items()} == {n: g.dtype for n, g in gradients.items()}


def test_masked_adamw_accesses_what_three_fusions_per_leaf_must() -> None:
    """Two moments of 12 bytes each and an update of 16, since a CPU writes one result a fusion."""
    program = compiled(masked(optim.adamw))
    assert 40 <= bytes_per_parameter(program) <= 40 + SCALARS
    assert 3 * LEAVES <= fusions(program) <= 3 * LEAVES + 4
