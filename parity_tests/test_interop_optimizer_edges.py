"""``flaxstab.interop`` and optimizers: absent state, frozen, shared and stacked parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import attention, interop, linear, optim

T = torch.nn
StateDict = dict[str, object]


class Two(nnx.Module):
    def __init__(self) -> None:
        self.first = linear.Linear(2, 3, rngs=nnx.Rngs(0))
        self.second = linear.Linear(3, 2, bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x))


NAMES = ["first.weight", "first.bias", "second.weight"]


def torch_two() -> torch.nn.Module:
    return T.ModuleDict({"first": T.Linear(2, 3), "second": T.Linear(3, 2, bias=False)})


def adam_state(steps: int = 3, absent: tuple[int, ...] = (), **options: object) -> StateDict:
    """AdamW's state after some steps in which some parameters had no gradient."""
    module = torch_two()
    optimizer = torch.optim.AdamW(module.named_parameters(), **options)
    for step in range(steps):
        for i, p in enumerate(module.parameters()):
            p.grad = None if i in absent else torch.full_like(p, step + i + 1.0)
        optimizer.step()
    return optimizer.state_dict()


def params_of(model: nnx.Module) -> nnx.State:
    return nnx.as_pure(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("graph", [True, False])
def test_an_nnx_optimizer_is_changed_in_place_and_a_bare_state_is_not(graph: bool) -> None:
    model = Two()
    tx = optax.chain(optax.clip(1.0), optim.adamw(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param, graph=graph)
    fresh = tx.init(params_of(model))
    found = interop.load_optimizer_state_dict(optimizer, model, adam_state())
    other = interop.load_optimizer_state_dict(fresh, model, adam_state())
    for state in (found, other, nnx.as_pure(optimizer.opt_state)):
        assert int(state[1].count) == 3
        assert np.abs(jax.tree.leaves(state[1].mu)[0]).min() > 0
    assert int(optimizer.step[...]) == 3
    assert int(fresh[1].count) == 0
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(model)
    optimizer.update(model, grads)  # it goes on
    assert int(optimizer.opt_state[1].count[...]) == 4


def test_trees_of_dicts_are_states_too() -> None:
    model = Two()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    found = interop.load_optimizer_state_dict(optax.adam(1e-3).init(params), model, adam_state())
    want = adam_state()["state"][2]["exp_avg"].numpy()
    assert np.array_equal(found[0].mu["second"]["kernel"].T, want)


def test_memory_is_not_shared_with_torch() -> None:
    model, state = Two(), adam_state()
    fresh = optim.adamw().init(params_of(model))
    found = interop.load_optimizer_state_dict(fresh, model, state)
    before = jax.tree.map(np.array, found)
    for entry in state["state"].values():
        for value in entry.values():
            value.fill_(7)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, found))


def test_a_parameter_without_state_is_at_its_own_first_step() -> None:
    model, state = Two(), adam_state(absent=(1,))
    tx = optim.adamw(own_steps=True)
    found = interop.load_optimizer_state_dict(tx.init(params_of(model)), model, state)
    assert int(found.count) == 3
    assert found.skipped.tolist() == [3, 0, 0]  # of first.bias, first.kernel, second.kernel
    back = interop.optimizer_state_dict(found, model, param_groups=state["param_groups"])
    assert set(back["state"]) == {0, 2}
    shared = optim.adamw().init(params_of(model))
    with pytest.raises(ValueError, match=r"own_steps=True, or freeze what has no gradient") as told:
        interop.load_optimizer_state_dict(shared, model, state)
    assert "not_there=['first.bias']" in str(told.value)


def test_updates_in_which_nothing_had_a_gradient_are_told_by_count() -> None:
    model = Two()
    fresh = optim.adamw(own_steps=True).init(params_of(model))
    found = interop.load_optimizer_state_dict(fresh, model, adam_state(), count=5)
    assert (int(found.count), found.skipped.tolist()) == (5, [2, 2, 2])
    with pytest.raises(ValueError, match="count must be an integer of at least every step number"):
        interop.load_optimizer_state_dict(fresh, model, adam_state(), count=2)


def test_an_optimizer_before_its_first_step_is_one_here() -> None:
    model, state = Two(), adam_state(steps=0)
    fresh = optim.adamw().init(params_of(model))
    found = interop.load_optimizer_state_dict(fresh, model, state)
    assert jax.tree.all(jax.tree.map(np.array_equal, fresh, found))
    back = interop.optimizer_state_dict(found, model, param_groups=state["param_groups"])
    assert back == state


