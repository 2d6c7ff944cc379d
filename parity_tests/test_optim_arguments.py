"""What the optimizers refuse, and what passes because it is not known yet."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from flaxstab import optim

TWINS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def parameters() -> dict[str, jax.Array]:
    return {"kernel": jnp.ones((5, 4)), "bias": jnp.ones(4), "gain": jnp.ones(())}


@pytest.mark.parametrize("mask", [True, False, np.True_, jnp.array(True), np.array([True, False])])
@pytest.mark.parametrize("name", [*TWINS, "freeze"])
def test_a_bare_boolean_mask_is_refused(name: str, mask: object) -> None:
    makers = {"freeze": lambda mask: optim.freeze(optax.sgd(0.1), mask)}
    make = makers.get(name) or getattr(optim, name)
    message = r"mask must be .*, not a bare boolean, got mask=.*static_"
    with pytest.raises(ValueError, match=message):
        make(mask=mask)


BAD = [  # an optimizer, what PyTorch refuses by its own names, and what we say
    (
        "adamw",
        {"lr": -1.0},
        "^learning_rate must be finite and at least 0, got learning_rate=-1.0.$",
    ),
    ("adam", {"lr": -1.0}, "^learning_rate must .* got learning_rate=-1.0.$"),
    ("adamw", {"eps": -1e-8}, "eps=-1e-08"),
    ("adamw", {"weight_decay": -0.1}, "weight_decay=-0.1"),
    ("adam", {"weight_decay": -0.1}, "weight_decay=-0.1"),
    ("adamw", {"betas": (1.0, 0.999)}, r"betas must lie in \[0, 1\), got betas=\(1.0, 0.999\)"),
    ("adam", {"betas": (0.9, -0.1)}, r"betas must lie in \[0, 1\)"),
    ("adamw", {"betas": (0.9, math.nan)}, r"betas must lie in \[0, 1\)"),
    ("sgd", {"lr": -1.0}, "^learning_rate must .* learning_rate=-1.0.$"),
    ("sgd", {"momentum": -0.5}, "momentum=-0.5"),
    ("sgd", {"weight_decay": -1.0}, "weight_decay=-1.0"),
    ("sgd", {"nesterov": True}, "nesterov needs a momentum above 0 .*, got momentum=0.0"),
    ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening=0.1"),
    ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": -0.1}, "dampening of 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_what_torch_refuses_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"Invalid|requires a momentum"):
        TWINS[name]([torch.zeros(1, requires_grad=True)], **options)
    ours = {"learning_rate" if key == "lr" else key: value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        getattr(optim, name)(**ours)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw", {"learning_rate": jnp.float32(-1)}, "must be finite and at least 0"),
        ("sgd", {"learning_rate": np.float64(-1)}, "must be finite and at least 0"),
        ("adamw", {"learning_rate": math.nan}, "learning_rate=nan"),
        ("adamw", {"weight_decay": math.inf}, "weight_decay=inf"),
        ("adamw", {"learning_rate": jnp.ones(2)}, r"learning_rate must be a single .*shape=\(2,\)"),
        ("sgd", {"momentum": jnp.ones((1, 1))}, r"momentum must be a single number, got shape="),
        ("sgd", {"dampening": math.nan}, "dampening must be a finite number, got dampening=nan"),
        ("adam", {"betas": (0.9,)}, r"betas must be two decay rates, got betas=\(0.9,\)"),
        ("adam", {"state_dtype": int}, "state_dtype must be a floating-point dtype"),
    ],
)
def test_other_known_bad_values_are_refused(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(optim, name)(**options)


def test_traced_values_pass() -> None:
    """What would be refused if it were known is computed: nothing can be raised under jit."""
    params = {"w": jnp.ones(2)}

    @jax.jit
    def update(bad: jax.Array) -> list[optax.Updates]:
        txs = [
            optim.adamw(bad, (0.9, bad), bad, bad),
            optim.adam(bad, (bad, 0.9), bad, bad),
            optim.sgd(bad, bad, bad, bad, nesterov=True),
        ]
        return [tx.update(params, tx.init(params), params)[0] for tx in txs]

    assert [tree["w"].shape for tree in update(jnp.float32(-0.5))] == [(2,)] * 3


def test_a_mask_that_does_not_fit_is_refused_at_init() -> None:
    with pytest.raises(
        ValueError, match=r"at the parameter's place, got on_one_side_only=\['bias', 'gain'\]"
    ):
        optim.adamw(mask={"kernel": True}).init(parameters())


def test_a_mask_goes_by_names_and_not_by_order() -> None:
    params = {0: jnp.ones(1), 2: jnp.ones(1), 10: jnp.ones(1)}
    tx = optim.adamw(1.0, weight_decay=0.5, mask={"0": False, "2": False, "10": True})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert {k: float(u[0]) for k, u in updates.items()} == {0: 0.0, 2: 0.0, 10: -0.5}


def test_an_update_without_parameters_is_refused() -> None:
    tx = optim.adamw()
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="weight decay needs the parameters, got params=None"):
        tx.update(params, tx.init(params))


def test_without_decay_the_parameters_are_not_needed() -> None:
    params, gradient = {"w": jnp.full(2, 3.0)}, {"w": jnp.array([1.0, -2.0])}
    for tx in (optim.adamw(weight_decay=0.0), optim.adam(), optim.sgd(momentum=0.9)):
        state = tx.init(params)
        expected, _ = tx.update(gradient, state, params)
        assert tx.update(gradient, state)[0]["w"].tolist() == expected["w"].tolist()


@pytest.mark.parametrize("odd", [1.0, "yes", jnp.array([True, False])])
def test_a_mask_of_other_things_than_booleans_is_refused(odd: object) -> None:
    mask = {"kernel": True, "bias": odd, "gain": False}
    with pytest.raises(ValueError, match=r"one boolean per parameter, .*got mask="):
        optim.adam(weight_decay=0.1, mask=mask).init(parameters())


@pytest.mark.parametrize("form", ["missing", "further"])
def test_gradients_that_do_not_fit_are_named(form: str) -> None:
    params = parameters()
    gradients = {**params, "other": jnp.ones(2)}
    if form == "missing":
        gradients = {"kernel": params["kernel"], "gain": params["gain"]}
    tx = optim.adam()
    with pytest.raises(ValueError, match=r"at the parameters' places, .*\['(other|bias)'\]"):
        tx.update(gradients, tx.init(params), params)
