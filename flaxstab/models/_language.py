"""A causal language model of Transformer blocks."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from flaxstab import initializers
from flaxstab._checks import check, check_positive
from flaxstab._dtypes import aligned
from flaxstab._typing import Array, DTypeLike, Initializer
from flaxstab.blocks import MakeNorm, Residual, TransformerBlock
from flaxstab.blocks._parts import Function, check_choices
from flaxstab.dropout import Dropout
from flaxstab.linear import Embed
from flaxstab.linear._base import check_rngs, drawn
from flaxstab.models._bare import carry_as_they_are
from flaxstab.models._stack import Chain
from flaxstab.norms import LayerNorm


@dataclass(frozen=True, kw_only=True)
class LMSize:
    """How large a language model is.

    Args:
      d: features of a token.
      depth: number of blocks.
      nhead: number of heads.
      d_ff: width of the feed-forward parts in units of ``d``.
      max_len: the longest sequence.

    Raises:
      ValueError: if a number is below 1.
    """

    d: int = 128
    depth: int = 4
    nhead: int = 4
    d_ff: int = 4
    max_len: int = 256

    def __post_init__(self) -> None:
        check_positive(**vars(self))


class TransformerLM(nnx.Module):
    """Causal language model: tokens and learned positions, Pre-LN blocks, a norm, logits.

    The table of tokens serves as the head, too: its array is passed, no variable is shared, so
    that both modes of NNX take it. Laws: truncated normal with std 0.02 for every table and
    kernel, biases 0. Blocks are :class:`flaxstab.blocks.TransformerBlock`.

    Args:
      vocab_size: number of tokens.
      size: its sizes.
      p_drop: the probability of dropping behind the embedding, on the attention's probabilities,
        behind the activation and behind both branches.
      attn_drop: that of the attention's probabilities; ``None`` = ``p_drop``.
      norm: builds each norm; ``None`` = :class:`flaxstab.norms.LayerNorm`.
      act: the activation; ``None`` = exact GELU.
      kernel_init: draws kernels and tables; ``None`` = as said.
      residual: how every branch is added; ``None`` = plainly.
      scan: whether the blocks are stacked and run by a loop: the same weights and numbers from a
        program that does not grow with depth. Parameters have other names: see :func:`stacked` and
        :func:`unstacked`.
      remat: whether the backward pass keeps each block's input only, and computes the rest again.
      dtype: dtype of computation and of the logits; ``None`` = ``param_dtype``.
      param_dtype: dtype of the parameters.
      rngs: source of the keys, stream ``params``, and ``dropout`` if anything is dropped.

    Raises:
      ValueError: if sizes do not fit, ``p_drop`` is outside [0, 1], ``rngs`` is missing, or a
        sequence is longer than ``max_len``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = TransformerLM(11, LMSize(d=8, depth=2, nhead=2, max_len=16), rngs=nnx.Rngs(0))
      >>> model(jnp.array([[1, 2, 3]])).shape
      (1, 3, 11)

    Reference:
      A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2);
      O. Press, L. Wolf, "Using the Output Embedding to Improve Language Models", 2016,
      arXiv:1608.05859.
    """

    def __init__(
        self,
        vocab_size: int,
        size: LMSize | None = None,
        *,
        p_drop: float = 0.1,
        attn_drop: float | None = None,
        norm: MakeNorm | None = None,
        act: Function | None = None,
        kernel_init: Initializer | None = None,
        residual: Residual | None = None,
        scan: bool = False,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        size = LMSize() if size is None else size
        rule = "size must be an LMSize"
        check(isinstance(size, LMSize), rule, fix="Pass e.g. LMSize(depth=6).", size=size)
        check_positive(vocab_size=vocab_size)
        check_choices(norm, act, residual)
        rngs, law = check_rngs(rngs), kernel_init or initializers.trunc_normal(std=0.02)
        make_norm = norm or LayerNorm
        self.size = size
        self.embed = Embed(
            vocab_size, size.d, embedding_init=law, dtype=dtype, param_dtype=param_dtype,
            rngs=rngs,
        )  # fmt: skip
        positions = (size.max_len, size.d)
        self.position = drawn(rngs, law, positions, param_dtype, role="position_embedding")
        self.drop = Dropout(p_drop, dtype=dtype, rngs=rngs if p_drop else None)

        def block() -> TransformerBlock:
            return TransformerBlock(
                size.d, size.nhead, size.d_ff, p_drop, attn_drop=attn_drop, out_drop=p_drop,
                norm=make_norm, act=act, kernel_init=law, residual=residual, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        blocks = (block() for _ in range(size.depth))
        self.blocks = Chain(blocks, scan=scan, remat=remat)
        self.norm = make_norm(size.d, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Maps integers ``(N, L)`` to logits ``(N, L, vocab_size)`` of the token that follows each.

        The logits of a token depend on it and on those before it only.
        """
        tokens, longest = jnp.asarray(tokens), self.size.max_len
        rule = "tokens must be (N, L), L at most max_len"
        fits = tokens.ndim == 2 and tokens.shape[1] <= longest
        check(fits, rule, max_len=longest, shape=tokens.shape)
        x = self.embed(tokens)
        position = self.position[: tokens.shape[1]]
        x = self.drop(x + aligned(position, x, x.dtype))
        x = self.blocks.run(lambda block, x: block(x, is_causal=True), x)
        return self.embed.attend(self.norm(x))


carry_as_they_are(TransformerLM, "position")