def test_frozen_parameters_have_no_state_on_either_side() -> None:
    model, state = Two(), adam_state(absent=(0, 1))
    frozen = optim.select(model, nnx.PathContains("first"))
    fresh = optim.freeze(optim.adamw(), frozen).init(params_of(model))
    found = interop.load_optimizer_state_dict(fresh, model, state)
    back = interop.optimizer_state_dict(found, model, param_groups=state["param_groups"])
    assert set(back["state"]) == {2}
    with pytest.raises(ValueError, match=r"must be of parameters that have one here, got left_ov"):
        interop.load_optimizer_state_dict(fresh, model, adam_state())


def test_a_shared_parameter_has_one_state_under_either_name() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.a = linear.Linear(2, 2, bias=False, rngs=nnx.Rngs(0))
            self.b = linear.Linear(2, 2, bias=False, rngs=nnx.Rngs(0))
            self.b.kernel = self.a.kernel

    model = Tied()
    fresh = optim.sgd(momentum=0.9).init(params_of(model))
    buffer = np.arange(4.0, dtype=np.float32).reshape(2, 2)
    given = {"state": {0: {"momentum_buffer": buffer}}, "param_groups": [{"params": [0]}]}
    for name in ("a.weight", "b.weight"):
        found = interop.load_optimizer_state_dict(fresh, model, given, names=[name], count=1)
        assert np.array_equal(jax.tree.leaves(found.trace)[0].T, buffer)
    given["param_groups"] = [{"params": [0, 1]}]
    with pytest.raises(ValueError, match="that belong together, and none twice"):
        interop.load_optimizer_state_dict(
            fresh, model, given, names=["a.weight", "b.weight"], count=1
        )


class Scale(nnx.Module):
    """torch's gain is one less, and the other way round."""

    def __init__(self) -> None:
        self.gamma = nnx.Param(jnp.arange(3.0))


interop.register(
    Scale,
    to_torch=lambda module: {"gain": np.flip(np.asarray(module.gamma[...])) - 1},
    to_flax=lambda _, tensors: {"gamma": np.flip(tensors["gain"]) + 1},
)


class Double(nnx.Module):
    """torch's gain is twice this."""

    def __init__(self) -> None:
        self.gamma = nnx.Param(jnp.arange(3.0))


interop.register(
    Double,
    to_torch=lambda module: {"gain": np.asarray(module.gamma[...]) * 2},
    to_flax=lambda _, tensors: {"gamma": tensors["gain"] / 2},
)


def of_gain(buffer: np.ndarray) -> StateDict:
    return {"state": {0: {"momentum_buffer": buffer}}, "param_groups": [{"params": [0]}]}


def test_a_registered_layer_moves_moments_without_what_it_adds() -> None:
    model, buffer = Scale(), np.array([1.0, 2.0, 4.0], np.float32)
    fresh = optim.sgd(momentum=0.9).init(params_of(model))
    found = interop.load_optimizer_state_dict(
        fresh, model, of_gain(buffer), names=["gain"], count=1
    )
    assert found.trace["gamma"].tolist() == [4.0, 2.0, 1.0]
    back = interop.optimizer_state_dict(
        found, model, param_groups=[{"params": [0]}], names=["gain"]
    )
    assert back["state"][0]["momentum_buffer"].tolist() == buffer.tolist()


def lstm() -> nnx.Module:
    return nnx.LSTMCell(2, 2, rngs=nnx.Rngs(0))


LSTM = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


@pytest.mark.parametrize(("make", "names"), [(lstm, LSTM), (Double, ["gain"])])
def test_moments_of_what_torch_computes_otherwise_are_refused(
    make: Callable[[], nnx.Module], names: list[str]
) -> None:
    model = make()
    fresh = optim.adamw().init(params_of(model))
    entry = {
        name: {"step": np.float32(1), "exp_avg": array, "exp_avg_sq": np.square(array)}
        for name, array in interop.state_dict(model).items()
    }
    given = {
        "state": {i: entry[name] for i, name in enumerate(names)},
        "param_groups": [{"params": list(range(len(names)))}],
    }
    with pytest.raises(ValueError, match="moved and not computed"):
        interop.load_optimizer_state_dict(fresh, model, given, names=names)
    moved = jax.tree.map(lambda a: a + 1, fresh)
    with pytest.raises(ValueError, match="moved and not computed"):
        interop.optimizer_state_dict(moved, model, param_groups=given["param_groups"], names=names)


