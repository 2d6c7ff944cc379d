"""Multi-head attention with PyTorch's semantics."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check, check_positive, check_probability
from flaxstab._dtypes import output_dtype, widest
from flaxstab._typing import Array, Bool, DTypeLike, Float, Initializer, Shape
from flaxstab.dropout._base import Dropping
from flaxstab.linear import Linear
from flaxstab.linear._base import drawn

Mask = Bool[Array, "..."] | Float[Array, "..."] | None
Heads = Float[Array, "n positions heads head_dim"]
Found = TypeVar("Found", Array, tuple[Array, Array])


class MultiHeadAttention(Dropping):
    """Attends from a query sequence to a key sequence, in several heads at once.

    Same result as ``torch.nn.MultiheadAttention(…, batch_first=True)``, with every option and mask.
    Masks have its sense: a boolean true = **ignore**, a float is added to the logits. Dropout falls
    on each probability of each sample and head by itself. The softmax is taken in float32 or wider.
    Memory grows with the number of keys, not with its square, and nothing but query, key and value
    is kept for the backward pass: see :func:`flaxstab.functional.attention`.

    Args:
      embed_dim: size of the query's and the output's last axis.
      num_heads: how many heads; divides ``embed_dim``.
      dropout: the probability of dropping a probability in training, in [0, 1].
      bias: whether the four projections add a bias.
      add_bias_kv: whether a learned key and value, ``bias_k`` and ``bias_v``, follow the others.
      add_zero_attn: whether a key and a value of zeros follow them. These last keys are hidden by
        no mask.
      kdim: size of the key's last axis; ``None`` = ``embed_dim``.
      vdim: size of the value's last axis; ``None`` = ``embed_dim``.
      kernel_init: draws the kernels of ``query``, ``key``, ``value`` and ``out``; ``None`` =
        PyTorch's laws: Xavier's uniform one, of the packed matrix unless ``kdim`` or ``vdim`` is
        another size, and ``Linear``'s for ``out``. Biases start at 0.
      dtype: dtype of computation and output; ``None`` = the query's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys: ``params``, and ``dropout`` if there is any.

    Attributes:
      query: the ``Linear`` of the query; beside it ``key``, ``value`` and ``out``.
      bias_k: the learned key, shape ``(embed_dim,)``, or ``None``; beside it ``bias_v``.
      p: the probability of dropping.
      deterministic: the mode: whether nothing is dropped.

    Raises:
      ValueError: if a size does not fit, ``dropout`` is outside [0, 1], or ``rngs`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = MultiHeadAttention(8, 2, dropout=0.1, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((3, 5, 8))
      >>> padding = jnp.arange(5)[None] >= jnp.array([5, 4, 0])[:, None]  # true = ignore
      >>> layer(x, key_padding_mask=padding, is_causal=True).shape
      (3, 5, 8)

    Differs from:
      PyTorch's: a query that sees no key attends to nothing: its probabilities and what goes into
      ``out`` are 0, and all gradients finite, also with ``need_weights=True``, where PyTorch has
      NaN. ``is_causal=True`` needs no mask beside it, goes with padding, and does not hide the keys
      of ``add_bias_kv`` and ``add_zero_attn`` (PyTorch hides them without weights and shows them
      with). ``need_weights`` is false by default, the batch first always, and the result the output
      alone unless weights are asked for. A boolean and a float mask may come together.
      ``flax.nnx.MultiHeadAttention``, whose masks have the opposite sense, a float one, too, and
      whose dropout is the same for the whole batch and all heads.

    Reference:
      A. Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762 (section 3.2.2).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        *,
        kernel_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        kdim, vdim = (embed_dim if size is None else size for size in (kdim, vdim))
        check_positive(embed_dim=embed_dim, num_heads=num_heads, kdim=kdim, vdim=vdim)
        rule = "num_heads must divide embed_dim"
        check(embed_dim % num_heads == 0, rule, num_heads=num_heads, embed_dim=embed_dim)
        check_probability(dropout=dropout)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim, vdim
        self.add_zero_attn = add_zero_attn

        packed = kdim == vdim == embed_dim
        law = kernel_init or initializers.torch_attention(3 if packed else 1)

        def projection(size: int, law: Initializer | None) -> Linear:
            return Linear(
                size, embed_dim, bias, kernel_init=law, bias_init=initializers.zeros,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.query, self.key, self.value = (projection(n, law) for n in (embed_dim, kdim, vdim))
        self.out = projection(embed_dim, kernel_init)
        rows = [_row(rngs, embed_dim, param_dtype) if add_bias_kv else None for _ in range(2)]
        self.bias_k, self.bias_v = map(nnx.data, rows)
        # Last: a stream for dropout must not change the weights that the same rngs draw.
        super().__init__(dropout, dtype=dtype, rngs=rngs if dropout > 0 else None)

    def __call__(
        self,
        query: Float[Array, "*n l embed_dim"],
        key: Float[Array, "*n s kdim"] | None = None,
        value: Float[Array, "*n s vdim"] | None = None,
        *,
        key_padding_mask: Mask = None,
        attn_mask: Mask = None,
        is_causal: bool = False,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        dropout_mask: Bool[Array, "..."] | None = None,
    ) -> Array | tuple[Array, Array]:
        """Attends.

        Args:
          query: shape ``(N, L, embed_dim)``, or ``(L, embed_dim)`` for a single sample; then the
            other arrays come without ``N``, too.
          key: shape ``(N, S, kdim)``; ``None`` = the query.
          value: shape ``(N, S, vdim)``; ``None`` = the key.
          key_padding_mask: shape ``(N, S)``: true where a key is ignored, or floats to add to its
            logits.
          attn_mask: shape ``(L, S)``, or ``(N * num_heads, L, S)`` with the heads of a sample side
            by side: true where a query ignores a key, or floats to add to the logits.
          is_causal: whether query i ignores the keys behind key i.
          need_weights: whether to return the probabilities as well.
          average_attn_weights: whether to average them over the heads.
          deterministic: overrides the layer's mode.
          rngs: overrides the layer's stream, as in :class:`flaxstab.dropout.Dropout`.
          dropout_mask: booleans that broadcast to ``(N, num_heads, L, S)``, with as many more keys
            as the layer adds, true where a probability is kept, instead of a draw.

        Returns:
          The output, shape ``(N, L, embed_dim)``; with ``need_weights`` the output and the
          probabilities after dropout, shape ``(N, L, S)``, or ``(N, num_heads, L, S)`` unless
          averaged. Keys that the layer adds come last in S.

        Raises:
          ValueError: if an array's shape or dtype does not fit, or dropout needs a key and there is
            none.
        """
        key = query if key is None else key
        value = key if value is None else value
        _check_axes(query, key, value, key_padding_mask)
        single = query.ndim == 2
        if single:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        if self.deterministic if deterministic is None else deterministic:
            dropout_mask = None
        draws = dropout_mask is None
        dropout_key = self.next_key(deterministic=deterministic, rngs=rngs) if draws else None
        options = ((key_padding_mask, attn_mask, is_causal), dropout_key, dropout_mask)
        q, k, v = self.qkv(query, key, value)
        if not need_weights:
            mixed = self._attended(functional.attention, q, k, v, *options)
            output = self.out(_side_by_side(mixed))
            return output[0] if single else output
        mixed, weights = self._attended(functional.attention_weights, q, k, v, *options)
        output = self.out(_side_by_side(mixed))
        if average_attn_weights:
            mean = jnp.mean(weights, 1, dtype=widest(weights.dtype))
            weights = jnp.asarray(mean, weights.dtype)
        return (output[0], weights[0]) if single else (output, weights)

    def qkv(
        self,
        query: Float[Array, "n l embed_dim"],
        key: Float[Array, "n s kdim"] | None = None,
        value: Float[Array, "n s vdim"] | None = None,
    ) -> tuple[Heads, Heads, Heads]:
        """Projects query, key and value: the first of three steps that a call is made of.

        ``layer(x)`` is ``layer.out(layer.attend(*layer.qkv(x), dropout_key=layer.next_key()))``.
        A block that keeps less for the backward pass puts steps into regions of its own.

        Args:
          query: shape ``(N, L, embed_dim)``.
          key: shape ``(N, S, kdim)``; ``None`` = the query.
          value: shape ``(N, S, vdim)``; ``None`` = the key.

        Returns:
          Three arrays of shape ``(N, L or S, num_heads, head_dim)``.

        Raises:
          ValueError: if an array does not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        dtype = output_dtype(query, self.dtype)
        named = (
            ("query", query, "embed_dim", self.query),
            ("key", key, "kdim", self.key),
            ("value", value, "vdim", self.value),
        )

        def projected(name: str, x: Array, size: str, part: Linear) -> Array:
            rule = f"{name} must have the shape (N, positions, {size})"
            given: dict[str, object] = {size: part.in_features, "shape": x.shape}
            check(x.ndim == 3 and x.shape[-1] == part.in_features, rule, fix="", **given)
            rows = part(jnp.asarray(x, dtype))
            return rows.reshape(*x.shape[:2], self.num_heads, self.head_dim)

        q, k, v = (projected(*parts) for parts in named)
        return q, k, v

    def attend(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        *,
        key_padding_mask: Mask = None,
        attn_mask: Mask = None,
        is_causal: bool = False,
        dropout_key: Array | None = None,
        dropout_mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "n l embed_dim"]:
        """Mixes projected values: the second step, of which ``out`` is the third.

        Args:
          q: shape ``(N, L, num_heads, head_dim)``.
          k: shape ``(N, S, num_heads, head_dim)``, without the keys that the layer adds.
          v: the same shape.
          key_padding_mask: as of a call, shape ``(N, S)``.
          attn_mask: as of a call.
          is_causal: as of a call.
          dropout_key: a key for dropout, whatever the mode, such as :meth:`next_key` returns;
            ``None`` drops nothing.
          dropout_mask: as of a call.

        Returns:
          The heads' outputs side by side, shape ``(N, L, embed_dim)``.

        Raises:
          ValueError: if an array does not fit.
        """
        masks = (key_padding_mask, attn_mask, is_causal)
        core = functional.attention
        return _side_by_side(self._attended(core, q, k, v, masks, dropout_key, dropout_mask))

    def attend_with_weights(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        *,
        key_padding_mask: Mask = None,
        attn_mask: Mask = None,
        is_causal: bool = False,
        dropout_key: Array | None = None,
        dropout_mask: Bool[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "n l embed_dim"], Float[Array, "n heads l s"]]:
        """Returns what :meth:`attend` returns, and the probabilities after dropout of each head."""
        masks = (key_padding_mask, attn_mask, is_causal)
        core = functional.attention_weights
        mixed, weights = self._attended(core, q, k, v, masks, dropout_key, dropout_mask)
        return _side_by_side(mixed), weights

    def _attended(
        self,
        core: Callable[..., Found],
        q: Array,
        k: Array,
        v: Array,
        masks: tuple[Mask, Mask, bool],
        dropout_key: Array | None,
        dropout_mask: Array | None,
    ) -> Found:
        """Calls the function at the core with this layer's options."""
        key_padding_mask, attn_mask, is_causal = masks
        drops = dropout_key is not None or dropout_mask is not None
        given = [
            _padding_mask(key_padding_mask, (k.shape[0], k.shape[1])),
            _attention_mask(attn_mask, (q.shape[0], self.num_heads, q.shape[1], k.shape[1])),
        ]
        arrays = [array for array in given if array is not None]
        return core(
            q,
            self._with_rows(k, self.bias_k),
            self._with_rows(v, self.bias_v),
            mask=[a for a in arrays if a.dtype == jnp.bool_],
            bias=[a for a in arrays if a.dtype != jnp.bool_],
            is_causal=is_causal,
            p=self.p if drops else 0.0,
            dropout_key=dropout_key,
            dropout_mask=dropout_mask,
            open_keys=(self.bias_k is not None) + self.add_zero_attn,
        )

    def _with_rows(self, rows: Array, learned: nnx.Param[Array] | None) -> Array:
        """Appends what the layer adds to keys or values."""
        n, _, *heads = rows.shape
        added = [] if learned is None else [jnp.asarray(learned[...], rows.dtype).reshape(heads)]
        added += [jnp.zeros(heads, rows.dtype)] if self.add_zero_attn else []
        more = [jnp.broadcast_to(row[None, None], (n, 1, *heads)) for row in added]
        return jnp.concatenate([rows, *more], 1) if more else rows


def _side_by_side(heads: Array) -> Array:
    n, length, count, size = heads.shape
    return heads.reshape(n, length, count * size)


def _row(rngs: nnx.Rngs | None, size: int, dtype: DTypeLike) -> nnx.Param[Array]:
    """Draws a learned key or value: Xavier's normal law of PyTorch's shape ``(1, 1, size)``."""
    row = drawn(rngs, initializers.normal(0.0, size**-0.5), (size,), dtype)
    row.set_metadata(role="bias")  # as PyTorch's users have it: no weight decay
    return row


def _check_axes(query: Array, key: Array, value: Array, key_padding_mask: Mask) -> None:
    """Raises a ``ValueError`` unless all have a batch axis, or none."""
    ranks = {query.ndim, key.ndim, value.ndim}
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    given: dict[str, object] = dict(shapes)
    rule = "query, key and value must have the axes (N, positions, features), or all be without N"
    check(ranks in ({2}, {3}), rule, fix="", **given)
    if key_padding_mask is not None:
        rule = "key_padding_mask must have the axes (N, S), or (S,) for a single sample"
        shape = jnp.shape(key_padding_mask)
        check(len(shape) == query.ndim - 1, rule, key_padding_mask=shape, query=query.shape)


def _padding_mask(mask: Mask, shape: Shape) -> Array | None:
    """Returns a mask of keys with the axes of the logits: (N, S) -> (N, 1, 1, S)."""
    if mask is None:
        return None
    array = _checked("key_padding_mask", mask)
    rule = "key_padding_mask must have the shape (N, S)"
    given: dict[str, object] = {"key_padding_mask": array.shape, "(N, S)": shape}
    check(array.shape == shape, rule, fix="", **given)
    return array[:, None, None]


def _attention_mask(mask: Mask, shape: Shape) -> Array | None:
    """Returns a mask of queries and keys with the axes of the logits, (N, H, L, S)."""
    if mask is None:
        return None
    array = _checked("attn_mask", mask)
    n, heads, length, keys = shape
    allowed = ((length, keys), (n * heads, length, keys))
    rule = "attn_mask must have the shape (L, S) or (N * num_heads, L, S)"
    check(array.shape in allowed, rule, attn_mask=array.shape, allowed=allowed)
    return array[None, None] if array.ndim == 2 else array.reshape(shape)


def _checked(name: str, mask: Array) -> Array:
    """Returns a mask, which must be boolean or floating-point."""
    array = jnp.asarray(mask)
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    check(
        array.dtype == jnp.bool_ or floating,
        f"{name} must be boolean, true = ignore, or floating-point, added to the logits",
        fix="Of integers that are 1 where a query may attend, pass mask == 0.",
        dtype=str(array.dtype),
    )
    return array
