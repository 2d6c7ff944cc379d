"""The two sublayers of every Transformer block, and what each step keeps.

A norm is computed again as the input of the linear layer behind it, and so is what lies between a
feed-forward part's two linear layers. Of a pre-norm block are kept its input, query, key and value,
the heads' output, the sum behind the attention and the first linear layer's output: 10 times the
input at four times its width (``test_what_a_transformer_block_keeps``).
"""

from flax import nnx

from flaxstab._typing import Array
from flaxstab.attention import MultiHeadAttention
from flaxstab.blocks._parts import Function
from flaxstab.dropout import Dropout
from flaxstab.linear import Linear
from flaxstab.norms._fused import region


def attended(
    attn: MultiHeadAttention,
    norm: nnx.Module | None,
    x: Array,
    memory: Array | None = None,
    *,
    attn_mask: Array | None = None,
    key_padding_mask: Array | None = None,
    is_causal: bool = False,
) -> Array:
    """Returns the attention of ``norm(x)`` to itself, or to a memory.

    Args:
      attn: the attention.
      norm: what it sees its input through; ``None`` = nothing.
      x: ``(N, L, d)``.
      memory: ``(N, S, d)``, which is not normalised.
      attn_mask: as of the attention.
      key_padding_mask: as of the attention.
      is_causal: as of the attention.
    """
    heads = _heads_of_itself(attn, norm, x) if memory is None else _heads(attn, norm, x, memory)
    mixed = attn.attend(
        *heads, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal,
        dropout_key=attn.next_key(),
    )  # fmt: skip
    return attn.out(mixed)


def _heads_of_itself(
    attn: MultiHeadAttention, norm: nnx.Module | None, x: Array
) -> tuple[Array, Array, Array]:
    if norm is None:
        return attn.qkv(x, x, x)
    return region(_of_itself, (attn, norm), x)


def _of_itself(attn: MultiHeadAttention, norm: nnx.Module, x: Array) -> tuple[Array, Array, Array]:
    h = norm(x)
    return attn.qkv(h, h, h)


def _heads(
    attn: MultiHeadAttention, norm: nnx.Module | None, x: Array, memory: Array
) -> tuple[Array, Array, Array]:
    if norm is None:
        return attn.qkv(x, memory, memory)
    return region(lambda attn, norm, x, m: attn.qkv(norm(x), m, m), (attn, norm), x, memory)


def fed_forward(
    norm: nnx.Module | None, up: Linear, act: Function, drop: Dropout, down: Linear, x: Array
) -> Array:
    """Returns ``down(drop(act(up(norm(x)))))`` and keeps ``x`` and the first layer's output.

    Args:
      norm: what the first layer sees its input through; ``None`` = nothing.
      up: the first linear layer.
      act: the activation.
      drop: drops elements behind it.
      down: the second linear layer.
      x: ``(*batch, d)``.
    """
    h = up(x) if norm is None else region(lambda norm, up, x: up(norm(x)), (norm, up), x)
    return region(lambda drop, down, h: down(drop(act(h))), (drop, down), h)
