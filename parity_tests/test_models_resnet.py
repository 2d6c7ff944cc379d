"""``flaxstab.models``: ResNets beside their twins, by torchvision's names and counts."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import blocks, functional, initializers, interop, linear, models, norms, torch_rng
from flaxstab.torch_rng import Generator, Tensors
from parity_tests.support.block_twins import (
    QUICKLY,
    Pair,
    assert_outcome,
    built,
    drawn,
    our_outcomes,
    torch_outcome,
)
from parity_tests.support.cases import values
from parity_tests.support.kept import kept_bytes
from torch_ref import resnet as theirs

Make = Callable[..., models.ResNet]
COUNTS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
ZEROS = {"kernel_init": initializers.zeros}  # where weights do not matter, or come from the twin


def abstract(make: Callable[[], nnx.Module]) -> nnx.Module:
    return nnx.eval_shape(make)


def parameters(model: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(("depth", "scan"), [*((depth, False) for depth in COUNTS), (50, True)])
def test_parameters_are_as_many_as_torchvisions(depth: int, scan: bool) -> None:
    make = getattr(models, f"resnet{depth}")
    assert parameters(abstract(lambda: make(scan=scan, rngs=nnx.Rngs(0)))) == COUNTS[depth]


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_pre_activation_moves_norms_and_adds_none(depth: int) -> None:
    """One less behind each projection and in the stem, one more at the end; others are wider."""
    model = abstract(lambda: getattr(models, f"preact_resnet{depth}")(rngs=nnx.Rngs(0)))
    with torch.device("meta"):
        kind = "preact" if depth < 50 else "preact_bottleneck"
        twin = theirs.ResNet(kind, theirs.LAYERS[depth])
    assert parameters(model) == sum(p.numel() for p in twin.parameters())


def test_the_cifar_stem_has_3x3_weights_and_no_pooling() -> None:
    model = abstract(lambda: models.resnet18(10, stem="cifar", rngs=nnx.Rngs(0)))
    assert parameters(model) == COUNTS[18] - (7 * 7 - 3 * 3) * 3 * 64 - 513 * 990
    x = jnp.ones((2, 32, 32, 3), jnp.bfloat16)
    assert nnx.eval_shape(lambda m, x: m.layer1(m.conv1(x)), model, x).shape == (2, 32, 32, 64)
    assert nnx.eval_shape(lambda m, x: m(x), model, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", theirs.BLOCKS)
def test_names_and_shapes_are_torchvisions(kind: str) -> None:
    """Those of the twin, whose names test_torch_ref_resnet.py spells out."""
    layers = (2, 1, 1, 2)
    size = models.ResNetSize(block=kind, layers=layers, width=2)
    model = models.ResNet(size, 3, **ZEROS, rngs=nnx.Rngs(0))
    with torch.device("meta"):
        expected = theirs.ResNet(kind, layers, 3, width=2).state_dict()
    found = {name: array.shape for name, array in interop.state_dict(model).items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in expected.items()}


def pair(kind: str, stem: str, layers: tuple[int, ...], **options: object) -> Pair:
    size = models.ResNetSize(block=kind, layers=layers, width=2)
    return Pair(
        partial(models.ResNet, size, 5, stem=stem, **ZEROS, **options),
        partial(theirs.ResNet, kind, layers, 5, stem, 2),
        (4, 11, 9, 3),
    )


PAIRS = {
    "basic": pair("basic", "cifar", (1,)),
    "bottleneck": pair("bottleneck", "imagenet", (1, 1)),
    "preact": pair("preact", "imagenet", (1, 1), remat=True),
}


def test_a_resnet_is_its_twin() -> None:
    twins = {name: drawn(pair) for name, pair in PAIRS.items()}
    ours = built(PAIRS, twins)
    for name, outcome in our_outcomes(PAIRS, ours).items():
        assert_outcome(outcome, torch_outcome(PAIRS[name], twins[name], ours[name]))


def fan_out_again(layer: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
    """What torchvision's ResNet draws again: its convolutions (docs/seeds.md)."""
    if not isinstance(layer, linear.Conv):
        return {}
    shape = tensors["weight"].shape
    return {"weight": generator.kaiming_normal(shape, mode="fan_out", nonlinearity="relu")}


