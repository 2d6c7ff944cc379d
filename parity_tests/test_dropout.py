"""Dropout: the same mask gives PyTorch's bits, and the masks have the right law."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from torch.nn import functional as F  # noqa: N812

from flaxstab import functional
from flaxstab.dropout import ChannelDropout, Dropout
from flaxstab.parity import Budget, HasMean
from parity_tests.support import random_checks
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same

X = values(40, 30)
TORCH = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_torchs_mask_gives_torchs_bits(p: float, dtype: str) -> None:
    """The mask is read off torch's output: the input has no zeros."""
    torch.manual_seed(0)
    x = torch.tensor(X, dtype=TORCH[dtype], requires_grad=True)
    theirs = F.dropout(x, p)
    mask = theirs.detach().double().numpy() != 0
    cotangent = torch.tensor(values(*X.shape, seed=1), dtype=TORCH[dtype])
    (gradient,) = torch.autograd.grad(theirs, x, cotangent)
    with jax.enable_x64(True):
        given = jnp.asarray(x.detach().double().numpy(), dtype)
        ours, pullback = jax.vjp(lambda x: functional.dropout(x, p, mask), given)
        (own,) = pullback(jnp.asarray(cotangent.double().numpy(), dtype))
        assert (ours.dtype, own.dtype) == (dtype, dtype)
        np.testing.assert_array_equal(
            np.asarray(ours, np.float64), theirs.detach().double().numpy()
        )
        np.testing.assert_array_equal(np.asarray(own, np.float64), gradient.double().numpy())
    assert 0 < mask.sum() < mask.size or p in (0.0, 1.0)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_nan_and_infinity_in_a_dropped_place_give_nan_as_in_torch(p: float) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1.0] * 25)
    torch.manual_seed(0)
    kept = F.dropout(torch.ones(100, dtype=torch.float64), p).numpy() != 0
    torch.manual_seed(0)
    theirs = F.dropout(torch.tensor(x), p)
    with jax.enable_x64(True):
        assert_same(functional.dropout(jnp.asarray(x), p, kept), theirs)
    assert np.isnan(theirs.numpy()).sum() > 25


def test_the_default_drops_half() -> None:
    assert Dropout().p == torch.nn.Dropout().p == 0.5


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize(
    "use",
    [
        Dropout,
        ChannelDropout,
        lambda p: functional.dropout_mask(jax.random.key(0), p, (2,)),
        lambda p: functional.dropout(jnp.ones(2), p, jnp.ones(2, bool)),
    ],
    ids=["layer", "channels", "mask", "function"],
)
def test_a_probability_out_of_range_is_refused(use: Callable[..., object], p: float) -> None:
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got p="):
        use(p)


def test_a_mask_must_be_boolean() -> None:
    with pytest.raises(ValueError, match="mask must be boolean, true where an element is kept"):
        functional.dropout(jnp.ones(2), 0.5, jnp.ones(2))


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="a layer computes in floating point, got dtype='int32'"):
        Dropout(rngs=nnx.Rngs(0))(jnp.ones(2, jnp.int32))


def test_training_needs_a_key() -> None:
    with pytest.raises(ValueError, match="dropout in training needs a key, got rngs=None"):
        Dropout()(jnp.ones(2))


def test_no_key_is_needed_where_nothing_is_drawn() -> None:
    x = jnp.ones(2)
    assert Dropout(0.0)(x) is not None
    np.testing.assert_array_equal(Dropout(deterministic=True)(x), x)
    np.testing.assert_array_equal(Dropout()(x, deterministic=True), x)
    np.testing.assert_array_equal(Dropout()(x, mask=jnp.array([True, False])), [2.0, 0.0])


def test_p_zero_keeps_and_p_one_drops_everything() -> None:
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_array_equal(Dropout(0.0, rngs=nnx.Rngs(0))(x), x)
    np.testing.assert_array_equal(Dropout(1.0, rngs=nnx.Rngs(0))(x), np.zeros_like(x))


def test_a_mask_broadcasts() -> None:
    mask = np.arange(30) % 2 == 0
    with jax.enable_x64(True):
        found = Dropout(0.5)(jnp.asarray(X), mask=jnp.asarray(mask))
        assert_same(found, X * mask * 2)


SPACES = {1: (F.dropout1d, (5,)), 2: (F.dropout2d, (3, 2)), 3: (F.dropout3d, (2, 1, 3))}


