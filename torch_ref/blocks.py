"""Residual blocks: document 2, B-6, C-5, C-6 and I."""

from torch import Tensor, nn

from torch_ref.dropout import feed_forward
from torch_ref.initializers import init_layer


def scaled_residual(x: Tensor, branch: Tensor, scale: float = 0.1) -> Tensor:
    """Residual scaling, x + scale * branch: a branch that starts small (document 2, B-6)."""
    return x + scale * branch


class PreActResBlock(nn.Module):
    """Pre-activation residual block with group normalisation (document 2, I-1).

    Norm, ReLU, convolution, twice, then channel dropout; the convolutions have no bias. As
    printed, the projection on the skip sees the raw x; He et al. (2016, arXiv 1603.05027) and timm
    project the activated input.

    Args:
        in_ch: Channels of the input; ``groups`` divides them.
        out_ch: Channels of the output; ``groups`` divides them.
        groups: Groups of both norms.
        stride: Stride of the first convolution and of the skip.
        drop: Probability of dropping a channel of the branch.
    """

    def __init__(
        self, in_ch: int, out_ch: int, groups: int = 32, stride: int = 1, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1, bias=False)
        self.act = nn.ReLU()
        self.drop = nn.Dropout2d(drop)
        self.skip = nn.Identity()
        if stride != 1 or in_ch != out_ch:
            self.skip = nn.Conv2d(in_ch, out_ch, 1, stride, bias=False)
        self.apply(init_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_ch, H, W)`` to ``(N, out_ch, H / stride, W / stride)``, rounded up."""
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(self.norm2(h)))
        return self.drop(h) + self.skip(x)


class BasicBlock(nn.Module):
    """Post-activation residual block with batch normalisation (document 2, C-5, C-6 and G-1).

    Convolution without bias, BN, ReLU, convolution without bias, BN, add, ReLU. Names of the
    parameters are those of torchvision's ``BasicBlock``; the initialisation is the document's (He,
    fan_in). ``bn2`` is the last norm of the branch, whose gamma may start at zero.

    Args:
        in_ch: Channels of the input.
        out_ch: Channels of the output.
        stride: Stride of the first convolution and of the skip.
    """

    def __init__(self, in_ch: int, out_ch: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_ch)
        self.relu = nn.ReLU()
        self.downsample = nn.Identity()
        if stride != 1 or in_ch != out_ch:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_ch, out_ch, 1, stride, bias=False), nn.BatchNorm2d(out_ch)
            )
        self.apply(init_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_ch, H, W)`` to ``(N, out_ch, H / stride, W / stride)``, rounded up."""
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return self.relu(h + self.downsample(x))


class TransformerBlock(nn.Module):
    """Pre-LN Transformer block: norm, attention, add; norm, feed-forward, add (document 2, I-2).

    ``apply(init_layer)``, as printed, re-initialises ``attn.out_proj`` and the feed-forward part
    only: ``attn.in_proj_weight`` is a bare parameter and keeps torch's Xavier uniform.

    Args:
        d: Features of a token; ``nhead`` divides them.
        nhead: Heads.
        d_ff: Width of the feed-forward part in units of ``d``.
        p_drop: Dropout of the attention weights and of both feed-forward layers.
        out_drop: Dropout behind the attention, where the document has none and GPT-2 has one.
    """

    def __init__(
        self, d: int, nhead: int = 8, d_ff: int = 4, p_drop: float = 0.1, out_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, nhead, dropout=p_drop, batch_first=True)
        self.drop = nn.Dropout(out_drop)
        self.ln2 = nn.LayerNorm(d)
        self.ff = feed_forward(d, d * d_ff, p_drop)
        self.apply(lambda module: init_layer(module, nonlin="gelu"))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Run the block.

        Args:
            x: ``(N, L, d)``.
            attn_mask: ``(L, L)`` or ``(N * nhead, L, L)``; boolean True = ignore, float = added.
            key_padding_mask: ``(N, L)``; boolean True = ignore, float = added.

        Returns:
            ``(N, L, d)``.
        """
        h = self.ln1(x)
        attended, _ = self.attn(
            h, h, h, key_padding_mask=key_padding_mask, need_weights=False, attn_mask=attn_mask
        )
        x = x + self.drop(attended)
        return x + self.ff(self.ln2(x))
