"""``flaxstab.models`` against their twins in ``torch_ref.models``."""

import functools
import math
import pickle
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import interop, models, parity
from flaxstab.parity._verdict import judge_semantics
from parity_tests.support.cases import values
from torch_ref import models as theirs
from torch_ref.norms import GhostBatchNorm

SMALL = {"widths": (4, 6), "groups": 2, "image_size": 8}


class GhostTwin(theirs.StableCNN):
    """The StableCNN of torch_ref with its ghost batch norm, which it has no name for."""

    def __init__(self, **options: object) -> None:
        super().__init__("batch", **options)
        for block in self.blocks:
            block.norm = GhostBatchNorm(block.norm.num_features, options["groups"])


def _stable(norm: str, act: str) -> tuple[Callable[..., nnx.Module], Callable[..., object]]:
    ours = functools.partial(models.StableCNN, norm, act, drop=0.0, **SMALL)
    if norm == "ghost":
        return ours, functools.partial(GhostTwin, act=act, drop=0.0, **SMALL)
    return ours, functools.partial(theirs.StableCNN, norm, act, drop=0.0, **SMALL)


TWINS = {
    **{
        f"small {act}": (
            functools.partial(models.SmallCNN, act), functools.partial(theirs.SmallCNN, act)
        )
        for act in ("relu", "gelu", "elu")
    },
    "cnn bn": (models.CNN_BN, theirs.CNN_BN),
    "cnn ln": (models.CNN_LN, theirs.CNN_LN),
    "stable batch": _stable("batch", "relu"),
    "stable group": _stable("group", "gelu"),
    "stable layer": _stable("layer", "gelu"),
    "stable ghost": _stable("ghost", "elu"),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "twin"), TWINS.values(), ids=TWINS)
def test_a_model_is_its_twin(ours: Callable[..., nnx.Module], twin: Callable[[], object]) -> None:
    torch.manual_seed(0)
    size = 8 if "image_size" in getattr(ours, "keywords", {}) else 4
    images = values(4, size, size, 3, offset=1.0)
    model = ours(rngs=nnx.Rngs(0))
    # Low precision is judged layer by layer; a compiled float64 pass of a model takes seconds.
    report = parity.compare(model, twin(), images, layout="image", dtypes=())
    assert report.passed, str(report)


@pytest.mark.parametrize("name", ["xavier", "kaiming"])
def test_toy_deep_is_its_twin(name: str) -> None:
    torch.manual_seed(0)
    ours, twin = models.ToyDeep(name, rngs=nnx.Rngs(0)), theirs.ToyDeep(name)
    interop.load_state_dict(ours, twin.state_dict())
    x = values(3, 512, offset=0.5)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, "float64"), nnx.state(ours, nnx.Param))
        nnx.update(ours, wide)
        found = [np.asarray(a) for a in ours.activations(jnp.asarray(x))]
        output = np.asarray(ours(jnp.asarray(x)))
    h, expected = torch.tensor(x), []
    for layer in twin.double().net:
        h = layer(h)
        if isinstance(layer, torch.nn.ReLU):
            expected.append(h.detach().numpy())
    assert len(found) == 10
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert judge_semantics(f"activation {n}", a, b, float(np.max(np.abs(b)))).passed
    assert output.tolist() == found[-1].tolist()


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_dropout_is_torchs_with_the_same_masks(act: str) -> None:
    ours = models.StableCNN("layer", act, drop=0.3, rngs=nnx.Rngs(0), **SMALL)
    twin = theirs.StableCNN("layer", act, drop=0.3, **SMALL).double()
    interop.load_state_dict(ours, twin.state_dict())
    x = values(4, 8, 8, 3, offset=1.0)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), "float64"), nnx.state(ours, nnx.Param)
        )
        nnx.update(ours, wide)
        twin.load_state_dict({n: torch.tensor(a) for n, a in interop.state_dict(ours).items()})
        with parity.replayed(ours, twin, "image"):
            expected = twin(torch.tensor(np.moveaxis(x, -1, 1).copy())).detach().numpy()
        found = np.asarray(ours(jnp.asarray(x)))
        ours.eval()
        silent = np.asarray(ours(jnp.asarray(x)))
    size = float(np.max(np.abs(expected))) * 100  # of the head's sum over 24 products
    finding = judge_semantics("output", found, expected, size)
    assert finding.passed, finding.explanation
    assert not np.allclose(found, silent)


FULL = {
    "small": (models.SmallCNN, theirs.SmallCNN),
    "toy": (models.ToyDeep, theirs.ToyDeep),
    "bn": (models.CNN_BN, theirs.CNN_BN),
    "ln": (models.CNN_LN, theirs.CNN_LN),
    "stable": (models.StableCNN, theirs.StableCNN),
}


@pytest.mark.parametrize(("ours", "twin"), FULL.values(), ids=FULL)
def test_by_default_names_and_shapes_are_the_twins(
    ours: Callable[..., nnx.Module], twin: Callable[[], torch.nn.Module]
) -> None:
    found = {n: a.shape for n, a in interop.state_dict(ours(rngs=nnx.Rngs(0))).items()}
    assert found == {n: tuple(t.shape) for n, t in twin().state_dict().items()}


