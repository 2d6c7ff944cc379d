"""Vision Transformers with timm's structure."""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import nnx

from flaxstab import initializers
from flaxstab._checks import check, check_positive
from flaxstab._dtypes import aligned
from flaxstab._typing import Array, DTypeLike, Initializer
from flaxstab.blocks import MakeNorm, Residual, TransformerBlock
from flaxstab.blocks._parts import Function, check_choices
from flaxstab.dropout import Dropout
from flaxstab.linear import Conv, Linear
from flaxstab.linear._base import check_rngs, drawn
from flaxstab.models._bare import carry_as_they_are
from flaxstab.models._depth import DropPathRule, check_drop_path_rule, residual_at
from flaxstab.models._stack import Chain
from flaxstab.norms import LayerNorm


@dataclass(frozen=True, kw_only=True)
class ViTSize:
    """How large a vision Transformer is.

    Args:
      d: features of a token.
      depth: number of blocks.
      nhead: number of heads.
      d_ff: width of the feed-forward parts in units of ``d``.
      patch_size: height and width of a patch.
      image_size: height and width of the input.
      in_channels: channels of the input.

    Raises:
      ValueError: if a number is below 1, or ``patch_size`` does not divide ``image_size``.
    """

    d: int = 192
    depth: int = 12
    nhead: int = 3
    d_ff: int = 4
    patch_size: int = 16
    image_size: int = 224
    in_channels: int = 3

    def __post_init__(self) -> None:
        check_positive(**vars(self))
        check(
            self.image_size % self.patch_size == 0,
            "patch_size must divide image_size",
            patch_size=self.patch_size,
            image_size=self.image_size,
        )

    @property
    def tokens(self) -> int:
        """How many tokens there are, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


VIT_TINY = ViTSize()
VIT_SMALL = ViTSize(d=384, nhead=6)


class _PatchEmbed(nnx.Module):
    """Maps each patch of an image to a token: timm's ``PatchEmbed``."""

    def __init__(
        self, size: ViTSize, dtype: DTypeLike | None, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.proj = Conv(
            size.in_channels, size.d, size.patch_size, size.patch_size, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, H, W, in_channels)`` to ``(N, H * W / patch_size**2, d)``."""
        x = self.proj(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])  # (N, h, w, d) -> (N, h * w, d)


class ViT(nnx.Module):
    """Vision Transformer: patches, class token, learned positions, Pre-LN blocks, linear head.

    timm's ``VisionTransformer``: the class token's features behind the last norm go into the head;
    LayerNorm's eps is 1e-6. Laws: truncated normal with std 0.02 for linear layers and positions,
    std 1e-6 for the class token, biases 0. Blocks are :class:`flaxstab.blocks.TransformerBlock`;
    :func:`from_timm` gives timm's names their names here.

    Args:
      size: its sizes; :data:`VIT_TINY` and :data:`VIT_SMALL` are timm's.
      num_classes: size of the output.
      p_drop: the probability of dropping behind the embedding, the attention's output, the
        activation and the feed-forward part.
      attn_drop: that of the attention's probabilities.
      norm: builds each norm; ``None`` = :class:`flaxstab.norms.LayerNorm` with eps 1e-6.
      act: the activation; ``None`` = exact GELU.
      kernel_init: draws kernels and positions; ``None`` = as said.
      residual: how each block adds its branches; ``None`` = plainly.
      drop_path_rule: whether every block has the ``drop_path`` of ``residual`` (``'uniform'``), or
        it grows from 0 in the first block to that in the last (``'linear'``, timm's).
      scan: whether the blocks are stacked and run by a loop: the same weights and numbers from a
        program that does not grow with depth. Not where the linear rule makes them unequal.
        Parameters have other names: see :func:`stacked` and :func:`unstacked`.
      remat: whether the backward pass keeps each block's input only, and computes the rest again.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys, stream ``params``, and ``dropout`` if anything is dropped.

    Raises:
      ValueError: if ``size`` is none, a probability is outside [0, 1], ``scan`` meets unequal
        blocks, or ``rngs`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> tiny = ViTSize(d=8, depth=1, nhead=2, patch_size=4, image_size=8)
      >>> ViT(tiny, num_classes=10, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
      (2, 10)

    Reference:
      A. Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv:2010.11929; H. Touvron et
      al., "Training Data-Efficient Image Transformers", 2020, arXiv:2012.12877 (its sizes tiny and
      small).
    """

    def __init__(
        self,
        size: ViTSize = VIT_TINY,
        num_classes: int = 1000,
        *,
        p_drop: float = 0.0,
        attn_drop: float = 0.0,
        norm: MakeNorm | None = None,
        act: Function | None = None,
        kernel_init: Initializer | None = None,
        residual: Residual | None = None,
        drop_path_rule: DropPathRule = "linear",
        scan: bool = False,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        rule = "size must be a ViTSize"
        check(isinstance(size, ViTSize), rule, fix="Pass e.g. ViTSize(depth=6).", size=size)
        check_positive(num_classes=num_classes)
        check_choices(norm, act, residual)
        wiring = residual or Residual()
        check_drop_path_rule(drop_path_rule, wiring, scan=scan)
        rngs, law = check_rngs(rngs), kernel_init or initializers.trunc_normal(std=0.02)
        make_norm = norm or partial(LayerNorm, eps=1e-6)
        self.size = size
        self.patch_embed = _PatchEmbed(size, dtype, param_dtype, rngs)
        token, positions = (1, 1, size.d), (1, size.tokens, size.d)
        self.cls_token = drawn(
            rngs, initializers.normal(std=1e-6), token, param_dtype, role="class_token"
        )
        self.pos_embed = drawn(rngs, law, positions, param_dtype, role="position_embedding")
        self.drop = Dropout(p_drop, dtype=dtype, rngs=rngs if p_drop else None)

        def block(place: int) -> TransformerBlock:
            return TransformerBlock(
                size.d, size.nhead, size.d_ff, p_drop, attn_drop=attn_drop, out_drop=p_drop,
                norm=make_norm, act=act, kernel_init=law,
                residual=residual_at(wiring, drop_path_rule, place, size.depth), dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.blocks = Chain(map(block, range(size.depth)), scan=scan, remat=remat)
        self.norm = make_norm(size.d, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.head = Linear(
            size.d, num_classes, kernel_init=law, bias_init=initializers.zeros, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, image_size, image_size, in_channels)`` to logits ``(N, num_classes)``."""
        side, channels = self.size.image_size, self.size.in_channels
        check(
            x.ndim == 4 and x.shape[1:] == (side, side, channels),
            "images must be (N, image_size, image_size, in_channels)",
            image_size=side,
            in_channels=channels,
            shape=x.shape,
        )
        patches = self.patch_embed(x)
        token = jnp.asarray(self.cls_token[...], patches.dtype)
        first = jnp.broadcast_to(token, (x.shape[0], *token.shape[1:]))
        tokens = jnp.concatenate([first, patches], 1)  # (N, 1 + h * w, d)
        x = self.drop(tokens + aligned(self.pos_embed[...], tokens, tokens.dtype))
        x = self.blocks(x)
        return self.head(self.norm(x)[:, 0])


_TIMM = (
    (".norm1.", ".ln1."),
    (".norm2.", ".ln2."),
    (".attn.qkv.", ".attn.in_proj_"),
    (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".ff.0."),
    (".mlp.fc2.", ".ff.3."),
    (".ls1.", ".add1."),
    (".ls2.", ".add2."),
)


def from_timm(name: str) -> str:
    """Returns the name here of a tensor of timm's ``VisionTransformer``.

    Args:
      name: a name of its state_dict.

    Example:
      >>> from_timm("blocks.3.attn.qkv.weight")
      'blocks.3.attn.in_proj_weight'
    """
    for theirs, ours in _TIMM:
        name = name.replace(theirs, ours)
    return name


vit_tiny_patch16_224 = partial(ViT, VIT_TINY)
"""Builds a :class:`ViT` of timm's sizes: 5,717,416 parameters with 1000 classes."""

vit_small_patch16_224 = partial(ViT, VIT_SMALL)
"""Builds a :class:`ViT` of timm's sizes: 22,050,664 parameters with 1000 classes."""


carry_as_they_are(ViT, "cls_token", "pos_embed")
