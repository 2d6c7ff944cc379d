"""The documents' small models: document 1, initialisation in practice; document 2, B-5, H, M."""

from torch import Tensor, nn

from torch_ref.initializers import (
    constant_,
    init_layer,
    kaiming_normal_,
    xavier_normal_,
    xavier_uniform_,
    zeros_,
)


class _NetLayers(nn.Module):
    """The layers that document 1's three networks share (one prints ``nnn.Sigmoid``, a typo)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(1, 2), nn.Sigmoid())
        self.fc = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 1)`` to ``(N, 1)``."""
        return self.fc(self.layer(x))


class NetInConstructor(_NetLayers):
    """Document 1's ``Net``, first form: each layer is initialised by name in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        for linear in (self.layer[0], self.fc):
            xavier_uniform_(linear.weight)
            constant_(linear.bias, 0.01)


def _xavier_and_small_bias(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        xavier_uniform_(module.weight)
        constant_(module.bias, 0.01)


class NetByApply(_NetLayers):
    """Document 1's ``Net``, second form: ``apply`` visits every submodule, children first."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(_xavier_and_small_bias)


class NetByModules(_NetLayers):
    """Document 1's ``Net``, third form: a walk over ``modules()``, parents first."""

    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            _xavier_and_small_bias(module)


def _activation(name: str) -> nn.Module:
    activations = {"relu": nn.ReLU, "gelu": nn.GELU, "elu": nn.ELU}
    if name not in activations:
        raise ValueError(f"act must be one of {', '.join(activations)}, got {name!r}; choose one.")
    return activations[name]()


class SmallCNN(nn.Module):
    """Two convolutions, global average, linear head for 10 classes (document 2, B-5).

    Args:
        act: 'relu', 'gelu' (exact) or 'elu'; also decides the initialisation.
    """

    def __init__(self, act: str = "relu") -> None:
        super().__init__()
        self.act = _activation(act)
        self.net = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1),
            self.act,
            nn.Conv2d(64, 64, 3, padding=1),
            self.act,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
        self.net.apply(lambda module: init_layer(module, nonlin=act))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` to logits ``(N, 10)``."""
        return self.net(x)


class ToyDeep(nn.Module):
    """Ten times Linear(512, 512) and ReLU, bias 0 (document 2, H-1).

    Args:
        init_name: 'xavier' or 'kaiming', both normal. The document leaves any other name at torch's
            default without a word; here it raises.
    """

    def __init__(self, init_name: str = "xavier") -> None:
        super().__init__()
        if init_name not in ("xavier", "kaiming"):
            raise ValueError(
                f"init_name must be 'xavier' or 'kaiming', got {init_name!r}; choose one."
            )
        layers = [layer for _ in range(10) for layer in (nn.Linear(512, 512), nn.ReLU())]
        self.net = nn.Sequential(*layers)
        for linear in self.net[::2]:
            if init_name == "xavier":
                xavier_normal_(linear.weight)
            else:
                kaiming_normal_(linear.weight, nonlinearity="relu")
            zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 512)`` to ``(N, 512)``."""
        return self.net(x)


def activation_stds(model: ToyDeep, x: Tensor) -> list[float]:
    """Standard deviation behind each of the ten ReLUs (document 2, H-1)."""
    stds = []
    for layer in model.net:
        x = layer(x).detach()
        if isinstance(layer, nn.ReLU):
            stds.append(x.std().item())
    return stds


class CNN_BN(nn.Module):  # noqa: N801, the document's name
    """Two times convolution without bias, batch norm, ReLU (document 2, H-2)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` to ``(N, 64, H, W)``."""
        return self.net(x)


class CNN_LN(nn.Module):  # noqa: N801, the document's name
    """Two times convolution, ``GroupNorm(1, 64)``, ReLU (document 2, H-2).

    The document comments the norm with "channels only"; it is over (C, H, W) of one sample.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.ln1 = nn.GroupNorm(1, 64)
        self.ln2 = nn.GroupNorm(1, 64)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` to ``(N, 64, H, W)``."""
        x = self.act(self.ln1(self.conv1(x)))
        return self.act(self.ln2(self.conv2(x)))


def _norm(name: str, channels: int, groups: int) -> nn.Module:
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name not in ("group", "layer"):
        raise ValueError(f"norm must be 'batch', 'group' or 'layer', got {name!r}; choose one.")
    return nn.GroupNorm(groups if name == "group" else 1, channels)


class StableBlock(nn.Module):
    """Convolution without bias, norm, activation, max-pool by 2, dropout (document 2, M)."""

    def __init__(self, channels: int, norm: nn.Module, act: str, width: int, drop: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = norm
        self.act = _activation(act)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, width, H // 2, W // 2)``."""
        return self.drop(self.pool(self.act(self.norm(self.conv(x)))))


class StableCNN(nn.Module):
    """The mini project's small CNN for CIFAR-10 (document 2, M; the layout is ours).

    The document compares batch norm + ReLU, group norm + GELU and "LN" + GELU, with He
    initialisation and dropout 0.1. "LN" is ``GroupNorm(1, C)``: over (C, H, W) of one sample.

    Args:
        norm: 'batch', 'group' or 'layer'.
        act: 'relu', 'gelu' (exact) or 'elu'.
        widths: Channels of the blocks; each halves the image.
        groups: Groups of 'group'; divides every width.
        drop: Probability of dropping an element behind each block.
        num_classes: Outputs.
        image_size: Height and width of the input.
    """

    def __init__(
        self,
        norm: str = "batch",
        act: str = "relu",
        *,
        widths: tuple[int, ...] = (32, 64, 128),
        groups: int = 16,
        drop: float = 0.1,
        num_classes: int = 10,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        size = image_size // 2 ** len(widths)
        if size < 1:
            raise ValueError(
                f"image_size must survive one halving per width, got image_size={image_size} and "
                f"{len(widths)} widths; use larger images or fewer widths."
            )
        self.blocks = nn.ModuleList(
            StableBlock(channels, _norm(norm, width, groups), act, width, drop)
            for channels, width in zip((3, *widths), widths, strict=False)
        )
        self.head = nn.Linear(widths[-1] * size**2, num_classes)
        self.apply(lambda module: init_layer(module, nonlin=act))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 3, image_size, image_size)`` to logits ``(N, num_classes)``."""
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1))  # (N, C, H, W) -> (N, C * H * W)
