"""Norms are replaced in a new model, which shares only the arrays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import blocks, norms, surgery
from flaxstab.norms._kinds import NORMS
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_twins, image
from parity_tests.support.normed import CONVERSIONS, C, Net, X, drawn, norms_of
from parity_tests.test_contracts import exported
from parity_tests.test_surgery import mode

__all__ = ["mode"]  # the fixture

PATHS = ["norm", "a_list.0", "a_list.1.in_dict", "plain.0.k.0", "net.layers.0", "other"]


def contents(model: nnx.Module) -> list[tuple[object, ...]]:
    """Every node with its attributes, by identity, and every variable with its array."""
    found: list[tuple[object, ...]] = []
    for path, node in nnx.iter_graph(model, graph=True):
        inside = node.get_value() if isinstance(node, nnx.Variable) else None
        attributes = vars(node) if isinstance(node, nnx.Pytree) else {}
        found.append((path, node, inside, *attributes.items()))
    return found


def same(a: list[tuple[object, ...]], b: list[tuple[object, ...]]) -> bool:
    def alike(x: object, y: object) -> bool:
        if isinstance(x, tuple) and isinstance(y, tuple):
            return len(x) == len(y) and all(map(alike, x, y))
        return x is y or (isinstance(x, int | str | float) and x == y)

    return len(a) == len(b) and all(map(alike, a, b))


def test_a_change_of_a_model_is_seen() -> None:
    for change in (
        lambda m: setattr(m, "norm", norms.BatchNorm(C)),
        lambda m: setattr(m.norm, "eps", 1e-3),
        lambda m: m.norm.mean.set_value(jnp.ones(C)),
        lambda m: m.plain.append(1),
    ):
        model = Net()
        before = contents(model)
        assert same(contents(model), before)
        change(model)
        assert not same(contents(model), before)


def test_every_norm_of_the_package_is_seen_by_surgery() -> None:
    assert {kind for kind in exported() if kind.__name__.endswith("Norm")} <= set(NORMS)


@pytest.mark.usefixtures("mode")
def test_make_sees_every_norm_once_and_decides() -> None:
    model, seen = Net(), []
    before = contents(model)

    def make(layer: nnx.Module) -> nnx.Module | None:
        seen.append(type(layer))
        return norms.RMSNorm(C) if isinstance(layer, norms.BatchNorm) else None

    new = surgery.replace_norms(model, make)
    assert same(contents(model), before)
    assert sorted(norms_of(new)) == sorted(PATHS)
    assert sorted(map(str, seen)) == sorted(str(type(n)) for n in norms_of(model).values())
    for path, layer in norms_of(model).items():
        expected = norms.RMSNorm if isinstance(layer, norms.BatchNorm) else type(layer)
        assert type(norms_of(new)[path]) is expected
    assert isinstance(new.plain, list)
    assert new.plain[0]["k"][1] == 3
    assert new(X).shape == X.shape


every_conversion = pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)


@pytest.mark.usefixtures("mode")
@every_conversion
def test_a_conversion_is_pure_and_shares_the_arrays(
    convert: Callable[[nnx.Module], nnx.Module],
) -> None:
    model = drawn(Net())
    model.other.scale = nnx.Param(np.ones(C, np.float32))  # NumPy's: changes in place
    model.frozen = drawn(norms.FrozenBatchNorm(C))
    before = contents(model)
    new = convert(model)
    assert same(contents(model), before)
    held = {path: v for path, v in nnx.iter_graph(model, graph=True) if isinstance(v, nnx.Variable)}
    carried = 0
    for path, variable in nnx.iter_graph(new, graph=True):
        if path in held and path[-1] != "count":
            assert variable is not held[path]
            if isinstance(held[path].get_value(), jax.Array):
                assert variable.get_value() is held[path].get_value()
            carried += 1
            variable[...] = variable[...] + 1
    assert carried >= 13
    assert same(contents(model), before)
    assert (model.other.scale[...] == 1).all()


class Shared(nnx.Module):
    def __init__(self) -> None:
        self.b = norms.BatchNorm(C)
        self.a = nnx.List([self.b])
        self.c = nnx.data((self.b,))
        self.itself = self


@pytest.mark.usefixtures("mode")
def test_a_layer_that_is_held_twice_is_replaced_once_and_stays_shared() -> None:
    made = []

    def make(layer: nnx.Module) -> nnx.Module:
        made.append(surgery.batch_to_group()(layer))
        return made[-1]

    new = surgery.replace_norms(Shared(), make)
    assert len(made) == 1
    assert new.b is new.a[0] is new.c[0] is made[0]
    assert new.itself is new


def test_variables_that_norms_share_stay_shared() -> None:
    model = nnx.List([norms.BatchNorm(C), norms.BatchNorm(C)])
    model[1].scale = model[0].scale
    new = surgery.replace_norms(model, surgery.batch_to_layer())
    assert new[0].scale is new[1].scale
    assert new[0].scale is not model[0].scale
    frozen = surgery.freeze_batch_norm(model)
    grouped = surgery.replace_norms(frozen, surgery.batch_to_group())
    for other in (frozen, surgery.unfreeze_batch_norm(frozen), grouped):
        assert other[0].scale is other[1].scale
        assert other[0].bias is not other[1].bias


@pytest.mark.usefixtures("mode")
def test_a_maker_that_raises_names_the_layer_and_changes_nothing() -> None:
    model, calls = Net(), []
    before = contents(model)

    def make(layer: nnx.Module) -> nnx.Module:
        layer.eps = 1.0
        calls.append(layer)
        if len(calls) == 3:
            raise ValueError("no")
        return norms.GroupNorm(1, C)

    third = list(norms_of(model))[2]
    with pytest.raises(ValueError, match=f"'{third}' .*Norm: no"):
        surgery.replace_norms(model, make)
    assert same(contents(model), before)


def test_the_root_may_be_a_norm() -> None:
    layer = drawn(norms.BatchNorm(C))
    new = surgery.replace_norms(layer, surgery.batch_to_group(2))
    assert isinstance(new, norms.GroupNorm)
    assert new.scale.get_value() is layer.scale.get_value()
    assert new.scale is not layer.scale


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda: surgery.freeze_batch_norm(3), "model must be an nnx.Module"),
        (lambda: surgery.batch_to_group(0), "num_groups must be an integer of at least 1"),
        (
            lambda: surgery.replace_norms(Net(), lambda _: 3),
            "make must return an nnx.Module or None, got int for 'a_list.0' BatchNorm",
        ),
        (
            lambda: surgery.freeze_batch_norm(Net(track_running_stats=False)),
            "'norm' BatchNorm: only running statistics can be frozen. Build the layer with "
            "track_running_stats=True",
        ),
        (
            lambda: surgery.unfreeze_batch_norm(norms.FrozenBatchNorm(C), 1.5),
            r"momentum must lie in \[0, 1\] or be None",
        ),
        (
            lambda: surgery.freeze_batch_norm(nnx.BatchNorm(C, axis=1, rngs=nnx.Rngs(0))),
            "features must come last, got axis=1",
        ),
        (
            lambda: surgery.convert_sync_batch_norm(Net(), "data"),
            r"'net.layers.0' BatchNorm: only flaxstab's BatchNorm can be converted, "
            "got axis_name=None",
        ),
        (
            lambda: surgery.convert_sync_batch_norm(Net(), ["data"]),
            "axis_name must be a name, a tuple of names or None",
        ),
    ],
)
def test_wrong_arguments_are_refused(convert: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert()


# Batch to group, batch to layer.


KINDS: dict[str, Callable[[], nnx.Module]] = {
    "batch": lambda: norms.BatchNorm(6, 1e-3, param_dtype=jnp.float64),
    "batch without bias": lambda: norms.BatchNorm(6, 1e-3, bias=False, param_dtype=jnp.float64),
    "batch without affine": lambda: norms.BatchNorm(6, 1e-3, affine=False),
    "ghost": lambda: norms.GhostBatchNorm(6, 2, 1e-3, param_dtype=jnp.float64),
    "frozen": lambda: norms.FrozenBatchNorm(6, 1e-3, param_dtype=jnp.float64),
    "nnx": lambda: nnx.BatchNorm(6, epsilon=1e-3, param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
    "nnx without scale": lambda: nnx.BatchNorm(
        6, epsilon=1e-3, use_scale=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    ),
}


def weights_of(layer: nnx.Module) -> list[torch.Tensor | None]:
    pair = (layer.scale, layer.bias)
    return [None if v is None else torch.tensor(np.asarray(v[...])) for v in pair]


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_converted_layers_are_torchs_with_the_same_weights(build: Callable[[], nnx.Module]) -> None:
    with jax.enable_x64(True):
        layer = drawn(build())
        weights = weights_of(layer)
        group = surgery.replace_norms(layer, surgery.batch_to_group(4))  # 4 does not divide 6
        assert group.num_groups == 3
        functional = torch.nn.functional
        torchs = image(lambda x: functional.group_norm(x, 3, *weights, eps=1e-3))
        assert_twins(group, torchs, values(2, 3, 2, 6))
        per_position = surgery.replace_norms(layer, surgery.batch_to_layer())
        assert_twins(
            per_position, lambda x: functional.layer_norm(x, (6,), *weights, eps=1e-3),
            values(2, 3, 2, 6),
        )  # fmt: skip
        for new in (group, per_position):
            learned = {n: v for n, v in vars(new).items() if isinstance(v, nnx.Variable)}
            assert {type(v) for v in learned.values()} <= {nnx.Param}
            assert len(learned) == sum(w is not None for w in weights)


@pytest.mark.parametrize(
    ("channels", "wanted", "groups"), [(64, 32, 32), (48, 32, 24), (7, 32, 7), (7, 6, 1), (6, 1, 1)]
)
def test_the_groups_are_the_largest_number_that_divides(
    channels: int, wanted: int, groups: int
) -> None:
    make = surgery.batch_to_group(wanted)
    assert make(norms.BatchNorm(channels)).num_groups == groups
    assert (wanted != 32) or surgery.batch_to_group()(norms.BatchNorm(channels)).num_groups


@pytest.mark.parametrize(
    "convert", [CONVERSIONS["group"], CONVERSIONS["layer"], CONVERSIONS["freeze"]]
)
def test_dtypes_and_metadata_are_carried_over(convert: Callable[[nnx.Module], nnx.Module]) -> None:
    layer = norms.BatchNorm(C, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    layer.scale = nnx.Param(layer.scale[...], role="gain")
    new = convert(layer)
    assert new(X).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(new))} == {jnp.dtype(jnp.float16)}
    assert new.scale.get_metadata()["role"] == "gain"


@pytest.mark.usefixtures("mode")
def test_a_resnet_block_with_group_norms_trains_and_starts_at_zero() -> None:
    block = blocks.BasicBlock(C, C, rngs=nnx.Rngs(0))
    new = surgery.replace_norms(block, surgery.batch_to_group(2))
    assert {type(n) for n in norms_of(new).values()} == {norms.GroupNorm}
    assert surgery.zero_last_gamma(new) == ["bn2.bias", "bn2.scale"]
    assert (block.bn2.scale[...] == 1).all()
    np.testing.assert_array_equal(new(X), nnx.relu(X))

    @nnx.jit
    def gradients(model: nnx.Module, x: jax.Array) -> nnx.State:
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        return jax.grad(lambda p: jnp.sum(nnx.merge(graph, p, rest, copy=True)(x) ** 2))(params)

    found = gradients(new, X)
    assert found["bn2"]["scale"][...].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
