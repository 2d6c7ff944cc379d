"""What a Transformer block keeps for its backward pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flaxstab import blocks, functional
from parity_tests.support.cases import values
from parity_tests.support.kept import kept_by_module

D, HEADS, LENGTH = 384, 6, 256
LIMIT = 11  # of the input's bytes; DESIGN, "Performance"

BLOCKS: dict[str, tuple[Callable[..., nnx.Module], float]] = {
    "block": (lambda r: blocks.TransformerBlock(D, HEADS, rngs=r), 10),
    "block, everything dropped": (
        lambda r: blocks.TransformerBlock(
            D, HEADS, out_drop=0.1, residual=blocks.Residual(drop_path=0.1), rngs=r
        ),
        10,
    ),
    "encoder, norm first": (
        lambda r: blocks.TransformerEncoderLayer(D, HEADS, 4 * D, norm_first=True, rngs=r), 10,
    ),
    "encoder": (lambda r: blocks.TransformerEncoderLayer(D, HEADS, 4 * D, rngs=r), 12),
    "mlp": (lambda r: blocks.MLP(D, 4 * D, drop=0.1, rngs=r), 5),
}  # fmt: skip


class Plain(nnx.Module):
    """The fault: the same block without anything computed again, of stock pieces."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.ln1, self.ln2 = (nnx.LayerNorm(D, rngs=rngs) for _ in range(2))
        self.attn = nnx.MultiHeadAttention(
            HEADS, D, dropout_rate=0.1, broadcast_dropout=False, decode=False, deterministic=False,
            dtype=jnp.bfloat16, rngs=rngs,
        )  # fmt: skip
        self.up = nnx.Linear(D, 4 * D, dtype=jnp.bfloat16, rngs=rngs)
        self.down = nnx.Linear(4 * D, D, dtype=jnp.bfloat16, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(jnp.asarray(self.ln1(x), x.dtype))
        h = self.up(jnp.asarray(self.ln2(x), x.dtype))
        return x + self.drop(self.down(self.drop(functional.gelu(h))))


def kept(make: Callable[[nnx.Rngs], nnx.Module]) -> float:
    """In units of the input, in bfloat16 with float32 parameters, in training."""
    x = jnp.asarray(values(8, LENGTH, D), jnp.bfloat16)
    return kept_by_module(make(nnx.Rngs(0)), x) / x.nbytes


@pytest.mark.parametrize("name", BLOCKS)
def test_what_a_transformer_block_keeps(name: str) -> None:
    make, expected = BLOCKS[name]
    assert expected <= kept(make) <= expected + 0.01
    assert expected <= LIMIT or name == "encoder"


def test_stock_pieces_keep_more() -> None:
    assert kept(Plain) > 3 * LIMIT
