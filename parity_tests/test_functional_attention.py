"""Attention as a function: PyTorch's numbers, block by block, with nothing of size L x S kept."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flaxstab import functional
from flaxstab.functional import _attention
from parity_tests.support.attention import EV, H, L, N, S, arrays, logits_bias, plain
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same

RNG = np.random.default_rng(0)


def hidden(*shape: int) -> np.ndarray:
    """Booleans, true = ignored, with a key left for every query."""
    drawn = RNG.uniform(size=shape) < 0.4
    drawn[..., 0] = False
    return drawn


def floats(*shape: int) -> np.ndarray:
    """A bias that also hides keys."""
    return np.where(hidden(*shape), -np.inf, RNG.normal(0.5, 2.0, shape))


CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "mask of queries and keys": {"mask": hidden(L, S)},
    "mask of keys": {"mask": hidden(N, 1, 1, S)},
    "mask of heads": {"mask": hidden(N, H, L, S)},
    "bias": {"bias": floats(1, H, L, S)},
    "bias of keys": {"bias": floats(N, 1, 1, S)},
    "causal": {"is_causal": True},
    "all of them": {
        "mask": (hidden(L, S), hidden(N, 1, 1, S)),
        "bias": [floats(H, L, S), floats(N, 1, 1, S)],
        "is_causal": True,
        "scale": 0.4,
    },
    "dropout": {"p": 0.3, "dropout_mask": RNG.uniform(size=(N, H, L, S)) > 0.3},
    "dropout of whole keys": {"p": 0.5, "dropout_mask": RNG.uniform(size=(N, 1, 1, S)) > 0.5},
    "everything dropped": {"p": 1.0, "dropout_mask": np.zeros((1, S), bool)},
}  # fmt: skip


def cotangents(name: str) -> tuple[np.ndarray, np.ndarray]:
    seed = 10 * list(CASES).index(name)
    return values(N, L, H, EV, seed=seed), values(N, H, L, S, seed=seed + 1)


def gradients(results: list[Tensor], inputs: list[Tensor], names: list[str]) -> tuple[Tensor, ...]:
    pulled = [torch.tensor(c) for name in names for c in cotangents(name)]
    shapes = [tuple(r.shape) for r in results]
    pulled = [c for c in pulled if tuple(c.shape) in shapes]
    return torch.autograd.grad(results, inputs, pulled)


def test_outputs_weights_and_gradients_are_pytorchs() -> None:
    """Gradients of all cases at once; each case's cotangents are its own."""
    qkv = arrays()
    tensors = [torch.tensor(a, requires_grad=True) for a in qkv]
    expected = {name: plain(*tensors, options) for name, options in CASES.items()}

    def run(*qkv: jax.Array) -> object:
        def outputs(*qkv: jax.Array) -> object:
            return {n: functional.attention_weights(*qkv, **o) for n, o in CASES.items()}

        found, pullback = jax.vjp(outputs, *qkv)
        return found, pullback({n: tuple(map(jnp.asarray, cotangents(n))) for n in CASES})

    with jax.enable_x64(True):
        found, own = jax.jit(run)(*qkv)
    for name, pair in expected.items():
        for ours, theirs in zip(found[name], pair, strict=True):
            assert_same(ours, theirs)
    flat = [part for pair in expected.values() for part in pair]
    for ours, theirs in zip(own, gradients(flat, tensors, list(CASES)), strict=True):
        assert_same(ours, theirs)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole blocks and a rest; without weights, whose own blocks the last cases show."""
    monkeypatch.setattr(_attention, "ROWS", 2)
    qkv, weighed = arrays(), ["all of them", "dropout"]
    names = ["mask of heads", "bias", "mask of keys", *weighed]
    tensors = [torch.tensor(a, requires_grad=True) for a in qkv]
    expected = {name: plain(*tensors, CASES[name]) for name in names}

    def run(*qkv: jax.Array) -> object:
        def outputs(*qkv: jax.Array) -> object:
            return {n: functional.attention(*qkv, **CASES[n]) for n in names}

        found, pullback = jax.vjp(outputs, *qkv)
        pulled = {n: jnp.asarray(cotangents(n)[0]) for n in names}
        weights = {n: functional.attention_weights(*qkv, **CASES[n]) for n in weighed}
        return found, pullback(pulled), weights

    with jax.enable_x64(True):
        found, own, weights = jax.jit(run)(*qkv)
    for name, (output, _) in expected.items():
        assert_same(found[name], output)
    for name, pair in weights.items():
        for ours, theirs in zip(pair, expected[name], strict=True):
            assert_same(ours, theirs)
    outputs = [output for output, _ in expected.values()]
    for ours, theirs in zip(own, gradients(outputs, tensors, names), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", [n for n in CASES if "p" not in CASES[n]])
def test_the_formula_is_what_pytorch_computes(name: str) -> None:
    """The oracle above against PyTorch's own function, whose boolean masks have the other sense."""
    options = CASES[name]
    q, k, v = (torch.tensor(a) for a in arrays())
    bias, scale = logits_bias(options), options.get("scale")
    swapped = (a.transpose(1, 2) for a in (q, k, v))
    theirs = scaled_dot_product_attention(*swapped, attn_mask=bias, scale=scale)
    assert_same(plain(q, k, v, options)[0], theirs.transpose(1, 2))
    if set(options) == {"mask"}:
        swapped = (a.transpose(1, 2) for a in (q, k, v))
        theirs = scaled_dot_product_attention(*swapped, attn_mask=torch.tensor(~options["mask"]))
        assert_same(plain(q, k, v, options)[0], theirs.transpose(1, 2))


