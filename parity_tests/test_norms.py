"""Normalisation layers through the harness, and what they refuse (all options: the grid)."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import torch_ref.norms
from flaxstab import functional, norms
from flaxstab.parity import Tolerance, compare
from parity_tests.support.cases import values
from parity_tests.support.norm_grid import randomised

C = 4
PLAIN = (np.float32, jnp.bfloat16)


def assert_parity(
    ours: Callable[..., object],
    theirs: Callable[..., object],
    *shape: int,
    layout: str | None = "image",
    dtypes: tuple[object, ...] = (),
    tolerances: tuple[Tolerance, ...] = (),
) -> None:
    report = compare(
        ours, randomised(theirs), values(*shape),
        layout=layout, dtypes=dtypes, tolerances=tolerances,
    )  # fmt: skip
    assert report.passed, str(report)


def test_batch_norm_of_two_values_is_torchs() -> None:
    """The gradient's terms cancel to 1e-4 of their size: the magnitude knows the terms."""
    assert_parity(norms.BatchNorm(C), torch.nn.BatchNorm1d(C), 2, C)


def test_batch_norm_is_as_precise_as_torchs() -> None:
    ours, theirs = norms.BatchNorm(C), torch.nn.BatchNorm2d(C)
    # 3.3 eps in float32: the plain sum of 384 cotangents.
    why = "XLA's CPU backend adds one term after the other, PyTorch in pairs"
    sums = (Tolerance("grad bias", 2, why),)
    assert_parity(ours, theirs, 6, 8, 8, C, dtypes=PLAIN, tolerances=sums)


def test_ghost_batch_norm_is_document_2s() -> None:
    """33 rows at 32 are 17 and 16, and two updates."""
    theirs = torch_ref.norms.GhostBatchNorm(C, 32)
    assert_parity(norms.GhostBatchNorm(C, 32), theirs, 33, C, dtypes=(np.float32,))


def test_a_ghost_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norms.GhostBatchNorm(C, 2)(jnp.ones((5, C)))


def test_layer_norm_is_as_precise_as_torchs() -> None:
    assert_parity(norms.LayerNorm(64), torch.nn.LayerNorm(64), 16, 64, layout=None, dtypes=PLAIN)


def test_group_norm_is_as_precise_as_torchs() -> None:
    assert_parity(norms.GroupNorm(4, 16), torch.nn.GroupNorm(4, 16), 3, 5, 6, 16, dtypes=PLAIN)


def test_instance_norm_is_as_precise_as_torchs() -> None:
    options = {"affine": True, "track_running_stats": True}
    ours, theirs = norms.InstanceNorm(C, **options), torch.nn.InstanceNorm2d(C, **options)
    assert_parity(ours, theirs, 3, 8, 8, C, dtypes=PLAIN)


def test_instance_norm_never_counts() -> None:
    layer = norms.InstanceNorm(C, track_running_stats=True)
    layer(jnp.asarray(values(2, 3, C), jnp.float32))
    assert layer.count[...] == 0
    assert (np.asarray(layer.mean[...]) != 0).all()


