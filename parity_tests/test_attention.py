"""Multi-head attention: every combination of PyTorch's options and masks, in float64."""

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor

from flaxstab import interop
from flaxstab.attention import MultiHeadAttention
from parity_tests.support.attention import Options, loaded
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same

N, L, S, H, E = 2, 3, 4, 2, 4
RNG = np.random.default_rng(0)
MASKS = ("none", "boolean", "float", "boolean of heads", "float of heads")
PADDING = ("none", "boolean", "float")


def mask(kind: str, *shape: int) -> np.ndarray | None:
    """A mask that leaves every query its first key."""
    if kind == "none":
        return None
    hidden = RNG.uniform(size=shape) < 0.4
    hidden[..., 0] = False
    return np.where(hidden, -np.inf, RNG.normal(0.5, 1.0, shape)) if "float" in kind else hidden


class Call(NamedTuple):
    """One call of both sides.

    Attributes:
      attn: the attention mask.
      padding: the key padding mask.
      single: whether the first sample comes alone, without a batch axis.
      averaged: whether its weights are averaged over the heads.
    """

    attn: np.ndarray | None
    padding: np.ndarray | None
    single: bool
    averaged: bool

    def ours(self, layer: nnx.Module, *qkv: jax.Array, need_weights: bool = True) -> object:
        return layer(
            *(a[0] for a in qkv) if self.single else qkv,
            attn_mask=self.attn,
            key_padding_mask=self.padding,
            need_weights=need_weights,
            average_attn_weights=self.averaged,
        )

    def theirs(self, module: torch.nn.Module, *qkv: Tensor, need_weights: bool = True) -> object:
        attn, padding = (None if a is None else torch.tensor(a) for a in (self.attn, self.padding))
        if attn is not None and padding is not None and attn.dtype != padding.dtype:
            # PyTorch asks for masks of one type.
            attn, padding = as_float(attn), as_float(padding)
        first = not module.batch_first
        if self.single:
            qkv = tuple(a[0] for a in qkv)
        elif first:
            qkv = tuple(a.transpose(0, 1) for a in qkv)
        output, weights = module(
            *qkv,
            attn_mask=attn,
            key_padding_mask=padding,
            need_weights=need_weights,
            average_attn_weights=self.averaged,
        )
        output = output.transpose(0, 1) if first and not self.single else output
        return (output, weights) if need_weights else output


def as_float(given: Tensor) -> Tensor:
    if given.is_floating_point():
        return given
    return torch.zeros(given.shape, dtype=torch.float64).masked_fill(given, -torch.inf)


