"""``docs/attention.md`` runs when pasted, and what it says of others is so."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity_tests.support.cases import values
from parity_tests.support.pages import pasted

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("the docs are not part of the wheel", allow_module_level=True)
PAGE = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
N, S, E, H = 2, 5, 4, 2
X = values(N, S, E, offset=0.5, scale=1.0).astype(np.float32)
HIDDEN = np.arange(S)[None] >= np.array([[S], [S - 2]])  # (N, S)


def test_the_page_runs_when_pasted() -> None:
    names = pasted(PAGE)
    assert names["y"].shape == names["z"].shape == (3, 256, 64)
    assert names["weights"].shape == (3, 256, 256)
    assert not np.asarray(names["weights"])[2, :, 4:].any()


def stock(mask: np.ndarray | None, **options: object) -> np.ndarray:
    layer = nnx.MultiHeadAttention(H, E, decode=False, rngs=nnx.Rngs(0), **options)
    return np.asarray(layer(jnp.asarray(X), mask=mask, deterministic=False))


def test_stock_attention_reads_a_float_mask_as_booleans_of_the_other_sense() -> None:
    hidden = np.broadcast_to(HIDDEN[:, None, None], (N, 1, S, S))
    floats = np.where(hidden, -np.inf, 0).astype(np.float32)
    np.testing.assert_array_equal(stock(floats), stock(hidden))
    assert np.abs(stock(floats) - stock(~hidden)).max() > 0.01


def test_stock_attention_raises_on_causality_with_padding_and_dropout() -> None:
    seen = ~HIDDEN[:, None, None]
    layers = [
        nnx.MultiHeadAttention(H, E, decode=False, dropout_rate=p, rngs=nnx.Rngs(0))
        for p in (0.0, 0.5)
    ]
    layers[0](jnp.asarray(X), mask=seen, is_causal=True, deterministic=False)
    with pytest.raises(ValueError, match="Incompatible types for broadcasting"):
        layers[1](jnp.asarray(X), mask=seen, is_causal=True, deterministic=False)


def test_stock_dropout_is_one_mask_for_the_batch_and_all_heads() -> None:
    q, v = jnp.zeros((N, 4, H, 4)), jnp.broadcast_to(jnp.eye(4)[:, None], (N, 4, H, 4))
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    kept = np.asarray(nnx.dot_product_attention(q, q, v, **options)) != 0
    np.testing.assert_array_equal(kept, np.broadcast_to(kept[:1, :, :1], kept.shape))
    assert 0 < kept.mean() < 1


def test_jaxs_attention_averages_where_no_key_is_seen() -> None:
    q = jnp.asarray(X)[:, :, None]
    seen = jnp.zeros((N, 1, S, S), bool)
    found = jax.nn.dot_product_attention(q, q, q, mask=seen)[:, :, 0]
    mean = np.broadcast_to(X.mean(1, keepdims=True), X.shape)
    assert np.abs(found - mean).max() <= 8 * np.finfo(np.float32).eps * np.abs(X).max()


def test_pytorchs_three_answers_where_no_key_is_seen() -> None:
    module = torch.nn.MultiheadAttention(E, H, batch_first=True)
    x, all_hidden = torch.tensor(X), torch.ones(N, S, dtype=torch.bool)

    def run(*, need_weights: bool) -> torch.Tensor:
        return module(x, x, x, key_padding_mask=all_hidden, need_weights=need_weights)[0]

    output = run(need_weights=True)
    assert output.isnan().all()
    output.sum().backward()
    assert all(p.grad.isnan().any() for p in (module.in_proj_weight, module.out_proj.weight))
    assert (run(need_weights=False) == module.out_proj.bias).all()
    module.eval()
    with torch.no_grad():
        assert run(need_weights=False).isnan().all()
