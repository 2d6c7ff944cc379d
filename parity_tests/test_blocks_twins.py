"""Every convolutional block beside its twin: training, gradients, statistics, evaluation."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import pytest
import torch
from flax import nnx

from flaxstab import blocks, functional, initializers, norms
from parity_tests.support.block_twins import (
    Outcome,
    Pair,
    assert_outcome,
    built,
    drawn,
    our_outcomes,
    torch_outcome,
)
from torch_ref import blocks as theirs

T = torch.nn
Block = Callable[..., nnx.Module]
ZEROS = {"kernel_init": initializers.zeros}  # the weights come from the twin


def changed(twin: Callable[[], T.Module], **parts: T.Module) -> Callable[[], T.Module]:
    """Returns a maker of the twin with other parts in places of it."""

    def make() -> T.Module:
        module = twin()
        for name, part in parts.items():
            setattr(module, name, part)
        return module

    return make


def pair(name: str, *sizes: int, other: Block | None = None, **options: object) -> Pair:
    """Returns a block and the twin of the same name, built from the same arguments."""
    twin = partial(getattr(theirs, name), *sizes, **options)
    return Pair(partial(getattr(blocks, name), *sizes, **options, **ZEROS), other or twin)


def own(base: Pair, *, twin: dict[str, T.Module], **options: object) -> Pair:
    """Returns a pair with other norms, activation or wiring on both sides."""
    return Pair(partial(base.ours, **options), changed(base.theirs, **twin))


def conv(window: tuple[int, ...], stride: int, shape: tuple[int, ...], norm: T.Module) -> Pair:
    """Returns a ConvNormAct and a Sequential of the same parts under the same names."""
    layer = {1: T.Conv1d, 2: T.Conv2d, 3: T.Conv3d}[len(window)]
    padding = tuple(size // 2 for size in window)

    def twin() -> T.Module:
        parts = {"conv": layer(4, 6, window, stride, padding, bias=False), "norm": norm}
        return T.Sequential(OrderedDict(parts, act=T.ReLU()))

    return Pair(partial(blocks.ConvNormAct, 4, 6, window, stride, **ZEROS), twin, shape)


def scaled(channels: int) -> dict[str, object]:
    """Returns the options of residual scaling and LayerScale on both sides."""
    wiring = blocks.Residual(scale=0.1, layer_scale=0.5)
    return {"residual": wiring, "twin": {"add": theirs.Add(0.1, 0.5, channels)}}


TWO, ONE = partial(norms.GroupNorm, 2), partial(norms.GroupNorm, 1)
PAIRS = {
    "basic same": pair("BasicBlock", 4, 4),
    "basic wider": pair("BasicBlock", 4, 6),
    "basic smaller": pair("BasicBlock", 4, 4, 2),
    "basic both": pair("BasicBlock", 4, 6, 2),
    "basic scaled": own(pair("BasicBlock", 4, 4), **scaled(4)),
    "basic group norm and GELU": own(
        pair("BasicBlock", 4, 4), norm=TWO, act=functional.gelu,
        twin={"bn1": T.GroupNorm(2, 4), "bn2": T.GroupNorm(2, 4), "relu": T.GELU()},
    ),
    "bottleneck same": pair("Bottleneck", 4, 1),
    "bottleneck wider": pair("Bottleneck", 4, 2),
    "bottleneck both": pair("Bottleneck", 4, 2, 2),
    "bottleneck scaled": own(pair("Bottleneck", 4, 2), **scaled(8)),
    "pre-act same": pair("PreActResBlock", 4, 4, 2),
    "pre-act wider": pair("PreActResBlock", 4, 6, 2),
    "pre-act smaller": pair("PreActResBlock", 4, 4, 2, 2),
    "pre-act both": pair("PreActResBlock", 4, 6, 2, 2),
    "pre-act activated": pair("PreActResBlock", 4, 6, 2, 2, projects="activated"),
    "pre-act activated same": pair("PreActResBlock", 4, 4, 2, projects="activated"),
    "pre-act scaled": own(pair("PreActResBlock", 4, 6, 2), **scaled(6)),
    "pre-act batch norm and GELU": own(
        pair("PreActResBlock", 4, 4, 2), norm=norms.BatchNorm, act=functional.gelu,
        twin={"norm1": T.BatchNorm2d(4), "norm2": T.BatchNorm2d(4), "act": T.GELU()},
    ),
    "pre-act one group": own(
        pair("PreActResBlock", 4, 4, 2), norm=ONE,
        twin={"norm1": T.GroupNorm(1, 4), "norm2": T.GroupNorm(1, 4)},
    ),
    "pre-act bottleneck dropping": pair("PreActBottleneck", 4, 2, 2, 0.3),
    "pre-act bottleneck same": pair("PreActBottleneck", 4, 1),
    "pre-act bottleneck both": pair("PreActBottleneck", 4, 2, 2),
    "pre-act bottleneck raw": pair("PreActBottleneck", 4, 2, 2, projects="raw"),
    "conv over one axis": conv((5,), 2, (3, 7, 4), T.BatchNorm1d(6)),
    "conv over two axes": conv((3, 1), 1, (3, 5, 4, 4), T.BatchNorm2d(6)),
    "conv over three axes": conv((3, 1, 3), 2, (3, 3, 4, 2, 4), T.BatchNorm3d(6)),
}  # fmt: skip


@pytest.fixture(scope="module")
def twins() -> dict[str, T.Module]:
    return {name: drawn(pair) for name, pair in PAIRS.items()}


@pytest.fixture(scope="module")
def ours(twins: dict[str, T.Module]) -> dict[str, nnx.Module]:
    return built(PAIRS, twins)


@pytest.fixture(scope="module")
def outcomes(ours: dict[str, nnx.Module]) -> dict[str, Outcome]:
    return our_outcomes(PAIRS, ours)


@pytest.fixture
def assert_twin(
    outcomes: dict[str, Outcome], ours: dict[str, nnx.Module], twins: dict[str, T.Module]
) -> Callable[..., None]:
    """Compares a block with its twin, or with one that has been changed."""

    def compare(name: str, change: Callable[[T.Module], object] = lambda _: None) -> None:
        twin = copy.deepcopy(twins[name])
        change(twin)
        assert_outcome(outcomes[name], torch_outcome(PAIRS[name], twin, ours[name]))

    return compare


@pytest.mark.parametrize("name", PAIRS)
def test_a_block_is_its_twin(name: str, assert_twin: Callable[..., None]) -> None:
    assert_twin(name)


FAULTS: dict[str, tuple[str, Callable[[T.Module], object]]] = {
    "projects": ("pre-act both", lambda twin: setattr(twin, "projects", "activated")),
    "projects not": ("pre-act activated", lambda twin: setattr(twin, "projects", "raw")),
    "momentum": ("basic same", lambda twin: setattr(twin.bn1, "momentum", 0.1 * (1 + 1e-11))),
    "eps": ("bottleneck same", lambda twin: setattr(twin.bn2, "eps", 1.001e-5)),
    "scale": ("basic scaled", lambda twin: setattr(twin.add, "scale", 0.1 * (1 + 1e-11))),
    "gamma": ("pre-act scaled", lambda twin: T.init.ones_(twin.add.gamma)),
    "approximate GELU": (
        "pre-act batch norm and GELU",
        lambda twin: setattr(twin, "act", T.GELU(approximate="tanh")),
    ),
    "activation": ("bottleneck both", lambda twin: setattr(twin, "relu", T.LeakyReLU(1e-11))),
    "order": ("conv over one axis", lambda twin: twin.append(twin.pop(1))),
}


@pytest.mark.parametrize(("name", "change"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(
    name: str, change: Callable[[T.Module], object], assert_twin: Callable[..., None]
) -> None:
    with pytest.raises(AssertionError, match="is above the bound"):
        assert_twin(name, change)
