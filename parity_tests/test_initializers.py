"""Initializers: what ``torch.nn.init`` fixes exactly, on Flax's shapes, and every layer's contract.

The laws of what is random are in ``test_initializers_laws``.
"""

import math
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flaxstab import initializers
from flaxstab._typing import Initializer

Shape = tuple[int, ...]
KEY = jax.random.key(0, impl="rbg")  # compiles in a quarter of the time of the default


def draw(init: Initializer, shape: Shape, dtype: str = "float32") -> np.ndarray:
    return np.asarray(init(KEY, shape, dtype), np.float64)


def torchs(kernel: np.ndarray) -> np.ndarray:
    """Returns a kernel ``(*window, in, out)`` in PyTorch's layout ``(out, in, *window)``."""
    return kernel.transpose(-1, -2, *range(kernel.ndim - 2))


@pytest.mark.parametrize(
    ("init", "value"),
    [(initializers.zeros, 0), (initializers.ones, 1), (initializers.constant(2.5), 2.5)],
)
def test_constants_fill(init: Initializer, value: float) -> None:
    np.testing.assert_array_equal(draw(init, (3, 4)), np.full((3, 4), value))


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 3), (1, 4), (0, 3), (3, 0)])
def test_eye_is_torchs(shape: Shape) -> None:
    expected = torch.nn.init.eye_(torch.empty(shape[::-1])).numpy()
    np.testing.assert_array_equal(torchs(draw(initializers.eye(), shape)), expected, strict=False)


@pytest.mark.parametrize(
    ("groups", "shape"),
    [
        (1, (5, 3, 4)),
        (1, (4, 4, 3)),
        (1, (1, 2, 2)),
        (2, (2, 3, 3, 8)),
        (3, (4, 1, 2, 6)),
        (1, (3, 2, 5, 5)),
        (2, (2, 3, 4, 3, 4)),
        (4, (1, 2, 6, 1, 4)),
        (1, (2, 0, 3)),
        (1, (2, 3, 0)),
    ],
)
def test_dirac_is_torchs(groups: int, shape: Shape) -> None:
    """Groups, one to three spatial axes, and even windows, whose centre is ``size // 2``."""
    *window, inputs, outputs = shape
    expected = torch.nn.init.dirac_(torch.empty(outputs, inputs, *window), groups).numpy()
    np.testing.assert_array_equal(torchs(draw(initializers.dirac(groups), shape)), expected)
    exchanged = initializers.dirac(groups, in_axis=-1, out_axis=-2)
    found = draw(exchanged, (*window, outputs, inputs)).swapaxes(-1, -2)
    np.testing.assert_array_equal(torchs(found), expected)