# Per-layer behaviour that PyTorch has too, checked without the harness.


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (norms.BatchNorm(C), (1, C), "more than 1 value per channel in training"),
        (norms.BatchNorm(C), (1, 1, 1, C), r"Use a larger batch, or use_running_average=True\."),
        (norms.GroupNorm(C, C), (1, C), "more than 1 value per group"),
        (norms.InstanceNorm(C), (3, 1, C), "more than 1 spatial element"),
        (norms.InstanceNorm(C), (3, C), "instance normalisation needs batch and spatial axes"),
        (norms.BatchNorm(C), (C,), r"needs a batch axis.*Give a single sample one: x\[None\]"),
        (norms.GhostBatchNorm(C, 2), (C,), "batch normalisation needs a batch axis"),
        (norms.GroupNorm(2, C), (C,), "group normalisation needs a batch axis"),
        (norms.BatchNorm(C), (2, C + 1), "last axis must have num_features elements, got"),
        (norms.GhostBatchNorm(C, 2), (2, C + 1), "last axis must have num_features elements"),
        (norms.InstanceNorm(C), (2, 3, C + 1), "last axis must have num_features elements"),
        (norms.GroupNorm(2, C), (2, C + 1), "last axis must have num_channels elements"),
        (norms.LayerNorm((3, C)), (2, C, 3), "the input's last axes must be normalized_shape"),
        (norms.LayerNorm((3, C)), (C,), "the input's last axes must be normalized_shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    layer: nnx.Module, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones(shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((2, 3), bool), r"must have as many axes as the input.*mask\[\.\.\., None\]"),
        (np.ones(C, bool), "must have as many axes as the input"),
        (np.ones((2, 4, 1), bool), "each of its size or 1, got mask="),
        (np.ones((2, 3, 1)), r"mask must be boolean.*Pass mask\.astype\(bool\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: np.ndarray, message: str, training: bool) -> None:
    layer = norms.BatchNorm(C)
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones((2, 3, C)), mask=mask, use_running_average=not training)
    with pytest.raises(ValueError, match=message):
        functional.batch_norm(jnp.ones((2, 3, C)), mask=mask)


def test_an_axis_that_nothing_maps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got axis_name='data' outside of it\. Call the layer in"):
        norms.BatchNorm(C, axis_name="data")(jnp.ones((2, C)))


def test_one_value_per_channel_is_fine_in_evaluation() -> None:
    assert norms.BatchNorm(C)(jnp.ones((1, C)), use_running_average=True).shape == (1, C)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: norms.BatchNorm(0), "num_features must be an integer of at least 1"),
        (lambda: norms.BatchNorm(C, eps=-1.0), "eps must be a number of at least 0, got eps=-1.0"),
        (lambda: norms.LayerNorm(C, eps=None), "eps must be a number of at least 0, got eps=None"),
        (lambda: norms.FrozenBatchNorm(C, eps="1"), "eps must be a number of at least 0"),
        (lambda: norms.RMSNorm(C, eps=-1.0), "eps must be a number of at least 0"),
        (lambda: norms.BatchNorm(C, axis_name=3), "axis_name must be a name, a tuple of names or"),
        (lambda: norms.BatchNorm(C, momentum=1.1), r"momentum must lie in \[0, 1\] or be None"),
        (lambda: norms.InstanceNorm(C, momentum=-0.1), r"Flax's 0.99 is PyTorch's 0.01\."),
        (lambda: norms.GhostBatchNorm(C, 0), "virtual_batch_size must be an integer of at least 1"),
        (lambda: norms.GroupNorm(0, C), "num_groups must be an integer of at least 1"),
        (lambda: norms.GroupNorm(3, C), "num_groups must divide num_channels, got num_groups=3"),
        (lambda: norms.LayerNorm(()), "normalized_shape must name at least one axis"),
        (lambda: norms.LayerNorm((3, 0)), "normalized_shape must be an integer of at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_the_constructor(
    build: Callable[..., object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_layer_norm_takes_a_list_and_keeps_a_tuple() -> None:
    assert norms.LayerNorm([3, C]).normalized_shape == (3, C)


@pytest.mark.parametrize("layer", [norms.BatchNorm(C), norms.GroupNorm(2, C), norms.LayerNorm(C)])
def test_integers_are_refused(layer: nnx.Module) -> None:
    with pytest.raises(ValueError, match="a layer computes in floating point, got dtype='int32'"):
        layer(jnp.ones((2, 3, C), jnp.int32))


@pytest.mark.parametrize("make", [norms.BatchNorm, lambda c: norms.GhostBatchNorm(c, 2)])
def test_statistics_are_followed_inside_nnx_jit(make: Callable[..., object]) -> None:
    layer, twin = make(C), make(C)
    x = jnp.asarray(values(6, C), jnp.float32)
    nnx.jit(lambda m, x: m(x))(layer, x)
    twin(x)
    assert layer.count[...] == twin.count[...] > 0
    # The compiled program fuses multiplications with additions: a few roundings, eight at most.
    np.testing.assert_allclose(layer.var[...], twin.var[...], rtol=jnp.finfo(jnp.float32).eps * 8)
