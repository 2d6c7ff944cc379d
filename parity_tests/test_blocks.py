"""``flaxstab.blocks`` against ``torch_ref.blocks``."""

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

from flaxstab import blocks, initializers, interop, norms
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_twins, image
from torch_ref import blocks as theirs

Block = Callable[..., nnx.Module]
SHAPES = {  # in_ch, out_ch, stride: equal, other channels, other size, both
    "same": (4, 4, 1),
    "wider": (4, 6, 1),
    "smaller": (4, 4, 2),
    "both": (4, 6, 2),
}
BOTTLENECKS = {  # in_ch, a quarter of out_ch, stride
    "same": (4, 1, 1),
    "wider": (4, 2, 1),
    "smaller": (4, 1, 2),
    "both": (4, 2, 2),
}
KINDS: dict[str, tuple[Block, Callable[..., torch.nn.Module]]] = {
    "basic": (blocks.BasicBlock, theirs.BasicBlock),
    "bottleneck": (blocks.Bottleneck, theirs.Bottleneck),
    "pre-act": (
        functools.partial(blocks.PreActResBlock, groups=2),
        functools.partial(theirs.PreActResBlock, groups=2),
    ),
    "pre-act bottleneck": (blocks.PreActBottleneck, theirs.PreActBottleneck),
}
SIZES = {kind: BOTTLENECKS if "bottleneck" in kind else SHAPES for kind in KINDS}
TWINS = {
    f"{kind} {name}": tuple(functools.partial(make, *sizes, stride=stride) for make in both)
    for kind, both in KINDS.items()
    for name, (*sizes, stride) in SIZES[kind].items()
}
each_twin = pytest.mark.parametrize(("ours", "twin"), TWINS.values(), ids=TWINS)
each_kind = pytest.mark.parametrize("kind", KINDS)
IMAGES = values(3, 5, 4, 4, offset=1.0)
ZEROS = {"kernel_init": initializers.zeros}  # where weights do not matter, or come from the twin


def built(name: str, **options: object) -> nnx.Module:
    return TWINS[name][0](rngs=nnx.Rngs(0), **options)


def assert_twin(ours: Block, twin: Callable[[], torch.nn.Module]) -> None:
    """Output in training and the gradient for the input."""
    torch.manual_seed(0)
    module = twin().double()
    with jax.enable_x64(True):
        block = ours(param_dtype="float64", **ZEROS, rngs=nnx.Rngs(0))
        interop.load_state_dict(block, module.state_dict())
        graph, state = nnx.split(block)

    def fresh(x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state, copy=True)(x)

    assert_twins(fresh, image(module), IMAGES)


@each_twin
def test_names_and_shapes_are_the_twins(ours: Block, twin: Callable[[], torch.nn.Module]) -> None:
    """So either change of shape, of channels or of size, projects the skip as the twin's."""
    block = ours(**ZEROS, rngs=nnx.Rngs(0))
    found = {n: a.shape for n, a in interop.state_dict(block).items()}
    assert found == {n: tuple(t.shape) for n, t in twin().state_dict().items()}


class Late(blocks.PreActResBlock):
    """A fault: the activation behind the second norm is missing."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.conv2(self.norm2(self.conv1(self.act(self.norm1(x)))))


class Early(blocks.BasicBlock):
    """A fault: the last activation before the addition."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


@pytest.mark.parametrize(("fault", "name"), [(Early, "basic same"), (Late, "pre-act same")])
def test_an_activation_in_another_place_is_found(fault: Block, name: str) -> None:
    ours, twin = TWINS[name]
    with pytest.raises(AssertionError, match="is above the bound"):
        assert_twin(functools.partial(fault, *ours.args, **ours.keywords), twin)


@pytest.mark.parametrize("kind", ["basic", "pre-act"])  # the others make theirs the same way
def test_kernels_start_by_hes_law_and_the_rest_as_in_torch(kind: str) -> None:
    model, reference = built(f"{kind} both"), TWINS[f"{kind} both"][1]().state_dict()
    for key, array in interop.state_dict(model).items():
        if array.ndim == 4:
            law = math.sqrt(2 / math.prod(array.shape[1:]))
            # but once in 5e8 samples; a convolution here has 8 to 324 weights
            assert abs(array.std() - law) <= 6 * law / math.sqrt(2 * array.size), key
        else:
            np.testing.assert_array_equal(array, reference[key].numpy())


