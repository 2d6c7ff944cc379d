"""The count of ``support.kept`` is the one worked out by hand, and moves when it should."""

import jax
import jax.numpy as jnp
import pytest

from flaxstab._typing import Array
from parity_tests.support.kept import kept_bytes

X = jnp.linspace(1.0, 2.0, 64 * 8, dtype=jnp.float32).reshape(64, 8)
SCALE = jnp.linspace(1.0, 2.0, 8, dtype=jnp.float32)
N = 64 * 8 * 4


def two_arrays(x: Array) -> Array:
    """Keeps exp(x), its own derivative, and x."""
    return jnp.exp(x) + jnp.square(x)


def widened(x: Array) -> Array:
    """Keeps a float32 copy of a bfloat16 array."""
    return jnp.square(jnp.asarray(x, jnp.float32))


def scaled(x: Array, scale: Array) -> Array:
    """Keeps each factor for the gradient of the other."""
    return x * scale


@pytest.mark.parametrize(
    ("f", "expected"),
    [(lambda x: 2 * x, 0), (jnp.square, N), (jnp.sin, N), (two_arrays, 2 * N),
     (jax.checkpoint(two_arrays), N)],
    ids=["nothing", "the input", "its cosine", "two arrays", "recomputed"],
)  # fmt: skip
def test_what_is_kept_is_counted(f: object, expected: int) -> None:
    assert kept_bytes(f, X) == expected


def test_a_buffer_held_twice_counts_once() -> None:
    _, pullback = jax.vjp(jax.jit(scaled), X, X)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pullback)) == 2 * N
    assert kept_bytes(scaled, X, X) == N
    assert kept_bytes(scaled, X, X + 1) == 2 * N


def test_bytes_are_those_of_the_dtype_that_is_kept() -> None:
    half = jnp.asarray(X, jnp.bfloat16)
    assert kept_bytes(jnp.square, half) == N / 2
    assert kept_bytes(widened, half) == N


def test_parameters_are_left_out_and_their_copies_are_not() -> None:
    scale = jnp.broadcast_to(SCALE, X.shape)
    assert kept_bytes(scaled, X, scale) == 2 * N
    assert kept_bytes(scaled, X, scale, parameters=[scale]) == N
    assert kept_bytes(scaled, X, scale, parameters=[scale, X]) == 0
    assert kept_bytes(scaled, X, scale, parameters=[scale + 0]) == 2 * N

    def reshaped(x: Array, scale: Array) -> Array:
        return x * scale[None, :]

    assert kept_bytes(reshaped, X, SCALE, parameters=[SCALE]) == N + SCALE.nbytes
