"""Initializers: the defaults of PyTorch's own layers, read off the layers themselves."""

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
import pytest
import torch
from torch import nn

from flaxstab import initializers
from flaxstab._typing import Initializer
from flaxstab.parity import Budget, Evidence, IsNormal
from parity_tests.support import random_checks

Shape = tuple[int, ...]
KEY = jax.random.key(0, impl="rbg")  # compiles in a quarter of the time of the default
WEIGHT, ATTENTION = initializers.torch_weight(), initializers.torch_attention()
EXCHANGED = initializers.torch_weight(in_axis=-1, out_axis=-2)  # of transposed convolutions
RECURRENT = initializers.torch_recurrent(96)


def bound_of(init: Initializer, shape: Shape) -> float:
    """Returns the b of draws from U(-b, b): their ratio to draws from U(-1, 1) of the same key."""
    unit = np.asarray(initializers.uniform(-1.0, 1.0)(KEY, shape), np.float64)
    largest = np.abs(unit).argmax()
    return float(np.asarray(init(KEY, shape), np.float64).flat[largest] / unit.flat[largest])


def has_bound(values: np.ndarray, bound: float, budget: Budget) -> Evidence:
    """Whether draws are from U(-bound, bound), up to a part of the bound that n determines.

    The largest of n is below ``1 - part`` of the bound with the probability ``(1 - part)**n``. A
    law whose bound is smaller by more than that part never gets there; one whose bound is larger by
    that part stays inside with the same probability.
    """
    n, alpha = values.size, budget.spend()
    part = -math.log(alpha) / n
    slack = 4 * np.finfo(np.float32).eps
    found = float(np.abs(values).max() / bound)
    return Evidence("largest", found, (1 - part, 1 + slack), n, part, alpha, alpha)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_bound_that_is_off_is_seen(factor: float, budget: Budget) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 20_000)
    assert has_bound(values, 1.0, budget).passed
    assert not has_bound(factor * values, 1.0, budget).passed


def linear() -> dict[str, tuple[torch.Tensor, Initializer, Shape]]:
    layer = nn.Linear(300, 200)
    biases = nn.Linear(4, 20_000).bias
    return {
        "weight": (layer.weight, WEIGHT, (300, 200)),
        "bias": (biases, initializers.torch_bias(4), (20_000,)),
    }


def convolutions() -> dict[str, tuple[torch.Tensor, Initializer, Shape]]:
    return {
        "1d": (nn.Conv1d(30, 200, 7).weight, WEIGHT, (7, 30, 200)),
        "grouped": (nn.Conv2d(40, 200, (3, 5), groups=4).weight, WEIGHT, (3, 5, 10, 200)),
        "depthwise": (nn.Conv2d(900, 900, 5, groups=900).weight, WEIGHT, (5, 5, 1, 900)),
        "3d": (nn.Conv3d(10, 100, (2, 3, 4)).weight, WEIGHT, (2, 3, 4, 10, 100)),
        "bias": (nn.Conv1d(4, 20_000, 3, groups=2).bias, initializers.torch_bias(6), (20_000,)),
    }


def transposed() -> dict[str, tuple[torch.Tensor, Initializer, Shape]]:
    """PyTorch's fan in is that of the output channels, of one group."""
    grouped = nn.ConvTranspose2d(60, 80, (3, 5), groups=4)
    biases = nn.ConvTranspose1d(2, 20_000, 1, groups=2)
    return {
        "1d": (nn.ConvTranspose1d(90, 40, 7).weight, EXCHANGED, (7, 90, 40)),
        "grouped": (grouped.weight, EXCHANGED, (3, 5, 60, 20)),
        "bias": (biases.bias, initializers.torch_bias(10_000), (20_000,)),
    }


def attention() -> dict[str, tuple[torch.Tensor, Initializer, Shape]]:
    packed = nn.MultiheadAttention(128, 4)
    apart = nn.MultiheadAttention(128, 4, kdim=96, vdim=160)
    alone = initializers.torch_attention(1)
    heads = initializers.torch_attention(in_axis=0, out_axis=(1, 2))
    return {
        "packed": (packed.in_proj_weight, ATTENTION, (128, 128)),
        "packed, by heads": (packed.in_proj_weight, heads, (128, 4, 32)),
        "query": (apart.q_proj_weight, alone, (128, 128)),
        "key": (apart.k_proj_weight, alone, (96, 128)),
        "value": (apart.v_proj_weight, alone, (160, 128)),
        "out": (packed.out_proj.weight, WEIGHT, (128, 128)),
    }


def recurrent() -> dict[str, tuple[torch.Tensor, Initializer, Shape]]:
    layers = {"lstm": nn.LSTM(64, 96, 2), "gru": nn.GRU(64, 96), "rnn": nn.RNN(64, 96)}
    layers |= {"lstm cell": nn.LSTMCell(64, 96), "gru cell": nn.GRUCell(64, 96)}
    return {
        f"{kind} {name}": (value, RECURRENT, (64, 96) if value.ndim == 2 else (96,))
        for kind, layer in layers.items()
        for name, value in layer.named_parameters()
    }


@pytest.mark.parametrize("made", [linear, convolutions, transposed, attention, recurrent])
def test_the_bound_is_that_of_torchs_layer(
    made: Callable[[], Mapping[str, tuple[torch.Tensor, Initializer, Shape]]], budget: Budget
) -> None:
    """What PyTorch's layer drew reaches our bound, and does not pass it."""
    torch.manual_seed(0)
    cases = made()
    paid = random_checks.divided(budget, len(cases))
    found = {
        name: has_bound(values.detach().double().numpy(), bound_of(init, shape), paid)
        for name, (values, init, shape) in cases.items()
    }
    assert {name: str(evidence) for name, evidence in found.items() if not evidence.passed} == {}


def test_attention_biases_are_zero_and_its_extra_biases_normal() -> None:
    layer = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert not layer.in_proj_bias.any()
    assert not layer.out_proj.bias.any()
    assert nn.init._calculate_fan_in_and_fan_out(layer.in_proj_weight) == (8, 24)


def test_embeddings_are_standard_normal_but_for_the_padding_row(budget: Budget) -> None:
    torch.manual_seed(0)
    theirs = nn.Embedding(1500, 1000, padding_idx=7).weight.detach().double().numpy()
    ours = np.asarray(initializers.torch_embedding(7)(KEY, (1500, 1000)), np.float64)
    last = np.asarray(initializers.torch_embedding(-1)(KEY, (5, 3)))
    for table in (theirs, ours):
        assert not table[7].any()
        evidence = IsNormal(discrepancy=0.01).check(np.delete(table, 7, 0), budget)
        assert evidence.passed, evidence
    np.testing.assert_array_equal((last == 0).all(1), [False] * 4 + [True])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(12, 8, (3, 2), groups=4), (3, 2, 3, 8)),
        (nn.Conv3d(4, 6, 2), (2, 2, 2, 4, 6)),
        (nn.Linear(5, 7), (5, 7)),
    ],
)
def test_fans_are_those_of_torchs_layers(layer: nn.Module, shape: Shape) -> None:
    expected = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    assert initializers.fan_in_and_fan_out(shape) == expected


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose2d(12, 8, (3, 2), groups=4), (3, 2, 12, 2)),
        (nn.ConvTranspose1d(4, 6, 5), (5, 4, 6)),
        (nn.Embedding(9, 4), (9, 4)),
    ],
)
def test_fans_of_weights_that_torch_stores_the_other_way(layer: nn.Module, shape: Shape) -> None:
    expected = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    assert initializers.fan_in_and_fan_out(shape, in_axis=-1, out_axis=-2) == expected