@pytest.mark.parametrize("kind", ["basic", "preact_bottleneck"])
def test_a_seed_gives_torchs_weights(kind: str) -> None:
    """Bit for bit: default draws of all layers, then the convolutions again."""
    size = models.ResNetSize(block=kind, layers=(2, 1), width=4)
    make = partial(models.ResNet, size, 5, **ZEROS, rngs=nnx.Rngs(0))
    found = interop.state_dict(torch_rng.seed_parameters(make, 3, then=fan_out_again))
    torch.manual_seed(3)
    for name, tensor in theirs.ResNet(kind, (2, 1), 5, width=4).state_dict().items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)


SMALL = models.ResNetSize(block="basic", layers=(3,), width=4)
IMAGES = values(4, 5, 6, 3, offset=1.0)


def one_step(model: nnx.Module) -> tuple[object, ...]:
    """Output, gradients and statistics of a training step, the chain's blocks one by one."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @partial(jax.jit, compiler_options=QUICKLY)
    def step(params: nnx.State, rest: nnx.State) -> tuple[object, ...]:
        def loss(params: nnx.State) -> tuple[jax.Array, object]:
            merged = nnx.merge(graph, params, rest, copy=True)
            y = merged(jnp.asarray(IMAGES))
            return jnp.sum(y**3), (y, nnx.state(merged, nnx.Not(nnx.Param)))

        gradient, (y, moved) = jax.grad(loss, has_aux=True)(params)
        return y, gradient, moved

    y, gradient, moved = step(params, rest)
    as_model = models.unstacked(nnx.merge(graph, gradient, rest))
    moved = models.unstacked(nnx.merge(graph, params, moved))
    return y, nnx.state(as_model, nnx.Param), nnx.state(moved, nnx.BatchStat)


def test_a_scanned_resnet_has_the_same_weights_and_numbers() -> None:
    with jax.enable_x64(True):
        make = partial(models.ResNet, SMALL, 5, stem="cifar", param_dtype=jnp.float64)
        plain, scanned = (make(scan=scan, rngs=nnx.Rngs(0)) for scan in (False, True))
        assert nnx.graphdef(models.stacked(plain)) == nnx.graphdef(scanned)
        apart, expected = (interop.state_dict(m) for m in (models.unstacked(scanned), plain))
        assert apart.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(apart[name], array)
        found, wanted = one_step(scanned), one_step(plain)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            bound = 1e-12 * max(float(jnp.abs(other).max()), 1.0)
            assert float(jnp.abs(one - other).max()) <= bound


def test_rematerialised_blocks_keep_their_inputs() -> None:
    def kept(**options: object) -> float:
        model = models.ResNet(SMALL, 5, stem="cifar", **ZEROS, **options, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        held = jax.tree.leaves((params, rest))
        x = jnp.ones((8, 16, 16, 3))

        def run(x: jax.Array, params: nnx.State, rest: nnx.State) -> jax.Array:
            return nnx.merge(graph, params, rest)(x)

        return kept_bytes(run, x, params, rest, parameters=held) / (8 * 16 * 16 * 4 * 4)

    # The image (3/4), the stem's output, and of each of three blocks 3 or its input.
    assert 9.5 < kept() <= 0.75 + 1 + 9 + 0.1
    assert 3.5 < kept(remat=True) <= 0.75 + 1 + 3 + 0.1


def rates(**options: object) -> list[float]:
    residual = blocks.Residual(drop_path=0.3, scale=0.5)
    size = models.ResNetSize(block="preact", layers=(1, 2, 1), width=1)
    model = models.ResNet(size, 2, residual=residual, **options, **ZEROS, rngs=nnx.Rngs(0))
    found = [m.add for _, m in nnx.iter_modules(model) if isinstance(m, blocks.PreActResBlock)]
    assert all(add.scale == 0.5 for add in found)
    return [0.0 if add.drop_path is None else add.drop_path.p for add in found]


def test_paths_are_dropped_uniformly_or_more_with_depth() -> None:
    assert rates() == [0.3] * 4
    eps = np.finfo(np.float64).eps
    np.testing.assert_allclose(rates(drop_path_rule="linear"), [0.0, 0.1, 0.2, 0.3], rtol=4 * eps)
    with pytest.raises(ValueError, match="scan=True needs equal blocks: pass drop_path_rule='uni"):
        rates(drop_path_rule="linear", scan=True)


def test_options_reach_every_block() -> None:
    own = partial(norms.GroupNorm, 1)
    for kind in theirs.BLOCKS:
        size = models.ResNetSize(block=kind, layers=(1, 1), width=2)
        model = models.ResNet(
            size, 2, norm=own, act=functional.gelu, residual=blocks.Residual(zero_init=True),
            kernel_init=initializers.constant(0.1), dtype=jnp.bfloat16, rngs=nnx.Rngs(0),
        )  # fmt: skip
        modules = [m for _, m in nnx.iter_modules(model)]
        convs = [m for m in modules if isinstance(m, linear.Conv)]
        found = [m for m in modules if isinstance(m, norms.GroupNorm)]
        assert not [m for m in modules if isinstance(m, norms.BatchNorm)]
        assert all(m.dtype == jnp.bfloat16 for m in (*convs, *found, model.fc))
        assert all(m.act is functional.gelu for m in modules if "act" in vars(m))
        weights = [m.kernel[...] for m in convs] + [m.scale[...] for m in found]
        zero = [not weight.any() for weight in weights]
        assert sum(zero) == 2
        assert {float(c.kernel[...].max()) for c in convs} <= {0.0, np.float32(0.1)}


def test_convolutions_start_by_the_fan_out_and_the_head_by_torchs_law() -> None:
    size = models.ResNetSize(block="basic", layers=(1,), width=32)
    model = models.ResNet(size, 100, rngs=nnx.Rngs(0))
    for conv in (model.conv1, model.layer1[0].conv1):
        fan_out = 32 * math.prod(conv.kernel_size)
        law, count = math.sqrt(2 / fan_out), conv.kernel.size
        # but once in 5e8 samples
        assert abs(conv.kernel[...].std() - law) <= 6 * law / math.sqrt(2 * count)
    bound = 1 / math.sqrt(32)
    assert 0.9 * bound < jnp.abs(model.fc.kernel[...]).max() <= bound
    assert jnp.abs(model.fc.bias[...]).max() > 0.5 * bound


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: models.ResNetSize(block="wide", layers=(1,)),
            "block must be one of 'basic', 'bottleneck', .* got block='wide'",
        ),
        (lambda: models.ResNetSize(block="basic", layers=[1]), "layers must be a tuple with a nu"),
        (lambda: models.ResNetSize(block="basic", layers=()), r"each stage, got layers=\(\)"),
        (lambda: models.ResNetSize(block="basic", layers=(0,)), "layers must be an integer of at"),
        (lambda: models.ResNetSize(block="basic", layers=(1,), width=0), "width must be an integ"),
        (lambda: models.ResNet("basic", rngs=nnx.Rngs(0)), "size must be a ResNetSize, got size="),
        (lambda: models.ResNet(SMALL, 0, rngs=nnx.Rngs(0)), "num_classes must be an integer of a"),
        (lambda: models.ResNet(SMALL, stem="big", rngs=nnx.Rngs(0)), "stem must be 'imagenet' or"),
        (
            lambda: models.ResNet(SMALL, drop_path_rule="cosine", rngs=nnx.Rngs(0)),
            "drop_path_rule must be 'uniform' or 'linear', got drop_path_rule='cosine'",
        ),
        (lambda: models.ResNet(SMALL, norm="bn", rngs=nnx.Rngs(0)), "norm must be a function th"),
        (lambda: models.resnet18(10), "a layer with random weights needs rngs"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
