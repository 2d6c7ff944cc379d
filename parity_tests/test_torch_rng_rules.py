"""``torch_rng.seed_parameters``: rules of one's own, and what is refused. Needs no torch."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxstab import interop, linear, norms
from flaxstab.torch_rng import Generator, Tensors, layer_rule, register, seed_parameters
from parity_tests.support.seeding import MAKERS, RNGS, Holder, Net, same, values


class Own(nnx.Module):
    """A parameter of its own."""

    def __init__(self) -> None:
        self.layer = linear.Linear(2, 2, rngs=RNGS)
        self.token = nnx.Param(jnp.zeros(4))


class Registered(Own):
    """A type of its own, with rules."""


class Subclass(linear.Linear):
    """Another type than its base."""


@pytest.mark.parametrize("model", [Own, Own(), Subclass(2, 2, rngs=RNGS)], ids=["a", "b", "c"])
def test_parameters_without_a_rule_are_refused(model: object) -> None:
    message = (
        r"a layer with a rule.*, got .*\['.*'\]\. Call .*interop\.register and .*torch_rng\.reg"
    )
    with pytest.raises(ValueError, match=message):
        seed_parameters(model, 0)


STRANGE: dict[str, Callable[[], nnx.Module]] = {
    "GRUCell": lambda: nnx.GRUCell(3, 4, rngs=RNGS),
    "SpectralNorm": lambda: nnx.SpectralNorm(nnx.Linear(3, 4, rngs=RNGS), rngs=RNGS),
    "WeightNorm": lambda: nnx.WeightNorm(nnx.Linear(3, 4, rngs=RNGS), rngs=RNGS),
    "Attention": lambda: Attention(2, 4, rngs=RNGS),
    "Einsum": lambda: nnx.Einsum("ab,bc->ac", (2, 3), rngs=RNGS),
}


class Attention(nnx.MultiHeadAttention):
    """Another type than its base."""


@pytest.mark.parametrize("name", STRANGE)
def test_layers_that_do_something_else_with_known_ones_are_refused(name: str) -> None:
    def make() -> nnx.Module:
        return nnx.List([STRANGE[name](), linear.Linear(2, 2, rngs=RNGS)])

    for model in (make, make()):
        with pytest.raises(ValueError, match=rf"must be a layer with a rule, .*types=\['{name}'"):
            seed_parameters(model, 0)


class Cell(nnx.RNNCellBase):
    """A user's cell: nothing but what it holds."""

    def __init__(self) -> None:
        self.inner = linear.Linear(2, 2, rngs=RNGS)


def test_a_cell_of_ones_own_is_a_container() -> None:
    expected = seed_parameters(MAKERS["square"], 0)
    assert same(values(seed_parameters(Cell, 0)), values(expected))


