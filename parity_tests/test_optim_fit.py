"""Gradients, states and parameters that do not fit each other are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxstab import optim

MAKERS = {
    "adamw": lambda: optim.adamw(0.1),
    "sgd": lambda: optim.sgd(0.1, 0.9),
    "plain sgd": lambda: optim.sgd(0.1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_gradient_of_another_shape_is_refused_also_if_it_broadcasts(name: str) -> None:
    params = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    gradients = {"layer": {"kernel": jnp.ones((1, 3)), "bias": jnp.ones(3)}}
    tx = MAKERS[name]()
    with pytest.raises(ValueError, match=r"parameter's shape, got .*layer.kernel.*\(1, 3\)"):
        tx.update(gradients, tx.init(params), params)


@pytest.mark.parametrize("dtype", ["complex64"])
@pytest.mark.parametrize("name", MAKERS)
def test_complex_parameters_and_gradients_are_refused(name: str, dtype: str) -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = MAKERS[name]()
    message = r"must be real, got leaves=\{'b': 'complex64'\}"
    with pytest.raises(ValueError, match=message):
        tx.init({**params, "b": jnp.ones(2, dtype)})
    with pytest.raises(ValueError, match=message):
        tx.update({**params, "b": jnp.ones(2, dtype)}, tx.init(params), params)


@pytest.mark.parametrize("make", [optim.clip_grad_norm, optim.clip_grad_value])
def test_clipping_refuses_complex_gradients(make: object) -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = make(1.0)
    with pytest.raises(ValueError, match=r"must be real, got leaves=\{'b': 'complex64'\}"):
        tx.update({**params, "b": jnp.ones(2, "complex64")}, tx.init(params))


def test_the_state_is_matched_by_path() -> None:
    """As strings, which a restored checkpoint has for numbers, 10 comes before 2."""
    params = {i: jnp.ones(1) for i in range(12)}
    tx = optim.adamw(0.1)
    gradients = {i: jnp.full(1, float(i)) for i in params}
    _, state = tx.update(gradients, tx.init(params), params)
    text = {name: {str(i): a for i, a in getattr(state, name).items()} for name in ("mu", "nu")}
    found, after = tx.update(gradients, state._replace(**text), params)
    expected, kept = tx.update(gradients, state, params)
    assert {i: float(u[0]) for i, u in found.items()} == {
        i: float(u[0]) for i, u in expected.items()
    }
    assert jax.tree.structure(after.mu) == jax.tree.structure(text["mu"])
    assert {int(i): float(m[0]) for i, m in after.mu.items()} == {
        i: float(m[0]) for i, m in kept.mu.items()
    }


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"a": (2,), "c": (2,)}, r"got on_one_side_only=\['b', 'c'\]"),
        ({"a": (2,)}, r"got on_one_side_only=\['b'\]"),
        ({"a": (2,), "b": (3,)}, r"moment must have its parameter's shape, got .*'b'"),
    ],
)
def test_a_foreign_state_is_refused_with_the_leaves(
    others: dict[str, tuple[int, ...]], message: str
) -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for tx in (optim.adamw(0.1), optim.sgd(0.1, 0.9), optim.adamw(0.1, own_steps=True)):
        state = tx.init({name: jnp.ones(shape) for name, shape in others.items()})
        with pytest.raises(ValueError, match=message):
            tx.update(params, state, params)


def test_counts_of_other_parameters_are_refused() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optim.adamw(0.1, own_steps=True)
    state = tx.init(params)._replace(skipped=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"state must be that of .* counts=\(3,\) and param"):
        tx.update(params, state, params)


def test_an_absent_gradient_without_parameters_is_refused_in_words() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for tx in (optim.adam(0.1, own_steps=True), optim.sgd(0.1, 0.9)):
        with pytest.raises(ValueError, match=r"only=\['b'\].*is None, pass the parameters too"):
            tx.update({"a": jnp.ones(2), "b": None}, tx.init(params))


def test_a_wrong_mask_is_refused_also_without_decay() -> None:
    for tx in (optim.adamw(0.1, weight_decay=0.0, mask={"z": True}), optim.sgd(0.1, mask={"z": 1})):
        with pytest.raises(ValueError, match=r"at the parameter's place, .*\['a', 'z'\]"):
            tx.init({"a": jnp.ones(2)})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw", {"learning_rate": "0.1"}, "^learning_rate must be a number, got learn.*'0.1'"),
        ("sgd", {"learning_rate": None}, "^learning_rate must be a number, got learning_rate=None"),
        ("adamw", {"betas": 0.9}, "^betas must be two decay rates, got betas=0.9"),
        ("adamw", {"betas": ("0.9", 0.9)}, "^betas must be a number"),
        ("adamw", {"eps": -1.0}, "^eps must be finite and at least 0, got eps=-1.0.$"),
        ("sgd", {"dampening": "0"}, "^dampening must be a number"),
        ("clip_grad_norm", {"max_norm": "1"}, "^max_norm must be a number"),
        ("clip_grad_norm", {"max_norm": np.float32(-1)}, "^max_norm must be at least 0"),
        ("clip_grad_value", {"clip_value": None}, "^clip_value must be a number"),
    ],
)
def test_the_argument_that_is_wrong_is_named(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(optim, name)(**options)


def test_known_arrays_pass_inside_jit() -> None:
    """There, JAX stages what is computed of them, comparisons too."""
    bound, rate = jnp.float32(0.5), jnp.float32(0.25)

    @jax.jit
    def run(g: jax.Array) -> list[jax.Array]:
        txs = [optim.clip_grad_norm(bound), optim.clip_grad_value(bound), optim.sgd(rate, rate)]
        return [tx.update(g, tx.init(g), g)[0] for tx in txs]

    assert [float(u[0].round(3)) for u in run(jnp.ones(1))] == [0.5, 0.5, -0.25]
    with pytest.raises(ValueError, match="max_norm must be at least 0"):
        jax.jit(lambda g: optim.clip_grad_norm(-bound_of(g)).init(g))(jnp.ones(1))


def bound_of(_: jax.Array) -> np.float32:
    return np.float32(1)


def test_an_injected_dtype_is_refused_with_the_way_out() -> None:
    params = {"a": jnp.ones(2, jnp.bfloat16)}
    lost = optax.inject_hyperparams(optim.adamw)(0.1, state_dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"state_dtype must be .*static_args=\('state_dtype',\)"):
        lost.init(params)
    make = optax.inject_hyperparams(optim.adamw, static_args=("state_dtype", "mask"))
    tx = make(0.1, state_dtype=jnp.float32, mask={"a": True})
    _, state = tx.update(params, tx.init(params), params)
    assert state.inner_state.mu["a"].dtype == jnp.float32