@pytest.mark.parametrize(
    ("shape", "gain"),
    [((7, 4), 1.0), ((4, 7), 0.3), ((5, 5), 2.0), ((3, 2, 4), 1.0), ((2, 1, 2, 2, 9), 1.0)],
)
def test_orthogonal_is_what_torch_makes_of_the_same_normals(
    shape: Shape, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch is given the matrix from which JAX starts; the last bits are LAPACK's.

    PyTorch transposes a weight ``(out, in)`` with fewer rows than columns, JAX a kernel ``(in,
    out)``. So they agree but for square ones, where each is the other's transpose: the law of a
    uniform orthogonal matrix is that of its transpose.
    """
    rows, outputs = math.prod(shape[:-1]), shape[-1]
    with jax.enable_x64(True):
        ours = draw(initializers.orthogonal(gain), shape, "float64").reshape(rows, outputs)
        normals = jax.random.normal(KEY, (max(rows, outputs), min(rows, outputs)), "float64")
    given = torch.tensor(np.array(normals if outputs >= rows else normals.T))
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *_, **__: self.copy_(given))
    theirs = torch.nn.init.orthogonal_(torch.empty(outputs, rows, dtype=torch.float64), gain)
    bound = normals.size * np.finfo(np.float64).eps
    expected = theirs if rows == outputs else theirs.T
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=bound)


def test_orthogonal_flattens_all_axes_but_the_outputs() -> None:
    kernel = draw(initializers.orthogonal(out_axis=-2), (3, 2, 5))
    matrix = np.moveaxis(kernel, -2, -1).reshape(-1, 2)
    bound = matrix.size * np.finfo(np.float32).eps
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(2), rtol=0, atol=bound)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.71, 1.0])
def test_sparse_cuts_as_many_connections_of_each_input_as_torch(sparsity: float) -> None:
    """Per column of PyTorch's ``(out, in)``, per row of ours."""
    weight = torch.nn.init.sparse_(torch.empty(20, 30), sparsity).numpy()
    ours = draw(initializers.sparse(sparsity), (30, 20))
    np.testing.assert_array_equal((ours == 0).sum(1), (weight == 0).sum(0))
    embedding = draw(initializers.sparse(sparsity, out_axis=0), (20, 30))
    np.testing.assert_array_equal((embedding == 0).sum(0), (weight == 0).sum(0))
    assert len(set((ours == 0).sum(0))) > 1 or sparsity in (0.0, 1.0)


def test_trunc_normal_never_draws_a_far_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest uniform number is no outlier: JAX's truncated_normal makes -2 of it here."""
    monkeypatch.setattr(jax.random, "uniform", lambda _, s, d, low, __: jnp.full(s, low, d))
    assert 5 < -draw(initializers.trunc_normal(std=0.02), (1,)).item() / 0.02 < 6
    assert 5 < draw(initializers.trunc_normal(std=0.02, b=3.0), (1,)).item() / 0.02 < 6


@pytest.mark.parametrize("bounds", [(-2.0, math.inf), (-math.inf, 2.0), (-math.inf, math.inf)])
def test_trunc_normal_takes_open_bounds(bounds: tuple[float, float]) -> None:
    drawn = draw(initializers.trunc_normal(0.0, 1.0, *bounds), (10_000,))
    low, high = drawn.min(), drawn.max()
    assert bounds[0] <= low < -1.9
    assert 1.9 < high <= bounds[1]


def test_trunc_normal_stays_inside_where_it_rounds() -> None:
    """Of these 10,000 draws 454 round to a number outside, and have to be put back."""
    low, high = -251.204, -251.2039
    drawn = np.asarray(initializers.trunc_normal(-251.21, 0.01, low, high)(KEY, (10_000,)))
    assert np.float32(low) <= drawn.min() <= drawn.max() <= np.float32(high)


def test_trunc_normal_with_equal_bounds_is_constant() -> None:
    np.testing.assert_array_equal(draw(initializers.trunc_normal(a=1.0, b=1.0), (3,)), np.ones(3))
    np.testing.assert_array_equal(torch.nn.init.trunc_normal_(torch.empty(3), a=1, b=1), np.ones(3))


# Of each: its options, and the standard deviation for fans of 6 * 5 and 6 * 7.
SCALES = [
    ({}, math.sqrt(2 / 30)),
    ({"mode": "fan_out"}, math.sqrt(2 / 42)),
    ({"mode": "FAN_OUT"}, math.sqrt(2 / 42)),
    ({"a": 0.5}, math.sqrt(2 / 1.25 / 30)),
    ({"a": 0.5, "nonlinearity": "relu"}, math.sqrt(2 / 30)),
    ({"nonlinearity": "tanh"}, 5 / 3 / math.sqrt(30)),
    ({"in_axis": -1, "out_axis": -2}, math.sqrt(2 / 42)),
    ({"in_axis": (0, 2), "out_axis": 3}, math.sqrt(2 / 30)),
    ({"in_axis": 1, "out_axis": (0, 2, 3)}, math.sqrt(2 / 3)),
]


def assert_scaled(init: Initializer, base: Initializer, factor: float) -> None:
    """The draws are another law's, times a factor; three operations round."""
    found, expected = (draw(law, (2, 3, 5, 7)) for law in (init, base))
    error = np.abs(found - factor * expected).max()
    assert error <= 3 * np.finfo(np.float32).eps * np.abs(found).max()


@pytest.mark.parametrize(("options", "std"), SCALES, ids=str)
def test_kaiming_scales_by_torchs_gain_and_fan(options: dict[str, object], std: float) -> None:
    unit = initializers.uniform(-1.0, 1.0)
    assert_scaled(initializers.kaiming_uniform(**options), unit, math.sqrt(3) * std)
    assert_scaled(initializers.kaiming_normal(**options), initializers.normal(), std)


@pytest.mark.parametrize(("gain", "options"), [(1.0, {}), (5 / 3, {"in_axis": 0, "out_axis": 3})])
def test_xavier_scales_by_torchs_gain_and_fans(gain: float, options: dict[str, int]) -> None:
    fans = 72 if not options else 2 * 15 + 7 * 15
    std = gain * math.sqrt(2 / fans)
    unit = initializers.uniform(-1.0, 1.0)
    assert_scaled(initializers.xavier_uniform(gain, **options), unit, math.sqrt(3) * std)
    assert_scaled(initializers.xavier_normal(gain, **options), initializers.normal(), std)


def test_a_wrong_scale_is_seen() -> None:
    with pytest.raises(AssertionError):
        assert_scaled(initializers.normal(std=1 + 1e-6), initializers.normal(), 1.0)


@pytest.mark.parametrize(
    "shape", [(3, 7), (5, 3, 7), (3, 5, 4, 7), (2, 3, 1, 4, 6), (0, 5), (5, 0), (0, 3, 4)]
)
def test_fans_are_torchs_of_the_transposed_shape(shape: Shape) -> None:
    *window, channels_in, channels_out = shape
    weight = torch.empty(channels_out, channels_in, *window)
    expected = torch.nn.init._calculate_fan_in_and_fan_out(weight)
    assert initializers.fan_in_and_fan_out(shape) == expected
    moved = (channels_out, channels_in, *window)
    assert initializers.fan_in_and_fan_out(moved, in_axis=1, out_axis=0) == expected


def test_fans_of_several_axes_are_those_of_the_flat_kernel() -> None:
    """As for a projection to heads, and back."""
    fans = initializers.fan_in_and_fan_out
    assert fans((32, 4, 6), in_axis=0, out_axis=(1, 2)) == fans((32, 24)) == (32, 24)
    assert fans((4, 6, 32), in_axis=(-3, 1), out_axis=-1) == fans((24, 32)) == (24, 32)
    assert fans((5, 4, 6, 32), in_axis=(1, 2), out_axis=3) == fans((5, 24, 32)) == (120, 160)


@pytest.mark.parametrize(
    ("in_axis", "out_axis"), [(0, 0), (0, -3), ((0, 1), 1), (3, 1), (0, (1, -4)), ((1, 1), 2)]
)
def test_axes_that_repeat_or_lie_outside_are_refused(in_axis: object, out_axis: object) -> None:
    rule = r"in_axis and out_axis must be different axes of the shape, got in_axis=.*shape=\(2, 3,"
    for make in (initializers.xavier_normal, initializers.torch_attention):
        with pytest.raises(ValueError, match=rule):
            make(in_axis=in_axis, out_axis=out_axis)(KEY, (2, 3, 4))


GAINS = get_args(initializers.Nonlinearity)


@pytest.mark.parametrize("name", GAINS)
def test_gains_are_torchs(name: str) -> None:
    assert initializers.calculate_gain(name) == torch.nn.init.calculate_gain(name)
    assert initializers.calculate_gain(name, 0.3) == torch.nn.init.calculate_gain(name, 0.3)


def test_the_table_of_gains_is_torchs() -> None:
    theirs = torch.nn.init._NonlinearityType.__args__
    assert theirs == GAINS


@pytest.mark.parametrize("slope", [0, 0.0, 0.01, 1, math.sqrt(5), -2.0, np.float64(0.5)])
def test_the_gain_of_leaky_relu_is_torchs(slope: float) -> None:
    expected = torch.nn.init.calculate_gain("leaky_relu", slope)
    assert initializers.calculate_gain("leaky_relu", slope) == expected


@pytest.mark.parametrize("name", ["gelu", "silu", "identity", "ReLU", "", None])
def test_what_has_no_gain_in_torch_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="nonlinearity"):
        torch.nn.init.calculate_gain(name)
    with pytest.raises(ValueError, match=r"nonlinearity must be one of linear, .* use 'relu'\."):
        initializers.calculate_gain(name)


