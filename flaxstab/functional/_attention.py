"""Scaled dot-product attention that never holds the logits of more than a block of queries."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from flaxstab._dtypes import widest
from flaxstab._typing import Array, Bool, Float, Shape
from flaxstab.functional._attention_arguments import Arrays, Given, How, check_shapes, fitted
from flaxstab.functional._dropout import dropout, dropout_mask
from flaxstab.functional._recompute import recomputed

ROWS = 256
"""Queries in a block, at most. Another number draws other dropout masks from the same key."""

Found = TypeVar("Found", Array, tuple[Array, ...])


def attention(
    query: Float[Array, "n l h e"],
    key: Float[Array, "n s h e"],
    value: Float[Array, "n s h ev"],
    *,
    mask: Arrays = None,
    bias: Arrays = None,
    is_causal: bool = False,
    p: float = 0.0,
    dropout_key: Array | None = None,
    dropout_mask: Bool[Array, "..."] | None = None,
    scale: float | None = None,
    open_keys: int = 0,
) -> Float[Array, "n l h ev"]:
    """Mixes values by the softmax of scaled products of queries and keys.

    Same result as ``torch.nn.functional.scaled_dot_product_attention`` with the heads behind the
    positions; but a boolean mask has the sense of ``torch.nn.MultiheadAttention``: true =
    **ignored**. A query that may see no key gets 0, and no gradient comes from it.

    Computed in float32 or wider, products included, as PyTorch does without its fused kernels.
    Queries are taken in blocks of at most 256, whose logits are not kept: the backward pass
    computes them again, with the dropout drawn again. So memory grows with S and not with L·S, and
    what is kept are the arguments.

    Args:
      query: shape ``(N, L, H, E)``.
      key: shape ``(N, S, H, E)``.
      value: shape ``(N, S, H, Ev)``.
      mask: booleans that broadcast to ``(N, H, L, S)``, true where a key is ignored; or several of
        them, of which each may hide a key.
      bias: floats that broadcast alike, added to the scaled products; -inf hides a key. Or several.
      is_causal: whether query i sees keys 0 to i only, also where L and S differ.
      p: the probability of dropping a probability, each by itself, in [0, 1].
      dropout_key: a PRNG key for that.
      dropout_mask: booleans that broadcast to ``(N, H, L, S)``, true where a probability is kept,
        instead of a draw.
      scale: factor of the products; ``None`` = ``1 / sqrt(E)``.
      open_keys: how many of the last keys every query sees. Masks, biases and ``is_causal`` are
        for the others alone: their last axis has so many fewer elements.

    Returns:
      Values of shape ``(N, L, H, Ev)`` in the dtype of ``query``.

    Raises:
      ValueError: if shapes or dtypes do not fit, or ``p`` needs a key and there is none.

    Example:
      >>> import jax.numpy as jnp
      >>> q, k = jnp.zeros((1, 2, 1, 4)), jnp.ones((1, 2, 1, 4))
      >>> v = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
      >>> attention(q, k, v).ravel().tolist()
      [2.0, 2.0]
      >>> attention(q, k, v, is_causal=True).ravel().tolist()
      [1.0, 2.0]
      >>> attention(q, k, v, mask=jnp.array([True, True])).ravel().tolist()
      [0.0, 0.0]

    Differs from:
      ``scaled_dot_product_attention``, whose boolean mask has the opposite sense and whose axes
      are ``(N, H, L, E)``. ``jax.nn.dot_product_attention``, which averages all values where every
      key is hidden, has no dropout, holds all logits, and takes a float64 softmax in float32.

    Reference:
      A. Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762 (equation 1);
      M. N. Rabe, C. Staats, "Self-attention Does Not Need O(n²) Memory", 2021, arXiv:2112.05682.
    """
    given = Given.of(mask, bias, dropout_key, dropout_mask)
    how = How(is_causal, p, scale, open_keys)
    (output,) = _in_blocks(query, key, value, given, how, weighted=False)
    return output.swapaxes(1, 2)  # (N, H, L, Ev) -> (N, L, H, Ev)


def attention_weights(
    query: Float[Array, "n l h e"],
    key: Float[Array, "n s h e"],
    value: Float[Array, "n s h ev"],
    *,
    mask: Arrays = None,
    bias: Arrays = None,
    is_causal: bool = False,
    p: float = 0.0,
    dropout_key: Array | None = None,
    dropout_mask: Bool[Array, "..."] | None = None,
    scale: float | None = None,
    open_keys: int = 0,
) -> tuple[Float[Array, "n l h ev"], Float[Array, "n h l s"]]:
    """Returns what :func:`attention` returns, and the probabilities by which it mixed the values.

    Arguments as of :func:`attention`, and the same output, also under dropout with the same key.

    Returns:
      The output, and the probabilities after dropout, shape ``(N, H, L, S)``, both in the dtype of
      ``query``. A query that may see no key has probabilities 0.
    """
    given = Given.of(mask, bias, dropout_key, dropout_mask)
    how = How(is_causal, p, scale, open_keys)
    output, weights = _in_blocks(query, key, value, given, how, weighted=True)
    return output.swapaxes(1, 2), weights


def attention_dropout_mask(key: Array, p: float, shape: Shape) -> Bool[Array, "*batch l s"]:
    """Draws the mask that :func:`attention` draws from the same key, all of it at once.

    That takes L·S bytes: it is for those who compare, and for replaying a run elsewhere.

    Args:
      key: a PRNG key.
      p: the probability of dropping, in [0, 1].
      shape: ``(N, H, L, S)``.

    Returns:
      Booleans of that shape, true where a probability is kept.
    """
    *batch, length, keys = shape
    blocks = _Blocks.of(length)

    def drawn(index: Array | int, rows: int) -> Array:
        return _drawn(key, index, p, (*batch, rows, keys))

    return _joined(drawn, blocks)


class _Blocks(NamedTuple):
    """How queries are dealt out: so many whole blocks of some rows, and the rest."""

    rows: int
    whole: int
    rest: int

    @classmethod
    def of(cls, length: int) -> "_Blocks":
        """Returns the fewest blocks, of the smallest size at which they are enough."""
        if length <= ROWS:
            return cls(length, 1, 0)
        rows = math.ceil(length / math.ceil(length / ROWS))
        return cls(rows, length // rows, length % rows)


def _in_blocks(
    query: Array, key: Array, value: Array, given: Given, how: How, *, weighted: bool
) -> tuple[Array, ...]:
    """Returns the output and, if wanted, the probabilities, both with the queries on axis 2."""
    check_shapes(query, key, value, how)
    given = fitted(given, how, (query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
    blocks = _Blocks.of(query.shape[1])
    return _region(query, key, value, given, how=how, blocks=blocks, weighted=weighted)


# Compiled, so that a call outside jit does not trace its loop anew each time.
@partial(jax.jit, static_argnames=("how", "blocks", "weighted"), inline=True)
def _region(
    query: Array,
    key: Array,
    value: Array,
    given: Given,
    *,
    how: How,
    blocks: _Blocks,
    weighted: bool,
) -> tuple[Array, ...]:
    # Once more around the loop: or key and value would be kept in its layout and dtype.
    return recomputed(partial(_whole, how, blocks, weighted))(query, key, value, given)


def _whole(
    how: How,
    blocks: _Blocks,
    weighted: bool,
    query: Array,
    key: Array,
    value: Array,
    given: Given,
) -> tuple[Array, ...]:
    wide = widest(query.dtype, key.dtype, value.dtype)
    # Wide before the loop: so the gradients of key and value add up over the blocks in float32
    # (test_sixteen_bits_are_as_accurate_as_pytorch).
    key, value = (jnp.asarray(a, wide).swapaxes(1, 2) for a in (key, value))

    def block(index: Array | int, rows: int) -> tuple[Array, ...]:
        start = index * blocks.rows
        part = jax.lax.dynamic_slice_in_dim(query, start, rows, 1)
        found = _block(part, key, value, _rows_of(given, start, rows), how, start, index)
        return tuple(jnp.asarray(a, query.dtype) for a in found[: 1 + weighted])

    return _joined(block, blocks)


def _joined(block: Callable[[Array | int, int], Found], blocks: _Blocks) -> Found:
    """Computes blocks one after the other and joins them along the last axis but one."""
    if blocks.whole == 1 and not blocks.rest:
        return block(0, blocks.rows)
    again = recomputed(block, static_argnums=1)
    indices = jnp.arange(blocks.whole, dtype=jnp.int32)
    _, stack = jax.lax.scan(lambda _, index: (None, again(index, blocks.rows)), None, indices)
    found = jax.tree.map(_merged, stack)
    if not blocks.rest:
        return found
    last = again(jnp.asarray(blocks.whole, jnp.int32), blocks.rest)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, -2), found, last)


def _merged(stack: Array) -> Array:
    blocks, *batch, rows, last = stack.shape
    return jnp.moveaxis(stack, 0, -3).reshape(*batch, blocks * rows, last)


def _rows_of(given: Given, start: Array | int, rows: int) -> Given:
    """Returns what is given for some queries."""

    def cut(array: Array) -> Array:
        every = array.shape[2] == 1  # of the same for each query
        return array if every else jax.lax.dynamic_slice_in_dim(array, start, rows, 2)

    kept = None if given.kept is None else cut(given.kept)
    masks, biases = tuple(map(cut, given.masks)), tuple(map(cut, given.biases))
    return given._replace(masks=masks, biases=biases, kept=kept)


def _block(
    query: Array,
    key: Array,
    value: Array,
    given: Given,
    how: How,
    start: Array | int,
    index: Array | int,
) -> tuple[Array, Array]:
    """Returns output and probabilities of some queries.

    Args:
      query: shape ``(N, rows, H, E)``.
      key: shape ``(N, H, S, E)``, in the dtype of computation.
      value: shape ``(N, H, S, Ev)``, in the same.
      given: what is given for these queries.
      how: the settings.
      start: the place of the first of them.
      index: the number of the block.
    """
    scale = 1 / math.sqrt(max(query.shape[-1], 1)) if how.scale is None else how.scale
    logits = jnp.einsum("nqhe,nhke->nhqk", jnp.asarray(query, key.dtype) * scale, key)
    weights = _probabilities(_masked(logits, given, how, start))
    kept = given.kept
    if kept is None and given.key is not None and how.p > 0:
        kept = _drawn(given.key, index, how.p, weights.shape)
    if kept is not None:
        weights = dropout(weights, how.p, kept)
    return jnp.einsum("nhqk,nhke->nhqe", weights, value), weights


def _masked(logits: Array, given: Given, how: How, start: Array | int) -> Array:
    """Adds the biases, and puts -inf where a key is ignored."""
    rows, keys = logits.shape[2:]
    closed = keys - how.open_keys

    def over_all_keys(array: Array) -> Array:
        if not how.open_keys:
            return array
        array = jnp.broadcast_to(array, (*array.shape[:3], closed))
        return jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, how.open_keys)))

    for bias in given.biases:
        logits = logits + over_all_keys(jnp.asarray(bias, logits.dtype))
    for mask in given.masks:
        logits = jnp.where(over_all_keys(mask), -jnp.inf, logits)
    if how.is_causal:
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (1, 1, rows, keys), i) for i in (2, 3))
        logits = jnp.where((column > row + start) & (column < closed), -jnp.inf, logits)
    return logits


def _probabilities(logits: Array) -> Array:
    """Returns the softmax over the last axis; 0 where all logits are -inf."""
    largest = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True, initial=-jnp.inf))
    terms = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0, largest))
    total = jnp.sum(terms, -1, keepdims=True)
    return terms / jnp.where(total == 0, 1, total)


def _drawn(key: Array, index: Array | int, p: float, shape: Shape) -> Array:
    """Draws the dropout mask of a block."""
    return dropout_mask(jax.random.fold_in(key, index), p, shape)


def forget_compiled() -> None:
    """Makes the next call trace anew, for who replaces a function of this module."""
    _region.clear_cache()  # type: ignore[attr-defined]  # documented, not annotated