@pytest.mark.parametrize("rank", SPACES)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_channel_dropout_gives_torchs_bits_with_torchs_mask(rank: int, p: float) -> None:
    drop, space = SPACES[rank]
    torch.manual_seed(0)
    x = torch.tensor(values(7, 6, *space))
    theirs = drop(x, p).movedim(1, -1)
    first = (slice(None), *(slice(1),) * rank)  # (N, *space, C) -> (N, 1, ..., 1, C)
    mask = theirs.numpy()[first] != 0
    with jax.enable_x64(True):
        ours = ChannelDropout(p)(jnp.asarray(x.movedim(1, -1).numpy()), mask=jnp.asarray(mask))
        np.testing.assert_array_equal(ours, theirs.numpy())
        assert ours.dtype == np.float64
    assert 0 < mask.sum() < mask.size or p in (0.0, 1.0)


@pytest.mark.parametrize("shape", [(50, 4, 20), (50, 3, 2, 20), (50, 2, 1, 2, 20)])
def test_channel_dropout_drops_channels_of_a_sample_as_one(shape: tuple[int, ...]) -> None:
    kept = np.asarray(ChannelDropout(0.3, rngs=nnx.Rngs(0))(jnp.ones(shape))) != 0
    first = kept[:, *(slice(1),) * (len(shape) - 2)]
    np.testing.assert_array_equal(kept, np.broadcast_to(first, shape))
    own = first.reshape(50, 20)
    assert len({row.tobytes() for row in own}) > 40  # samples differ: 2**17 masks of 20 channels
    assert len({column.tobytes() for column in own.T}) == 20


def test_channel_dropout_drops_with_probability_p(budget: Budget) -> None:
    """1e6 channels: a probability off by 0.01 is found."""
    drawn = ChannelDropout(0.3, rngs=nnx.Rngs(0))(jnp.ones((1000, 1, 1000)))
    assert HasMean(0.7, discrepancy=0.01).check(np.asarray(drawn) != 0, budget).passed
    assert set(np.unique(drawn)) == {0, np.float32(1 / 0.7)}


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
def test_channel_dropout_needs_batch_and_space(shape: tuple[int, ...]) -> None:
    layer = ChannelDropout(0.3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"channel dropout needs \(N, \*space, C\), got shape="):
        layer(jnp.ones(shape))


def test_channel_dropouts_default_and_mode_are_torchs() -> None:
    assert ChannelDropout().p == torch.nn.Dropout2d().p == 0.5
    layer, x = ChannelDropout(rngs=nnx.Rngs(0)), jnp.ones((2, 3, 3, 8))
    assert (layer(x) == 0).any()
    layer.eval()
    np.testing.assert_array_equal(layer(x), x)
    assert (layer(x, deterministic=False) == 0).any()
    given = [layer(x, rngs=jax.random.key(0), deterministic=False) for _ in range(2)]
    np.testing.assert_array_equal(*given)


DRAWS = 2_000_000


def test_dropout_drops_with_probability_p(budget: Budget) -> None:
    """2e6 draws each: a probability off by 0.005 is found; 0 and 1 are exact."""
    for p in (0.0, 0.1, 0.5, 0.9, 1.0):
        kept = functional.dropout_mask(jax.random.key(0), p, (DRAWS,))
        found = HasMean(1 - p, discrepancy=0.005).check(kept, budget)
        assert found.passed, str(found)