def calls(options: Options) -> Iterator[Call]:
    """Every mask with every padding, of a batch and of a single sample."""
    length, keys = L, S if options.cross else L
    for number, (attn, padding, single) in enumerate(
        itertools.product(MASKS, PADDING, (False, True))
    ):
        n = 1 if single else N
        shape = (n * H, length, keys) if "heads" in attn else (length, keys)
        hidden = mask(padding, n, keys)
        hidden = hidden[0] if single and hidden is not None else hidden
        yield Call(mask(attn, *shape), hidden, single, averaged=number // 2 % 2 == 0)


def inputs(options: Options) -> tuple[np.ndarray, ...]:
    """Query, key and value; equal ones without sizes of their own."""
    query = values(N, L, E, offset=0.5, scale=1.0)
    if not options.cross:
        return (query,)
    return query, values(N, S, 5, seed=1, scale=1.0), values(N, S, 6, seed=2, scale=1.0)


ALL = [Options(*chosen) for chosen in itertools.product((True, False), repeat=4)]


@pytest.mark.parametrize("options", ALL, ids=str)
def test_every_combination_is_pytorchs(options: Options) -> None:
    """Outputs and weights of each call; gradients of all of them, each with its cotangents.

    Called eagerly: compiled, these 480 calls take four times as long.
    """
    module, layer = loaded(options)
    given, cases = inputs(options), list(calls(options))
    tensors = [torch.tensor(a, requires_grad=True) for a in given]
    theirs = [case.theirs(module, *in_threes(tensors)) for case in cases]
    cotangents = [
        [values(*part.shape, seed=7 * i + j) for j, part in enumerate(pair)]
        for i, pair in enumerate(theirs)
    ]
    named = dict(module.named_parameters())
    expected = torch.autograd.grad(
        [part for pair in theirs for part in pair],
        [*tensors, *named.values()],
        [torch.tensor(c) for pair in cotangents for c in pair],
    )
    with jax.enable_x64(True), jax.disable_jit():
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def run(params: nnx.State, *given: jax.Array) -> object:
            merged = nnx.merge(graph, params, rest)
            return [case.ours(merged, *in_threes(given)) for case in cases]

        ours, pullback = jax.vjp(run, params, *map(jnp.asarray, given))
        grads, *own = pullback([tuple(map(jnp.asarray, pair)) for pair in cotangents])
        for pair, other in zip(ours, theirs, strict=True):
            for a, b in zip(pair, other, strict=True):
                assert_same(a, b)
        found = interop.Naming(layer).tensors(grads, gradients=True)
        assert found.keys() == named.keys()
        size = max(float(g.abs().max()) for g in expected)
        for a, b in zip([*own, *(found[n] for n in named)], expected, strict=True):
            assert_same(a, b, size)


def in_threes(given: object) -> tuple[object, ...]:
    """Query, key and value of what was given: one array is all of them."""
    return tuple(given) if len(given) == 3 else (*given,) * 3


@pytest.mark.parametrize(
    "options", [Options(True, True, True, True), Options(True, False, False, False)], ids=str
)
def test_without_weights_the_output_is_pytorchs_and_the_same(options: Options) -> None:
    module, layer = loaded(options)
    given, cases = inputs(options), list(calls(options))
    with jax.enable_x64(True), jax.disable_jit(), torch.no_grad():
        arrays = in_threes(tuple(map(jnp.asarray, given)))
        tensors = in_threes([torch.tensor(a) for a in given])
        for case in cases:
            found = case.ours(layer, *arrays, need_weights=False)
            assert_same(found, case.theirs(module, *tensors, need_weights=False))
            assert_same(found, case.ours(layer, *arrays)[0])


def test_key_and_value_default_to_what_stands_before_them() -> None:
    layer = MultiHeadAttention(E, H, rngs=nnx.Rngs(0))
    x, y = (jnp.asarray(values(N, S, E, seed=i), jnp.float32) for i in (1, 2))
    np.testing.assert_array_equal(layer(x), layer(x, x, x))
    np.testing.assert_array_equal(layer(x, y), layer(x, y, y))


CAUSAL: Mapping[str, dict[str, bool]] = {
    "alone": {},
    "with padding": {"padding": True},
    "with a mask": {"attn": True},
    "with added keys": {"added": True},
    "with padding and added keys": {"padding": True, "added": True},
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causality_is_a_mask_from_the_top_left(name: str, training: bool) -> None:
    """Of 3 queries and 4 keys; PyTorch needs the mask itself. In training with dropout of 0."""
    case = CAUSAL[name]
    added = case.get("added", False)
    module, layer = loaded(Options(True, added, added, True))
    module.train(training)
    layer.set_attributes(deterministic=not training)
    triangle = ~np.tri(L, S, dtype=bool)
    attn = mask("boolean", L, S) if case.get("attn") else None
    padding = mask("boolean", N, S) if case.get("padding") else None
    given = inputs(Options(True, added, added, True))
    whole = Call(triangle if attn is None else triangle | attn, padding, False, True)
    with jax.enable_x64(True), torch.no_grad():
        arrays = tuple(map(jnp.asarray, given))
        options = {"attn_mask": attn, "key_padding_mask": padding, "is_causal": True}
        output, weights = layer(*arrays, need_weights=True, **options)
        expected = whole.theirs(module, *map(torch.tensor, given))
        assert_same(output, expected[0])
        assert_same(weights, expected[1])
        assert_same(layer(*arrays, **options), expected[0])


@pytest.mark.parametrize("added", [False, True], ids=["plain", "added keys"])
def test_a_query_that_sees_nothing_is_pytorchs_without_weights(added: bool) -> None:
    """The output's bias; with weights PyTorch has NaN, here they are 0 and gradients finite."""
    module, layer = loaded(Options(True, added, False, False))
    x = inputs(Options(True, added, False, False))[0]
    padding = np.array([[False] * L, [True] * L])
    attn = np.zeros((L, L), bool)
    attn[1] = True
    case = Call(attn, padding, False, averaged=False)
    blind = np.array([[False, True, False], [True] * L])
    tensor = torch.tensor(x, requires_grad=True)
    expected = case.theirs(module, tensor, tensor, tensor, need_weights=False)
    cotangent = values(N, L, E, seed=3)
    (gradient,) = torch.autograd.grad(expected, tensor, torch.tensor(cotangent))

    with jax.enable_x64(True):
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def run(params: nnx.State, x: jax.Array, *, need_weights: bool) -> object:
            merged = nnx.merge(graph, params, rest)
            return case.ours(merged, x, x, x, need_weights=need_weights)

        array = jnp.asarray(x)
        output, pullback = jax.vjp(lambda x: run(params, x, need_weights=False), array)
        assert_same(output, expected)
        assert_same(pullback(jnp.asarray(cotangent))[0], gradient, np.abs(cotangent).max())
        (output, weights), pullback = jax.vjp(
            lambda p, x: run(p, x, need_weights=True), params, array
        )
        assert_same(output, expected)
        shown = np.asarray(weights)[:, :, :, :L]
        assert not shown.transpose(0, 2, 1, 3)[blind].any()
        pulled = jnp.asarray(values(*weights.shape, seed=4))
        gradients = jax.tree.leaves(pullback((jnp.asarray(cotangent), pulled)))
        assert all(np.isfinite(np.asarray(g)).all() for g in gradients)
    if not added:
        np.testing.assert_array_equal(np.asarray(output)[blind], module.out_proj.bias.detach()[None]
                                      .expand(int(blind.sum()), E))  # fmt: skip
        assert case.theirs(module, tensor, tensor, tensor)[1].isnan().any()


def test_the_three_steps_make_the_call() -> None:
    module, layer = loaded(Options(True, True, True, True))
    query, key, value = (
        jnp.asarray(a, jnp.float32) for a in inputs(Options(True, True, True, True))
    )
    layer = MultiHeadAttention(E, H, 0.5, add_bias_kv=True, kdim=5, vdim=6, rngs=nnx.Rngs(0))
    twin = nnx.clone(layer)
    padding = jnp.zeros((N, S), bool).at[0, 1].set(True)
    q, k, v = layer.qkv(query, key, value)
    assert [a.shape for a in (q, k, v)] == [(N, L, H, E // H)] + 2 * [(N, S, H, E // H)]
    dropout_key = layer.next_key()
    options = {"key_padding_mask": padding, "is_causal": True, "dropout_key": dropout_key}
    expected = twin(query, key, value, key_padding_mask=padding, is_causal=True)
    np.testing.assert_array_equal(layer.out(layer.attend(q, k, v, **options)), expected)
    mixed, weights = layer.attend_with_weights(q, k, v, **options)
    np.testing.assert_array_equal(layer.out(mixed), expected)
    assert weights.shape == (N, H, L, S + 1)
    dropped = layer.attend(q, k, v) != layer.attend(q, k, v, dropout_key=dropout_key)
    assert dropped.any()
    assert layer.next_key(deterministic=True) is None
    layer.eval()
    assert layer.next_key() is None
    assert layer.next_key(deterministic=False, rngs=dropout_key) is dropout_key
    assert MultiHeadAttention(E, H, rngs=nnx.Rngs(0)).next_key() is None
    del module
