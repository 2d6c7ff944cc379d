"""``torch_rng.seed_parameters``: the order of construction, and what is refused. Needs no torch."""

import copy
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxstab import interop, linear, norms
from flaxstab.torch_rng import Generator, Tensors, register, seed_parameters
from flaxstab.torch_rng._layers import DRAWS
from flaxstab.torch_rng._order import is_as_built

RNGS = nnx.Rngs(0)


class Net(nnx.Module):
    """Attributes in no alphabetical order."""

    def __init__(self) -> None:
        self.stem = linear.Linear(3, 4, rngs=RNGS)
        self.norm = norms.LayerNorm(4)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=RNGS) for _ in range(11)])
        self.act = nnx.PReLU()
        self.drop = nnx.Dropout(0.1, rngs=RNGS)


def values(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def jitted(model: nnx.Module) -> nnx.Module:
    nnx.jit(lambda m: jax.tree.leaves(nnx.state(m)))(model)
    return model


REBUILT: dict[str, Callable[[nnx.Module], nnx.Module]] = {
    "split and merge": lambda model: nnx.merge(*nnx.split(model)),
    "clone": nnx.clone,
    "view": lambda model: nnx.view(model, deterministic=True),
    "jit": jitted,
    "deepcopy": copy.deepcopy,
    "jax.tree": lambda model: jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model)),
}

MAKERS: dict[str, Callable[[], nnx.Module]] = {
    "Linear": lambda: linear.Linear(2, 3, rngs=RNGS),
    "Linear, no bias": lambda: linear.Linear(2, 3, bias=False, rngs=RNGS),
    "Conv": lambda: linear.Conv(2, 3, 3, rngs=RNGS),
    "ConvTranspose": lambda: linear.ConvTranspose(2, 3, 3, rngs=RNGS),
    "Embed": lambda: linear.Embed(2, 3, rngs=RNGS),
    "nnx.Linear": lambda: nnx.Linear(2, 3, rngs=RNGS),
    "nnx.LinearGeneral": lambda: nnx.LinearGeneral(2, 3, rngs=RNGS),
    "nnx.Conv": lambda: nnx.Conv(2, 3, (3,), rngs=RNGS),
    "nnx.ConvTranspose": lambda: nnx.ConvTranspose(2, 3, (3,), rngs=RNGS),
    "nnx.Embed": lambda: nnx.Embed(2, 3, rngs=RNGS),
    "nnx.MultiHeadAttention": lambda: nnx.MultiHeadAttention(2, 4, rngs=RNGS),
    "nnx.LSTMCell": lambda: nnx.LSTMCell(2, 3, rngs=RNGS),
    "nnx.OptimizedLSTMCell": lambda: nnx.OptimizedLSTMCell(2, 3, rngs=RNGS),
    "nnx.SimpleCell": lambda: nnx.SimpleCell(2, 3, rngs=RNGS),
}


class Holder(nnx.Module):
    """A layer that something can be done to."""

    def __init__(self, make: Callable[[], nnx.Module]) -> None:
        self.layer = make()
        self.drop = nnx.Dropout(0.1, rngs=RNGS)


def test_every_type_that_draws_numbers_has_a_maker() -> None:
    types = {t for t in DRAWS if t.__module__.startswith(("flax.", "flaxstab."))}
    assert {type(make()) for make in MAKERS.values()} == types - {nnx.PReLU}


@pytest.mark.parametrize("rebuild", REBUILT.values(), ids=REBUILT)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_layer_shows_whether_nnx_has_rebuilt_it(
    make: Callable[[], nnx.Module], rebuild: Callable[[nnx.Module], nnx.Module]
) -> None:
    holder = Holder(make)
    assert is_as_built(holder.layer)
    assert not is_as_built(rebuild(holder).layer)


@pytest.mark.parametrize("rebuild", REBUILT.values(), ids=REBUILT)
def test_a_model_that_nnx_has_rebuilt_is_refused_and_stays_as_it_is(
    rebuild: Callable[[nnx.Module], nnx.Module],
) -> None:
    model = rebuild(Net())
    before = values(model)
    message = r"order of their construction, got '.*' Linear that NNX has rebuilt .*lambda: Net"
    with pytest.raises(ValueError, match=message):
        seed_parameters(model, 0)
    assert same(before, values(model))


