"""Attention's dropout: each probability by itself, the same on every device, and its mask known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxstab import functional
from flaxstab.functional import _attention
from flaxstab.parity import Budget, HasMean
from parity_tests.support.cases import values

P = 0.3
S = 256  # XLA's CPU compiler takes ten times as long for a mask with short rows


def uniform(shape: tuple[int, ...], p: float, key: jax.Array, **options: object) -> jax.Array:
    """Probabilities of equal logits."""
    n, h, length, s = shape
    q, k = jnp.zeros((n, length, h, 1)), jnp.zeros((n, s, h, 1))
    return functional.attention_weights(q, k, k, p=p, dropout_key=key, **options)[1]


def test_the_mask_for_replay_is_the_one_that_the_blocks_draw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two blocks and a rest."""
    monkeypatch.setattr(_attention, "ROWS", 3)
    key, shape = jax.random.key(1), (2, 3, 7, S)
    weights = np.asarray(jax.jit(lambda key: uniform(shape, P, key, open_keys=2))(key))
    kept = np.asarray(jax.jit(lambda k: functional.attention_dropout_mask(k, P, shape))(key))
    # 1/S each, scaled by 1 / (1 - p); the probabilities of a query no longer sum to 1.
    np.testing.assert_allclose(
        weights, kept * np.float32(1 / S / (1 - P)), rtol=4 * np.finfo(np.float32).eps
    )


def test_the_output_is_made_of_the_probabilities_that_are_returned() -> None:
    """With a key: both functions draw alike."""
    shapes = (2, 5, 3, 4), (2, S, 3, 4), (2, S, 3, 4)
    q, k, v = (jnp.asarray(values(*s, seed=i), jnp.float32) for i, s in enumerate(shapes))
    options = {"p": P, "dropout_key": jax.random.key(1)}

    @jax.jit
    def run(*qkv: jax.Array) -> object:
        return functional.attention(*qkv, **options), functional.attention_weights(*qkv, **options)

    alone, (output, weights) = run(q, k, v)
    np.testing.assert_array_equal(alone, output)
    mixed = np.einsum("nhqk,nkhe->nqhe", np.asarray(weights, float), np.asarray(v, float))
    assert np.abs(output - mixed).max() <= S * np.finfo(np.float32).eps * np.abs(mixed).max()


def test_dropout_falls_on_each_probability_by_itself(budget: Budget) -> None:
    """2e6 draws, and 1e6 pairs of samples, of heads, of blocks of queries, of neighbours.

    A probability that is off by 0.005 is found, a share of pairs that is off by 0.006.
    """
    kept = np.asarray(functional.attention_dropout_mask(jax.random.key(0), P, (4, 4, 512, 256)))
    assert HasMean(1 - P, discrepancy=0.005).check(kept, budget).passed
    pairs = (
        kept[:2] & kept[2:],
        kept[:, :2] & kept[:, 2:],
        kept[:, :, :256] & kept[:, :, 256:],
        kept[:, :, ::2] & kept[:, :, 1::2],
        kept[..., ::2] & kept[..., 1::2],
    )
    for both in pairs:
        assert HasMean((1 - P) ** 2, discrepancy=0.006).check(both, budget).passed


def test_probabilities_0_and_1_drop_nothing_and_everything() -> None:
    key, shape = jax.random.key(0), (1, 2, 3, S)
    nothing, everything = jax.jit(lambda key: [uniform(shape, p, key) for p in (0.0, 1.0)])(key)
    assert (nothing == 1 / S).all()
    assert (everything == 0).all()


def test_masks_are_the_same_on_eight_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded over samples and heads, in several blocks of queries."""
    monkeypatch.setattr(_attention, "ROWS", 4)
    mesh = jax.make_mesh((4, 2), ("n", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("n", None, "h")
    q, k = (jnp.asarray(values(8, n, 4, 4, scale=0.3), jnp.float32) for n in (8, S))

    def run(q: jax.Array, k: jax.Array, key: jax.Array) -> jax.Array:
        return functional.attention_weights(q, k, k, p=0.5, dropout_key=key)[1]

    key = jax.random.key(3)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    spread = jax.jit(run)(*jax.device_put((q, k), sharding), key)
    expected = functional.attention_dropout_mask(key, 0.5, spread.shape)
    np.testing.assert_array_equal(spread != 0, expected)
    assert len(spread.sharding.device_set) == 8
