"""The Transformer blocks against ``torch_ref`` and ``torch.nn``."""

from collections import OrderedDict
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import blocks, interop, parity
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same
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
], ids=str)  # fmt: skip
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


class TorchTwo(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pre = theirs.TransformerBlock(D, HEADS, 2, 0.3, out_drop=0.2)
        self.post = encoder(dropout=0.3)
        layers = feed_forward(D, 12, 0.3)
        names = ("fc1", "act", "drop1", "fc2", "drop2")
        self.mlp = torch.nn.Sequential(OrderedDict(zip(names, layers, strict=True)))

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        x = self.pre(x, key_padding_mask=padding)
        return self.mlp(self.post(x, src_key_padding_mask=padding))


def test_training_with_the_same_masks_is_torchs() -> None:
    """Every dropout replayed; gradients of all parameters; evaluation after ten steps."""
    twin = drawn(TorchTwo())
    report = parity.compare(Two(nnx.Rngs(0)), twin, X, PADDED, dtypes=())
    assert report.passed, str(report)
