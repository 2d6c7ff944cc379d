"""A parameter whose gradient is ``None`` is left alone, and its own step count with it."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
import torch
from flax import nnx

from flaxstab import optim
from parity_tests.support import optimizers

# From which step on, and until which, a tensor has no gradient; counted from 0.
GAPS = {"gain": range(4), "bias": range(10, 13)}
PAIRS = {
    "adamw": (
        lambda: optim.adamw(0.02, amsgrad=True, own_steps=True),
        lambda ps: torch.optim.AdamW(ps, lr=0.02, amsgrad=True),
    ),
    "adam": (
        lambda: optim.adam(0.02, weight_decay=0.1, own_steps=True),
        lambda ps: torch.optim.Adam(ps, lr=0.02, weight_decay=0.1),
    ),
    "sgd": (
        lambda: optim.sgd(0.02, 0.9, 0.3, 0.1, own_steps=True),
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
            rows.setdefault(f"step {name}", []).append(state.count - state.skipped[i])
    return {name: np.stack([np.asarray(a) for a in arrays]) for name, arrays in rows.items()}


PLAIN = {
    "adamw": lambda own: optim.adamw(0.1, own_steps=own),
    "adam": lambda own: optim.adam(0.1, own_steps=own),
    "dampened sgd": lambda own: optim.sgd(0.1, 0.9, 0.3, own_steps=own),
}


@pytest.mark.parametrize("name", PLAIN)
def test_counts_are_there_from_the_start_or_never(name: str) -> None:
    """The state keeps its structure and shapes; by default it costs nothing."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    absent = {"a": params["a"], "b": None}
    tx = PLAIN[name](False)
    state = tx.init(params)
    assert state.skipped is None
    assert "slice" not in str(jax.make_jaxpr(tx.update)(params, state, params))
    with pytest.raises(ValueError, match=r"own for its parameter, .*\['b'\]. .*own_steps=True"):
        tx.update(absent, state, params)
    tx = PLAIN[name](True)
    state = tx.init(params)
    for gradients, skipped in ((params, [0, 0]), (absent, [0, 1])):
        before = jax.tree.map(jnp.shape, state)
        _, state = jax.jit(tx.update)(gradients, state, params)
        assert jax.tree.map(jnp.shape, state) == before
        assert state.skipped.tolist() == skipped
    assert int(state.count) == 2


@pytest.mark.parametrize("tx", [optim.sgd(0.5), optim.sgd(0.5, 0.9)], ids=["plain", "momentum"])
def test_sgd_without_dampening_needs_no_counts(tx: optax.GradientTransformation) -> None:
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    state = tx.init(params)
    for a in (-0.5, -0.5 if state.trace is None else -0.95):
        updates, state = tx.update({"a": jnp.ones(1), "b": None}, state, params)
        assert abs(float(updates["a"][0]) - a) <= 2 * float(jnp.finfo(jnp.float32).eps)
        assert updates["b"].tolist() == [0.0]


@pytest.mark.parametrize("own", [False, True])
def test_a_fresh_state_is_saved_and_restored_by_orbax(own: bool, tmp_path: pathlib.Path) -> None:
    """Orbax refuses arrays without elements."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    txs = {
        "adamw": optim.adamw(0.1, own_steps=own),
        "sgd": optim.sgd(0.1, 0.9, own_steps=own),
        "plain": optim.sgd(0.1, own_steps=own),
    }
    states = {name: tx.init(params) for name, tx in txs.items()}
    states |= {"empty": optim.adamw(0.1, own_steps=own).init({})}
    states["adamw"] = txs["adamw"].update(params, states["adamw"], params)[1]
    with orbax.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", states)
        saver.wait_until_finished()
        found = saver.restore(tmp_path / "state", states)
    assert jax.tree.structure(found) == jax.tree.structure(states)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, states))


def test_the_guard_takes_absent_gradients_under_jit() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optim.skip_nonfinite(optim.adamw(0.1, own_steps=True))
    gradients = {"a": jnp.ones(2), "b": None}
    updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    assert state.inner_state.skipped.tolist() == [0, 1]
    assert updates["a"].all()


def test_counts_follow_the_paths_and_not_the_order_of_leaves() -> None:
    """A state restored from a checkpoint has strings for numbers: '10' comes before '2'."""
    params = {i: jnp.ones(1) for i in range(12)}
    tx = optim.adamw(0.1, own_steps=True)
    gradients = {i: None if i in (2, 10) else jnp.full(1, float(i)) for i in params}
    _, state = tx.update(gradients, tx.init(params), params)
    text = {str(i): p for i, p in params.items()}
    moments = {f: {str(i): a for i, a in getattr(state, f).items()} for f in ("mu", "nu")}
    expected, after = tx.update(gradients, state, params)
    updates, foreign = tx.update(gradients, state._replace(**moments), text)
    assert {int(i): float(u[0]) for i, u in updates.items()} == {
        i: float(u[0]) for i, u in expected.items()
    }
    assert foreign.skipped.tolist() == after.skipped.tolist()
    assert [i for i, n in enumerate(foreign.skipped.tolist()) if n] == [2, 10]
    assert {i for i, a in foreign.mu.items() if not a.any()} == {"0", "2", "10"}


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
    tx = optax.chain(optim.clip_grad_norm(1.0), optim.adamw(0.5, weight_decay=0.5, own_steps=True))
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


def test_a_loop_carries_the_counts() -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = optax.chain(optim.clip_grad_norm(1.0), optim.adamw(0.1, own_steps=True))

    def loop(tx: optax.GradientTransformation) -> tuple[object, object]:
        def step(carried: object, gradient: object) -> tuple[object, None]:
            p, state = carried
            updates, state = tx.update({"a": gradient, "b": None}, state, p)
            return (optax.apply_updates(p, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.ones((5, 3)))[0]

    counted, state = loop(tx)
    assert state[1].skipped.tolist() == [0, 5]
    assert counted["b"].tolist() == [1.0, 1.0]
    after, _ = loop(optim.freeze(tx, {"a": False, "b": True}))
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
        optim.adamw(0.1, mask=mask, own_steps=True),
        groups.optimizer(optim.adamw, learning_rate=0.1, own_steps=True),
        optim.freeze(optim.adamw(0.1), {"kernel": False, "bias": True}),
        optim.freeze(optax.adamw(0.1), optim.select(model, nnx.PathContains("bias"))),
    ):
        updates, _ = tx.update(gradients, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert not updates["bias"].any()
        assert updates["kernel"].all()


def test_nnx_optimizer_needs_a_variable_around_none_and_the_error_says_so() -> None:
    model = Net()
    optimizer = nnx.Optimizer(model, optim.adamw(0.5, own_steps=True), wrt=nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    gradients["bias"] = None
    with pytest.raises(ValueError, match=r"only=\['bias'\].*nnx.Param\(None\)"):
        optimizer.update(model, gradients)
    gradients["bias"] = nnx.Param(None)
    optimizer.update(model, gradients)
    assert model.bias[...].tolist() == [0.0] * 3
    assert optimizer.opt_state.skipped[...].tolist() == [1, 0]
