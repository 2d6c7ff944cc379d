"""``torch_ref.resnet`` against torchvision's parameter counts and names, and its formula."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from parity_tests.support.torch_checks import assert_close, draw
from torch_ref.resnet import BLOCKS, LAYERS, ResNet

COUNTS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


@pytest.mark.parametrize("depth", COUNTS)
def test_parameters_are_as_many_as_torchvisions(depth: int) -> None:
    with torch.device("meta"):
        model = ResNet("basic" if depth < 50 else "bottleneck", LAYERS[depth])
    assert sum(p.numel() for p in model.parameters()) == COUNTS[depth]


def test_names_are_torchvisions() -> None:
    with torch.device("meta"):
        names = [*ResNet("bottleneck", LAYERS[50]).state_dict()]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    bn1 = [f"bn1.{n}" for n in norm]
    block = [name for i in (1, 2, 3) for name in (f"conv{i}.weight", *(f"bn{i}.{n}" for n in norm))]
    skip = ["downsample.0.weight", *(f"downsample.1.{n}" for n in norm)]
    assert names[:6] == ["conv1.weight", *bn1]
    assert names[6 : 6 + 24] == [f"layer1.0.{name}" for name in (*block, *skip)]
    assert names[30 : 30 + 18] == [f"layer1.1.{name}" for name in block]
    assert names[-2:] == ["fc.weight", "fc.bias"]
    assert {name.split(".")[0] for name in names} == {
        "conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"
    }  # fmt: skip


def _forward(model: ResNet, x: Tensor, *, large: bool, preact: bool) -> Tensor:
    x = F.conv2d(x, model.conv1.weight, stride=2 if large else 1, padding=3 if large else 1)
    x = x if preact else model.bn1(x).relu()
    x = F.max_pool2d(x, 3, 2, 1) if large else x
    for block in (*model.layer1, *model.layer2):
        x = block(x)
    x = model.norm(x).relu() if preact else x
    return F.linear(x.flatten(2).mean(2), model.fc.weight, model.fc.bias)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_network_is_its_formula(kind: str, stem: str) -> None:
    torch.manual_seed(0)
    model = ResNet(kind, (2, 1), 5, stem, width=4).double()
    x = draw(2, 3, 17, 15, seed=1)
    preact = kind.startswith("preact")
    found = model.train()(x)
    expected = _forward(model, x, large=stem == "imagenet", preact=preact)
    assert found.shape == (2, 5)
    assert_close(found.detach(), expected.detach(), expected.detach().abs().max())
    assert {type(block).__name__ for block in model.layer1} == {BLOCKS[kind].__name__}
    assert model.layer2[0].conv2.stride == ((2, 2) if "bottleneck" in kind else (1, 1))


def test_pre_activation_networks_have_batch_norms_and_project_what_is_activated() -> None:
    model = ResNet("preact", (1, 1), width=4)
    assert not [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert all(b.projects == "activated" for b in (*model.layer1, *model.layer2))
    assert isinstance(model.layer2[0].skip, nn.Conv2d)


def test_convolutions_start_by_the_fan_out_and_the_head_by_torchs_law() -> None:
    torch.manual_seed(0)
    model = ResNet("basic", (1, 1), 10, width=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight.shape[0] * math.prod(module.weight.shape[2:])
            law, count = math.sqrt(2 / fan_out), module.weight.numel()
            # but once in 5e8 samples
            assert abs(module.weight.std() - law) <= 6 * law / math.sqrt(2 * count)
    bound = 1 / math.sqrt(model.fc.in_features)
    assert 0.9 * bound < model.fc.weight.abs().max() <= bound


def test_weights_of_a_seed_are_torchvisions() -> None:
    """Which builds a block's projection before the block: default draws are as many either way."""
    torch.manual_seed(0)
    model = ResNet("basic", (1, 1), 5, width=4)
    torch.manual_seed(0)
    conv = [nn.Conv2d(*sizes, bias=False) for sizes in ((3, 4, 7), (4, 4, 3), (4, 4, 3))]
    downsample = nn.Conv2d(4, 8, 1, bias=False)
    conv += [nn.Conv2d(*sizes, bias=False) for sizes in ((4, 8, 3), (8, 8, 3))]
    head = nn.Linear(8, 5)
    for layer in (*conv, downsample):  # in the order of modules()
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    expected = [layer.weight for layer in (*conv, downsample, head)]
    found = [p for p in model.parameters() if p.ndim > 1]
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected)


def test_unknown_kinds_and_stems_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of basic, .* got kind='wide'"):
        ResNet("wide", (1,))
    with pytest.raises(ValueError, match="got kind='basic' and stem='mnist'; choose others"):
        ResNet("basic", (1,), stem="mnist")
