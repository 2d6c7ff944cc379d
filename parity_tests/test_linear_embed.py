"""The embedding against PyTorch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import functional, linear
from flaxstab.parity import Budget, IsNormal, compare
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same, assert_twins

RNGS = nnx.Rngs(0)
IDS = np.array([[1, 4, 4], [0, 3, 4]])  # 2 is not looked up, 4 is more than once


def test_embed_is_torchs() -> None:
    # Not in bfloat16: there the harness keeps the parameters, and so the output, in float32.
    ours, theirs = linear.Embed(5, 3, rngs=RNGS), torch.nn.Embedding(5, 3)
    report = compare(ours, theirs, IDS, dtypes=(np.float32,))
    assert report.passed, str(report)


@pytest.mark.parametrize("padding_idx", [4, -1, -5])
def test_the_padding_row_is_looked_up_and_gets_no_gradient(padding_idx: int) -> None:
    table = values(5, 3)
    weight = torch.tensor(table, requires_grad=True)
    expected = torch.nn.functional.embedding(torch.tensor(IDS), weight, padding_idx)
    cotangent = values(*IDS.shape, 3, seed=1)
    expected.backward(torch.tensor(cotangent))
    with jax.enable_x64(True):
        layer = linear.Embed(5, 3, padding_idx, param_dtype=jnp.float64, rngs=RNGS)
        layer.embedding[...] = jnp.asarray(table)  # the padding row, too: not 0
        graph, params = nnx.split(layer)
        y, pull = jax.vjp(lambda params: nnx.merge(graph, params)(IDS), params)
        (gradient,) = jax.tree.leaves(pull(jnp.asarray(cotangent)))
        assert_same(y, expected)
        assert_same(gradient, weight.grad)
    y, gradient = np.asarray(y), np.asarray(gradient)
    assert (y[0, 1] == table[4]).all()
    assert not gradient[padding_idx].any()
    assert gradient[3].all()


def test_the_padding_row_stays_as_it_is_in_training() -> None:
    layer = linear.Embed(5, 3, -1, embedding_init=nnx.initializers.ones, rngs=RNGS)
    graph, params = nnx.split(layer)
    gradients = nnx.grad(lambda p: jnp.sum(nnx.merge(graph, p)(IDS) ** 2))(params)
    assert (layer.embedding[...] == 1).all()  # of one's own law torch zeroes no row, either
    changed = layer.embedding[...] - gradients["embedding"][...]
    assert (changed[4] == 1).all()
    assert (changed[3] == -1).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32"])
def test_indices_of_every_integer_type_are_rows(dtype: str) -> None:
    table = jnp.asarray(values(300, 2), jnp.float32)
    largest = min(299, np.iinfo(dtype).max)
    ids = jnp.asarray([0, 5, largest], dtype)
    for padding_idx in (None, 5, 299):
        found = functional.embedding(ids, table, padding_idx=padding_idx)
        np.testing.assert_array_equal(found, np.asarray(table)[[0, 5, largest]])


@pytest.mark.parametrize("shape", [(), (0,), (2, 1, 3)])
def test_indices_have_any_shape(shape: tuple[int, ...]) -> None:
    layer = linear.Embed(5, 4, 1, rngs=RNGS)
    for ids in (np.zeros(shape, int), jnp.zeros(shape, jnp.int32)):
        y = layer(ids)
        assert (y.shape, y.dtype) == ((*shape, 4), jnp.float32)
        np.testing.assert_array_equal(y, np.broadcast_to(layer.embedding[...][0], y.shape))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("jitted", [False, True])
def test_an_index_outside_the_table_gives_nan_and_no_gradient(rows: int, jitted: bool) -> None:
    """``torch`` raises; stock ``nnx.Embed`` wraps, and with one row answers every index."""
    ids = jnp.asarray([0, rows, -1, rows + 100, np.iinfo(np.int32).min])
    for index in (rows, -1):
        with pytest.raises(IndexError):
            torch.nn.Embedding(rows, 2)(torch.tensor([index]))
    layer = linear.Embed(rows, 2, 0 if rows > 1 else None, rngs=RNGS)

    def outputs(layer: nnx.Module) -> jax.Array:
        return layer(ids)

    y = (nnx.jit(outputs) if jitted else outputs)(layer)
    np.testing.assert_array_equal(y[0], layer.embedding[...][0])
    assert np.isnan(y[1:]).all()
    graph, params = nnx.split(layer)
    gradient = nnx.grad(lambda p: jnp.sum(nnx.merge(graph, p)(ids[1:])))(params)
    assert not gradient["embedding"][...].any()


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
def test_indices_that_are_no_integers_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"indices must be integers, got dtype='{dtype}'"):
        linear.Embed(5, 3, rngs=RNGS)(jnp.ones(2, dtype))


@pytest.mark.parametrize(
    ("options", "output", "head"),
    [
        ({}, "float32", "float16"),
        ({"param_dtype": jnp.bfloat16}, "bfloat16", "float16"),
        ({"dtype": jnp.bfloat16}, "bfloat16", "bfloat16"),
    ],
    ids=str,
)
def test_the_output_has_the_tables_dtype_unless_told_otherwise(
    options: dict[str, object], output: str, head: str
) -> None:
    layer = linear.Embed(5, 3, rngs=RNGS, **options)
    assert layer(jnp.asarray([1])).dtype == output
    assert layer.attend(jnp.ones((2, 3), jnp.float16)).dtype == head


def test_a_tied_head_is_torchs_linear_with_the_table() -> None:
    layer = linear.Embed(5, 3, 1, rngs=RNGS)

    def ours(query: jax.Array, table: jax.Array) -> jax.Array:
        graph, _ = nnx.split(layer)
        return nnx.merge(graph, nnx.State({"embedding": nnx.Param(table)})).attend(query)

    assert_twins(ours, torch.nn.functional.linear, values(2, 4, 3), values(5, 3, seed=1))


def test_a_query_that_does_not_fit_is_refused() -> None:
    layer = linear.Embed(5, 3, rngs=RNGS)
    with pytest.raises(ValueError, match="last axis must have embedding_dim elements"):
        layer.attend(jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="computes in floating point"):
        layer.attend(jnp.ones((2, 3), jnp.int32))


@pytest.mark.parametrize("padding_idx", [None, -2])
def test_the_table_starts_as_torchs(padding_idx: int | None, budget: Budget) -> None:
    """N(0, 1) whatever the width (stock nnx: 8 times narrower here), the padding row 0."""
    layer = linear.Embed(1000, 64, padding_idx, rngs=nnx.Rngs(3))
    table = np.asarray(layer.embedding[...], np.float64)
    theirs = torch.nn.Embedding(1000, 64, padding_idx).weight.detach().numpy()
    zero = [] if padding_idx is None else [998]
    assert np.flatnonzero(~table.any(1)).tolist() == zero
    assert np.flatnonzero(~theirs.any(1)).tolist() == zero
    law = IsNormal(0.0, 1.0, discrepancy=0.05)
    found = law.check(np.delete(table, zero, 0).ravel(), budget)
    assert found.passed, str(found)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: linear.Embed(0, 3, rngs=RNGS), "num_embeddings must be an integer of at least 1"),
        (lambda: linear.Embed(3, 0, rngs=RNGS), "embedding_dim must be an integer of at least 1"),
        (
            lambda: linear.Embed(3, 2, 3, rngs=RNGS),
            r"padding_idx must lie in \[-num_embeddings, num_embeddings\), got padding_idx=3 and",
        ),
        (lambda: linear.Embed(3, 2, -4, rngs=RNGS), "padding_idx must lie in"),
        (lambda: linear.Embed(3, 2, 1.5, rngs=RNGS), "padding_idx must be an integer or None, got"),
        (
            lambda: linear.Embed(3, 2, True, rngs=RNGS),
            "padding_idx must be an integer or None, got",
        ),
        (lambda: linear.Embed(3, 2), r"needs rngs. Pass rngs=nnx.Rngs\(seed\)\."),
        (lambda: linear.Embed(3, 2, param_dtype=int, rngs=RNGS), "param_dtype must be a floating"),
        (lambda: linear.Embed(3, 2, dtype=int, rngs=RNGS), "dtype must be a floating-point dtype"),
        (
            lambda: functional.embedding(jnp.ones(2, int), jnp.ones((3, 2)), padding_idx=3),
            "padding_idx must lie in",
        ),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("padding_idx", [3, -4])
def test_torch_refuses_the_same_padding_rows(padding_idx: int) -> None:
    with pytest.raises(AssertionError, match="Padding_idx must be within num_embeddings"):
        torch.nn.Embedding(3, 2, padding_idx)
