"""Document 2's Transformer block."""

from typing import TypeAlias, cast

import jax.numpy as jnp
from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check_positive, check_probability
from flaxstab._typing import Array, DTypeLike, Initializer
from flaxstab.attention import MultiHeadAttention
from flaxstab.blocks._parts import Function, MakeNorm, check_choices
from flaxstab.blocks._residual import Add, Residual, wired
from flaxstab.blocks._sublayers import attended, fed_forward
from flaxstab.dropout import Dropout
from flaxstab.linear import Linear
from flaxstab.linear._base import check_rngs, drawn
from flaxstab.norms import LayerNorm

_FeedForward: TypeAlias = tuple[Linear, Function, Dropout, Linear, Dropout]


class TransformerBlock(nnx.Module):
    """Pre-LN block: norm, attention, add; norm, feed-forward part, add.

    Same result as document 2's ``TransformerBlock`` (I-2): dropout on the attention's
    probabilities, behind the activation and behind the feed-forward part. The names are the
    document's: ``ln1``, ``attn``, ``ln2``, ``ff.0``, ``ff.3``. The laws are those that its
    ``apply(init_layer)`` leaves: Xavier uniform for query, key and value, He normal for the other
    layers, biases 0.

    Args:
      d: features of a token; ``nhead`` divides them.
      nhead: number of heads.
      d_ff: width of the feed-forward part in units of ``d``.
      p_drop: the probability of dropping, in all three places.
      attn_drop: that of the attention's probabilities; ``None`` = ``p_drop``. Document 2 (G-2)
        gives 0.1 to 0.2 for the one and 0 to 0.1 for the other.
      out_drop: that behind the attention's output, where the document has none and GPT-2 and timm
        have one.
      norm: builds each norm; ``None`` = :class:`flaxstab.norms.LayerNorm`.
      act: the activation; ``None`` = exact GELU.
      kernel_init: draws all six kernels; ``None`` = as said.
      residual: how both branches are added; ``None`` = plainly.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys, stream ``params``, and ``dropout`` if anything is dropped.

    Raises:
      ValueError: if a size is below 1, ``nhead`` does not divide ``d``, a probability is outside
        [0, 1], ``norm`` or ``act`` is no function, or ``rngs`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> block = TransformerBlock(16, nhead=2, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 5, 16)), is_causal=True).shape
      (2, 5, 16)

    Differs from:
      the document's, whose masks must come as PyTorch wants them: here ``is_causal`` needs no mask
      of its own. Post-LN: :class:`TransformerEncoderLayer`.

    Reference:
      R. Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020,
      arXiv:2002.04745 (figure 1b).
    """

    def __init__(
        self,
        d: int,
        nhead: int = 8,
        d_ff: int = 4,
        p_drop: float = 0.1,
        *,
        attn_drop: float | None = None,
        out_drop: float = 0.0,
        norm: MakeNorm | None = None,
        act: Function | None = None,
        kernel_init: Initializer | None = None,
        residual: Residual | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_positive(d=d, nhead=nhead, d_ff=d_ff)
        check_probability(p_drop=p_drop)
        check_choices(norm, act, residual)
        rngs, make_norm, wiring = check_rngs(rngs), norm or LayerNorm, residual or Residual()
        init = kernel_init or initializers.kaiming_normal(nonlinearity="relu")
        last = initializers.zeros if wiring.zero_init else init

        def linear(size: int, out: int, init: Initializer) -> Linear:
            return Linear(
                size, out, kernel_init=init, bias_init=initializers.zeros, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        def drop(p: float) -> Dropout:
            return Dropout(p, dtype=dtype, rngs=rngs if p else None)

        self.ln1 = make_norm(d, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attn = MultiHeadAttention(
            d, nhead, p_drop if attn_drop is None else attn_drop, kernel_init=kernel_init,
            dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.attn.out.kernel = drawn(rngs, last, (d, d), param_dtype)
        self.drop = drop(out_drop)
        self.ln2 = make_norm(d, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.ff = nnx.Sequential(
            linear(d, d * d_ff, init), act or functional.gelu, drop(p_drop),
            linear(d * d_ff, d, last), drop(p_drop),
        )  # fmt: skip
        self.add1 = Add(wiring, d, param_dtype=param_dtype, rngs=rngs)
        self.add2 = Add(wiring, d, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: Array,
        attn_mask: Array | None = None,
        key_padding_mask: Array | None = None,
        *,
        is_causal: bool = False,
    ) -> Array:
        """Maps ``(N, L, d)`` to ``(N, L, d)``.

        Args:
          x: the tokens.
          attn_mask: ``(L, L)`` or ``(N * nhead, L, L)``; boolean true = ignore, float = added.
          key_padding_mask: ``(N, L)``; boolean true = ignore, float = added.
          is_causal: whether a token sees itself and what comes before it only.
        """
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}

        def attend(norm: nnx.Module | None, x: Array) -> Array:
            return self.drop(attended(self.attn, norm, x, **masks, is_causal=is_causal))

        def feed(norm: nnx.Module | None, x: Array) -> Array:
            up, act, inner, down, outer = cast("_FeedForward", tuple(self.ff.layers))
            return outer(fed_forward(norm, up, act, inner, down, x))

        x = wired(attend, self.ln1, self.add1, x, norm_first=True)
        return wired(feed, self.ln2, self.add2, x, norm_first=True)
