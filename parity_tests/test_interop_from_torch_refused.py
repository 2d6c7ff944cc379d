"""from_torch: replaced, overridden and hooked parts are refused; a taught twin is settled."""

import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from flaxstab import interop, models, norms
from torch_ref.resnet import ResNet

assert models


class OddConv(nn.Conv2d):
    def _conv_forward(self, *args: object) -> torch.Tensor:
        return -super()._conv_forward(*args)


class Called(nn.Linear):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return -super().__call__(x)


class Backwards(nn.Sequential):
    def __iter__(self):  # noqa: ANN204
        return reversed(list(super().__iter__()))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (OddConv(1, 1, 1), "OddConv: it overrides '_conv_forward' of Conv2d"),
        (Called(1, 1), "Called: it overrides '__call__' of Linear"),
        (Backwards(nn.ReLU()), "Backwards: it overrides '__iter__' of Sequential"),
    ],
)
def test_a_type_that_overrides_what_forward_calls_is_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        interop.from_torch(module)


def test_slopes_by_channel_and_softmax2d_are_refused() -> None:
    with pytest.raises(ValueError, match="PReLU has one slope"):
        interop.from_torch(nn.PReLU(2))
    with pytest.raises(ValueError, match="cannot make a twin of Softmax2d"):
        interop.from_torch(nn.Softmax2d())


@pytest.mark.parametrize(
    "layer", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.ZeroPad2d(1)]
)
def test_pools_and_paddings_keep_their_rank(layer: nn.Module) -> None:
    twin = interop.from_torch(layer, layout="image")
    with pytest.raises(ValueError, match=r"2d takes 4 axes, got shape=\(8, 8, 8\)"):
        twin(jnp.ones((8, 8, 8)))
    assert twin(jnp.ones((1, 8, 8, 3))).ndim == 4


def test_replaced_parts_of_a_resnet_are_refused() -> None:
    for owner in (lambda net: net, lambda net: net.layer1[0]):
        net = ResNet("basic", (1,), 5, "cifar", 4)
        names = [n for n, _ in owner(net).named_children() if n.startswith("relu")]
        assert names
        setattr(owner(net), names[0], nn.Identity())
        with pytest.raises(ValueError, match="relu must be a ReLU"):
            interop.from_torch(net)
    net = ResNet("basic", (1,), 5, "cifar", 4)
    net.fc = nn.Identity()
    with pytest.raises(ValueError, match="fc must be a Linear, got fc='Identity'"):
        interop.from_torch(net)
    net = ResNet("basic", (1,), 5, "cifar", 4)
    net.layer1[0].conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'layer1.0.conv1' Conv2d: it has a hook"):
        interop.from_torch(net)


class Wrapped(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm


class Ours(nnx.Module):
    def __init__(self, norm: nnx.Module) -> None:
        self.norm = norm


def test_a_taught_twin_gets_settings_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop._torch_twin, "_TAUGHT", {})
    made = {"BatchNorm1d": norms.BatchNorm(4), "RMSNorm": norms.RMSNorm(4, 1e-2)}
    interop.register_twin(Wrapped, lambda m, _: Ours(made[type(m.norm).__name__]))
    assert interop.from_torch(Wrapped(nn.BatchNorm1d(4, momentum=None))).norm.momentum is None
    assert interop.from_torch(Wrapped(nn.RMSNorm(4))).norm.eps == norms.RMSNorm(4, None).eps
    made["RMSNorm"] = nnx.RMSNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'norm' RMSNorm: its settings fit RMSNorm, got flax"):
        interop.from_torch(Wrapped(nn.RMSNorm(4)))