def test_a_registered_type_draws_after_its_layers() -> None:
    def draw(module: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
        assert isinstance(module, Registered)
        return {"token": generator.normal(tensors["token"].shape)}

    interop.register(
        Registered,
        to_torch=lambda module: {"token": module.token[...]},
        to_flax=lambda _, tensors: {"token": tensors["token"]},
    )
    register(Registered, draw)
    generator = Generator(0)
    generator.uniform((2, 2))
    generator.uniform(2)
    expected = generator.normal(4)
    np.testing.assert_array_equal(seed_parameters(Registered, 0).token[...], expected)
    np.testing.assert_array_equal(seed_parameters(Registered(), 0).token[...], expected)
    with pytest.raises(ValueError, match="registered once, got module_type='Registered'"):
        register(Registered, draw)


def linear_of(rngs: nnx.Rngs) -> nnx.Module:
    return linear.Linear(2, 2, rngs=rngs)


TRANSFORMED: dict[str, Callable[[], nnx.Module]] = {
    "vmap": lambda: nnx.vmap(linear_of)(nnx.Rngs(0).split(3)),
    "jit": lambda: nnx.jit(linear_of)(nnx.Rngs(0)),
}


@pytest.mark.parametrize("make", TRANSFORMED.values(), ids=TRANSFORMED)
def test_layers_that_are_built_under_a_transformation_are_refused(
    make: Callable[[], nnx.Module],
) -> None:
    message = r"one by one, not under jax\.vmap, .* or nnx\.eval_shape, got built='Linear'"
    with pytest.raises(ValueError, match=message):
        seed_parameters(make, 0)


def test_stacks_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nnx\.vmap or nnx\.scan stacks them"):
        seed_parameters(TRANSFORMED["vmap"](), 0)


def test_shapes_without_values_are_refused() -> None:
    abstract = nnx.eval_shape(lambda: linear.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"seeded one by one, .* got built='Linear'"):
        seed_parameters(abstract, 0)
    with pytest.raises(ValueError, match=r"seeded one by one, .* got built='Linear'"):
        nnx.jit(lambda m: seed_parameters(m, 0))(MAKERS["Linear"]())


def broken(module: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
    del tensors, generator
    return {} if isinstance(module, linear.Linear) else {"wait": np.zeros(3)}


def test_a_rule_that_fails_leaves_a_given_model_as_it_was() -> None:
    model = Net()
    before = values(model)
    with pytest.raises(ValueError, match=r"draw tensors of the layer: .*, got drawn=\['wait'\]"):
        seed_parameters(model, 0, then=broken)
    assert same(before, values(model))


def test_a_function_must_return_a_module() -> None:
    with pytest.raises(ValueError, match="must return a module, got type='int'"):
        seed_parameters(lambda: 3, 0)
    with pytest.raises(ValueError, match=r"nnx\.Module, or a function that builds one, got type="):
        seed_parameters(3, 0)


RULES: dict[str, tuple[object, str]] = {
    "a name": ("relu", "then must be a function"),
    "a list": ([layer_rule()], "then must be a function"),
    "by name": ({"Net": layer_rule()}, "then must be a function"),
    "none by type": ({}, "then must be a function"),
    "not called": (layer_rule, r"then must be .*then=torch_rng\.layer_rule\('relu'\)"),
    "nothing returned": (lambda *_: None, "return tensors by name, .*, got NoneType of Linear"),
    "another shape": (
        lambda _, tensors, __: {n: np.zeros(7) for n in tensors},
        r"must draw weight in the shape \(4, 3\), got drawn=\(7,\) and layer='Linear'",
    ),
    "a type that is not there": (
        {Net: layer_rule(), Holder: layer_rule()},
        r"types of modules of the model, got missing=\['Holder'\]",
    ),
}


@pytest.mark.parametrize(("then", "message"), RULES.values(), ids=RULES)
def test_rules_that_do_not_fit_are_named(then: object, message: str) -> None:
    for model in (Net, Net()):
        with pytest.raises(ValueError, match=message):
            seed_parameters(model, 0, then=then)


class Subnet(Net):
    """A net whose base ends its constructor by drawing again."""


def test_rules_by_type_serve_subclasses() -> None:
    expected = values(seed_parameters(Net, 0, then=layer_rule()))
    assert same(values(seed_parameters(Subnet, 0, then={Net: layer_rule()})), expected)
    assert same(values(seed_parameters(Subnet(), 0, then={Net: layer_rule()})), expected)


def test_a_rule_that_fails_puts_statistics_and_numpy_values_back() -> None:
    model = nnx.List([norms.BatchNorm(2), linear.Linear(2, 2, rngs=RNGS)])
    model[1].bias.set_value(np.ones(2, np.float32))

    def rule(layer: nnx.Module, _: Tensors, generator: Generator) -> Tensors:
        if isinstance(layer, linear.Linear):
            raise RuntimeError("on purpose")
        return {"running_mean": generator.normal(2)}

    with pytest.raises(RuntimeError, match="on purpose"):
        seed_parameters(model, 0, then=rule)
    assert model[0].mean[...].tolist() == [0, 0]
    assert np.asarray(model[1].bias[...]).tolist() == [1, 1]
