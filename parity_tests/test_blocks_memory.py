"""What blocks and layers keep for the backward pass, in units of their input's bytes."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flaxstab import blocks, functional, linear
from flaxstab.blocks import _wiring
from parity_tests.support.cases import values
from parity_tests.support.kept import kept_by_module
from parity_tests.support.stock_blocks import StockBlock

C = 64
SHAPE = (8, 16, 16, C)
Make = Callable[..., nnx.Module]
SLACK = 0.03  # statistics and keys
BLOCKS: dict[str, tuple[Make, float]] = {  # what is kept, in N
    "basic": (partial(blocks.BasicBlock, C, C), 3),
    "basic, projection": (partial(blocks.BasicBlock, C, 2 * C, 2), 2.5),
    "bottleneck": (partial(blocks.Bottleneck, C, C // 4), 2.5),
    "pre-act": (partial(blocks.PreActResBlock, C, C), 2),
    "pre-act, dropping channels": (partial(blocks.PreActResBlock, C, C, drop=0.5), 2),
    "pre-act, projection": (partial(blocks.PreActResBlock, C, 2 * C, stride=2), 1.5),
    "pre-act bottleneck": (partial(blocks.PreActBottleneck, C, C // 4), 1.5),
    "conv, norm, act": (partial(blocks.ConvNormAct, C, C), 2),
}
LIMITS = {"basic": 3.1, "pre-act": 2.1, "pre-act, dropping channels": 2.1}  # the project's own


def kept(make: Make, call: Callable[..., object] = lambda layer, x: layer(x)) -> float:
    """Returns what a layer keeps in training: bf16 computation, float32 parameters, running."""
    layer = make(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(values(*SHAPE), jnp.bfloat16)
    return kept_by_module(layer, x, call=call) / x.nbytes


@pytest.mark.parametrize("name", BLOCKS)
def test_what_a_block_keeps(name: str) -> None:
    make, expected = BLOCKS[name]
    found = kept(make)
    assert expected <= found <= expected + SLACK
    assert found <= LIMITS.get(name, expected + SLACK)


def test_what_a_block_keeps_without_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_wiring, "region", lambda call, layers, *arrays: call(*layers, *arrays))
    assert kept(BLOCKS["basic"][0]) > LIMITS["basic"] + 1
    assert kept(BLOCKS["pre-act"][0]) > LIMITS["pre-act"] + 1


@pytest.mark.parametrize(
    ("norm", "first"), [(nnx.BatchNorm, False), (partial(nnx.GroupNorm, num_groups=32), True)]
)
def test_what_a_stock_block_keeps(norm: Make, first: bool) -> None:
    """What the limits are for."""
    assert kept(partial(StockBlock, C, norm, first)) > 12.9


def test_what_is_done_to_a_branch_keeps_nothing() -> None:
    wiring = blocks.Residual(scale=0.1, layer_scale=0.1, drop_path=0.2)
    assert kept(partial(blocks.PreActResBlock, C, C, residual=wiring)) <= LIMITS["pre-act"]


LAYERS: dict[str, tuple[Make, Callable[..., object]]] = {
    "Linear": (partial(linear.Linear, C, 8 * C), lambda layer, x: layer(x)),
    "Conv": (partial(linear.Conv, C, C, 3, padding=1), lambda layer, x: layer(x)),
    "ConvTranspose": (partial(linear.ConvTranspose, C, C, 3), lambda layer, x: layer(x)),
    "Embed.attend": (partial(linear.Embed, 512, C), lambda layer, x: layer.attend(x)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_copy_of_a_kernel_is_kept(name: str) -> None:
    make, call = LAYERS[name]
    assert kept(make, call) <= 1 + 1e-3


def test_a_copy_of_a_kernel_is_found() -> None:
    def cast_before(layer: linear.Conv, x: jax.Array) -> jax.Array:
        return functional.conv(x, jnp.asarray(layer.kernel[...], x.dtype), padding=1)

    assert kept(LAYERS["Conv"][0], cast_before) > 1.2