def test_stable_cnn_has_the_twins_defaults() -> None:
    ours, twin = models.StableCNN(rngs=nnx.Rngs(0)), theirs.StableCNN()
    assert [block.drop.p for block in ours.blocks] == [block.drop.p for block in twin.blocks]
    group = models.StableCNN("group", rngs=nnx.Rngs(0)).blocks[0].norm.num_groups
    assert group == theirs.StableCNN("group").blocks[0].norm.num_groups == 16
    assert models.StableCNN("layer", rngs=nnx.Rngs(0)).blocks[0].norm.num_groups == 1
    assert models.StableCNN("ghost", rngs=nnx.Rngs(0)).blocks[0].norm.virtual_batch_size == 16


# A sample's standard deviation is within 6 / sqrt(2n) of the law's but once in 5e8 normal samples.
def _allowed(std: float, n: int) -> float:
    return 6 * std / math.sqrt(2 * n)


@pytest.mark.parametrize(("ours", "twin"), FULL.values(), ids=FULL)
def test_weights_start_by_the_twins_laws(
    ours: Callable[..., nnx.Module], twin: Callable[[], torch.nn.Module]
) -> None:
    torch.manual_seed(0)
    found, reference = interop.state_dict(ours(rngs=nnx.Rngs(0))), twin().state_dict()
    for name, tensor in reference.items():
        expected = tensor.numpy()
        if np.ptp(expected) == 0:  # zeros, ones and counts
            assert found[name].tolist() == expected.tolist(), name
        elif expected.ndim > 1:
            std = float(expected.std())
            # both sides are samples of the law
            assert abs(found[name].std() - std) <= 2 * _allowed(std, expected.size), name
            uniform = np.abs(expected).max() < 2 * std
            assert (np.abs(found[name]).max() < 2 * std) == uniform, name


def test_he_weights_have_the_variance_2_over_fan_in() -> None:
    for name, array in interop.state_dict(models.StableCNN(rngs=nnx.Rngs(1))).items():
        if array.ndim > 1:
            law = math.sqrt(2 / math.prod(array.shape[1:]))
            assert abs(array.std() - law) <= _allowed(law, array.size), name
            assert abs(array.mean()) <= 6 * law / math.sqrt(array.size), name


@pytest.mark.parametrize(("name", "kept"), [("kaiming", True), ("xavier", False)])
def test_kaiming_keeps_the_spread_and_xavier_halves_the_variance(name: str, kept: bool) -> None:
    model = models.ToyDeep(name, rngs=nnx.Rngs(0))
    x = jnp.asarray(values(64, 512, offset=0.0, scale=1.0), "float32")
    spread = [float(a.std()) for a in model.activations(x)]
    ratio = (spread[-1] / spread[0]) ** (1 / 9)
    assert (ratio > 0.9) == kept
    if not kept:
        assert abs(ratio - math.sqrt(0.5)) < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [m for m, _ in FULL.values()], ids=FULL)
def test_the_output_has_the_inputs_dtype(make: Callable[..., nnx.Module], dtype: str) -> None:
    x = jnp.ones((2, 512) if make is models.ToyDeep else (2, 32, 32, 3), dtype)
    model = make(rngs=nnx.Rngs(0))
    shape = nnx.eval_shape(lambda m, x: m(x), model, x)
    assert shape.dtype == jnp.dtype(dtype)
    expected = {
        models.ToyDeep: (2, 512), models.SmallCNN: (2, 10), models.StableCNN: (2, 10),
    }.get(make, (2, 32, 32, 64))  # fmt: skip
    assert shape.shape == expected


def test_dtype_and_param_dtype_reach_every_layer() -> None:
    for make in (models.SmallCNN, models.CNN_BN, models.CNN_LN, models.StableCNN):
        model = make(dtype=jnp.bfloat16, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
        params = jax.tree.leaves(nnx.state(model, nnx.Param))
        assert {leaf.dtype.name for leaf in params} == {"float16"}
        output = nnx.eval_shape(lambda m, x: m(x), model, jnp.ones((2, 32, 32, 3)))
        assert output.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (models.SmallCNN, {"act": "tanh"}, "act must be one of relu, gelu, elu, got act='tanh'"),
        (models.ToyDeep, {"init_name": "he"}, "must be 'xavier' or 'kaiming', got init_name='he'"),
        (models.StableCNN, {"norm": "x"}, "one of batch, group, layer, ghost, got norm='x'"),
        (models.StableCNN, {"act": "tanh"}, "got act='tanh'"),
        (models.StableCNN, {"image_size": 20}, "divisible by 8, .* got image_size=20"),
        (models.StableCNN, {"image_size": 0}, "image_size must be .* got image_size=0"),
        (models.StableCNN, {"widths": ()}, r"widths must name at least one block, got widths=\(\)"),
        (models.StableCNN, {"norm": "group", "groups": 5}, "num_groups must divide num_channels"),
        (models.StableCNN, {"drop": 1.5}, r"p must lie in \[0, 1\], got p=1.5"),
    ],
)
def test_bad_arguments_are_named(
    make: Callable[..., nnx.Module], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [models.SmallCNN, models.StableCNN])
def test_an_empty_batch_passes_and_the_model_can_be_pickled(make: type[nnx.Module]) -> None:
    model = make(rngs=nnx.Rngs(0))
    model.eval()
    assert model(jnp.ones((0, 32, 32, 3))).shape == (0, 10)
    copied = pickle.loads(pickle.dumps(model))  # noqa: S301
    x = jnp.ones((2, 32, 32, 3))
    np.testing.assert_array_equal(copied(x), model(x))