@each_kind
def test_other_norms_activations_and_initializers_can_be_chosen(kind: str) -> None:
    own = functools.partial(norms.GroupNorm, 1)
    init = initializers.constant(0.1)
    block = built(f"{kind} both", norm=own, act=jnp.tanh, kernel_init=init)
    found = [m for _, m in nnx.iter_modules(block) if isinstance(m, norms.GroupNorm)]
    kernels = [m.kernel[...] for _, m in nnx.iter_modules(block) if "kernel" in vars(m)]
    projection_has_norm = not kind.startswith("pre-act")
    assert len(found) == len(kernels) - (not projection_has_norm)
    assert len(kernels) == (4 if "bottleneck" in kind else 3)
    assert all((kernel == np.float32(0.1)).all() for kernel in kernels)
    assert block.act is jnp.tanh
    assert output(block, jnp.asarray(IMAGES, jnp.float32)).shape[:3] == (3, 3, 2)


def test_an_activation_may_have_a_parameter() -> None:
    """One that all places share, as a ``torch.nn.PReLU`` that the twin holds once."""
    twin = theirs.PreActResBlock(4, 4, 2)
    twin.act = torch.nn.PReLU()
    act = nnx.PReLU()
    assert_twin(lambda **o: blocks.PreActResBlock(4, 4, 2, act=act, **o), twin.double)


def test_the_activation_is_used_everywhere() -> None:
    """With the identity the pre-activation block of zero kernels is linear in its skip."""
    zero = initializers.zeros
    x = jnp.asarray(values(2, 3, 3, 4, offset=0.0), jnp.float32)
    block = blocks.BasicBlock(4, 4, act=lambda x: x, kernel_init=zero, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(block(x), x)
    assert (x < 0).any()
    squared = blocks.BasicBlock(4, 4, act=jnp.square, kernel_init=zero, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(squared(x), x**2)


def test_the_defaults_are_the_documents() -> None:
    rngs, twin = nnx.Rngs(0), theirs.PreActResBlock(32, 32)
    block = blocks.PreActResBlock(32, 32, **ZEROS, rngs=rngs)
    assert block.norm1.num_groups == twin.norm1.num_groups == 32
    assert block.drop.p == twin.drop.p == 0
    assert block.skip is None
    assert blocks.BasicBlock(4, 4, **ZEROS, rngs=rngs).downsample is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: blocks.BasicBlock(0, 4, rngs=r), "in_ch must be .* got in_ch=0"),
        (lambda r: blocks.BasicBlock(4, 4, 0, rngs=r), "stride must be .* got stride=0"),
        (lambda r: blocks.PreActResBlock(4, 4, 0, rngs=r), "groups must be .* got groups=0"),
        (
            lambda r: blocks.PreActResBlock(4, 6, 4, rngs=r),
            "groups must divide in_ch and out_ch, got groups=4 and in_ch=4 and out_ch=6",
        ),
        (
            lambda r: blocks.PreActResBlock(4, 4, 2, 1, -0.1, **ZEROS, rngs=r),
            r"p must lie in \[0, 1\]",
        ),
        (
            lambda r: blocks.PreActBottleneck(4, 1, 1, 1.1, **ZEROS, rngs=r),
            r"p must lie in \[0, 1\]",
        ),
        (lambda r: blocks.Bottleneck(4, 0, rngs=r), "width must be .* got width=0"),
        (lambda r: blocks.PreActBottleneck(4, True, rngs=r), "width must be .* got width=True"),
        (
            lambda r: blocks.PreActResBlock(4, 4, 2, projects="norm", rngs=r),
            "projects must be 'raw' or 'activated', got projects='norm'",
        ),
        (
            lambda r: blocks.ConvNormAct(4, 4, 2, rngs=r),
            "odd integer or a tuple of such, got k.*=2",
        ),
        (lambda r: blocks.ConvNormAct(4, 4, (3, 0), rngs=r), r"odd integer .*=\(3, 0\)"),
        (lambda r: blocks.ConvNormAct(4, 4, [3], rngs=r), r"odd integer .*=\[3\]"),
        (lambda r: blocks.ConvNormAct(4, 4, -1, rngs=r), "each at least 1, got kernel_size"),
        (lambda r: blocks.ConvNormAct(4, 4, drop=2.0, **ZEROS, rngs=r), r"p must lie in \[0, 1\]"),
        (lambda _: blocks.BasicBlock(4, 4), "a layer with random weights needs rngs. Pass rngs="),
        (
            lambda _: blocks.PreActResBlock(4, 4, norm=nnx.LayerNorm),  # this norm needs them, too
            "a layer with random weights needs rngs. Pass rngs=",
        ),
    ],
)
def test_bad_arguments_are_named(make: Callable[[nnx.Rngs], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"act": "relu"}, "act must be a function of an array, got act='relu'. Pass e.g. flaxst"),
        ({"act": nnx.PReLU}, "act must be a function of an array, got act=<class"),
        ({"norm": "bn"}, "norm must be a function that builds a norm, got norm='bn'. Pass e.g. fu"),
        ({"norm": norms.BatchNorm(4)}, r"got norm='BatchNorm'\. Pass e\.g\. functools\.partial\("),
        ({"residual": 0.1}, r"must be a blocks.Residual, got residual=0.1. Pass e.g. blocks.Res"),
    ],
    ids=str,
)
@each_kind
def test_what_is_no_choice_is_refused(kind: str, choice: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(f"{kind} same", **choice)


BOTH = {
    "basic": functools.partial(blocks.BasicBlock, 4, 6, 2),
    "pre-act": functools.partial(blocks.PreActResBlock, 4, 6, 2, 2, 0.3),
}
each_block = pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)