@pytest.mark.parametrize("shape", [(1, H, L, S), (L, 1), (1, S)])
def test_a_bias_is_learned_as_in_pytorch(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_attention, "ROWS", 2)
    qkv, bias = arrays(), RNG.normal(size=shape)
    cotangent = values(N, L, H, EV, seed=9)
    theirs = torch.tensor(bias, requires_grad=True)
    q, k, v = (torch.tensor(a).transpose(1, 2) for a in qkv)
    whole = theirs.expand(N, H, L, S)
    output = scaled_dot_product_attention(q, k, v, attn_mask=whole).transpose(1, 2)
    (expected,) = torch.autograd.grad(output, theirs, torch.tensor(cotangent))

    def loss(bias: jax.Array) -> jax.Array:
        return jnp.sum(functional.attention(*map(jnp.asarray, qkv), bias=bias) * cotangent)

    with jax.enable_x64(True):
        # Whole rows and columns of a bias change little or nothing: the terms cancel.
        assert_same(jax.jit(jax.grad(loss))(bias), expected, size=np.abs(cotangent).max())


def blind(which: str) -> dict[str, np.ndarray]:
    """Options with which queries 1 and 4 see nothing: by a mask, a bias, or both together."""
    rows = np.isin(np.arange(L), [1, 4])[:, None]
    half = np.arange(S)[None] < S // 2
    return {
        "mask": {"mask": np.broadcast_to(rows, (L, S))},
        "bias": {"bias": np.where(np.broadcast_to(rows, (L, S)), -np.inf, 0.3)},
        "both": {"mask": rows & half, "bias": np.where(rows & ~half, -np.inf, 0.3)},
    }[which]


