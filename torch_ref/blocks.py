"""Residual blocks: document 2, B-6, C-5, C-6 and I, and their bottlenecks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_ref.dropout import feed_forward
from torch_ref.initializers import init_layer

Rule = Callable[[nn.Module], object]


def scaled_residual(x: Tensor, branch: Tensor, scale: float = 0.1) -> Tensor:
    """Residual scaling, x + scale * branch: a branch that starts small (document 2, B-6)."""
    return x + scale * branch


class Add(nn.Module):
    """How a block adds its branch: x + scale * gamma * branch, gamma per channel (LayerScale).

    Touvron et al.: Going deeper with image transformers, 2021, arXiv 2103.17239.

    Args:
        scale: Constant factor.
        gamma: Initial value of the learned factor; None = none.
        channels: Size of axis 1, for ``gamma``.
    """

    def __init__(
        self, scale: float = 1.0, gamma: float | None = None, channels: int | None = None
    ) -> None:
        super().__init__()
        self.scale = scale
        self.gamma = None if gamma is None else nn.Parameter(torch.full((channels or 0,), gamma))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Add ``branch`` to ``x``, both ``(N, C, *space)``."""
        if self.gamma is not None:
            branch = branch * self.gamma.reshape(-1, *[1] * (branch.ndim - 2))
        return scaled_residual(x, branch, self.scale)


def _projection(in_ch: int, out_ch: int, stride: int) -> nn.Module:
    """The skip: a 1x1 convolution where the shape changes, else the identity."""
    if stride == 1 and in_ch == out_ch:
        return nn.Identity()
    return nn.Conv2d(in_ch, out_ch, 1, stride, bias=False)


def _normed_projection(in_ch: int, out_ch: int, stride: int) -> nn.Module:
    """The skip of post-activation blocks: a 1x1 convolution and a norm, or the identity."""
    skip = _projection(in_ch, out_ch, stride)
    if isinstance(skip, nn.Identity):
        return skip
    return nn.Sequential(skip, nn.BatchNorm2d(out_ch))


def _check_projects(projects: str) -> None:
    if projects not in ("raw", "activated"):
        raise ValueError(
            f"projects must be 'raw' or 'activated', got projects={projects!r}; choose one."
        )


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
        projects: What the projection sees, 'raw' or 'activated'.
        init: Applied to every module at the end.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        groups: int = 32,
        stride: int = 1,
        drop: float = 0.0,
        *,
        projects: str = "raw",
        init: Rule = init_layer,
    ) -> None:
        super().__init__()
        _check_projects(projects)
        self.norm1 = nn.GroupNorm(groups, in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1, bias=False)
        self.act = nn.ReLU()
        self.projects = projects
        self.drop = nn.Dropout2d(drop)
        self.skip = _projection(in_ch, out_ch, stride)
        self.add = Add()
        self.apply(init)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_ch, H, W)`` to ``(N, out_ch, H / stride, W / stride)``, rounded up."""
        activated = self.act(self.norm1(x))
        h = self.conv1(activated)
        h = self.conv2(self.act(self.norm2(h)))
        changed = isinstance(self.skip, nn.Conv2d)
        seen = activated if changed and self.projects == "activated" else x
        return self.add(self.skip(seen), self.drop(h))


class PreActBottleneck(nn.Module):
    """Pre-activation bottleneck with batch normalisation: norm, ReLU, convolution, three times.

    He et al.: Identity mappings in deep residual networks, 2016, arXiv 1603.05027.

    Args:
        in_ch: Channels of the input.
        width: Channels of the middle; the output has four times as many.
        stride: Stride of the 3x3 convolution and of the skip.
        drop: Probability of dropping a channel of the branch.
        projects: What the projection of the skip sees, 'raw' or 'activated'.
        init: Applied to every module at the end.
    """

    def __init__(
        self,
        in_ch: int,
        width: int,
        stride: int = 1,
        drop: float = 0.0,
        *,
        projects: str = "activated",
        init: Rule = init_layer,
    ) -> None:
        super().__init__()
        _check_projects(projects)
        self.norm1 = nn.BatchNorm2d(in_ch)
        self.conv1 = nn.Conv2d(in_ch, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.act = nn.ReLU()
        self.projects = projects
        self.drop = nn.Dropout2d(drop)
        self.skip = _projection(in_ch, 4 * width, stride)
        self.add = Add()
        self.apply(init)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_ch, H, W)`` to ``(N, 4 * width, H / stride, W / stride)``, rounded up."""
        activated = self.act(self.norm1(x))
        h = self.conv1(activated)
        h = self.conv2(self.act(self.norm2(h)))
        h = self.conv3(self.act(self.norm3(h)))
        changed = isinstance(self.skip, nn.Conv2d)
        seen = activated if changed and self.projects == "activated" else x
        return self.add(self.skip(seen), self.drop(h))


class BasicBlock(nn.Module):
    """Post-activation residual block with batch normalisation (document 2, C-5, C-6 and G-1).

    Convolution without bias, BN, ReLU, convolution without bias, BN, add, ReLU. Names of the
    parameters are those of torchvision's ``BasicBlock``; the initialisation is the document's (He,
    fan_in). ``bn2`` is the last norm of the branch, whose gamma may start at zero.

    Args:
        in_ch: Channels of the input.
        out_ch: Channels of the output.
        stride: Stride of the first convolution and of the skip.
        init: Applied to every module at the end.
    """

    def __init__(
        self, in_ch: int, out_ch: int, stride: int = 1, *, init: Rule = init_layer
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_ch)
        self.relu = nn.ReLU()
        self.downsample = _normed_projection(in_ch, out_ch, stride)
        self.add = Add()
        self.apply(init)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_ch, H, W)`` to ``(N, out_ch, H / stride, W / stride)``, rounded up."""
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return self.relu(self.add(self.downsample(x), h))


class Bottleneck(nn.Module):
    """Post-activation bottleneck: 1x1, 3x3 and 1x1 convolution, each with BN; add; ReLU.

    The names and, with the stride in the 3x3 convolution, the structure of torchvision's
    ``Bottleneck``; the initialisation is the documents'. ``bn3`` is the last norm of the branch.
    He et al.: Deep residual learning, 2015, arXiv 1512.03385.

    Args:
        in_ch: Channels of the input.
        width: Channels of the middle; the output has four times as many.
        stride: Stride of the 3x3 convolution and of the skip.
        init: Applied to every module at the end.
    """

    def __init__(self, in_ch: int, width: int, stride: int = 1, *, init: Rule = init_layer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample = _normed_projection(in_ch, 4 * width, stride)
        self.add = Add()
        self.apply(init)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_ch, H, W)`` to ``(N, 4 * width, H / stride, W / stride)``, rounded up."""
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return self.relu(self.add(self.downsample(x), h))


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
