"""A table of rows, looked up by integers."""

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check
from flaxstab._typing import Array, Float, Int


def row_index(padding_idx: int | None, num_embeddings: int) -> int | None:
    """Returns ``padding_idx`` counted from the front; ``None`` stays ``None``.

    Raises:
      ValueError: if it is no integer, or there is no such row.

    Example:
      >>> row_index(-1, 5)
      4
    """
    if padding_idx is None:
        return None
    check(
        isinstance(padding_idx, int | np.integer) and not isinstance(padding_idx, bool),
        "padding_idx must be an integer or None",
        padding_idx=padding_idx,
    )
    check(
        -num_embeddings <= padding_idx < num_embeddings,
        "padding_idx must lie in [-num_embeddings, num_embeddings)",
        padding_idx=padding_idx,
        num_embeddings=num_embeddings,
    )
    return int(padding_idx) % num_embeddings


def embedding(
    indices: Int[Array, "*batch"],
    table: Float[Array, "num_embeddings embedding_dim"],
    *,
    padding_idx: int | None = None,
) -> Float[Array, "*batch embedding_dim"]:
    """Looks rows of a table up.

    Same result as ``torch.nn.functional.embedding``.

    Args:
      indices: of rows, integers of any shape and width.
      table: shape ``(num_embeddings, embedding_dim)``.
      padding_idx: a row that gets no gradient; negative ones count from the end.

    Returns:
      Rows, shape ``(*batch, embedding_dim)``, in the table's dtype.

    Raises:
      ValueError: if the indices are no integers, or there is no row ``padding_idx``.

    Differs from:
      ``torch``, which raises an ``IndexError`` for an index outside ``[0, num_embeddings)``: a
      compiled program cannot, so that row is NaN, also for negative indices, and gets no gradient.
    """
    check(
        jnp.issubdtype(indices.dtype, jnp.integer),
        "indices must be integers",
        dtype=str(indices.dtype),
    )
    row = row_index(padding_idx, table.shape[0])
    looked_up = table.at[indices]
    found = looked_up.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    if row is None or row > jnp.iinfo(indices.dtype).max:
        return found
    # (*batch) -> (*batch, 1)
    padded = (indices == jnp.asarray(row, indices.dtype))[..., None]
    return jnp.where(padded, jax.lax.stop_gradient(found), found)
