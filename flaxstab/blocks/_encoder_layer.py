"""PyTorch's own Transformer layers, batch first."""

from functools import partial
from typing import Literal, NamedTuple, cast

import jax.numpy as jnp
from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check, check_positive
from flaxstab._typing import Array, DTypeLike, Initializer
from flaxstab.attention import MultiHeadAttention
from flaxstab.blocks._parts import Function, MakeNorm, check_choices
from flaxstab.blocks._residual import Add, Residual, wired
from flaxstab.blocks._sublayers import attended, fed_forward
from flaxstab.dropout import Dropout
from flaxstab.linear import Linear
from flaxstab.linear._base import check_rngs
from flaxstab.norms import LayerNorm

Activation = Literal["relu", "gelu"] | Function


class _Parts(NamedTuple):
    """Makes the parts of one layer, all with the same settings."""

    d_model: int
    nhead: int
    dropout: float
    bias: bool
    layer_norm_eps: float
    make_norm: MakeNorm | None
    kernel_init: Initializer | None
    residual: Residual
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def attention(self) -> MultiHeadAttention:
        """Returns an attention, whose output starts at zero if the branch has to."""
        attention = MultiHeadAttention(
            self.d_model, self.nhead, self.dropout, self.bias, kernel_init=self.kernel_init,
            dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs,
        )  # fmt: skip
        if self.residual.zero_init:
            kernel = attention.out.kernel
            kernel[...] = jnp.zeros_like(kernel[...])
        return attention

    def linear(self, size: int, out: int, *, last: bool = False) -> Linear:
        """Returns a linear layer; one that ends a branch may have to start at zero."""
        zero = initializers.zeros if last and self.residual.zero_init else None
        return Linear(
            size, out, self.bias, kernel_init=zero or self.kernel_init, bias_init=zero,
            dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs,
        )  # fmt: skip

    def norm(self) -> nnx.Module:
        """Returns a norm."""
        default = partial(LayerNorm, eps=self.layer_norm_eps, bias=self.bias)
        make_norm = default if self.make_norm is None else self.make_norm
        return make_norm(
            self.d_model, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs
        )

    def drop(self) -> Dropout:
        """Returns a dropout layer."""
        return Dropout(self.dropout, dtype=self.dtype, rngs=self.rngs if self.dropout else None)

    def add(self) -> Add:
        """Returns what adds a branch."""
        return Add(self.residual, self.d_model, param_dtype=self.param_dtype, rngs=self.rngs)


def _check(
    sizes: dict[str, int],
    batch_first: bool,
    norm_first: bool,
    norm: MakeNorm | None,
    residual: Residual | None,
) -> None:
    check_positive(**sizes)
    check(
        batch_first,
        "arrays are (N, L, C) here, so batch_first must be True",
        fix="Swap the first two axes of (L, N, C), of the input and of the output.",
        batch_first=batch_first,
    )
    check(
        norm_first or residual is None or not residual.zero_init,
        "zero_init needs norm_first=True",
        fix="Behind a zero sum the norm of Post-LN has nothing to start from.",
        norm_first=norm_first,
    )
    check_choices(norm, None, residual)


def _activation(activation: Activation) -> Function:
    by_name: dict[object, Function] = {"relu": functional.relu, "gelu": functional.gelu}
    if isinstance(activation, str) and activation in by_name:
        return by_name[activation]
    check(
        callable(activation) and not isinstance(activation, type),
        "activation must be 'relu', 'gelu' or a function",
        fix="Pass e.g. flaxstab.functional.relu.",
        activation=activation,
    )
    return cast("Function", activation)


