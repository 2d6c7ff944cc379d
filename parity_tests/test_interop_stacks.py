"""Stacked layers: apart on the way out, together on the way in, under PyTorch's names."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxstab import dropout, interop, linear, models, norms
from flaxstab.interop import _rules, _stacks
from parity_tests.support.cases import values
from parity_tests.test_interop import state_of

C = 3


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_rules, "RULES", dict(_rules.RULES))
    monkeypatch.setattr(_stacks, "STACKED", set())
    return


class Block(nnx.Module):
    """All that a block may hold: parameters, statistics, a bare parameter, random streams."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = norms.BatchNorm(C)
        self.linear = linear.Linear(C, C, rngs=rngs)
        self.drop = dropout.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.linear(self.norm(x)))


def several(number: int, rngs: nnx.Rngs) -> list[nnx.Module]:
    return [Block(rngs) for _ in range(number)]


def filled(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors of other numbers, all of them different."""
    return {
        name: values(*array.shape, seed=seed).astype(array.dtype)
        for seed, (name, array) in enumerate(tensors.items())
    }


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


class Net(nnx.Module):
    """Chains with a part before, between and behind stacks."""

    def __init__(self, scan: bool) -> None:
        rngs = nnx.Rngs(0)
        one = linear.Linear(C, C, rngs=rngs)
        blocks = [*several(2, rngs), one, *several(3, rngs), linear.Linear(C, C, False, rngs=rngs)]
        self.first = models.Chain(blocks, scan=scan)
        self.alone = models.Chain(several(1, rngs), scan=scan)
        self.head = linear.Linear(C, 2, rngs=rngs)


def test_a_stacked_model_has_the_tensors_of_its_blocks() -> None:
    scanned, plain = Net(scan=True), Net(scan=False)
    assert [type(part).__name__ for part in scanned.first] == ["Stack", "Linear", "Stack", "Linear"]
    tensors = filled(interop.state_dict(plain))
    assert "first.6.weight" in tensors
    assert "first.5.norm.num_batches_tracked" in tensors
    report = interop.load_state_dict(scanned, tensors)
    assert report.complete
    assert set(report.loaded) == tensors.keys()
    assert_equal(interop.state_dict(scanned), tensors)
    assert_equal(interop.state_dict(models.unstacked(scanned)), tensors)
    interop.load_state_dict(plain, tensors)
    assert_equal(interop.state_dict(models.stacked(plain)), tensors)
    entry = next(e for e in report.entries if e.name == "first.4.linear.weight")
    assert entry.variable == "first.2.block.linear.kernel[1]"
    assert entry.variable_shapes == ((C, C),)
    assert not report.warnings


def test_models_own_stacks_come_apart() -> None:
    size = models.ResNetSize(block="preact", layers=(1, 3), width=1)

    scanned = models.ResNet(size, 2, scan=True, rngs=nnx.Rngs(0))
    plain = models.unstacked(scanned)
    assert_equal(interop.state_dict(scanned), interop.state_dict(plain))
    tensors = filled(interop.state_dict(plain))
    assert interop.load_state_dict(scanned, tensors).complete
    assert_equal(interop.state_dict(models.unstacked(scanned)), tensors)


def test_a_stack_by_itself_is_a_list_of_blocks() -> None:
    blocks = several(2, nnx.Rngs(0))
    assert_equal(interop.state_dict(models.Stack(blocks)), interop.state_dict(nnx.List(blocks)))


def test_of_a_stack_what_fits_is_loaded_and_the_rest_stays() -> None:
    stack = models.Stack(several(3, nnx.Rngs(0)))
    before, given = interop.state_dict(stack), filled(interop.state_dict(stack))
    del given["1.linear.weight"]
    given["2.norm.bias"] = np.ones(C + 1, "float32")
    report = interop.load_state_dict(stack, given, strict=False)
    assert report.missing == ("1.linear.weight",)
    assert report.mismatched == (f"2.norm.bias ({C + 1},) for ({C},)",)
    after = interop.state_dict(stack)
    assert after["1.linear.weight"].tobytes() == before["1.linear.weight"].tobytes()
    assert after["2.norm.bias"].tobytes() == before["2.norm.bias"].tobytes()
    assert after["0.linear.weight"].tobytes() == given["0.linear.weight"].tobytes()
    assert after["2.linear.weight"].tobytes() == given["2.linear.weight"].tobytes()


def test_gradients_of_a_stack_have_the_names_of_its_blocks() -> None:
    stack = models.Stack(several(2, nnx.Rngs(0)))
    named = interop.Naming(stack).tensors(nnx.state(stack, nnx.Param))
    everything = interop.state_dict(stack)
    assert set(named) == {n for n in everything if "running" not in n and "batches" not in n}
    for name, array in named.items():
        assert array.tobytes() == everything[name].tobytes()


class Mapped(nnx.Module):
    """Blocks that nnx.vmap makes and nnx.scan runs."""

    def __init__(self, kind: Callable[..., nnx.Module] = Block, number: int = 2) -> None:
        rngs = nnx.Rngs(0)
        make = nnx.vmap(kind, in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=number)(make)(rngs)
        self.head = linear.Linear(C, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block: nnx.Module, x: jax.Array) -> jax.Array:
            return block(x)

        self.blocks.eval()
        return self.head(run(self.blocks, x))


class Listed(nnx.Module):
    def __init__(self) -> None:
        self.blocks = nnx.List(several(2, nnx.Rngs(0)))
        self.head = linear.Linear(C, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            block.eval()
            x = block(x)
        return self.head(x)


def test_what_nnx_vmap_builds_is_a_list_of_a_registered_type() -> None:
    interop.register_stacked(Block)
    mapped, listed = Mapped(), Listed()
    tensors = filled(interop.state_dict(listed))
    tensors |= {n: np.abs(a) for n, a in tensors.items() if "running_var" in n}
    for model in (mapped, listed):
        report = interop.load_state_dict(model, tensors)
        assert report.complete
        assert not report.warnings
        assert_equal(interop.state_dict(model), tensors)
    x = jnp.asarray(values(4, C), jnp.float32)
    np.testing.assert_allclose(mapped(x), listed(x), rtol=8 * float(jnp.finfo(x.dtype).eps))


def test_of_an_unknown_type_each_layer_is_a_list_and_the_report_says_so() -> None:
    tensors = interop.state_dict(Mapped())
    assert list(tensors)[:3] == [
        "blocks.linear.0.weight", "blocks.linear.0.bias", "blocks.linear.1.weight"
    ]  # fmt: skip
    model, given = Mapped(), filled(tensors)
    report = interop.load_state_dict(model, given)
    assert_equal(interop.state_dict(model), given)
    (warning,) = report.warnings
    assert warning.modules[:2] == ("blocks.linear.0", "blocks.linear.1")
    assert "register_stacked for the type" in warning.text


class Deep(nnx.Module):
    """Two stacks, one in the other."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = models.Stack([Block(rngs) for _ in range(2)])


class Own(nnx.Module):
    """A bare parameter, whose rule reads the module."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = linear.Linear(C, C, rngs=rngs)
        self.gamma = nnx.Param(jax.random.normal(rngs.params(), (C, 2)))


def carry_own() -> None:
    interop.register(
        Own,
        to_torch=lambda module: {"gain": np.asarray(module.gamma[...]).T},
        to_flax=lambda _, tensors: {"gamma": tensors["gain"].T},
    )


@pytest.mark.parametrize("wrap", ["stack", "vmap"])
def test_a_stack_of_stacks_comes_apart_too(wrap: str) -> None:
    interop.register_stacked(Deep)
    rngs = nnx.Rngs(0)
    model: nnx.Module = models.Stack([Deep(rngs) for _ in range(3)])
    if wrap == "vmap":
        model = nnx.List([nnx.vmap(Deep)(rngs.split(3))])
    tensors = filled(interop.state_dict(model))
    prefix = "" if wrap == "stack" else "0."
    starts = dict.fromkeys(name.split("norm")[0].split("linear")[0] for name in tensors)
    assert list(starts) == [f"{prefix}{i}.inner.{j}." for i in range(3) for j in range(2)]
    assert interop.load_state_dict(model, tensors).complete
    assert_equal(interop.state_dict(model), tensors)
    part = model.block if wrap == "stack" else model[0]
    kernel = np.asarray(part.inner.block.linear.kernel[...])
    assert kernel.shape == (3, 2, C, C)
    assert kernel[2, 1].T.tolist() == tensors[f"{prefix}2.inner.1.linear.weight"].tolist()


@pytest.mark.parametrize("wrap", ["stack", "vmap"])
def test_a_rule_of_the_users_own_sees_one_module_of_a_stack(wrap: str) -> None:
    carry_own()
    interop.register_stacked(Own)
    rngs = nnx.Rngs(0)
    stack = models.Stack([Own(rngs) for _ in range(2)])
    model: nnx.Module = stack if wrap == "stack" else nnx.vmap(Own)(rngs.split(2))
    tensors = filled(interop.state_dict(model))
    assert {n: a.shape for n, a in tensors.items() if "gain" in n} == {
        "0.gain": (2, C), "1.gain": (2, C)
    }  # fmt: skip
    assert interop.load_state_dict(model, tensors).complete
    assert_equal(interop.state_dict(model), tensors)
    gamma = model.block.gamma if wrap == "stack" else model.gamma
    assert gamma[1].T.tolist() == tensors["1.gain"].tolist()


def half_stacked() -> nnx.Module:
    model = linear.Linear(C, C, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(jnp.ones((2, C, C)))
    return nnx.List([model])


def flat() -> nnx.Module:
    model = linear.Linear(C, C, False, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(jnp.ones((C * C,)))
    return nnx.List([model])


def twice_unknown() -> nnx.Module:
    rngs = nnx.Rngs(0)
    return nnx.List([nnx.vmap(nnx.vmap(Block))(rngs.split((2, 3)))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (half_stacked, r"of one layer, or of as many each, got '0\.bias' \(3,\) of Linear"),
        (flat, r"of one layer, or of as many each, got '0\.kernel' \(9,\) of Linear"),
        (twice_unknown, r"which modules are stacked, got '0\.\w+' \w+ with \(2, 3\) before its"),
    ],
)
def test_variables_of_no_clear_stack_are_refused(
    make: Callable[[], nnx.Module], message: str
) -> None:
    model = make()
    before = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    for read in (interop.state_dict, lambda m: interop.load_state_dict(m, {}, strict=False)):
        with pytest.raises(ValueError, match=message):
            read(model)
    after = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert after == before


def test_a_container_with_other_names_than_entries_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            self.stack = models.Stack(several(2, nnx.Rngs(0))).block

    monkeypatch.setattr(_stacks, "CONTAINERS", dict(_stacks.CONTAINERS))
    interop.register_container(Twice, lambda _: {("stack",): ("a", "b", "c")})
    with pytest.raises(ValueError, match=r"a name for each entry .*, got names=3 and entries=2"):
        interop.state_dict(Twice())
    with pytest.raises(ValueError, match="registered once, got module_type='Twice'"):
        interop.register_container(Twice, lambda _: {})


def test_a_stack_has_one_name_among_modules() -> None:
    names = interop.named_modules(Net(scan=True))
    assert isinstance(names["first.3-5"], Block)
    assert isinstance(names["first.0-1.linear"], linear.Linear)
    assert isinstance(names["first.6"], linear.Linear)
    assert isinstance(names["alone.0.linear"], linear.Linear)


def test_a_failure_in_the_last_variable_leaves_a_stack_as_it_was() -> None:
    model = Net(scan=True)
    before, tensors = state_of(model), filled(interop.state_dict(model))

    def refuse(*_: object) -> jax.Array:
        raise RuntimeError("refused")

    model.head.bias.set_metadata(on_set_value=refuse)
    assert list(tensors)[-1] == "head.bias"
    with pytest.raises(RuntimeError, match="refused"):
        interop.load_state_dict(model, tensors)
    assert state_of(model) == before
