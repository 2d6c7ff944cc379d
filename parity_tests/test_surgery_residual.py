"""``zero_last_gamma``: branches start at zero, blocks are their skip path, and branches train."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import blocks, linear, norms, surgery
from flaxstab.surgery import _residual
from parity_tests.support.cases import values
from torch_ref import blocks as torch_blocks
from torch_ref import surgery as torch_surgery

IMAGES = jnp.asarray(values(3, 5, 4, 4, offset=0.5), jnp.float32)
TOKENS = jnp.asarray(values(3, 5, 4, offset=0.5), jnp.float32)


class PreLN(nnx.Module):
    """Norm, attention, add; norm, feed-forward, add."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.ln1, self.ln2 = norms.LayerNorm(4), norms.LayerNorm(4)
        self.attn = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.first, self.second = linear.Linear(4, 6, rngs=rngs), linear.Linear(6, 4, rngs=rngs)

    def feed(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.gelu(self.first(x)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln1(x))
        return x + self.feed(self.ln2(x))


class PostLN(PreLN):
    """Attention, add, norm; feed-forward, add, norm."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.ln1(x + self.attn(x))
        return self.ln2(x + self.feed(x))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teaches surgery the two blocks, for one test."""
    monkeypatch.setattr(_residual, "_RESIDUAL", dict(_residual._RESIDUAL))
    surgery.register_residual(
        PreLN, lambda block: surgery.last_parameters(block.attn.out, block.second)
    )
    surgery.register_residual(PostLN, surgery.refuse_post_norm)


def drawn(key: jax.Array, shape: tuple[int, ...], dtype: object = jnp.float32) -> jax.Array:
    """Draws in numpy, without a compilation for each shape."""
    del key
    return jnp.asarray(values(*shape, offset=0.0, scale=0.3), dtype)


DRAWN = {"kernel_init": drawn}


def relu_of_skip(block: blocks.BasicBlock | blocks.Bottleneck, x: jax.Array) -> jax.Array:
    return nnx.relu(x if block.downsample is None else block.downsample(x))


def skip(block: blocks.PreActResBlock | blocks.PreActBottleneck, x: jax.Array) -> jax.Array:
    if block.skip is None:
        return x
    return block.skip(x if block.projects == "raw" else block.act(block.norm1(x)))


Build = Callable[[], nnx.Module]
Skip = Callable[[nnx.Module, jax.Array], jax.Array]
KINDS: dict[str, tuple[Build, Skip, jax.Array, list[str]]] = {
    "post-activation": (
        lambda: blocks.BasicBlock(4, 4, **DRAWN, rngs=nnx.Rngs(0)), relu_of_skip, IMAGES,
        ["bn2.bias", "bn2.scale"],
    ),
    "pre-activation": (
        lambda: blocks.PreActResBlock(4, 6, 2, 2, 0.3, **DRAWN, rngs=nnx.Rngs(0)), skip, IMAGES,
        ["conv2.kernel"],
    ),
    "bottleneck": (
        lambda: blocks.Bottleneck(4, 1, **DRAWN, rngs=nnx.Rngs(0)), relu_of_skip, IMAGES,
        ["bn3.bias", "bn3.scale"],
    ),
    "pre-activation bottleneck": (
        lambda: blocks.PreActBottleneck(4, 1, 2, projects="raw", **DRAWN, rngs=nnx.Rngs(0)),
        skip, IMAGES, ["conv3.kernel"],
    ),
    "Pre-LN": (
        lambda: PreLN(nnx.Rngs(0)), lambda _, x: x, TOKENS,
        ["attn.out.bias", "attn.out.kernel", "second.bias", "second.kernel"],
    ),
}  # fmt: skip
each_kind = pytest.mark.parametrize(("build", "expected", "x", "names"), KINDS.values(), ids=KINDS)


def flat(model: nnx.Module) -> dict[str, np.ndarray]:
    found = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in found}