@pytest.mark.parametrize("slope", [True, False, "0.1", [0.1], np.float32(0.1), 1j])
def test_a_slope_that_is_no_number_is_refused(slope: object) -> None:
    with pytest.raises(ValueError, match="not a valid number"):
        torch.nn.init.calculate_gain("leaky_relu", slope)
    with pytest.raises(ValueError, match="slope of leaky_relu must be an int or a float, got par"):
        initializers.calculate_gain("leaky_relu", slope)
    assert initializers.calculate_gain("relu", slope) == math.sqrt(2)


Call = Callable[[torch.Tensor], object]
init = torch.nn.init

# What is refused when it is made, PyTorch's call on a 3 x 4 weight, what we say.
REFUSED: list[tuple[Callable[[], object], Call | None, str]] = [
    (
        lambda: initializers.uniform(2.0, 1.0),
        lambda w: init.uniform_(w, 2, 1),
        r"a must not be above b, got a=2.0 and b=1.0\.",
    ),
    (
        lambda: initializers.normal(std=-1.0),
        lambda w: init.normal_(w, 0, -1),
        r"std must not be negative, got std=-1.0\.",
    ),
    (
        lambda: initializers.trunc_normal(std=0.0),
        lambda w: init.trunc_normal_(w, std=0.0),
        r"std must be positive, got std=0.0\.",
    ),
    (
        lambda: initializers.trunc_normal(a=1.0, b=-1.0),
        lambda w: init.trunc_normal_(w, a=1, b=-1),
        r"a must not be above b, got a=1.0 and b=-1.0\.",
    ),
    (
        lambda: initializers.trunc_normal(a=12.0, b=13.0),
        None,
        r"a or b must come within 11 standard deviations of the mean, got mean=0.0 and std=1.0 ",
    ),
    (lambda: initializers.sparse(-0.1), None, r"sparsity must lie in \[0, 1\], got sparsity=-0.1"),
    (lambda: initializers.sparse(1.1), None, r"sparsity must lie in \[0, 1\], got sparsity=1.1"),
    (lambda: initializers.sparse(0.5, -1.0), lambda w: init.sparse_(w, 0.5, -1), "std must not be"),
    (lambda: initializers.dirac(0), lambda w: init.dirac_(w[None], 0), "groups must be an integer"),
    (
        lambda: initializers.xavier_uniform(-1.0),
        lambda w: init.xavier_uniform_(w, -1),
        r"gain must not be negative, got gain=-1.0\.",
    ),
    (
        lambda: initializers.xavier_normal(-1.0),
        lambda w: init.xavier_normal_(w, -1),
        "gain must not be negative",
    ),
    (
        lambda: initializers.kaiming_normal(mode="fan_avg"),
        lambda w: init.kaiming_normal_(w, mode="fan_avg"),
        "mode must be 'fan_in' or 'fan_out', got mode='fan_avg'",
    ),
    (
        lambda: initializers.kaiming_uniform(nonlinearity="gelu"),
        lambda w: init.kaiming_uniform_(w, nonlinearity="gelu"),
        "nonlinearity must be one of",
    ),
    (
        lambda: initializers.kaiming_uniform(True),
        lambda w: init.kaiming_uniform_(w, True),
        "slope of leaky_relu must be an int or a float, got param=True",
    ),
    (lambda: initializers.torch_attention(0), None, "parts must be an integer of at least 1"),
    (
        lambda: initializers.torch_recurrent(0),
        lambda _: torch.nn.LSTM(3, 0),
        "hidden_size must be an integer of at least 1, got hidden_size=0",
    ),
]


