"""The Transformer blocks against ``torch_ref`` and ``torch.nn``."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import blocks, initializers, interop, norms, optim
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same
from parity_tests.support.one_step import assert_one_step
from torch_ref import blocks as theirs
from torch_ref.dropout import feed_forward

N, L, S, D, HEADS = 2, 5, 4, 8, 2
X, MEMORY = values(N, L, D, offset=0.5, scale=1.0), values(N, S, D, seed=1, offset=0.5, scale=1.0)
PADDED = np.arange(L)[None] >= np.array([[L], [3]])  # (N, L): the second sample has 3 tokens
LATER = np.triu(np.ones((L, L), bool), 1)
PER_HEAD = values(N * HEADS, L, L, seed=2, offset=0.0, scale=1.0)
PADDING = np.where(PADDED, -np.inf, values(N, L, seed=3, offset=0.0, scale=1.0))
ENCODER, DECODER = torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """Draws all parameters anew: scales of 1 and biases of 0 hide what is done to them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.3, 0.4, generator=generator)
    return module


def encoder(**options: object) -> torch.nn.Module:
    return ENCODER(D, HEADS, 12, batch_first=True, **options)


def decoder(**options: object) -> torch.nn.Module:
    return DECODER(D, HEADS, 12, batch_first=True, **options)


def our_encoder(**options: object) -> nnx.Module:
    return blocks.TransformerEncoderLayer(D, HEADS, 12, **options, rngs=nnx.Rngs(0))


def our_decoder(**options: object) -> nnx.Module:
    return blocks.TransformerDecoderLayer(D, HEADS, 12, **options, rngs=nnx.Rngs(0))


Arrays = Mapping[str, np.ndarray]


def assert_twins(
    ours: nnx.Module, twin: torch.nn.Module, inputs: tuple[np.ndarray, ...], calls: list[Arrays]
) -> None:
    """In evaluation: outputs of several calls, and the gradients for all inputs, in float64.

    Args:
      ours: a module of float32 parameters.
      twin: its counterpart, whose weights both get.
      inputs: arrays for both.
      calls: keyword arguments of one call each: masks.
    """
    twin = drawn(twin).double().eval()
    cotangent = values(*inputs[0].shape, seed=9, offset=0.5)
    interop.load_state_dict(ours, twin.state_dict())
    ours.eval()
    graph, state = nnx.split(ours)

    def results(state: nnx.State, *arrays: jax.Array) -> list[object]:
        found = []
        for masks in calls:
            module = lambda *xs, masks=masks: nnx.merge(graph, state)(*xs, **masks)  # noqa: E731
            y, pullback = jax.vjp(module, *arrays)
            found.append((y, *pullback(jnp.asarray(cotangent))))
        return found

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, float) if a.dtype == "float32" else a, state)
        found = jax.jit(results)(wide, *inputs)
        for masks, own in zip(calls, found, strict=True):
            tensors = [torch.tensor(array, requires_grad=True) for array in inputs]
            given = {
                n: torch.tensor(m) if isinstance(m, np.ndarray) else m for n, m in masks.items()
            }
            y = twin(*tensors, **given)
            expected = (y, *torch.autograd.grad(y, tensors, torch.tensor(cotangent)))
            for mine, their in zip(own, expected, strict=True):
                # The terms of a gradient are at least of the cotangent's size.
                assert_same(mine, their, size=np.abs(cotangent).max())


def test_document_twos_block_with_masks_of_every_kind() -> None:
    calls = [
        {},
        {"attn_mask": LATER, "key_padding_mask": PADDED},
        {"attn_mask": np.repeat(LATER[None], N * HEADS, 0), "key_padding_mask": PADDED},
        {"attn_mask": PER_HEAD, "key_padding_mask": PADDING},
        {"attn_mask": PER_HEAD[0]},
        {"key_padding_mask": PADDING},
    ]
    ours = blocks.TransformerBlock(D, HEADS, 2, rngs=nnx.Rngs(0))
    assert_twins(ours, theirs.TransformerBlock(D, HEADS, 2), (X,), calls)