def test_half_a_packed_tensor_is_refused() -> None:
    model = attention.MultiHeadAttention(4, 2, rngs=nnx.Rngs(0))
    names = [name for name, _ in T.MultiheadAttention(4, 2).named_parameters()]
    frozen = optim.select(model, nnx.PathContains("query"))
    fresh = optim.freeze(optim.adamw(), frozen).init(params_of(model))
    with pytest.raises(ValueError, match="one array on either side must have the same moments"):
        interop.optimizer_state_dict(
            fresh, model, param_groups=[{"params": [0, 1, 2, 3]}], names=names
        )


class Stacked(nnx.Module):
    def __init__(self) -> None:
        make = nnx.vmap(lambda rngs: linear.Linear(2, 3, bias=False, rngs=rngs))
        self.layers = make(nnx.Rngs(0).split(4))


STACK = [f"layers.{i}.weight" for i in range(4)]


def stack_state(*steps: int) -> StateDict:
    def entry(i: int, step: int) -> dict[str, object]:
        moments = np.arange(12.0).reshape(2, 3, 2).astype(np.float32) + 12 * i
        return {"step": np.float32(step), "exp_avg": moments[0], "exp_avg_sq": moments[1]}

    groups = [{"params": [*range(len(steps))], "param_names": STACK[: len(steps)]}]
    return {"state": {i: entry(i, n) for i, n in enumerate(steps)}, "param_groups": groups}


def test_a_stack_of_layers_has_the_state_of_each() -> None:
    model, given = Stacked(), stack_state(5, 5, 5, 5)
    fresh = optim.adamw(own_steps=True).init(params_of(model))
    found = interop.load_optimizer_state_dict(fresh, model, given)
    for i in range(4):
        assert np.array_equal(found.mu["layers"]["kernel"][i].T, given["state"][i]["exp_avg"])
        assert np.array_equal(found.nu["layers"]["kernel"][i].T, given["state"][i]["exp_avg_sq"])
    back = interop.optimizer_state_dict(found, model, param_groups=given["param_groups"])
    assert jax.tree.all(jax.tree.map(np.array_equal, back["state"], given["state"]))
    with pytest.raises(ValueError, match=r"got left_out=\['layers.kernel'\]"):
        interop.load_optimizer_state_dict(fresh, model, stack_state(5, 5, 5))
    with pytest.raises(ValueError, match="one array on either side must have the same step numb"):
        interop.load_optimizer_state_dict(fresh, model, stack_state(5, 5, 4, 5))


class Flat(nnx.Module):
    def __init__(self) -> None:
        self.head = linear.Linear(2 * 3 * 4, 5, bias=False, rngs=nnx.Rngs(0))


def test_moments_of_flattened_images_go_the_way_of_the_weights() -> None:
    model, flattened = Flat(), {"head": (2, 3, 4)}
    given = np.arange(120.0, dtype=np.float32).reshape(5, 24)
    fresh = optim.sgd(momentum=0.9).init(params_of(model))
    options = {"names": ["head.weight"], "flattened": flattened}
    found = interop.load_optimizer_state_dict(fresh, model, of_gain(given), count=1, **options)
    interop.load_state_dict(model, {"head.weight": given}, flattened=flattened)
    assert np.array_equal(found.trace["head"]["kernel"], model.head.kernel[...])
    assert not np.array_equal(found.trace["head"]["kernel"], given.T)
    back = interop.optimizer_state_dict(found, model, param_groups=[{"params": [0]}], **options)
    assert np.array_equal(back["state"][0]["momentum_buffer"], given)


def test_states_by_name_and_renamed_ones_are_taken() -> None:
    model, whole = Two(), adam_state()
    named = {
        "state": {f"module.{NAMES[i]}": entry for i, entry in whole["state"].items()},
        "param_groups": [{"params": [f"module.{name}" for name in NAMES]}],
    }
    fresh = optim.adamw().init(params_of(model))
    found = interop.load_optimizer_state_dict(
        fresh, model, named, rename=lambda name: name.removeprefix("module.")
    )
    expected = interop.load_optimizer_state_dict(fresh, model, whole)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
