"""``torch_rng.seed_parameters``: the order of construction. Needs no torch."""

import copy
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxstab import blocks, linear, norms
from flaxstab.blocks._residual import Add
from flaxstab.torch_rng import Generator, Tensors, layer_rule, seed_parameters
from flaxstab.torch_rng._layers import DRAWS, SILENT
from flaxstab.torch_rng._order import is_as_built
from parity_tests.support.seeding import MAKERS, REBUILT, RNGS, Holder, Net, jitted, same, values


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
    message = r"order of their construction, got a Net that NNX has rebuilt .*lambda: Net"
    with pytest.raises(ValueError, match=message):
        seed_parameters(model, 0)
    assert same(before, values(model))


def test_a_part_that_nnx_has_rebuilt_is_refused() -> None:
    model = nnx.List([Net(), Net()])
    jitted(model[0])
    message = "order of their construction, got a Net at '0' that NNX"
    with pytest.raises(ValueError, match=message):
        seed_parameters(model, 0)


def test_attributes_that_are_added_later_prove_nothing() -> None:
    model = REBUILT["jax.tree"](Net())
    for _, module in nnx.iter_modules(model):
        module.b_tag, module.a_tag = 1, 2
    with pytest.raises(ValueError, match="order of their construction"):
        seed_parameters(model, 0)


def test_rules_for_norms_need_the_order_of_norms() -> None:
    def rule(_: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
        return {name: generator.normal(t.shape) for name, t in tensors.items()}

    def make() -> nnx.Module:
        return nnx.Dict(second=linear.Linear(2, 2, rngs=RNGS), first=norms.LayerNorm(2))

    seed_parameters(make(), 0, then=rule)
    seed_parameters(nnx.clone(make()), 0)
    with pytest.raises(ValueError, match="order of their construction, got a Dict that NNX"):
        seed_parameters(nnx.clone(make()), 0, then=rule)


class Placeholder(nnx.Module):
    """An attribute that is None first: PyTorch counts it by its second time."""

    def __init__(self) -> None:
        self.first = nnx.data(None)
        self.second = linear.Linear(2, 2, rngs=RNGS)
        self.first = linear.Linear(2, 2, rngs=RNGS)


def test_rules_need_layers_that_are_built_in_the_order_of_their_attributes() -> None:
    generator, found = Generator(0), seed_parameters(Placeholder, 0)
    expected = generator.uniform((2, 2), -(2**-0.5), 2**-0.5)
    np.testing.assert_array_equal(found.second.kernel[...].T, expected)
    for then in (layer_rule(), {Placeholder: layer_rule()}):
        with pytest.raises(ValueError, match="then= needs layers in one order, got a Linear at"):
            seed_parameters(Placeholder, 0, then=then)


def test_a_rebuilt_model_with_one_layer_needs_no_order() -> None:
    expected = seed_parameters(lambda: Holder(MAKERS["Linear"]), 0)
    found = seed_parameters(nnx.clone(Holder(MAKERS["Linear"])), 0)
    assert same(values(expected), values(found))


def test_copies_that_the_function_makes_draw_nothing() -> None:
    def make() -> nnx.Module:
        layer = linear.Linear(3, 3, rngs=RNGS)
        return nnx.List([layer, nnx.clone(layer), copy.deepcopy(layer), MAKERS["Linear"]()])

    generator, found = Generator(0), seed_parameters(make, 0)
    first = generator.uniform((3, 3), -(3**-0.5), 3**-0.5)
    for layer in found[:3]:
        np.testing.assert_array_equal(layer.kernel[...].T, first)
    generator.uniform(3, -(3**-0.5), 3**-0.5)
    last = generator.uniform((3, 2), -(2**-0.5), 2**-0.5)
    np.testing.assert_array_equal(found[3].kernel[...].T, last)
    copied = seed_parameters(lambda: nnx.clone(Net()), 0)
    assert same(values(copied), values(seed_parameters(Net, 0)))


def test_layers_that_were_built_before_are_refused() -> None:
    given = Net()
    message = "function must build every layer itself, got a .* at '.*' that it has not"
    with pytest.raises(ValueError, match=message):
        seed_parameters(lambda: given, 0)


def test_modes_and_values_do_not_touch_the_order() -> None:
    model, expected = Net(), seed_parameters(Net, 0)
    model.eval()
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    seed_parameters(model, 0)
    assert same(values(model.stem), values(expected.stem))
    assert same(values(model.layers), values(expected.layers))


def test_elements_of_a_list_count_by_their_places() -> None:
    model = nnx.List([nnx.Linear(2, 2, rngs=RNGS) for _ in range(3)])
    model[0], model[2] = model[2], model[0]
    vars(model)["1"] = vars(model).pop("1")  # as lists leave it behind: last of all
    first = seed_parameters(lambda: nnx.Linear(2, 2, rngs=RNGS), 0)
    assert same(values(seed_parameters(model, 0)[0]), values(first))
    generator = Generator(0)
    generator.uniform((2, 2))
    generator.uniform(2)
    second = generator.uniform((2, 2), -(2**-0.5), 2**-0.5)
    np.testing.assert_array_equal(model[1].kernel[...].T, second)


def test_plain_containers_are_walked() -> None:
    class Plain(nnx.Module):
        def __init__(self) -> None:
            made = [linear.Linear(2, 2, rngs=RNGS) for _ in range(3)]
            self.parts = nnx.data({"z": [made[0]], "a": (made[1], made[2])})

    generator, model = Generator(0), seed_parameters(Plain(), 0)
    for layer in (model.parts["z"][0], *model.parts["a"]):
        expected = generator.uniform((2, 2), -(2**-0.5), 2**-0.5)
        np.testing.assert_array_equal(layer.kernel[...].T, expected)
        generator.uniform(2)


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
        for build in (Net, lambda: seed_parameters(Net, 1)):
            thread = threading.Thread(target=lambda: others.append(build()))  # noqa: B023
            thread.start()
            thread.join(timeout=60)
        return Net()

    expected = [values(seed_parameters(Net, seed)) for seed in (0, 1)]
    assert same(values(seed_parameters(make, 0)), expected[0])
    plain, seeded = map(values, others)
    assert same(seeded, expected[1])
    assert not same(plain, expected[0])
    assert not same(plain, expected[1])


def test_types_that_draw_and_types_that_do_not_are_different() -> None:
    assert not set(DRAWS) & set(SILENT)


@pytest.mark.parametrize("silent", SILENT, ids=lambda t: t.__module__ + "." + t.__name__)
def test_silent_layers_stay_as_they_are(silent: type[nnx.Module]) -> None:
    arguments = (2, 4) if silent in (norms.GroupNorm, norms.GhostBatchNorm) else (4,)
    arguments = (blocks.Residual(layer_scale=0.5), 4) if silent is Add else arguments
    options = {"num_groups": 2} if silent is nnx.GroupNorm else {}
    if silent is norms.InstanceNorm:
        options = {"affine": True}

    def make() -> nnx.Module:
        return nnx.List([silent(*arguments, **options, rngs=RNGS), MAKERS["Linear"]()])

    found, expected = seed_parameters(make, 0), make()
    assert values(found[0]) or silent is norms.FrozenBatchNorm  # which has no parameters
    assert same(values(found[0]), values(expected[0]))
    assert same(values(found[1]), values(seed_parameters(MAKERS["Linear"], 0)))
