"""What attention holds and keeps, which does not grow with the square of the length; 16 bits."""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flaxstab import functional
from flaxstab.functional import _attention
from parity_tests.support.attention import arrays, plain
from parity_tests.support.cases import values
from parity_tests.support.kept import kept_bytes

N, H, E = 1, 2, 32


def run(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
    options = {"mask": mask, "is_causal": True, "p": 0.1}
    return functional.attention(q, k, v, dropout_key=jax.random.wrap_key_data(key), **options)


def arguments(length: int, dtype: str) -> tuple[jax.Array, ...]:
    qkv = [jnp.asarray(values(N, length, H, E, seed=i), dtype) for i in range(3)]
    mask = jnp.asarray(np.arange(length) > length - 9)[None, None, None]
    return (*qkv, mask, jax.random.key_data(jax.random.key(0)))


@pytest.mark.parametrize(
    ("length", "dtype"), [(256, "bfloat16"), (512, "bfloat16"), (512, "float32")]
)
def test_nothing_but_the_arguments_is_kept(length: int, dtype: str) -> None:
    """In their own dtypes; of dropout the key, 8 bytes."""
    given = arguments(length, dtype)
    assert kept_bytes(run, *given) == sum(a.nbytes for a in given)
    assert given[-1].nbytes == 8


def test_stock_attention_keeps_more() -> None:
    """What the limit is for: its logits or probabilities, in float32, with or without dropout."""
    q, k, v, *_ = arguments(512, "bfloat16")
    kept = kept_bytes(jax.nn.dot_product_attention, q, k, v)
    assert kept > 3 * q.nbytes + 4 * N * H * 512 * 512


def temporaries(length: int, dtype: str) -> int:
    """Bytes that the program of output and all gradients needs beside what goes in and out."""

    def both(cotangent: jax.Array, *given: jax.Array) -> object:
        output, pullback = jax.vjp(lambda *qkv: run(*qkv, *given[3:]), *given[:3])
        return output, pullback(cotangent)

    given = arguments(length, dtype)
    return jax.jit(both).lower(given[0], *given).compile().memory_analysis().temp_size_in_bytes


def growth(dtype: str, *lengths: int) -> list[float]:
    """By how much the temporaries grow when the length doubles."""
    sizes = [temporaries(length, dtype) for length in lengths]
    return [b / a for a, b in itertools.pairwise(sizes)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporaries_grow_with_the_length_and_not_with_its_square(dtype: str) -> None:
    """At most 2.2 times when the length doubles, with dropout, a mask and causality."""
    assert max(growth(dtype, 512, 1024, 2048)) <= 2.2


def test_the_growth_shows_a_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """All queries in one block."""
    monkeypatch.setattr(_attention, "ROWS", 1024)
    assert min(growth("float32", 512, 1024)) > 3.5


def bfloat16_errors(attend: Callable[..., object]) -> list[float]:
    """Largest errors of output and gradients of bfloat16 inputs, by their largest exact value."""
    shapes = (1, 64, 2, 8), (1, 96, 2, 8), (1, 96, 2, 8)
    qkv = [values(*shape, seed=i, offset=1.0, scale=1.0) for i, shape in enumerate(shapes)]
    low = [np.asarray(a).astype(jnp.bfloat16) for a in (*qkv, values(*shapes[0], seed=5))]
    *exact, cotangent = (torch.tensor(a.astype(np.float64), requires_grad=True) for a in low)
    output = plain(*exact, {})[0]
    expected = [output, *torch.autograd.grad(output, exact, cotangent)]
    pairs = zip(attend(*low), (b.detach().numpy() for b in expected), strict=True)
    return [np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in pairs]


def pytorchs(*low: np.ndarray, backend: SDPBackend = SDPBackend.MATH) -> list[np.ndarray]:
    q, k, v, cotangent = (torch.tensor(a.astype(np.float32)).bfloat16() for a in low)
    inputs = [a.requires_grad_() for a in (q, k, v)]
    with sdpa_kernel(backend):
        output = scaled_dot_product_attention(*(a.transpose(1, 2) for a in inputs)).transpose(1, 2)
    found = [output, *torch.autograd.grad(output, inputs, cotangent)]
    return [a.detach().double().numpy() for a in found]


def ours_in_bfloat16(*low: np.ndarray) -> list[jax.Array]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> object:
        output, pullback = jax.vjp(functional.attention, q, k, v)
        return [output, *pullback(cotangent)]

    return jax.jit(run)(*low)


def test_sixteen_bits_are_as_accurate_as_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In four blocks, against the path of PyTorch's that computes in float32, the most accurate."""
    monkeypatch.setattr(_attention, "ROWS", 16)
    theirs = bfloat16_errors(pytorchs)
    ours = bfloat16_errors(ours_in_bfloat16)
    assert all(a <= 1.5 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    fused = bfloat16_errors(partial(pytorchs, backend=SDPBackend.FLASH_ATTENTION))
    assert fused[1] > 3 * ours[1]  # of the query's gradient
    monkeypatch.setattr(_attention, "widest", lambda *_: jnp.bfloat16)
    _attention.forget_compiled()
    narrow = bfloat16_errors(ours_in_bfloat16)
    _attention.forget_compiled()
    assert all(a > 1.5 * b for a, b in zip(narrow, theirs, strict=True)), (narrow, theirs)


def test_probabilities_in_bfloat16_are_rounded_once() -> None:
    """Ours within 1 eps of each value; those that PyTorch returns come from rounded logits."""
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in arrays(scale=2.0))
    exact = plain(*(torch.tensor(np.asarray(a, np.float64)) for a in (q, k, v)), {})[1].numpy()
    found = np.asarray(functional.attention_weights(q, k, v)[1], np.float64)
    heads = [torch.tensor(np.asarray(a, np.float32)).bfloat16().transpose(1, 2) for a in (q, k)]
    theirs = torch.softmax((heads[0] * q.shape[-1] ** -0.5) @ heads[1].mT, -1).double().numpy()
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert np.max(np.abs(found - exact) / exact) <= eps
    assert np.max(np.abs(theirs - exact) / exact) > 2 * eps
    assert functional.attention_weights(q, k, v)[0].dtype == jnp.bfloat16
