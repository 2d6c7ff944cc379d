"""``blocks.Residual``: scale, LayerScale, dropped paths, branches that start at zero."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxstab import blocks, norms, optim, surgery
from flaxstab.blocks._residual import Add
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same

Block = Callable[..., nnx.Module]
KINDS: dict[str, Block] = {
    "basic": functools.partial(blocks.BasicBlock, 4, 6),
    "bottleneck": functools.partial(blocks.Bottleneck, 4, 2),
    "pre-act": functools.partial(blocks.PreActResBlock, 4, 6, 2),
    "pre-act bottleneck": functools.partial(blocks.PreActBottleneck, 4, 2),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
IMAGES = values(6, 3, 3, 4, offset=1.0)


def drawn(key: jax.Array, shape: tuple[int, ...], dtype: object = jnp.float32) -> jax.Array:
    """Draws in numpy, without a compilation for each shape."""
    del key
    return jnp.asarray(values(*shape, offset=0.0, scale=0.3), dtype)


def built(make: Block, **wiring: object) -> nnx.Module:
    residual = blocks.Residual(**wiring)
    return make(kernel_init=drawn, residual=residual, rngs=nnx.Rngs(0))


def test_the_sum_is_its_formula() -> None:
    x, branch = values(2, 3, 4), values(2, 3, 4, seed=1)
    with jax.enable_x64(True):
        plain = Add(blocks.Residual(), 4)
        assert_same(plain(jnp.asarray(x), jnp.asarray(branch)), x + branch)
        wiring = blocks.Residual(scale=0.1, layer_scale=0.5)
        add = Add(wiring, 4, param_dtype=jnp.float64)
        add.gamma[...] = jnp.asarray(values(4, seed=2))
        found = add(jnp.asarray(x), jnp.asarray(branch))
        assert_same(found, x + 0.1 * values(4, seed=2) * branch)


def test_the_defaults_add_plainly_and_hold_nothing() -> None:
    wiring = blocks.Residual()
    assert dataclasses.astuple(wiring) == (1.0, None, 0.0, False)
    assert jax.tree.leaves(nnx.state(Add(wiring, 4))) == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        wiring.scale = 2.0  # type: ignore[misc]


@each_kind
def test_layer_scale_has_an_entry_per_channel_and_does_not_decay(make: Block) -> None:
    block = built(make, layer_scale=1e-4)
    channels = 8 if isinstance(block, blocks.Bottleneck | blocks.PreActBottleneck) else 6
    np.testing.assert_array_equal(block.add.gamma[...], np.full(channels, 1e-4, np.float32))
    role = optim.decay_mask(block).roles["add", "gamma"]
    assert role == ((channels,), False, "layer_scale")


@each_kind
def test_zero_init_is_what_surgery_does(make: Block) -> None:
    """Whose tests show that the branch is zero and trains, in test_surgery_residual.py."""
    block, plain = built(make, zero_init=True), built(make)
    surgery.zero_last_gamma(plain)
    found, expected = (nnx.to_flat_state(nnx.state(b)) for b in (block, plain))
    for (path, ours), (other, theirs) in zip(found, expected, strict=True):
        assert path == other
        np.testing.assert_array_equal(ours[...], theirs[...])


@pytest.mark.parametrize(
    "norm", [norms.FrozenBatchNorm, functools.partial(norms.BatchNorm, affine=False)]
)
def test_zero_init_needs_a_last_norm_that_trains(norm: Block) -> None:
    message = "zero_init needs a last norm whose scale trains, got .*BatchNorm without one. Give"
    with pytest.raises(ValueError, match=message):
        blocks.BasicBlock(4, 4, norm=norm, residual=blocks.Residual(zero_init=True),
                          rngs=nnx.Rngs(0))  # fmt: skip
    pre_act = functools.partial(blocks.PreActResBlock, 4, 4, norm=norm)
    assert not built(pre_act, zero_init=True).conv2.kernel[...].any()


def test_zero_init_zeroes_a_bias_too() -> None:
    def shifted(channels: int, **options: object) -> nnx.Module:
        norm = norms.BatchNorm(channels, **options)
        norm.bias[...] = jnp.ones(channels)
        return norm

    block = built(functools.partial(blocks.BasicBlock, 4, 4, norm=shifted), zero_init=True)
    x = jnp.asarray(IMAGES, jnp.float32)
    np.testing.assert_array_equal(block(x), nnx.relu(x))
    assert block.bn1.bias[...].all()


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropped_paths_leave_samples_as_they_are_and_scale_the_others(p: float) -> None:
    block = built(functools.partial(blocks.PreActResBlock, 4, 4, 2), drop_path=p, scale=0.1)
    x = jnp.asarray(IMAGES, jnp.float32)
    factors = np.asarray(nnx.clone(block.add.drop_path)(jnp.ones((6, 1, 1, 1))))
    assert set(np.unique(factors)) == ({0.0, 2.0} if p < 1 else {0.0})
    trained = np.asarray(block(x), np.float64)
    block.eval()
    branch = np.asarray(block(x), np.float64) - IMAGES
    bound = 8 * np.finfo(np.float32).eps * np.abs(trained).max()  # two sums, a product each
    assert np.abs(trained - (IMAGES + factors * branch)).max() <= bound
    assert np.abs(branch).max() > 100 * bound


def test_blocks_of_one_source_drop_other_paths() -> None:
    rngs, wiring = nnx.Rngs(0), blocks.Residual(drop_path=0.5)
    ones = jnp.ones((64, 1))
    first, second = (Add(wiring, 4, rngs=rngs).drop_path(ones) for _ in range(2))
    assert (first != second).any()


def test_dropped_paths_need_a_stream() -> None:
    make = functools.partial(blocks.BasicBlock, 4, 4, kernel_init=drawn)
    make(residual=blocks.Residual(), rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"needs nnx\.Rngs with a 'dropout' stream"):
        make(residual=blocks.Residual(drop_path=0.1), rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize(
    ("wiring", "message"),
    [
        # Behind a factor of 0 the branch has zero gradient for ever.
        ({"scale": 0.0}, "scale must be a finite number other than 0, got scale=0.0. For a branch"),
        ({"scale": np.nan}, "scale must be a finite number other than 0, got scale=nan"),
        ({"layer_scale": np.inf}, "layer_scale must be a finite number or None, got layer_scale=i"),
        ({"drop_path": 1.5}, r"drop_path must lie in \[0, 1\], got drop_path=1.5"),
        ({"drop_path": np.nan}, r"drop_path must lie in \[0, 1\], got drop_path=nan"),
    ],
    ids=str,
)
def test_bad_wiring_is_named(wiring: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks.Residual(**wiring)