@pytest.mark.parametrize(
    ("which", "rows"), [("mask", 256), ("bias", 256), ("both", 2)], ids=["mask", "bias", "both"]
)
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(
    which: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch's function; and as if the query were not there."""
    monkeypatch.setattr(_attention, "ROWS", rows)
    qkv, seeing = arrays(), [0, 2, 3]
    cotangent = values(N, L, H, EV, seed=3), values(N, H, L, S, seed=4)
    options = {n: jnp.asarray(a) for n, a in blind(which).items()}

    def run(*qkv: jax.Array) -> object:
        found, pullback = jax.vjp(lambda *a: functional.attention_weights(*a, **options), *qkv)
        return found, pullback(tuple(map(jnp.asarray, cotangent)))

    q, k, v = (torch.tensor(a, requires_grad=True) for a in qkv)
    output, weights = plain(q[:, seeing], k, v, {})
    pulled = (torch.tensor(cotangent[0][:, seeing]), torch.tensor(cotangent[1][:, :, seeing]))
    gradients = torch.autograd.grad((output, weights), (q, k, v), pulled)
    with jax.enable_x64(True):
        (found, found_weights), own = jax.jit(run)(*qkv)
    assert_same(np.asarray(found)[:, seeing], output)
    assert_same(np.asarray(found_weights)[:, :, seeing], weights)
    assert not np.asarray(found)[:, [1, 4]].any()
    assert not np.asarray(found_weights)[:, :, [1, 4]].any()
    for ours, theirs in zip(own, gradients, strict=True):
        assert_same(ours, theirs)
    assert not np.asarray(own[0])[:, [1, 4]].any()
    swapped = (torch.tensor(a).transpose(1, 2) for a in qkv)
    theirs = scaled_dot_product_attention(*swapped, attn_mask=logits_bias(blind(which)))
    assert_same(found, theirs.transpose(1, 2))


def test_large_logits_and_the_least_float_are_pytorchs() -> None:
    """A row of finfo.min sees all alike, as in PyTorch; -inf sees nothing."""
    q, k, v = arrays(scale=300.0)
    bias = np.zeros((L, S))
    bias[1], bias[2, :3] = np.finfo(np.float64).min, np.finfo(np.float64).min
    swapped = (torch.tensor(a).transpose(1, 2) for a in (q, k, v))
    theirs = scaled_dot_product_attention(*swapped, attn_mask=torch.tensor(bias)).transpose(1, 2)
    with jax.enable_x64(True):
        found = functional.attention(*map(jnp.asarray, (q, k, v)), bias=jnp.asarray(bias))
        assert_same(found, theirs)


def test_open_keys_are_seen_by_every_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "ROWS", 2)
    closed = {
        "mask": {"mask": hidden(N, 1, L, S - 2)},
        "bias": {"bias": floats(L, S - 2)},
        "causal": {"mask": ~np.tri(L, S - 2, dtype=bool)},
        "nothing else": {"mask": np.ones((L, S - 2), bool)},
    }
    given = closed | {"causal": {"is_causal": True}, "nothing else": {"mask": np.ones(1, bool)}}
    qkv = arrays()
    tensors = [torch.tensor(a) for a in qkv]
    with jax.enable_x64(True):
        found = {
            name: functional.attention(*map(jnp.asarray, qkv), open_keys=2, **options)
            for name, options in given.items()
        }
    for name, options in closed.items():
        whole = {n: np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, 2)]) for n, a in options.items()}
        assert_same(found[name], plain(*tensors, whole)[0])


def loss_of(attend: Callable[..., object], *qkv: object) -> object:
    """A scalar with a second derivative."""
    return (attend(*qkv) ** 3).sum()


def torch_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k, v, {"is_causal": True})[0]


def test_forward_mode_and_second_derivatives_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "ROWS", 2)
    qkv = arrays()
    directions = [values(*a.shape, seed=i + 20, offset=0.5) for i, a in enumerate(qkv)]
    tensors = [torch.tensor(a, requires_grad=True) for a in qkv]
    tangents = tuple(map(torch.tensor, directions))
    _, first = torch.autograd.functional.jvp(torch_attend, tuple(tensors), tangents)
    gradients = torch.autograd.grad(loss_of(torch_attend, *tensors), tensors, create_graph=True)
    product = sum((g * d).sum() for g, d in zip(gradients, tangents, strict=True))
    second = torch.autograd.grad(product, tensors)

    def attend(*qkv: jax.Array) -> jax.Array:
        return functional.attention(*qkv, is_causal=True)

    def run(qkv: tuple[jax.Array, ...], along: tuple[jax.Array, ...]) -> object:
        gradient = jax.grad(lambda *a: loss_of(attend, *a), argnums=(0, 1, 2))
        forward = jax.jvp(gradient, qkv, along)[1]
        back = jax.vjp(gradient, *qkv)[1](along)
        return jax.jvp(attend, qkv, along)[1], forward, back

    with jax.enable_x64(True):
        tangent, *both = jax.jit(run)(tuple(map(jnp.asarray, qkv)), tuple(directions))
        size = max(float(t.abs().max()) for t in second)
        assert_same(tangent, first)
        for found in both:
            for ours, theirs in zip(found, second, strict=True):
                assert_same(ours, theirs, size)


