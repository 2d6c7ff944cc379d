"""Multi-head attention as a layer: dropout, how it starts, what it refuses, 16 bits."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor

from flaxstab import initializers, optim, parity, torch_rng
from flaxstab.attention import MultiHeadAttention
from flaxstab.parity import Budget, HasCdf, IsNormal
from parity_tests.support.cases import values
from parity_tests.support.kept import kept_bytes
from parity_tests.support.layers import assert_same

E, H = 8, 2
S = 256  # XLA's CPU compiler takes ten times as long for dropout masks with short rows
X = jnp.asarray(values(3, 4, E, offset=0.5, scale=1.0), jnp.float32)
MEMORY = jnp.asarray(values(3, S, E, seed=1, offset=0.5, scale=1.0), jnp.float32)


def layer(p: float = 0.5, seed: int = 0, **options: object) -> MultiHeadAttention:
    return MultiHeadAttention(E, H, p, **options, rngs=nnx.Rngs(seed))


def test_arguments_and_defaults_are_pytorchs() -> None:
    ours = dict(inspect.signature(MultiHeadAttention.__init__).parameters)
    theirs = inspect.signature(torch.nn.MultiheadAttention).parameters
    del ours["self"]
    own = [name for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY]
    other = [name for name in theirs if name not in ("batch_first", "device", "dtype")]
    assert own == other
    assert [ours[n].default for n in own] == [theirs[n].default for n in own]


def test_dropout_is_drawn_for_each_sample_and_head() -> None:
    """Of 24 masks of 256 keys no two are alike: by chance some would be once in 2**247 runs."""
    _, weights = layer()(X, MEMORY, need_weights=True, average_attn_weights=False)
    kept = np.asarray(weights) != 0
    assert 0.4 < kept.mean() < 0.6
    rows = kept.reshape(-1, S)
    assert len({row.tobytes() for row in rows}) == len(rows) == 3 * H * 4


def test_evaluation_and_a_dropout_of_0_draw_nothing() -> None:
    """Nor does dropout change the weights that a layer starts with."""
    training, evaluating, never = layer(), layer(), layer(0.0)
    evaluating.eval()
    expected = never(X, MEMORY)
    np.testing.assert_array_equal(evaluating(X, MEMORY), expected)
    np.testing.assert_array_equal(training(X, MEMORY, deterministic=True), expected)
    np.testing.assert_array_equal(nnx.view(training, deterministic=True)(X, MEMORY), expected)
    assert (training(X, MEMORY) != expected).any()
    assert (evaluating(X, MEMORY, deterministic=False) != expected).any()
    mask = jnp.zeros((4, S), bool)
    np.testing.assert_array_equal(evaluating(X, MEMORY, dropout_mask=mask), expected)
    assert "rngs" not in [str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(never))]


def test_every_call_draws_anew_and_a_key_at_the_call_overrides() -> None:
    one, key = layer(), jax.random.key(5)
    outputs = [one(X, MEMORY), one(X, MEMORY)]
    assert (outputs[0] != outputs[1]).any()
    np.testing.assert_array_equal(layer()(X, MEMORY), outputs[0])
    given = [one(X, MEMORY, rngs=key), layer(seed=0)(X, MEMORY, rngs=key)]
    np.testing.assert_array_equal(*given)
    weighed = one(X, MEMORY, rngs=key, need_weights=True)[0]
    np.testing.assert_array_equal(weighed, given[0])


def test_a_dropout_mask_is_that_of_the_formula() -> None:
    """In float64, with one more key: the layer's learned one."""
    mask = np.random.default_rng(0).uniform(size=(3, H, 4, 6)) > 0.3
    with jax.enable_x64(True):
        one = MultiHeadAttention(
            E, H, 0.3, add_bias_kv=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        x, memory = jnp.asarray(values(3, 4, E)), jnp.asarray(values(3, 5, E, seed=1))
        plain = one(x, memory, deterministic=True, need_weights=True, average_attn_weights=False)
        output, weights = one(
            x, memory, dropout_mask=mask, need_weights=True, average_attn_weights=False
        )
        assert_same(weights, np.asarray(plain[1]) * mask / (1 - 0.3))
        rows = jnp.concatenate([memory, jnp.zeros((3, 1, E))], 1)
        value = np.array(one.value(rows).reshape(3, 6, H, E // H))
        value[:, 5] = one.bias_v[...].reshape(H, E // H)
        mixed = np.einsum("nhqk,nkhe->nqhe", weights, value).reshape(3, 4, E)
        assert_same(output, one.out(jnp.asarray(mixed)))
        single = one(x[0], memory[0], dropout_mask=mask[0])
        assert_same(single, output[0])


def test_parameters_start_as_pytorchs(budget: Budget) -> None:
    size = 256
    packed = MultiHeadAttention(size, 4, add_bias_kv=True, rngs=nnx.Rngs(0))
    apart = MultiHeadAttention(size, 4, kdim=size // 2, rngs=nnx.Rngs(1))
    bounds = {
        packed.query: (6 / (4 * size)) ** 0.5,
        packed.value: (6 / (4 * size)) ** 0.5,
        packed.out: size**-0.5,
        apart.query: (6 / (2 * size)) ** 0.5,
        apart.key: (6 / (1.5 * size)) ** 0.5,
    }
    for part, bound in bounds.items():
        law = HasCdf(lambda x, b=bound: np.clip((x + b) / (2 * b), 0, 1), discrepancy=0.05)
        assert law.check(part.kernel[...], budget).passed
        assert float(jnp.abs(part.kernel[...]).max()) <= bound
    parts = [p for one in (packed, apart) for p in (one.query, one.key, one.value, one.out)]
    assert not any(part.bias[...].any() for part in parts)
    wide = MultiHeadAttention(
        2560, 1, add_bias_kv=True, kernel_init=initializers.zeros, rngs=nnx.Rngs(2)
    )
    rows = np.concatenate([wide.bias_k[...], wide.bias_v[...]])
    assert IsNormal(0.0, 2560**-0.5, discrepancy=0.2).check(rows, budget).passed
    assert not any(p.kernel[...].any() for p in (wide.query, wide.key, wide.value, wide.out))


def test_only_weights_decay() -> None:
    one = layer(add_bias_kv=True)
    roles = optim.decay_mask(one).roles
    decaying = {".".join(path) for path, role in roles.items() if role.decays}
    assert decaying == {f"{part}.kernel" for part in ("query", "key", "value", "out")}
    assert roles[("bias_k",)].reason == roles[("bias_v",)].reason == "bias"
    assert one.bias_k.get_metadata()["role"] == "bias"


def test_the_documents_rule_of_seeds_reaches_the_output_alone() -> None:
    plain, again = (
        torch_rng.seed_parameters(lambda: layer(0.0), 0, then=then)
        for then in (None, torch_rng.layer_rule("tanh"))
    )
    same = [
        bool((getattr(plain, part).kernel[...] == getattr(again, part).kernel[...]).all())
        for part in ("query", "key", "value", "out")
    ]
    assert same == [True, True, True, False]


class Ours(nnx.Module):
    """Attention with masks."""

    def __init__(self) -> None:
        self.attn = MultiHeadAttention(E, H, add_zero_attn=True, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array, attn: jax.Array, padding: jax.Array) -> object:
        return self.attn(x, attn_mask=attn, key_padding_mask=padding, need_weights=True)


class Theirs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = torch.nn.MultiheadAttention(E, H, add_zero_attn=True, batch_first=True)

    def forward(self, x: Tensor, attn: Tensor, padding: Tensor) -> object:
        padding = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -torch.inf)
        return self.attn(x, x, x, attn_mask=attn, key_padding_mask=padding)


def test_lower_precisions_are_as_accurate_as_pytorchs() -> None:
    """Output, weights and all gradients; a float mask and a boolean padding of one call."""
    x = values(2, 6, E, offset=0.5, scale=1.5)
    attn = values(6, 6, seed=1, offset=0.0)
    padding = np.arange(6)[None] >= np.array([[6], [4]])
    report = parity.compare(Ours(), Theirs(), x, attn, padding, dtypes=("float32", "bfloat16"))
    assert report.passed, str(report)


def test_attention_keeps_query_key_and_value_alone() -> None:
    """And, of dropout, a key of 8 bytes."""
    one = layer(0.1)
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in one.qkv(MEMORY))
    padding = jnp.zeros((3, S), bool)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, padding: jax.Array, key: jax.Array) -> object:
        options = {"key_padding_mask": padding, "is_causal": True}
        return one.attend(q, k, v, dropout_key=jax.random.wrap_key_data(key), **options)

    key = jax.random.key_data(jax.random.key(0))
    assert kept_bytes(run, q, k, v, padding, key) == 3 * q.nbytes + padding.nbytes + 8


def attends(**options: object) -> Callable[[], object]:
    return lambda: layer()(X, **options)


BUILT: dict[str, tuple[Callable[[], object], str]] = {
    "heads": (
        lambda: MultiHeadAttention(32, 3, rngs=nnx.Rngs(0)),
        r"num_heads must divide embed_dim, got num_heads=3 and embed_dim=32\.",
    ),
    "no heads": (
        lambda: MultiHeadAttention(4, 0, rngs=nnx.Rngs(0)),
        "num_heads must be an integer of at least 1, got num_heads=0",
    ),
    "kdim": (
        lambda: MultiHeadAttention(4, 2, kdim=0, rngs=nnx.Rngs(0)),
        "kdim must be an integer of at least 1, got kdim=0",
    ),
    "dropout": (
        lambda: MultiHeadAttention(4, 2, 1.5, rngs=nnx.Rngs(0)),
        r"dropout must lie in \[0, 1\], got dropout=1\.5",
    ),
    "rngs": (
        lambda: MultiHeadAttention(4, 2),
        "a layer with random weights needs rngs",
    ),
    "stream": (
        lambda: MultiHeadAttention(4, 2, 0.1, rngs=nnx.Rngs(params=0)),
        "dropout needs nnx.Rngs with a 'dropout' stream",
    ),
}  # fmt: skip
CALLED: dict[str, tuple[Callable[[], object], str]] = {
    "features": (
        lambda: layer()(X[..., :5]),
        r"query must have the shape \(N, positions, embed_dim\), got embed_dim=8 and shape=",
    ),
    "features of key": (
        lambda: layer(kdim=5)(X),
        r"key must have the shape \(N, positions, kdim\), got kdim=5 and shape=\(3, 4, 8\)",
    ),
    "features of value": (
        attends(key=X, value=X[..., :7]),
        r"value must have the shape \(N, positions, vdim\), got vdim=8 and shape=\(3, 4, 7\)",
    ),
    "rank": (
        lambda: layer()(X[None]),
        r"query, key and value must have the axes \(N, positions, features\), or all be without N",
    ),
    "a single key": (
        attends(key=X[0]),
        r"or all be without N, got query=\(3, 4, 8\) and key=\(4, 8\)",
    ),
    "batch": (attends(key=X[:2]), "key must have the batch, heads and features of query"),
    "positions": (
        attends(key=X, value=X[:, :2]),
        "value must have the batch, positions and heads of key",
    ),
    "an integer mask": (
        attends(attn_mask=jnp.ones((4, 4), jnp.int32)),
        "attn_mask must be boolean, true = ignore, or floating-point, added to the logits, got "
        "dtype='int32'. Of integers that are 1 where a query may attend, pass mask == 0.",
    ),
    "an integer padding mask": (
        attends(key_padding_mask=jnp.ones((3, 4), jnp.uint8)),
        "key_padding_mask must be boolean, true = ignore, .* got dtype='uint8'",
    ),
    "mask shape": (
        attends(attn_mask=jnp.zeros((4, 5))),
        r"attn_mask must have the shape \(L, S\) or \(N \* num_heads, L, S\), got "
        r"attn_mask=\(4, 5\) and allowed=\(\(4, 4\), \(6, 4, 4\)\)",
    ),
    "heads of a mask": (
        attends(attn_mask=jnp.zeros((2, 4, 4))),
        r"attn_mask must have the shape .*, got attn_mask=\(2, 4, 4\)",
    ),
    "padding shape": (
        attends(key_padding_mask=jnp.zeros((3, 5), bool)),
        r"key_padding_mask must have the shape \(N, S\), got key_padding_mask=\(3, 5\) and "
        r"\(N, S\)=\(3, 4\)",
    ),
    "padding of a batch": (
        attends(key_padding_mask=jnp.zeros(4, bool)),
        r"key_padding_mask must have the axes \(N, S\), or \(S,\) for a single sample, got "
        r"key_padding_mask=\(4,\)",
    ),
    "a padding mask of two axes for one sample": (
        lambda: layer()(X[0], key_padding_mask=jnp.zeros((1, 4), bool)),
        r"key_padding_mask must have the axes .*, got key_padding_mask=\(1, 4\) and query=\(4, 8\)",
    ),
    "dropout mask": (
        attends(dropout_mask=jnp.ones((4, 5), bool)),
        r"dropout_mask must broadcast to \(N, H, L, S\), got dropout_mask=\(4, 5\)",
    ),
    "integers": (
        lambda: layer()(jnp.ones((3, 4, E), jnp.int32)),
        "a layer computes in floating point, got dtype='int32'",
    ),
    "no key": (
        lambda: nnx.merge(*nnx.split(layer()), copy=True)(X, rngs=0),
        "dropout needs nnx.Rngs with a 'dropout' stream or a default one, got int",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*BUILT, *CALLED])
def test_what_does_not_fit_is_refused(name: str) -> None:
    call, message = (BUILT | CALLED)[name]
    with pytest.raises(ValueError, match=message):
        call()