class Probe:
    """Runs a block, its skip path and steps of SGD, compiled as one."""

    def __init__(self, model: nnx.Module, expected: Skip, x: jax.Array) -> None:
        self.model = model
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def forward(params: nnx.State) -> jax.Array:
            return nnx.merge(graph, params, rest, copy=True)(x)

        @jax.jit
        def run(params: nnx.State, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, nnx.State]:
            y, pull = jax.vjp(forward, params)
            skipped = expected(nnx.merge(graph, params, rest, copy=True), x)
            (gradient,) = pull(cotangent)
            return y, skipped, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

        self.run, self.shape = run, jax.eval_shape(forward, params).shape

    def step(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns output and skip path, and takes a step from a random cotangent of that seed."""
        cotangent = jnp.asarray(values(*self.shape, seed=seed, offset=0.0), jnp.float32)
        y, skipped, new = self.run(nnx.state(self.model, nnx.Param), cotangent)
        nnx.update(self.model, new)
        return np.asarray(y), np.asarray(skipped)


def assert_starts_at_its_skip_and_trains(probe: Probe, names: list[str]) -> None:
    """The block is its skip, bit for bit; a step later it is not; in the second step all moves.

    Args:
      probe: of a block whose branch is to be 0.
      names: the variables that are 0.
    """
    before = flat(probe.model)
    assert not any(before[name].any() for name in names)
    np.testing.assert_array_equal(*probe.step(0))
    moved = [name for name in names if flat(probe.model)[name].any()]
    assert moved == names, f"0 for ever: {set(names) - set(moved)}"
    y, skipped = probe.step(1)
    assert (y != skipped).any()
    after = flat(probe.model)
    still = {name for name, array in after.items() if np.array_equal(array, before[name])}
    assert still <= {"attn.key.bias"}  # its true gradient is 0: softmax ignores a shift


@each_kind
def test_a_block_starts_as_its_skip_and_its_branch_trains(
    build: Build, expected: Skip, x: jax.Array, names: list[str]
) -> None:
    model = build()
    before = flat(model)
    assert surgery.zero_last_gamma(model) == names
    for name, array in flat(model).items():
        if name not in names:
            np.testing.assert_array_equal(array, before[name])
    assert_starts_at_its_skip_and_trains(Probe(model, expected, x), names)


def test_a_zero_scale_before_relu_never_trains_and_is_found() -> None:
    """The documents' way for pre-activation blocks: gamma = beta = 0 before a ReLU."""
    model = blocks.PreActResBlock(4, 4, 2, **DRAWN, rngs=nnx.Rngs(0))
    names = ["norm2.bias", "norm2.scale"]
    for variable in (model.norm2.bias, model.norm2.scale):
        variable[...] = jnp.zeros(4)
    before, probe = flat(model), Probe(model, skip, IMAGES)
    with pytest.raises(AssertionError, match="0 for ever"):
        assert_starts_at_its_skip_and_trains(probe, names)
    for seed in range(5):
        probe.step(seed)
    for name, array in flat(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_branch_that_is_not_zero_is_found() -> None:
    model = blocks.PreActResBlock(4, 4, 2, **DRAWN, rngs=nnx.Rngs(0))
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        assert_starts_at_its_skip_and_trains(Probe(model, skip, IMAGES), [])


@pytest.mark.parametrize(
    ("block", "sizes", "expected"),
    [(blocks.BasicBlock, (4, 6, 2), relu_of_skip), (blocks.PreActBottleneck, (4, 2, 2), skip)],
)
def test_a_block_starts_as_its_projection_with_a_norm(
    block: Callable[..., nnx.Module], sizes: tuple[int, ...], expected: Skip
) -> None:
    model = block(*sizes, **DRAWN, rngs=nnx.Rngs(0))
    surgery.zero_last_gamma(model)
    found, expected = np.asarray(model(IMAGES)), np.asarray(expected(model, IMAGES))
    # One program and one by one: each of a norm's four operations may round by half an eps.
    bound = 4 * np.finfo(np.float32).eps * np.abs(expected).max()
    assert np.abs(found - expected).max() <= bound < 1e-5 * np.abs(expected).max()


def test_a_bias_of_the_last_norm_is_zeroed_too() -> None:
    model = blocks.BasicBlock(4, 4, **DRAWN, rngs=nnx.Rngs(0))
    model.bn2.bias[...] = jnp.ones(4)
    surgery.zero_last_gamma(model)
    np.testing.assert_array_equal(model(IMAGES), nnx.relu(IMAGES))


def test_the_last_norm_may_have_no_bias() -> None:
    def norm(channels: int, **options: object) -> nnx.Module:
        return norms.BatchNorm(channels, bias=False, **options)

    model = blocks.BasicBlock(4, 4, norm=norm, **DRAWN, rngs=nnx.Rngs(0))
    assert surgery.zero_last_gamma(model) == ["bn2.scale"]
    np.testing.assert_array_equal(model(IMAGES), nnx.relu(IMAGES))


def test_the_norms_that_are_zeroed_are_torch_refs() -> None:
    theirs = torch.nn.Sequential(torch_blocks.BasicBlock(4, 6, 2), torch_blocks.Bottleneck(6, 1))
    ours = nnx.List([blocks.BasicBlock(4, 6, 2, **DRAWN, rngs=nnx.Rngs(0)),
                     blocks.Bottleneck(6, 1, **DRAWN, rngs=nnx.Rngs(0))])  # fmt: skip
    expected = torch_surgery.zero_last_bn_gamma(theirs)
    assert surgery.zero_last_gamma(ours) == [
        f"{n}.{v}" for n in expected for v in ("bias", "scale")
    ]
    scales = {n: a for n, a in flat(ours).items() if n.endswith("scale")}
    weights = {n: p for n, p in theirs.named_parameters() if p.ndim == 1 and n.endswith("weight")}
    for (name, scale), weight in zip(scales.items(), weights.values(), strict=True):
        np.testing.assert_array_equal(scale, weight.detach().numpy(), err_msg=name)


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test in NNX's graph mode and in tree mode."""
    with nnx.set_graph_mode(request.param), nnx.set_graph_updates(request.param):
        yield


class Deep(nnx.Module):
    """Eleven blocks in a list, and a layer that is none."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.head = linear.Linear(2, 2, rngs=rngs)
        self.blocks = nnx.List(
            [blocks.PreActResBlock(2, 2, 1, **DRAWN, rngs=rngs) for _ in range(11)]
        )


@pytest.mark.usefixtures("mode")
def test_blocks_anywhere_are_found_and_named_in_order() -> None:
    model = Deep()
    assert surgery.zero_last_gamma(model) == [f"blocks.{n}.conv2.kernel" for n in range(11)]
    assert not any(block.conv2.kernel[...].any() for block in model.blocks)
    assert all(block.conv1.kernel[...].any() for block in model.blocks)


@pytest.mark.usefixtures("mode")
def test_branches_are_zeroed_under_jit_and_dtypes_kept() -> None:
    @nnx.jit
    def build() -> nnx.Module:
        model = blocks.BasicBlock(2, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        surgery.zero_last_gamma(model)
        return model

    scale = build().bn2.scale[...]
    assert (scale.dtype, scale.any()) == (jnp.bfloat16, False)


def test_stacked_blocks_start_at_zero() -> None:
    many = nnx.vmap(lambda rngs: blocks.PreActResBlock(4, 4, 2, rngs=rngs))(nnx.Rngs(0).split(3))
    assert surgery.zero_last_gamma(many) == ["conv2.kernel"]
    assert many.conv2.kernel.shape == (3, 3, 3, 4, 4)
    run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    np.testing.assert_array_equal(run(IMAGES, many), IMAGES)


def test_post_ln_is_refused_with_the_reason_and_nothing_is_zeroed() -> None:
    model = nnx.Dict(a=blocks.BasicBlock(4, 4, **DRAWN, rngs=nnx.Rngs(0)), b=PostLN(nnx.Rngs(0)))
    before = flat(model)
    with pytest.raises(
        ValueError, match="got 'b' PostLN: its norm stands behind the addition"
    ) as e:
        surgery.zero_last_gamma(model)
    assert str(e.value).endswith(
        "so a zero scale would make the whole block 0, skip and all. Use Pre-LN."
    )
    for name, array in flat(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_the_reason_for_refusing_post_ln_is_true() -> None:
    block = PostLN(nnx.Rngs(0))
    block.ln2.scale[...] = jnp.zeros(4)
    np.testing.assert_array_equal(block(TOKENS), np.zeros(TOKENS.shape))


@pytest.mark.parametrize("norm", [partial(norms.BatchNorm, affine=False), norms.FrozenBatchNorm])
def test_a_norm_without_scale_is_refused_by_the_blocks_name(norm: Callable[..., object]) -> None:
    block = blocks.BasicBlock(4, 4, norm=norm, **DRAWN, rngs=nnx.Rngs(0))
    message = "'stage.0' BasicBlock: its last layer is a .*Norm without a scale or a kernel to tra"
    with pytest.raises(ValueError, match=message):
        surgery.zero_last_gamma(nnx.Dict(stage=nnx.List([block])))


def test_attention_is_named_by_its_output_layer() -> None:
    class Named(PreLN):
        pass

    surgery.register_residual(Named, lambda block: surgery.last_parameters(block.attn))
    with pytest.raises(ValueError, match=r"MultiHeadAttention without .* name its output layer\."):
        surgery.zero_last_gamma(Named(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="last_parameters takes layers, got layer_type='NoneType'"):
        surgery.last_parameters(None)


def test_of_a_mixed_model_only_the_known_blocks_are_zeroed_and_named() -> None:
    class Unknown(PreLN):
        pass

    del _residual._RESIDUAL[PreLN]
    model = nnx.List([blocks.PreActResBlock(2, 2, 1, rngs=nnx.Rngs(0)), Unknown(nnx.Rngs(0))])
    assert surgery.zero_last_gamma(model) == ["0.conv2.kernel"]
    assert model[1].second.kernel[...].all()


@pytest.mark.parametrize(
    ("model", "name"), [(lambda: PreLN(nnx.Rngs(0)), "function"), ([PreLN], "list")]
)
def test_what_is_no_module_is_refused(model: object, name: str) -> None:
    """NNX walks through it and finds nothing."""
    for change in (
        surgery.zero_last_gamma,
        lambda m: surgery.init_weights(m, surgery.init_layer, rngs=nnx.Rngs(0)),
    ):
        message = f"model must be an nnx.Module, got model_type='{name}'. Pass the built model"
        with pytest.raises(ValueError, match=message):
            change(model)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"got model='Linear'\. Call flaxstab.surgery.register_resid"
    ):
        surgery.zero_last_gamma(linear.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_a_subclass_is_treated_as_its_parent_unless_registered() -> None:
    class Own(blocks.BasicBlock):
        pass

    block = Own(4, 4, rngs=nnx.Rngs(0))
    assert surgery.zero_last_gamma(block) == ["bn2.bias", "bn2.scale"]
    surgery.register_residual(Own, lambda block: [block.conv2.kernel])
    assert surgery.zero_last_gamma(block) == ["conv2.kernel"]


@pytest.mark.parametrize(
    "block_type", ["PreLN", dict, blocks.BasicBlock.__call__], ids=["name", "dict", "function"]
)
def test_what_is_no_type_of_blocks_is_refused(block_type: object) -> None:
    with pytest.raises(
        ValueError, match=r"block_type must be a subclass of nnx\.Module, got block"
    ):
        surgery.register_residual(block_type, surgery.refuse_post_norm)
    with pytest.raises(ValueError, match="last must be a function from a block to variables, got"):
        surgery.register_residual(PreLN, ["kernel"])


def test_a_type_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered once, got block_type='BasicBlock'"):
        surgery.register_residual(blocks.BasicBlock, surgery.refuse_post_norm)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (lambda _: [], "must return a variable, or say why there is none, got block='Own'"),
        (lambda block: [block.bias], "must return variables of the model, got returned='NoneType'"),
        (lambda _: [nnx.Param(jnp.ones(2))], "variables of the model, got returned='Param'"),
        (lambda _: None, "must return a list of variables, got returned='NoneType' and block='Own"),
        (
            lambda _: nnx.Param(jnp.ones(2)),
            "list of variables, got returned='Param' .* into a list",
        ),
    ],
)
def test_what_a_registered_function_returns_is_checked(
    last: Callable[..., object], message: str
) -> None:
    class Own(nnx.Module):
        def __init__(self) -> None:
            self.bias = None

    surgery.register_residual(Own, last)
    with pytest.raises(ValueError, match=message):
        surgery.zero_last_gamma(Own())
