"""The embedding layer."""

import jax.numpy as jnp
from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check_last_axis, check_positive
from flaxstab._dtypes import floating, output_dtype
from flaxstab._typing import Array, DTypeLike, Initializer
from flaxstab.functional._embedding import row_index
from flaxstab.functional._recompute import with_parameters
from flaxstab.linear._base import drawn


class Embed(nnx.Module):
    """Looks rows of a learned table up.

    Same result as ``torch.nn.Embedding``: the table starts as N(0, 1), its padding row as 0.

    Args:
      num_embeddings: how many rows the table has.
      embedding_dim: size of the output's last axis.
      padding_idx: a row that gets no gradient and so stays as it is in training; it is looked up
        like any other. A negative one counts from the end.
      embedding_init: draws the table, shape ``(num_embeddings, embedding_dim)``, the padding row,
        too; ``None`` = PyTorch's law.
      dtype: dtype of the output; ``None`` = the table's.
      param_dtype: dtype of the table.
      rngs: source of the keys; the ``params`` stream is used.

    Raises:
      ValueError: if a size is below 1, there is no row ``padding_idx``, ``rngs`` is missing, or
        the input is not of integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> Embed(10, 4, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 9]])).shape
      (1, 3, 4)

    Differs from:
      ``torch.nn.Embedding``, which raises an ``IndexError`` for an index outside
      ``[0, num_embeddings)``: a compiled program cannot, so that row of the output is NaN, also
      for a negative index; and which has ``max_norm``, ``scale_grad_by_freq`` and ``sparse``.
      ``flax.nnx.Embed``, whose table starts ``sqrt(embedding_dim)`` times narrower, whose negative
      indices count from the end, and whose table of one row answers every index.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        embedding_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = row_index(padding_idx, num_embeddings)
        self.dtype = None if dtype is None else floating("dtype", dtype)
        law = embedding_init or initializers.torch_embedding(self.padding_idx)
        self.embedding = drawn(rngs, law, (num_embeddings, embedding_dim), param_dtype)

    def __call__(self, indices: Array) -> Array:
        """Maps indices of rows, any shape, to ``(*batch, embedding_dim)``."""
        table = self.embedding[...]
        rows = functional.embedding(jnp.asarray(indices), table, padding_idx=self.padding_idx)
        return rows if self.dtype is None else jnp.asarray(rows, self.dtype)

    def attend(self, query: Array) -> Array:
        """Maps ``(*batch, embedding_dim)`` to each row's product with it: a tied output head.

        Same result as ``torch.nn.functional.linear(query, embedding.weight)``: here the padding
        row gets a gradient like any other.

        Returns:
          Values of shape ``(*batch, num_embeddings)``, in the layer's ``dtype`` or the query's.
        """
        check_last_axis("embedding_dim", self.embedding_dim, query.shape)
        dtype = output_dtype(query, self.dtype)
        arrays = (jnp.asarray(query, dtype), self.embedding[...])
        return with_parameters(lambda x, t: functional.linear(x, t.T), *arrays, dtype=dtype)
