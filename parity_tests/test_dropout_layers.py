"""Every dropout layer: its keys, what it keeps for the backward pass, and its derivatives."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional as F  # noqa: N812

from flaxstab import dropout, functional, parity
from flaxstab._typing import Array, Shape
from flaxstab.parity import Budget, HasMean
from parity_tests.support.cases import values
from parity_tests.support.kept import kept_bytes
from parity_tests.support.layers import assert_same
from torch_ref import dropout as torch_dropout

P = 0.3
KEY = jax.random.key(2)
KEPT = 16  # bytes; issue 6: the key alone


class Row(NamedTuple):
    """A layer, an input's shape, and the shape in which it draws.

    Attributes:
      layer: the class.
      shape: of the input.
      drawn: of the mask.
      random: the function that it applies.
    """

    layer: type[nnx.Module]
    shape: Shape
    drawn: Shape
    random: Callable[..., Array] = functional.random_dropout


ROWS = {
    "Dropout": Row(dropout.Dropout, (8, 16, 12), (8, 16, 12)),
    "ChannelDropout": Row(dropout.ChannelDropout, (8, 4, 4, 12), (8, 1, 1, 12)),
    "AlphaDropout": Row(
        dropout.AlphaDropout, (8, 16, 12), (8, 16, 12), functional.random_alpha_dropout
    ),
    "DropPath": Row(dropout.DropPath, (40, 4, 12), (40, 1, 1)),
    "RecurrentDropout": Row(dropout.RecurrentDropout, (8, 6, 12), (8, 1, 12)),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def test_every_layer_has_a_row() -> None:
    layers = {n for n, c in vars(dropout).items() if isinstance(c, type)}
    assert layers == {*ROWS, "RecurrentDropoutCell"}  # the cell: test_dropout_recurrent


@every_row
def test_a_layer_draws_in_its_shape_with_the_key_given(row: Row) -> None:
    x = jnp.asarray(values(*row.shape), jnp.float32)
    mask = functional.dropout_mask(KEY, P, row.drawn)
    for layer in (row.layer(P), row.layer(P, rngs=nnx.Rngs(0))):
        found = layer(x, rngs=KEY)
        np.testing.assert_array_equal(found, layer(x, mask=mask))
        np.testing.assert_array_equal(found, row.random(x, P, KEY, row.drawn))
    assert 0 < mask.sum() < mask.size


@every_row
def test_the_next_key_is_that_of_the_next_call(row: Row) -> None:
    x = jnp.ones(row.shape)
    asked, called = row.layer(P, rngs=nnx.Rngs(3)), row.layer(P, rngs=nnx.Rngs(3))
    for _ in range(2):
        key = asked.next_key()
        np.testing.assert_array_equal(row.layer(P)(x, rngs=key), called(x))
    assert int(asked.rngs.count[...]) == int(called.rngs.count[...]) == 2


@every_row
def test_without_anything_to_drop_there_is_no_key_and_no_draw(row: Row) -> None:
    layer, x = row.layer(P, rngs=nnx.Rngs(3)), jnp.ones(row.shape)
    assert layer.next_key(deterministic=True) is None
    layer.eval()
    assert layer.next_key() is None
    assert layer.next_key(rngs=KEY) is None
    assert layer.next_key(deterministic=False) is not None
    none = row.layer(0.0, rngs=nnx.Rngs(3))
    assert none.next_key() is None
    np.testing.assert_array_equal(none(x), x)
    assert int(none.rngs.count[...]) == 0
    assert row.layer(0.0).next_key() is None
    with pytest.raises(ValueError, match="dropout in training needs a key, got rngs=None"):
        row.layer(P).next_key()


@pytest.mark.parametrize("source", [KEY, jax.random.PRNGKey(3), np.array([0, 3], np.uint32)])
def test_a_given_key_is_returned_as_it_is_and_the_stream_stays(source: Array) -> None:
    layer = dropout.Dropout(P, rngs=nnx.Rngs(3))
    found = layer.next_key(rngs=source)
    assert found.dtype == source.dtype
    assert bool((jnp.asarray(found) == jnp.asarray(source)).all())
    layer(jnp.ones(4), rngs=source)
    assert int(layer.rngs.count[...]) == 0


def test_a_key_enters_where_a_stream_cannot() -> None:
    """Under ``jax.checkpoint`` a stream would be advanced inside, which NNX refuses."""
    row = ROWS["RecurrentDropout"]
    layer, x = row.layer(P, rngs=nnx.Rngs(3)), jnp.asarray(values(*row.shape), jnp.float32)
    region = jax.checkpoint(lambda x, key: jnp.sin(layer(x, rngs=key)))
    found, gradient = jax.jit(jax.value_and_grad(lambda x, key: region(x, key).sum()))(x, KEY)
    plain = jax.value_and_grad(lambda x: jnp.sin(row.layer(P)(x, rngs=KEY)).sum())(x)
    bound = 64 * np.finfo(np.float32).eps  # a sum of a few hundred sines, in another order
    assert abs(found - plain[0]) <= bound * x.size
    assert jnp.abs(gradient - plain[1]).max() <= bound * jnp.abs(plain[1]).max()
    with pytest.raises(Exception, match="from a different trace level"):
        jax.checkpoint(layer)(x)


def test_nothing_but_the_key_is_kept_for_the_backward_pass() -> None:
    """By all layers together, on float32 and bfloat16, with one key."""
    rows = [(row, dtype) for row in ROWS.values() for dtype in (jnp.float32, jnp.bfloat16)]
    inputs = [jnp.ones(row.shape, dtype) for row, dtype in rows]

    def run(key: Array, *inputs: Array) -> list[Array]:
        return [row.layer(P)(x, rngs=key) for (row, _), x in zip(rows, inputs, strict=True)]

    assert 0 < kept_bytes(run, KEY, *inputs) <= KEPT
    assert kept_bytes(lambda x, key: nnx.Dropout(P)(x, rngs=key), inputs[0], KEY) >= inputs[0].size


def test_a_layer_that_advances_its_stream_keeps_no_more() -> None:
    layers = [row.layer(P, rngs=nnx.Rngs(3)) for row in ROWS.values()]
    inputs = [jnp.ones(row.shape, jnp.bfloat16) for row in ROWS.values()]
    graph, state = nnx.split(layers)

    def run(inputs: list[Array], state: nnx.State) -> tuple[list[Array], nnx.State]:
        merged = nnx.merge(graph, state, copy=True)
        return [f(x) for f, x in zip(merged, inputs, strict=True)], nnx.state(merged)

    _, pullback, after = jax.vjp(jax.jit(lambda xs: run(xs, state)), inputs, has_aux=True)
    held = [a.nbytes for a in jax.tree.leaves(pullback) if isinstance(a, jax.Array)]
    assert 0 < sum(held) <= KEPT * len(layers)
    counts = [leaf for leaf in jax.tree.leaves(after) if leaf.dtype == jnp.uint32 and not leaf.ndim]
    assert [int(count) for count in counts] == [1] * len(layers)


@pytest.mark.parametrize("row", [ROWS["RecurrentDropout"], ROWS["AlphaDropout"]])
def test_all_derivatives_are_those_of_the_mask(row: Row) -> None:
    """Forward mode, and the second derivative of a function that is not linear behind it."""
    with jax.enable_x64(True):
        x, t = (jnp.asarray(values(*row.shape, seed=seed)) for seed in (0, 1))
        layer = row.layer(P)

        def derivatives(drop: Callable[[Array], Array]) -> object:
            def loss(x: Array) -> Array:
                return jnp.sum(jnp.tanh(drop(x)))

            return jax.jvp(drop, (x,), (t,)), jax.jvp(jax.grad(loss), (x,), (t,))

        def all_of_them(key: Array) -> object:
            mask = functional.dropout_mask(key, P, row.drawn)
            drawn = derivatives(lambda x: layer(x, rngs=key))
            return drawn, derivatives(lambda x: layer(x, mask=mask))

        drawn, given = jax.jit(all_of_them)(KEY)
        for ours, theirs in zip(jax.tree.leaves(drawn), jax.tree.leaves(given), strict=True):
            assert_same(ours, theirs)
            assert bool((ours != 0).any())


@every_row
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_at_p_0_and_1_nan_stays_and_nothing_is_drawn(row: Row, p: float) -> None:
    x = np.full(row.shape, 2.0, np.float32)
    x.reshape(-1)[::7] = np.nan
    found = np.asarray(row.layer(p, rngs=nnx.Rngs(0))(jnp.asarray(x)))
    np.testing.assert_array_equal(found, x if p == 0 else 0 * x)


@pytest.mark.parametrize("function", ["random_dropout", "random_alpha_dropout"])
def test_a_key_and_a_fitting_shape_are_needed(function: str) -> None:
    drop, x = getattr(functional, function), jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"random dropout needs a key, got key=None\. Pass jax"):
        drop(x, P, None)
    for shape in ((4, 2), (2, 4, 3)):
        with pytest.raises(ValueError, match=r"the mask's shape must broadcast to the input's"):
            drop(x, P, KEY, shape)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        drop(x, 1.5, KEY)
    y = drop(x, P, KEY, (3,))
    np.testing.assert_array_equal(y, jnp.broadcast_to(y[:1], y.shape))


def test_a_default_key_implementation_other_than_threefry_works() -> None:
    with jax.default_prng_impl("rbg"):
        layer = dropout.Dropout(P, rngs=nnx.Rngs(0))
        x = jnp.ones((4, 400))
        first, second = layer(x), layer(x)
        raw = layer(x, rngs=jax.random.PRNGKey(0))
    assert bool((first != second).any())
    assert bool((raw == 0).any())


TORCH_ALPHA = {
    "elements": (F.alpha_dropout, (6, 5, 40), (6, 5, 40)),
    "features": (F.feature_alpha_dropout, (6, 40, 5), (6, 40, 1)),
}


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", TORCH_ALPHA)
def test_alpha_dropout_is_torchs_with_torchs_mask(kind: str, p: float) -> None:
    theirs, shape, drawn = TORCH_ALPHA[kind]
    torch.manual_seed(4)
    mask = jnp.asarray(torch.empty(drawn).bernoulli_(1 - p).numpy() != 0)

    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(4)
        return theirs(x, p, training=True)

    report = parity.compare(
        lambda x: functional.alpha_dropout(x, p, mask), seeded, values(*shape, offset=0.5)
    )
    assert report.passed, str(report)
    assert 0 < mask.sum() < mask.size or p in (0.0, 1.0)


def test_alpha_dropout_keeps_mean_and_variance(budget: Budget) -> None:
    """Of 4e6 standard normal numbers; the square is cut at 40, which 1e-9 of them exceed."""
    x = jax.random.normal(KEY, (4_000_000,))
    y = np.asarray(dropout.AlphaDropout(0.4, rngs=nnx.Rngs(1))(x))
    moments = {
        "mean": (y, HasMean(0.0, low=-8.0, high=8.0, discrepancy=0.05)),
        "variance": (np.square(y), HasMean(1.0, low=0.0, high=40.0, discrepancy=0.1)),
    }
    for name, (samples, claim) in moments.items():
        found = claim.check(samples, budget)
        assert found.passed, f"{name}: {found}"


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_drop_path_is_its_twin_with_its_mask(p: float) -> None:
    x = values(40, 3, 2)
    torch.manual_seed(1)
    theirs = torch_dropout.DropPath(p)(torch.tensor(x))
    mask = jnp.asarray((theirs != 0).numpy()[:, :1, :1])
    with jax.enable_x64(True):
        assert_same(dropout.DropPath(p)(jnp.asarray(x), mask=mask), theirs)
    assert 0 < mask.sum() < mask.size or p in (0.0, 1.0)


def test_drop_path_drops_samples_with_probability_p(budget: Budget) -> None:
    """Of 1e6 samples; a probability off by 0.01 is found, and so is a mean off by 0.01."""
    y = np.asarray(dropout.DropPath(0.2, rngs=nnx.Rngs(0))(jnp.ones((1_000_000, 2))))
    np.testing.assert_array_equal(y[:, 0], y[:, 1])
    assert HasMean(0.2, discrepancy=0.01).check(y[:, 0] == 0, budget).passed
    assert HasMean(1.0, high=1.25, discrepancy=0.01).check(y[:, 0], budget).passed


def test_drop_path_takes_any_number_of_axes_but_none() -> None:
    layer = dropout.DropPath(0.5, rngs=nnx.Rngs(0))
    assert set(layer(jnp.ones(64)).tolist()) == {0.0, 2.0}
    with pytest.raises(ValueError, match=r"drop path needs \(N, \.\.\.\), got shape=\(\)"):
        layer(jnp.ones(()))


@pytest.mark.parametrize("layer", [dropout.DropPath, dropout.RecurrentDropout])
def test_a_probability_without_a_usual_value_has_no_default(layer: type[nnx.Module]) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'p'"):
        layer()
    assert dropout.AlphaDropout().p == torch.nn.AlphaDropout().p == 0.5