def test_queries_are_dealt_out_whole_and_evenly() -> None:
    for length in range(3000):
        rows, whole, rest = _attention._Blocks.of(length)
        assert rows * whole + rest == length
        assert rows <= _attention.ROWS
        assert whole + (rest > 0) == max(-(-length // _attention.ROWS), 1)
        assert rest == 0 or rest > rows - whole - 1


@pytest.mark.parametrize("empty", ["samples", "queries", "keys"])
def test_an_empty_array_gives_an_empty_or_zero_one(empty: str) -> None:
    sizes = {"samples": 2, "queries": 3, "keys": 4} | {empty: 0}
    n, length, s = sizes.values()
    q, k, v = jnp.ones((n, length, 1, 2)), jnp.ones((n, s, 1, 2)), jnp.ones((n, s, 1, 5))
    output, weights = functional.attention_weights(q, k, v, is_causal=True)
    assert (output.shape, weights.shape) == ((n, length, 1, 5), (n, 1, length, s))
    assert not output.size or (output == (0 if empty == "keys" else 1)).all()


X = jnp.ones((2, 3, 2, 4))
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "an axis missing": (
        lambda: functional.attention(X[0], X[0], X[0]),
        r"must have 4 axes, \(N, positions, heads, features\), got query=\(3, 2, 4\)",
    ),
    "other heads": (
        lambda: functional.attention(X, X[:, :, :1], X[:, :, :1]),
        r"key must have the batch, heads and features of query, got query=.* and key=\(2, 3, 1, 4",
    ),
    "another length": (
        lambda: functional.attention(X, X, X[:, :2]),
        r"value must have the batch, positions and heads of key, got key=.* and value=\(2, 2,",
    ),
    "a float mask": (
        lambda: functional.attention(X, X, X, mask=jnp.zeros((3, 3))),
        "mask must be boolean, got dtype='float32'. Pass mask.astype.bool., true where a key is ig",
    ),
    "an integer mask": (
        lambda: functional.attention(X, X, X, mask=jnp.zeros((3, 3), jnp.int32)),
        "mask must be boolean, got dtype='int32'",
    ),
    "a boolean bias": (
        lambda: functional.attention(X, X, X, bias=jnp.zeros((3, 3), bool)),
        "bias must be floating-point, got dtype='bool'. Give booleans as a mask",
    ),
    "a mask too large": (
        lambda: functional.attention(X, X, X, mask=jnp.zeros((3, 4), bool)),
        r"mask must broadcast to \(N, H, L, S\), got mask=\(3, 4\) and .*\(2, 2, 3, 3\)",
    ),
    "a mask of open keys": (
        lambda: functional.attention(X, X, X, mask=jnp.zeros((3, 3), bool), open_keys=1),
        r"mask must broadcast to .*, got mask=\(3, 3\) and .*\(2, 2, 3, 2\)",
    ),
    "five axes": (
        lambda: functional.attention(X, X, X, bias=jnp.zeros((1, 2, 2, 3, 3))),
        r"bias must broadcast to \(N, H, L, S\), got bias=\(1, 2, 2, 3, 3\)",
    ),
    "a float dropout mask": (
        lambda: functional.attention(X, X, X, p=0.1, dropout_mask=jnp.ones((3, 3))),
        "dropout_mask must be boolean, got dtype='float32'. Pass dropout_mask.astype",
    ),
    "no key": (
        lambda: functional.attention(X, X, X, p=0.1),
        "dropout in attention needs a key, got p=0.1 and dropout_key=None. Pass dropout_key=",
    ),
    "a probability": (
        lambda: functional.attention(X, X, X, p=1.5),
        r"p must lie in \[0, 1\], got p=1.5",
    ),
    "too many open keys": (
        lambda: functional.attention(X, X, X, open_keys=4),
        "open_keys must be a number of keys, got open_keys=4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