@pytest.mark.parametrize(("make", "theirs", "message"), REFUSED)
def test_bad_options_are_refused_at_once_as_by_torch(
    make: Callable[[], object], theirs: Call | None, message: str
) -> None:
    """Without a call PyTorch takes them: what it makes of them is in the docstrings."""
    with pytest.raises(ValueError, match=message):
        make()
    if theirs is not None:
        with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)):
            theirs(torch.empty(3, 4))


# The shape, and what PyTorch does with its own layout of it.
BAD_SHAPES: list[tuple[Initializer, Call, Shape, str]] = [
    (initializers.eye(), init.eye_, (2, 3, 4), r"2 axes, \(in, out\), got shape=\(2, 3, 4\)"),
    (initializers.eye(), init.eye_, (3,), "eye fills a kernel with 2 axes"),
    (initializers.sparse(0.5), lambda w: init.sparse_(w, 0.5), (2, 3, 4), "Flatten the window"),
    (initializers.sparse(0.5), lambda w: init.sparse_(w, 0.5), (3,), "a kernel with 2 axes"),
    (initializers.dirac(), init.dirac_, (2, 3), r"3 to 5 axes, .* use eye\(\)\."),
    (initializers.dirac(), init.dirac_, (1, 1, 1, 1, 2, 3), "3 to 5 axes"),
    (
        initializers.dirac(3),
        lambda w: init.dirac_(w, 3),
        (2, 2, 4),
        r"groups must divide the output channels, got groups=3 and channels=4\.",
    ),
    (initializers.orthogonal(), init.orthogonal_, (3,), r"2 axes, got shape=\(3,\)"),
    (initializers.xavier_uniform(), init.xavier_uniform_, (3,), "at least 2 axes"),
    (initializers.xavier_normal(), init.xavier_normal_, (), "at least 2 axes"),
    (initializers.kaiming_normal(), init.kaiming_normal_, (3,), "at least 2 axes"),
    (initializers.torch_weight(), init.kaiming_uniform_, (3,), "at least 2 axes"),
    (initializers.torch_attention(), init.xavier_uniform_, (3,), "at least 2 axes"),
]


@pytest.mark.parametrize(("ours", "theirs", "shape", "message"), BAD_SHAPES)
def test_shapes_that_torch_refuses_are_refused(
    ours: Initializer, theirs: Call, shape: Shape, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours(KEY, shape)
    with pytest.raises(ValueError, match=r"dimension|dim 0"):
        theirs(torch.empty(shape[-1:] + shape[-2:-1] + shape[:-2]))


def test_a_padding_row_outside_the_embedding_is_refused() -> None:
    for row in (4, -5):
        rule = f"padding_idx must be a row of the embedding, got padding_idx={row}"
        with pytest.raises(ValueError, match=rule):
            initializers.torch_embedding(row)(KEY, (4, 3))
        with pytest.raises(AssertionError):
            torch.nn.Embedding(4, 3, padding_idx=row)