def output(block: nnx.Module, x: jax.Array) -> jax.ShapeDtypeStruct:
    with jax.numpy_dtype_promotion("strict"):
        return nnx.eval_shape(lambda block, x: block(x), block, x)


@pytest.mark.parametrize("name", [*(f"{kind} both" for kind in KINDS), "conv"])
def test_dtypes_reach_every_layer(name: str) -> None:
    conv = functools.partial(blocks.ConvNormAct, 4, 6, rngs=nnx.Rngs(0))
    make = conv if name == "conv" else functools.partial(built, name)
    block = make(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    params = jax.tree.leaves(nnx.state(block, nnx.Param))
    assert {leaf.dtype.name for leaf in params} == {"float16"}
    x = jnp.asarray(IMAGES, jnp.float32)
    assert output(block, x).dtype == jnp.bfloat16
    assert output(make(), jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@each_block
def test_a_block_is_merged_pickled_and_given_an_empty_batch(make: Block) -> None:
    block = make(rngs=nnx.Rngs(0))
    block.eval()
    x = jnp.asarray(IMAGES, jnp.float32)
    expected = block(x)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(block))(x), expected)  # noqa: S301
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        np.testing.assert_array_equal(nnx.merge(*nnx.split(block))(x), expected)
    assert output(block, x[:0]).shape == (0, 3, 2, 6)


@each_block
def test_stacked_blocks_are_mapped(make: Block) -> None:
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stack(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs=rngs)

    def run(block: nnx.Module, x: jax.Array) -> jax.Array:
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(block, x)

    many = nnx.eval_shape(lambda: stack(nnx.Rngs(0)))
    assert nnx.eval_shape(run, many, jnp.asarray(IMAGES, jnp.float32)).shape == (2, 3, 3, 2, 6)


def test_a_block_drops_whole_channels_of_its_branch_in_training() -> None:
    block = blocks.PreActResBlock(4, 4, 2, drop=0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(IMAGES, jnp.float32)
    dropped = np.asarray(block(x) == x)
    assert (dropped == dropped[:, :1, :1]).all()
    assert 0 < dropped[:, 0, 0].sum() < dropped[:, 0, 0].size
    block.eval()
    assert not np.asarray(block(x) == x).any()


def test_nothing_needs_a_dropout_stream_unless_something_drops() -> None:
    blocks.PreActResBlock(4, 4, 2, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"dropout needs nnx\.Rngs with a 'dropout' stream"):
        blocks.PreActResBlock(4, 4, 2, drop=0.1, rngs=nnx.Rngs(params=0))


def test_in_evaluation_a_block_may_be_closed_over_by_a_program() -> None:
    block = blocks.PreActBottleneck(4, 1, drop=0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(IMAGES, jnp.float32)

    def traced() -> jax.ShapeDtypeStruct:
        return jax.eval_shape(lambda x: 1 * block(x), x)

    block.eval()
    assert traced().shape == x.shape
    block.train()
    with pytest.raises(Exception, match="different trace level"):
        traced()


def test_outputs_of_a_blocks_layers_can_be_captured() -> None:
    block, x = blocks.BasicBlock(4, 4, rngs=nnx.Rngs(0)), jnp.asarray(IMAGES, jnp.float32)
    _, found = nnx.capture(block, nnx.Intermediate, method_outputs=nnx.Intermediate)(x)
    seen = {n: found[n]["__call__"].get_value()[0] for n in ("conv1", "bn1", "conv2", "bn2", "add")}
    np.testing.assert_array_equal(seen["add"], x + seen["bn2"])
    np.testing.assert_array_equal(seen["conv1"], block.conv1(x))