def test_a_rebuilt_model_with_one_layer_needs_no_order() -> None:
    expected = seed_parameters(lambda: Holder(MAKERS["Linear"]), 0)
    found = seed_parameters(nnx.clone(Holder(MAKERS["Linear"])), 0)
    assert same(values(expected), values(found))


def test_a_model_that_the_function_rebuilds_is_refused() -> None:
    with pytest.raises(ValueError, match="build every layer and leave it as built, got '"):
        seed_parameters(lambda: nnx.clone(Net()), 0)
    given = Net()
    with pytest.raises(ValueError, match="build every layer and leave it as built"):
        seed_parameters(lambda: given, 0)


def test_modes_and_values_do_not_touch_the_order() -> None:
    model, expected = Net(), seed_parameters(Net, 0)
    model.eval()
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    seed_parameters(model, 0)
    assert same(values(model.stem), values(expected.stem))
    assert same(values(model.layers), values(expected.layers))


def test_an_element_put_into_a_list_counts_by_its_place() -> None:
    model = nnx.List([nnx.Linear(2, 2, rngs=RNGS), nnx.Linear(2, 2, rngs=RNGS)])
    model.insert(0, nnx.Linear(2, 2, rngs=RNGS))
    first = seed_parameters(lambda: nnx.Linear(2, 2, rngs=RNGS), 0)
    assert same(values(seed_parameters(model, 0)[0]), values(first))


def test_norms_keep_what_their_constructors_gave_them() -> None:
    def make() -> nnx.Module:
        norm = nnx.LayerNorm(3, scale_init=nnx.initializers.zeros, rngs=RNGS)
        return nnx.Sequential(norm, nnx.Linear(3, 2, rngs=RNGS))

    assert not values(seed_parameters(make, 0).layers[0])[1].any()
    assert not values(seed_parameters(make(), 0).layers[0])[1].any()


def test_layers_that_share_a_parameter_are_refused_as_they_are() -> None:
    model = nnx.List([linear.Embed(5, 4, rngs=RNGS), linear.Embed(5, 4, rngs=RNGS)])
    model[1].embedding = model[0].embedding
    message = r"share a parameter draw it twice, got shared=\['0.embedding'\]\. Pass a function"
    with pytest.raises(ValueError, match=message):
        seed_parameters(model, 0)


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
    message = r"must belong to a layer with a rule, got left=\['.*'\]\. Call .*torch_rng\.register"
    with pytest.raises(ValueError, match=message):
        seed_parameters(model, 0)


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
    message = r"one by one, not under jax\.vmap, jax\.jit or nnx\.scan, got traced='Linear'"
    with pytest.raises(ValueError, match=message):
        seed_parameters(make, 0)


def test_stacks_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nnx\.vmap or nnx\.scan stacks them"):
        seed_parameters(TRANSFORMED["vmap"](), 0)


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
    with pytest.raises(ValueError, match="must return a module, got int"):
        seed_parameters(lambda: 3, 0)


def test_constructors_are_left_as_they_were() -> None:
    before = {t: (vars(t).get("__init__"), t.__init__) for t in DRAWS}

    def fail() -> nnx.Module:
        linear.Linear(2, 2, rngs=RNGS)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        seed_parameters(fail, 0)
    seed_parameters(Net, 0)
    assert before == {t: (vars(t).get("__init__"), t.__init__) for t in DRAWS}


def test_seeding_inside_of_a_seeded_function_is_refused() -> None:
    with pytest.raises(ValueError, match="seeded one after the other"):
        seed_parameters(lambda: seed_parameters(Net, 1), 0)
    seed_parameters(Net, 0)


def test_other_threads_neither_draw_nor_are_drawn() -> None:
    others: list[nnx.Module] = []

    def make() -> nnx.Module:
        thread = threading.Thread(target=lambda: others.append(Net()))
        thread.start()
        thread.join()
        return Net()

    plain = [np.asarray(layer.kernel[...]) for layer in Net().layers]
    found = values(seed_parameters(make, 0))
    assert same(found, values(seed_parameters(Net, 0)))
    drawn = np.asarray(seed_parameters(Net, 0).layers[0].kernel[...])
    assert not np.array_equal(others[0].layers[0].kernel[...], drawn)
    assert len(plain) == len(others[0].layers)