def test_neighbours_are_dropped_independently(budget: Budget) -> None:
    """Of a million disjoint pairs at each lag a quarter is kept; 0.006 off is found."""
    kept = np.asarray(functional.dropout_mask(jax.random.key(1), 0.5, (DRAWS,)))
    for lag in (1, 2, 3, 4, 5, 64):
        blocks = kept[: DRAWS // (2 * lag) * 2 * lag].reshape(-1, 2, lag)
        found = HasMean(0.25, discrepancy=0.006).check(blocks[:, 0] & blocks[:, 1], budget)
        assert found.passed, str(found)


def test_dropout_keeps_the_mean(budget: Budget) -> None:
    """2e6 ones at p = 0.25 become 0 or 4/3; a mean off by 0.005 is found."""
    layer = Dropout(0.25, rngs=nnx.Rngs(dropout=2))
    claim = HasMean(1.0, discrepancy=0.005, high=float(np.float32(4 / 3)))
    found = claim.check(layer(jnp.ones(DRAWS)), budget)
    assert found.passed, str(found)


def test_the_frequency_test_sees_a_wrong_probability(budget: Budget) -> None:
    kept = functional.dropout_mask(jax.random.key(0), 0.505, (DRAWS,))
    paid = random_checks.for_faults(budget)
    assert not HasMean(0.5, discrepancy=0.005).check(kept, paid).passed


def test_masks_do_not_depend_on_the_x64_mode() -> None:
    masks = []
    for wide in (False, True):
        with jax.enable_x64(wide):
            mask = functional.dropout_mask(jax.random.key(3), 0.3, (1000,))
            inside = jax.jit(lambda k: functional.dropout_mask(k, 0.3, (1000,)))
            masks += [np.asarray(mask), np.asarray(inside(jax.random.key(3)))]
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


def test_a_sharded_batch_drops_what_one_device_does() -> None:
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    x = jnp.asarray(values(16, 24), jnp.float32)

    def apply(x: jax.Array, key: jax.Array) -> object:
        return jax.value_and_grad(lambda x: jnp.sum(functional.random_dropout(x, 0.5, key)))(x)

    def dropped(x: jax.Array, key: jax.Array) -> object:
        return functional.random_dropout(x, 0.5, key), apply(x, key)[1]

    key = jax.random.key(4)
    alone = jax.jit(dropped)(x, key)
    spread = jax.jit(dropped, out_shardings=sharding)(jax.device_put(x, sharding), key)
    for ours, one in zip(spread, alone, strict=True):
        np.testing.assert_array_equal(ours, one)
        assert len(ours.sharding.device_set) == 8


def test_every_call_and_every_layer_draws_a_mask_of_its_own() -> None:
    rngs = nnx.Rngs(0)
    first, second = Dropout(rngs=rngs), Dropout(rngs=rngs)
    x = jnp.ones(200)
    outputs = [np.asarray(layer(x)) for layer in (first, second) for _ in range(2)]
    for a, b in itertools.combinations(outputs, 2):
        assert (a != b).any()


def test_equal_seeds_draw_equal_masks() -> None:
    x = jnp.ones(200)
    outputs = [Dropout(rngs=nnx.Rngs(dropout=7))(x) for _ in range(2)]
    np.testing.assert_array_equal(*outputs)


def test_nnx_jit_advances_the_stream_as_eager_calls_do() -> None:
    x = jnp.ones(200)
    eager, jitted = Dropout(rngs=nnx.Rngs(7)), Dropout(rngs=nnx.Rngs(7))
    run = nnx.jit(lambda m, x: m(x))
    for _ in range(3):
        np.testing.assert_array_equal(run(jitted, x), eager(x))


@pytest.mark.parametrize(
    "source",
    [
        lambda: nnx.Rngs(dropout=5),
        lambda: nnx.Rngs(dropout=5).dropout,
        lambda: nnx.Rngs(dropout=5).dropout(),
    ],
    ids=["rngs", "stream", "key"],
)
def test_rngs_at_the_call_override_the_layers_own(source: Callable[..., object]) -> None:
    x = jnp.ones(200)
    key = nnx.Rngs(dropout=5).dropout()
    expected = functional.dropout(x, 0.5, functional.dropout_mask(key, 0.5, x.shape))
    for layer in (Dropout(), Dropout(rngs=nnx.Rngs(9))):
        np.testing.assert_array_equal(layer(x, rngs=source()), expected)


def test_deterministic_at_the_call_overrides_the_mode() -> None:
    x = jnp.ones(200)
    layer = Dropout(rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x, deterministic=True), x)
    layer.eval()
    np.testing.assert_array_equal(layer(x), x)
    assert (layer(x, deterministic=False) != x).any()


def test_a_view_changes_the_mode_and_not_the_layer() -> None:
    x = jnp.ones(200)
    layer = Dropout(rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(nnx.view(layer, deterministic=True)(x), x)
    assert (layer(x) != x).any()


def test_a_missing_stream_is_named() -> None:
    with pytest.raises(ValueError, match=r"a 'dropout' stream or a default one, got \['params'\]"):
        Dropout(0.5, rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize("kind", [Dropout, ChannelDropout])
def test_what_is_no_source_of_keys_is_refused(kind: type[Dropout | ChannelDropout]) -> None:
    message = (
        r"dropout needs nnx\.Rngs with a 'dropout' stream .*, got int\. Pass nnx\.Rngs\(seed\)"
    )
    with pytest.raises(ValueError, match=message):
        kind(rngs=0)
    with pytest.raises(ValueError, match=message):
        kind()(jnp.ones((2, 3, 4)), rngs=0)
    with pytest.raises(ValueError, match=r"dropout needs nnx\.Rngs with .* got "):
        kind(rngs=jax.random.key(0))


def test_a_scale_that_overflows_leaves_what_is_dropped_at_zero_as_in_torch() -> None:
    mask = np.array([True, False])
    ours = functional.dropout(jnp.ones(2, jnp.float16), 0.99999, jnp.asarray(mask))
    assert np.isinf(ours[0])
    assert ours[1] == 0
