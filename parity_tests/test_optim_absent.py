"""A parameter whose gradient is ``None`` is left alone, and its own step count with it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import optim
from parity_tests.support import optimizers

# From which step on, and until which, a tensor has no gradient; counted from 0.
GAPS = {"gain": range(4), "bias": range(10, 13)}
PAIRS = {
    "adamw": (
        lambda: optim.adamw(0.02, amsgrad=True),
        lambda ps: torch.optim.AdamW(ps, lr=0.02, amsgrad=True),
    ),
    "adam": (
        lambda: optim.adam(0.02, weight_decay=0.1),
        lambda ps: torch.optim.Adam(ps, lr=0.02, weight_decay=0.1),
    ),
    "sgd": (
        lambda: optim.sgd(0.02, 0.9, 0.3, 0.1),
        lambda ps: torch.optim.SGD(ps, 0.02, 0.9, 0.3, 0.1),
    ),
}


def without(gradients: optimizers.Tree) -> dict[str, list[np.ndarray | None]]:
    return {
        name: [None if i in GAPS.get(name, ()) else a for i, a in enumerate(arrays)]
        for name, arrays in gradients.items()
    }


def test_a_gradient_that_comes_late_or_pauses_is_torchs() -> None:
    """A parameter whose first gradient comes in step 5 begins its bias correction there."""
    params, gradients = optimizers.problem()
    gradients = without(gradients)
    theirs = [optimizers.run_torch(make, params, gradients) for _, make in PAIRS.values()]
    with jax.enable_x64(True):
        txs = [make() for make, _ in PAIRS.values()]
        tree = jax.tree.map(jnp.asarray, params)
        carried = [(tree, tx.init(tree)) for tx in txs]

        @jax.jit
        def step(carried: list[tuple[object, object]], gradient: object) -> list[object]:
            rows = zip(txs, carried, strict=True)
            found = [(p, *tx.update(gradient, state, p)) for tx, (p, state) in rows]
            return [(optax.apply_updates(p, u), state) for p, u, state in found]

        steps = []
        for i in range(optimizers.STEPS):
            gradient = {name: arrays[i] for name, arrays in gradients.items()}
            carried = step(carried, gradient)
            steps.append(carried)
    for number, expected in enumerate(theirs):
        found = _by_name([one[number] for one in steps])
        for name, array in expected.items():
            if name.startswith("update"):
                continue
            ours = found[name][-len(array) :]  # PyTorch has no moments before a first gradient
            assert optimizers.differences({name: ours}, {name: array}) == []
    assert [int(n) for n in carried[0][1].skipped] == [3, 4, 0]  # bias, gain, kernel


def _by_name(steps: list[tuple[object, object]]) -> optimizers.Trace:
    rows: dict[str, list[object]] = {}
    for params, state in steps:
        trees = {"param": params, **state._asdict()}
        for key, tree in trees.items():
            for name, array in tree.items() if isinstance(tree, dict) else ():
                rows.setdefault(f"{key} {name}", []).append(array)
        for i, name in enumerate(sorted(params)):
            skipped = state.skipped[i] if state.skipped.size else 0
            rows.setdefault(f"step {name}", []).append(state.count - skipped)
    return {name: np.stack([np.asarray(a) for a in arrays]) for name, arrays in rows.items()}


@pytest.mark.parametrize("name", PAIRS)
def test_what_all_have_costs_nothing(name: str) -> None:
    """As long as no gradient is absent the state holds no counts and the program reads none."""
    tx = PAIRS[name][0]()
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    state = tx.init(params)
    assert state.skipped.shape == (0,)
    _, state = jax.jit(tx.update)(params, state, params)
    assert state.skipped.shape == (0,)
    assert "slice" not in str(jax.make_jaxpr(tx.update)(params, state, params))
    _, state = jax.jit(tx.update)({"a": params["a"], "b": None}, state, params)
    assert state.skipped.tolist() == [0, 1]
    assert int(state.count) == 2


class Net(nnx.Module):
    """Two parameters, one of which gets no gradient."""

    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.full((2, 3), 2.0))
        self.bias = nnx.Param(jnp.full((3,), -0.0))


def _nothing(gradients: object) -> object:
    return jax.tree_util.tree_map_with_path(
        lambda path, g: None if "bias" in str(path[0]) else g, gradients
    )


@pytest.mark.parametrize("form", ["state", "pure"])
@pytest.mark.parametrize("jit", [nnx.jit, lambda step: step], ids=["nnx.jit", "eager"])
def test_nnx_optimizer_skips_it_too(form: str, jit: Callable[..., object]) -> None:
    model = Net()
    tx = optax.chain(optim.clip_grad_norm(1.0), optim.adamw(0.5, weight_decay=0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @jit
    def step(model: Net, optimizer: nnx.Optimizer, gradients: object) -> None:
        if form == "state":
            optimizer.update(model, gradients)
        else:
            params = nnx.as_pure(nnx.state(model, nnx.Param))
            state = nnx.as_pure(optimizer.opt_state)
            updates, after = tx.update(nnx.as_pure(gradients), state, params)
            nnx.update(model, optax.apply_updates(params, updates))
            nnx.update(optimizer.opt_state, nnx.state(after))

    gradients = _nothing(jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert gradients["bias"].get_value() is None
    for _ in range(3):
        step(model, optimizer, gradients)
    assert model.bias[...].tolist() == [0.0] * 3
    assert (model.kernel[...] < 0.5).all()
    clipped, adam = optimizer.opt_state
    assert adam.skipped[...].tolist() == [3, 0]
    assert not adam.mu["bias"][...].any()
    assert abs(float(clipped.norm[...]) - 6**0.5) <= 4 * float(jnp.finfo(jnp.float32).eps) * 6**0.5


def test_a_loop_needs_the_counts_from_the_start_or_a_freeze() -> None:
    """What ``lax.scan`` carries cannot grow; ``docs/optim.md`` says how to begin."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = optax.chain(optim.clip_grad_norm(1.0), optim.adamw(0.1))

    def loop(tx: optax.GradientTransformation, state: object) -> tuple[object, object]:
        def step(carried: object, gradient: object) -> tuple[object, None]:
            p, state = carried
            updates, state = tx.update({"a": gradient, "b": None}, state, p)
            return (optax.apply_updates(p, updates), state), None

        return jax.lax.scan(step, (params, state), jnp.ones((5, 3)))[0]

    with pytest.raises(TypeError, match="skipped"):
        loop(tx, tx.init(params))
    counts = jnp.zeros(len(params), jnp.int32)
    counted, state = loop(tx, optax.tree.set(tx.init(params), skipped=counts))
    assert state[1].skipped.tolist() == [0, 5]
    assert counted["b"].tolist() == [1.0, 1.0]
    frozen = optim.freeze(tx, {"a": False, "b": True})
    after, state = loop(frozen, frozen.init(params))
    assert state[1].skipped.shape == (0,)
    assert jax.tree.map(lambda a: a.tolist(), after) == jax.tree.map(lambda a: a.tolist(), counted)
    assert (after["a"] < 1).all()


def test_what_accumulates_takes_no_absent_gradients() -> None:
    """As ``docs/optim.md`` says of ``optax.MultiSteps``."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = optax.MultiSteps(optim.adamw(0.1), 2)
    with pytest.raises(ValueError, match="None"):
        tx.update({"a": params["a"], "b": None}, tx.init(params), params)


def test_masks_and_partitions_take_absent_gradients() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = optim.decay_mask(model)
    gradients = {"kernel": jnp.ones((2, 3)), "bias": None}
    assert mask(gradients) == {"kernel": True, "bias": False}
    groups = optim.param_groups(model, [{"params": nnx.PathContains("bias"), "weight_decay": 0.5}])
    for tx in (
        optim.adamw(0.1, mask=mask),
        groups.optimizer(optim.adamw, learning_rate=0.1),
        optim.freeze(optim.adamw(0.1), {"kernel": False, "bias": True}),
        optim.freeze(optax.adamw(0.1), optim.select(model, nnx.PathContains("bias"))),
    ):
        updates, _ = tx.update(gradients, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert not updates["bias"].any()
        assert updates["kernel"].all()
