"""ResNets with torchvision's structure, and their pre-activation form, in plain PyTorch."""

from torch import Tensor, nn

from torch_ref.blocks import BasicBlock, Bottleneck, PreActBottleneck, PreActResBlock

BLOCKS: dict[str, type[nn.Module]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
    "preact": PreActResBlock,
    "preact_bottleneck": PreActBottleneck,
}
LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
          152: (3, 8, 36, 3)}  # fmt: skip


def _keep(module: nn.Module) -> None:
    """Leave the blocks at PyTorch's own initialisation: the network draws again at its end."""


def _block(kind: str, in_ch: int, width: int, stride: int) -> nn.Module:
    if kind != "preact":
        return BLOCKS[kind](in_ch, width, stride, init=_keep)
    block = PreActResBlock(in_ch, width, 1, stride, projects="activated", init=_keep)
    block.norm1, block.norm2 = nn.BatchNorm2d(in_ch), nn.BatchNorm2d(width)
    return block


class ResNet(nn.Module):
    """A stem, stages of residual blocks, global average pooling, a linear head.

    Parameters have the names and shapes of torchvision's ``ResNet``, and its initialisation:
    convolutions He normal by the fan out, the head as ``nn.Linear``. Pre-activation networks have a
    bare convolution as their stem, and a norm and a ReLU before the pooling. He et al.: Deep
    residual learning, 2015, arXiv 1512.03385; Identity mappings, 2016, arXiv 1603.05027.

    Args:
        kind: 'basic', 'bottleneck', 'preact' or 'preact_bottleneck'.
        layers: Blocks of each stage.
        num_classes: Outputs.
        stem: 'imagenet' (7x7, stride 2, then max pooling) or 'cifar' (3x3).
        width: Channels of the stem.
    """

    def __init__(
        self,
        kind: str,
        layers: tuple[int, ...],
        num_classes: int = 1000,
        stem: str = "imagenet",
        width: int = 64,
    ) -> None:
        super().__init__()
        if kind not in BLOCKS or stem not in ("imagenet", "cifar"):
            raise ValueError(
                f"kind must be one of {', '.join(BLOCKS)} and stem 'imagenet' or 'cifar', "
                f"got kind={kind!r} and stem={stem!r}; choose others."
            )
        preact, large = kind.startswith("preact"), stem == "imagenet"
        window, stride = (7, 2) if large else (3, 1)
        self.conv1 = nn.Conv2d(3, width, window, stride, padding=window // 2, bias=False)
        self.bn1 = nn.Identity() if preact else nn.BatchNorm2d(width)
        self.relu = nn.Identity() if preact else nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        channels, expansion, self.stages = width, 4 if "bottleneck" in kind else 1, len(layers)
        for stage, count in enumerate(layers):
            blocks = []
            for number in range(count):
                step = 2 if stage > 0 and number == 0 else 1
                blocks.append(_block(kind, channels, width * 2**stage, step))
                channels = expansion * width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(channels) if preact else nn.Identity()
        self.act = nn.ReLU() if preact else nn.Identity()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(self.act(self.norm(x)).mean((2, 3)))