class TransformerEncoderLayer(nnx.Module):
    """Self-attention and a feed-forward part, Post-LN by default: ``x = norm(x + branch(x))``.

    Same result as ``torch.nn.TransformerEncoderLayer``, its names included: ``self_attn``,
    ``linear1``, ``linear2``, ``norm1``, ``norm2``. Dropout falls on the attention's probabilities,
    behind either sublayer, and behind the activation. The laws are PyTorch's.

    Args:
      d_model: features of a token; ``nhead`` divides them.
      nhead: number of heads.
      dim_feedforward: width between the linear layers.
      dropout: the probability of dropping, in all places.
      activation: ``'relu'``, ``'gelu'`` (exact) or a function.
      layer_norm_eps: added to the variance of both norms. Not used with ``norm``.
      batch_first: only ``True``: arrays are ``(N, L, C)``.
      norm_first: whether each branch sees its input through the norm (Pre-LN) instead.
      bias: whether linear layers, attention and norms have biases.
      norm: builds each norm; ``None`` = :class:`flaxstab.norms.LayerNorm`.
      kernel_init: draws all kernels; ``None`` = PyTorch's laws.
      residual: how both branches are added; ``None`` = plainly.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys, stream ``params``, and ``dropout`` if anything is dropped.

    Raises:
      ValueError: if a size is below 1, ``nhead`` does not divide ``d_model``, ``dropout`` lies
        outside [0, 1], ``activation`` is unknown, ``batch_first`` is false, or ``rngs`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = TransformerEncoderLayer(16, 2, 32, norm_first=True, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 5, 16))).shape
      (2, 5, 16)

    Differs from:
      torch's, whose default is ``batch_first=False``, whose evaluation without gradients returns 0
      for padded tokens, and NaN for one that ignores all. ``torch.nn.TransformerEncoder`` copies
      one layer, weights and all; layers built one by one differ.

    Reference:
      A. Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = False,
        bias: bool = True,
        *,
        norm: MakeNorm | None = None,
        kernel_init: Initializer | None = None,
        residual: Residual | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        sizes = {"d_model": d_model, "nhead": nhead, "dim_feedforward": dim_feedforward}
        _check(sizes, batch_first, norm_first, norm, residual)
        parts = _Parts(
            d_model, nhead, dropout, bias, layer_norm_eps, norm, kernel_init,
            residual or Residual(), dtype, param_dtype, check_rngs(rngs),
        )  # fmt: skip
        self.self_attn = parts.attention()
        self.linear1 = parts.linear(d_model, dim_feedforward)
        self.dropout = parts.drop()
        self.linear2 = parts.linear(dim_feedforward, d_model, last=True)
        self.norm1, self.norm2 = parts.norm(), parts.norm()
        self.dropout1, self.dropout2 = parts.drop(), parts.drop()
        self.add1, self.add2 = parts.add(), parts.add()
        self.act = _activation(activation)
        self.norm_first = norm_first

    def __call__(
        self,
        src: Array,
        src_mask: Array | None = None,
        src_key_padding_mask: Array | None = None,
        is_causal: bool = False,
    ) -> Array:
        """Maps ``(N, L, d_model)`` to ``(N, L, d_model)``.

        Args:
          src: the tokens.
          src_mask: ``(L, L)`` or ``(N * nhead, L, L)``; boolean true = ignore, float = added.
          src_key_padding_mask: ``(N, L)``; boolean true = ignore, float = added.
          is_causal: whether a token sees itself and what comes before it only.
        """
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}

        def attend(norm: nnx.Module | None, x: Array) -> Array:
            y = attended(self.self_attn, norm, x, **masks, is_causal=is_causal)
            return self.dropout1(y)

        x = wired(attend, self.norm1, self.add1, src, norm_first=self.norm_first)
        feed = partial(_fed, self, self.dropout2)
        return wired(feed, self.norm2, self.add2, x, norm_first=self.norm_first)


class TransformerDecoderLayer(nnx.Module):
    """Self-attention, attention to a memory, and a feed-forward part, Post-LN by default.

    Same result as ``torch.nn.TransformerDecoderLayer``, its names included: ``self_attn``,
    ``multihead_attn``, ``linear1``, ``linear2``, ``norm1`` to ``norm3``. The laws are PyTorch's.

    Args:
      d_model: features of a token, of the memory too; ``nhead`` divides them.
      nhead: number of heads.
      dim_feedforward: width between the linear layers.
      dropout: the probability of dropping, in all places.
      activation: ``'relu'``, ``'gelu'`` (exact) or a function.
      layer_norm_eps: added to the variance of the norms. Not used with ``norm``.
      batch_first: only ``True``: arrays are ``(N, L, C)``.
      norm_first: whether each branch sees its input through the norm (Pre-LN) instead.
      bias: whether linear layers, attention and norms have biases.
      norm: builds each norm; ``None`` = :class:`flaxstab.norms.LayerNorm`.
      kernel_init: draws all kernels; ``None`` = PyTorch's laws.
      residual: how the branches are added; ``None`` = plainly.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys, stream ``params``, and ``dropout`` if anything is dropped.

    Raises:
      ValueError: as :class:`TransformerEncoderLayer`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = TransformerDecoderLayer(16, 2, 32, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 5, 16)), jnp.ones((2, 7, 16)), tgt_is_causal=True).shape
      (2, 5, 16)

    Differs from:
      torch's, whose default is ``batch_first=False`` and whose causal hints need masks as well.

    Reference:
      A. Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762 (figure 1, right).
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = False,
        bias: bool = True,
        *,
        norm: MakeNorm | None = None,
        kernel_init: Initializer | None = None,
        residual: Residual | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        sizes = {"d_model": d_model, "nhead": nhead, "dim_feedforward": dim_feedforward}
        _check(sizes, batch_first, norm_first, norm, residual)
        parts = _Parts(
            d_model, nhead, dropout, bias, layer_norm_eps, norm, kernel_init,
            residual or Residual(), dtype, param_dtype, check_rngs(rngs),
        )  # fmt: skip
        self.self_attn, self.multihead_attn = parts.attention(), parts.attention()
        self.linear1 = parts.linear(d_model, dim_feedforward)
        self.dropout = parts.drop()
        self.linear2 = parts.linear(dim_feedforward, d_model, last=True)
        self.norm1, self.norm2, self.norm3 = parts.norm(), parts.norm(), parts.norm()
        self.dropout1, self.dropout2, self.dropout3 = parts.drop(), parts.drop(), parts.drop()
        self.add1, self.add2, self.add3 = parts.add(), parts.add(), parts.add()
        self.act = _activation(activation)
        self.norm_first = norm_first

    def __call__(
        self,
        tgt: Array,
        memory: Array,
        tgt_mask: Array | None = None,
        memory_mask: Array | None = None,
        tgt_key_padding_mask: Array | None = None,
        memory_key_padding_mask: Array | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Array:
        """Maps ``(N, L, d_model)`` and a memory ``(N, S, d_model)`` to ``(N, L, d_model)``.

        Args:
          tgt: the tokens.
          memory: what they attend to beside themselves.
          tgt_mask: ``(L, L)`` or ``(N * nhead, L, L)``; boolean true = ignore, float = added.
          memory_mask: ``(L, S)`` or ``(N * nhead, L, S)``, likewise.
          tgt_key_padding_mask: ``(N, L)``, likewise.
          memory_key_padding_mask: ``(N, S)``, likewise.
          tgt_is_causal: whether a token sees itself and what comes before it only.
          memory_is_causal: whether a token sees the memory up to its own place only.
        """

        def to_itself(norm: nnx.Module | None, x: Array) -> Array:
            y = attended(
                self.self_attn, norm, x, attn_mask=tgt_mask,
                key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal,
            )  # fmt: skip
            return self.dropout1(y)

        def to_memory(norm: nnx.Module | None, x: Array) -> Array:
            y = attended(
                self.multihead_attn, norm, x, memory, attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask, is_causal=memory_is_causal,
            )  # fmt: skip
            return self.dropout2(y)

        first = self.norm_first
        x = wired(to_itself, self.norm1, self.add1, tgt, norm_first=first)
        x = wired(to_memory, self.norm2, self.add2, x, norm_first=first)
        feed = partial(_fed, self, self.dropout3)
        return wired(feed, self.norm3, self.add3, x, norm_first=first)


def _fed(
    layer: TransformerEncoderLayer | TransformerDecoderLayer,
    outer: Dropout,
    norm: nnx.Module | None,
    x: Array,
) -> Array:
    """Returns the feed-forward branch of a layer."""
    return outer(fed_forward(norm, layer.linear1, layer.act, layer.dropout, layer.linear2, x))