@pytest.mark.parametrize("options", [
    {},
    {"norm_first": True, "activation": "gelu", "layer_norm_eps": 1e-2},
    {"norm_first": True, "bias": False},
    {"activation": torch.tanh, "bias": False},
], ids=["default", "pre-norm", "no bias", "tanh"])  # fmt: skip
def test_torchs_encoder_layer(options: dict[str, object]) -> None:
    calls = [
        {},
        {"src_mask": LATER, "src_key_padding_mask": PADDED},
        {"src_mask": PER_HEAD, "src_key_padding_mask": PADDING},
    ]
    own = (
        {**options, "activation": jnp.tanh} if options.get("activation") is torch.tanh else options
    )
    assert_twins(our_encoder(**own), encoder(**options), (X,), calls)


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=str)
def test_torchs_decoder_layer(options: dict[str, object]) -> None:
    hidden = PADDED[:, :S]
    calls = [
        {},
        {"tgt_mask": LATER, "tgt_key_padding_mask": PADDED, "memory_key_padding_mask": hidden},
        {"memory_mask": PER_HEAD[:, :, :S], "tgt_mask": PER_HEAD},
    ]
    assert_twins(our_decoder(**options), decoder(**options), (X, MEMORY), calls)


def test_is_causal_needs_no_mask() -> None:
    """Against torch with the mask that its hint asks for."""
    ours, twin = our_encoder(dropout=0.0), encoder(dropout=0.0)

    class Causal(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = twin

        def forward(self, x: torch.Tensor, is_causal: bool) -> torch.Tensor:
            return self.layer(x, src_mask=torch.tensor(LATER), is_causal=is_causal)

        def state_dict(self, *_: object, **__: object) -> dict[str, torch.Tensor]:
            return twin.state_dict()

    assert_twins(ours, Causal(), (X,), [{"is_causal": True}])


class Two(nnx.Module):
    """A Pre-LN and a Post-LN block in a row, with everything dropped that can be."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.pre = blocks.TransformerBlock(D, HEADS, 2, 0.3, out_drop=0.2, rngs=rngs)
        self.post = blocks.TransformerEncoderLayer(D, HEADS, 12, 0.3, rngs=rngs)
        self.mlp = blocks.MLP(D, 12, drop=0.3, rngs=rngs)

    def __call__(self, x: jax.Array, padding: jax.Array) -> jax.Array:
        x = self.pre(x, key_padding_mask=padding)
        return self.mlp(self.post(x, src_key_padding_mask=padding))


MLP_NAMES = ("fc1", "act", "drop1", "fc2", "drop2")


class TorchTwo(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pre = theirs.TransformerBlock(D, HEADS, 2, 0.3, out_drop=0.2)
        self.post = encoder(dropout=0.3)
        names = OrderedDict(zip(MLP_NAMES, feed_forward(D, 12, 0.3), strict=True))
        self.mlp = torch.nn.Sequential(names)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        x = self.pre(x, key_padding_mask=padding)
        return self.mlp(self.post(x, src_key_padding_mask=padding))


def test_training_with_the_same_masks_is_torchs() -> None:
    """Every dropout replayed; gradients of all parameters."""
    assert_one_step(Two(nnx.Rngs(0)), drawn(TorchTwo()), X, PADDED)


class Unscaled(blocks.MLP):
    """A fault: what is kept is not scaled."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) * 0.7


def test_one_step_can_fail() -> None:
    names = OrderedDict(zip(MLP_NAMES, feed_forward(D, 12, 0.3), strict=True))
    with pytest.raises(AssertionError, match="is above the bound"):
        assert_one_step(Unscaled(D, 12, drop=0.3, rngs=nnx.Rngs(0)), torch.nn.Sequential(names), X)


def twin_names(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


TWINS = {
    "block": (
        lambda r: blocks.TransformerBlock(D, HEADS, 3, rngs=r),
        lambda: theirs.TransformerBlock(D, HEADS, 3),
    ),
    "encoder": (
        lambda r: blocks.TransformerEncoderLayer(D, HEADS, 12, bias=False, rngs=r),
        lambda: encoder(bias=False),
    ),
    "decoder": (lambda r: blocks.TransformerDecoderLayer(D, HEADS, 12, rngs=r), decoder),
}


@pytest.mark.parametrize(("ours", "twin"), TWINS.values(), ids=TWINS)
def test_names_and_shapes_are_the_twins(
    ours: Callable[[nnx.Rngs], nnx.Module], twin: Callable[[], torch.nn.Module]
) -> None:
    found = interop.state_dict(ours(nnx.Rngs(0)))
    assert {name: array.shape for name, array in found.items()} == twin_names(twin())


def test_the_defaults_are_torchs_and_the_documents() -> None:
    layer, twin = blocks.TransformerEncoderLayer(D, HEADS, rngs=nnx.Rngs(0)), ENCODER(D, HEADS)
    assert layer.linear1.out_features == twin.linear1.out_features == 2048
    assert layer.dropout.p == layer.dropout1.p == layer.self_attn.p == twin.dropout.p == 0.1
    assert layer.norm1.eps == twin.norm1.eps
    assert layer.norm_first is twin.norm_first is False
    assert float(layer.act(jnp.float32(-1.0))) == 0
    block, other = blocks.TransformerBlock(16, rngs=nnx.Rngs(0)), theirs.TransformerBlock(16)
    assert block.attn.num_heads == other.attn.num_heads == 8
    assert block.attn.p == block.ff.layers[2].p == block.ff.layers[4].p == other.attn.dropout == 0.1
    assert block.ff.layers[0].out_features == other.ff[0].out_features == 64
    assert block.drop.p == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_block_starts_by_the_documents_laws(seed: int) -> None:
    """He normal but for query, key and value, whose Xavier bound is that of the packed matrix."""
    block = blocks.TransformerBlock(64, 4, rngs=nnx.Rngs(seed))
    up, down = block.ff.layers[0], block.ff.layers[3]
    for kernel in (block.attn.out.kernel[...], up.kernel[...], down.kernel[...]):
        law = np.sqrt(2 / kernel.shape[0])
        # 6 standard errors, but once in 5e8 samples.
        assert abs(float(kernel.std()) - law) <= 6 * law / np.sqrt(2 * kernel.size)
        assert float(jnp.abs(kernel).max()) > 2.5 * law
    bound = np.sqrt(6 / (64 + 3 * 64))
    for part in (block.attn.query, block.attn.key, block.attn.value):
        largest = float(jnp.abs(part.kernel[...]).max())
        assert 0.99 * bound < largest <= bound
    for layer in (block.attn.query, block.attn.out, up, down):
        assert not np.any(layer.bias[...])


def test_other_norms_activations_and_initializers_can_be_chosen() -> None:
    init = initializers.constant(0.25)
    block = blocks.TransformerBlock(
        D,
        HEADS,
        norm=norms.RMSNorm,
        act=jnp.tanh,
        kernel_init=init,
        attn_drop=0.0,
        rngs=nnx.Rngs(0),
    )
    kernels = [m.kernel[...] for _, m in nnx.iter_modules(block) if "kernel" in vars(m)]
    assert len(kernels) == 6
    assert all((kernel == 0.25).all() for kernel in kernels)
    assert isinstance(block.ln1, norms.RMSNorm)
    assert block.attn.p == 0
    block.eval()
    assert block(jnp.asarray(X, jnp.float32)).shape == X.shape


PRE_NORM = {
    "block": lambda **o: blocks.TransformerBlock(D, HEADS, 2, 0.0, **o),
    "encoder": lambda **o: blocks.TransformerEncoderLayer(D, HEADS, 12, 0.0, norm_first=True, **o),
}


@pytest.mark.parametrize("make", PRE_NORM.values(), ids=PRE_NORM)
def test_zero_init_starts_at_the_skip_and_trains(make: Callable[..., nnx.Module]) -> None:
    model = make(residual=blocks.Residual(zero_init=True), rngs=nnx.Rngs(0))
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_array_equal(model(x), x)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda p: jnp.sum(nnx.merge(graph, p, rest, copy=True)(x) ** 3)  # noqa: E731
    gradient = nnx.merge(graph, jax.grad(loss)(params), rest)
    attn = gradient.attn if "attn" in vars(gradient) else gradient.self_attn
    down = gradient.ff.layers[3] if "ff" in vars(gradient) else gradient.linear2
    for layer in (attn.out, down):
        assert np.any(layer.kernel[...])
        assert np.any(layer.bias[...])


def test_scales_and_layer_scales_reach_both_branches() -> None:
    """With factors of 0.5 twice, the block moves its input by a quarter of the plain one."""
    wiring = blocks.Residual(scale=0.5, layer_scale=0.5)
    x = jnp.asarray(X, jnp.float32)
    scaled = blocks.TransformerBlock(D, HEADS, 2, 0.0, residual=wiring, rngs=nnx.Rngs(0))
    plain = blocks.TransformerBlock(D, HEADS, 2, 0.0, rngs=nnx.Rngs(0))
    for block in (scaled, plain):
        kernel = block.ff.layers[3].kernel
        kernel[...] = jnp.zeros_like(kernel[...])
    moved, expected = scaled(x) - x, (plain(x) - x) / 4
    eps = np.finfo(np.float32).eps
    np.testing.assert_array_less(np.abs(moved - expected), 4 * eps * np.abs(X).max())
    assert scaled.add1.gamma.get_metadata()["role"] == "layer_scale"
    decays = {n: r.decays for n, r in optim.decay_mask(scaled).roles.items()}
    assert decays["add1", "gamma"] is decays["add2", "gamma"] is False
    assert decays["attn", "query", "kernel"] is True


@pytest.mark.parametrize(("make", "message"), [
    (lambda r: blocks.TransformerBlock(8, 3, rngs=r), "num_heads must divide embed_dim"),
    (lambda r: blocks.TransformerBlock(8, 2, 0, rngs=r), "d_ff must be .* got d_ff=0"),
    (lambda r: blocks.TransformerBlock(8, 2, p_drop=2.0, rngs=r), r"p_drop must lie in \[0, 1\]"),
    (lambda r: blocks.TransformerBlock(8, 2, norm="ln", rngs=r), "norm must be a function that"),
    (lambda r: blocks.TransformerBlock(8, 2, act="gelu", rngs=r), "act must be a function of an"),
    (lambda r: blocks.TransformerBlock(8, 2, residual=0.1, rngs=r), "residual must be a block"),
    (lambda _: blocks.TransformerBlock(8, 2), "a layer with random weights needs rngs"),
    (
        lambda r: blocks.TransformerEncoderLayer(8, 2, activation="silu", rngs=r),
        "activation must be 'relu', 'gelu' or a function, got activation='silu'",
    ),
    (
        lambda r: blocks.TransformerEncoderLayer(8, 2, batch_first=False, rngs=r),
        r"arrays are \(N, L, C\) here, so batch_first must be True, got batch_first=False\. Swap",
    ),
    (
        lambda r: blocks.TransformerDecoderLayer(
            8, 2, residual=blocks.Residual(zero_init=True), rngs=r
        ),
        "zero_init needs norm_first=True, got norm_first=False",
    ),
    (
        lambda r: blocks.TransformerEncoderLayer(8, 2, activation=None, rngs=r),
        "activation must be 'relu', 'gelu' or a function, got activation=None",
    ),
    (
        lambda _: blocks.Residual(layer_scale=0.0, zero_init=True),
        "layer_scale and zero_init must not both be 0: the branch would never train",
    ),
    (lambda r: blocks.MLP(8, 0, rngs=r), "hidden_features must be .* got hidden_features=0"),
])  # fmt: skip
def test_bad_arguments_are_named(make: Callable[[nnx.Rngs], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))
