"""Teaches ``interop.from_torch`` the ResNets of torchvision and of ``torch_ref``."""

from typing import TYPE_CHECKING

from flax import nnx

from flaxstab import initializers, interop
from flaxstab._checks import check
from flaxstab.models._resnet import BlockName, ResNet, ResNetSize, Stem

if TYPE_CHECKING:
    from flaxstab._typing import PyTree

_TYPES = ("torchvision.models.resnet.ResNet", "torch_ref.resnet.ResNet")
_BLOCKS: dict[str, BlockName] = {"BasicBlock": "basic", "Bottleneck": "bottleneck"}
_IDLE = ("maxpool", "norm", "act")  # the last two are of torch_ref's pre-activation networks
_PARTS = {"Conv2d", "BatchNorm2d", "ReLU", "Sequential", "Linear", "MaxPool2d", "Identity",
          "AdaptiveAvgPool2d", "ResNet", "Add"}  # fmt: skip


def _resnet(module: "PyTree", convert: interop.Converter) -> nnx.Module:
    """Builds a ResNet of the same size; ``from_torch`` gives its layers their settings."""
    stages, number = [], 1
    while (stage := dict(module.named_children()).get(f"layer{number}")) is not None:
        stages.append(list(stage))
        number += 1
    kinds = {type(part).__name__ for part in module.modules()}
    blocks = kinds & _BLOCKS.keys()
    odd = sorted(kinds - _PARTS - _BLOCKS.keys())
    fix = "Build it of flaxstab's blocks, and teach it by register_twin."
    check(len(blocks) == 1 and not odd, "a ResNet's twin has plain blocks", fix=fix, parts=odd)
    _check_parts(module)
    stem = _stem(module)
    size = ResNetSize(
        block=_BLOCKS[blocks.pop()],
        layers=tuple(len(stage) for stage in stages),
        width=module.conv1.out_channels,
    )
    return ResNet(
        size, module.fc.out_features, stem=stem, in_channels=module.conv1.in_channels,
        kernel_init=initializers.zeros, param_dtype=convert.param_dtype(module), rngs=nnx.Rngs(0),
    )  # fmt: skip


def _check_parts(module: "PyTree") -> None:
    """Refuses a head without weights, and parts that were replaced."""
    head = type(module.fc).__name__
    fix = "Convert it with a Linear, and replace the twin's fc."
    check(head == "Linear", "a ResNet's fc must be a Linear", fix=fix, fc=head)
    for name, part in module.named_modules():
        kind, last = type(part).__name__, name.rpartition(".")[2]
        known = kind == "ReLU" if last.startswith("relu") else kind != "Identity"
        fix = "Put it back, or teach your network by register_twin."
        rule = "a ResNet's relu must be a ReLU, and only its maxpool an Identity"
        check(known or name in _IDLE or last == "downsample", rule, fix=fix, part=name, type=kind)


def _stem(module: "PyTree") -> Stem:
    pool = module.maxpool
    if type(pool).__name__ == "Identity":
        return "cifar"
    options = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    plain = options == (3, 2, 1, 1, False)
    check(plain, "a ResNet's stem pools 3x3 by 2, padding 1, or not at all", pool=repr(pool))
    return "imagenet"


for _name in _TYPES:
    interop.register_twin(_name, _resnet)
