"""A vision Transformer and a language model of document 2's Transformer blocks (I-2)."""

import torch
from torch import Tensor, nn

from torch_ref.blocks import TransformerBlock


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.MultiheadAttention):
        nn.init.trunc_normal_(module.in_proj_weight, std=0.02)


def _blocks(d: int, depth: int, nhead: int, p_drop: float) -> nn.ModuleList:
    return nn.ModuleList(
        [TransformerBlock(d, nhead, p_drop=p_drop, out_drop=p_drop) for _ in range(depth)]
    )


class _PatchEmbed(nn.Module):
    """Cuts images into patches and maps each to a token."""

    def __init__(self, patch_size: int, d: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, d, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` to ``(N, H * W / patch_size**2, d)``."""
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Vision Transformer: patches, class token, learned positions, Pre-LN blocks, linear head.

    The structure and the laws are timm's ``VisionTransformer`` (truncated normal, std 0.02, for
    every linear layer and the positions, 1e-6 for the class token; LayerNorm's eps 1e-6); the
    blocks and their names are document 2's. A. Dosovitskiy et al.: An Image is Worth 16x16 Words,
    2020, arXiv 2010.11929.

    Args:
        image_size: Height and width of the input.
        patch_size: Height and width of a patch.
        d: Features of a token.
        depth: Number of blocks.
        nhead: Heads.
        num_classes: Size of the output.
        p_drop: Dropout of the embeddings and of the blocks.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        d: int = 192,
        depth: int = 12,
        nhead: int = 3,
        num_classes: int = 1000,
        p_drop: float = 0.0,
    ) -> None:
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + 1
        self.patch_embed = _PatchEmbed(patch_size, d)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, d))
        self.drop = nn.Dropout(p_drop)
        self.blocks = _blocks(d, depth, nhead, p_drop)
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.head = nn.Linear(d, num_classes)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        self.apply(_init_linear)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 3, image_size, image_size)`` to logits ``(N, num_classes)``."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = self.drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class TransformerLM(nn.Module):
    """Causal language model: tokens and positions, Pre-LN blocks, norm, the embedding as the head.

    Args:
        vocab_size: Number of tokens.
        d: Features of a token.
        depth: Number of blocks.
        nhead: Heads.
        max_len: Longest sequence.
        p_drop: Dropout of the embeddings and of the blocks.
    """

    def __init__(
        self,
        vocab_size: int,
        d: int = 128,
        depth: int = 4,
        nhead: int = 4,
        max_len: int = 256,
        p_drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d)
        self.position = nn.Parameter(torch.zeros(max_len, d))
        self.drop = nn.Dropout(p_drop)
        self.blocks = _blocks(d, depth, nhead, p_drop)
        self.norm = nn.LayerNorm(d)
        self.apply(_init_linear)
        nn.init.trunc_normal_(self.embed.weight, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, L)`` integers to logits ``(N, L, vocab_size)`` of the next token each."""
        length = tokens.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.drop(self.embed(tokens) + self.position[:length])
        for block in self.blocks:
            x = block(x, attn_mask=later)
        return self.norm(x) @ self.embed.weight.T
