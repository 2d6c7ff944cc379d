"""Pooling against PyTorch."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from flaxstab import functional
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same, assert_twins, image

SPACE = {1: (11,), 2: (9, 8), 3: (7, 6, 5)}
MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def batch(rank: int, seed: int = 0) -> np.ndarray:
    return values(2, *SPACE[rank], 3, seed=seed, offset=0.5)


# kernel_size, stride, padding
WINDOWS = [(2, None, 0), (3, 2, 1), (3, 1, 0), (2, 3, 1), (4, 3, 2)]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("size", "stride", "padding"), WINDOWS)
def test_max_pool_is_torchs(rank: int, size: object, stride: object, padding: int | str) -> None:
    assert_twins(
        lambda x: functional.max_pool(x, size, stride, padding),
        image(lambda x: MAX[rank](x, size, stride, padding)),
        batch(rank),
    )


OUTPUT_SIZES = itertools.product((1, 2, 3), (1, 2, 3), (0, 1), (1, 3), (False, True))
FITTING = [o for o in OUTPUT_SIZES if 2 * o[2] <= o[0]]


def test_max_pool_has_torchs_windows_for_every_option() -> None:
    """All 60 combinations on one axis; forward only, which fixes where the windows lie."""
    x = values(1, 13, 2)
    with jax.enable_x64(True):
        for size, stride, padding, dilation, ceil_mode in FITTING:
            ours = functional.max_pool(x, size, stride, padding, dilation, ceil_mode=ceil_mode)
            options = (size, stride, padding, dilation, ceil_mode)
            theirs = image(lambda t, o=options: F.max_pool1d(t, *o))(torch.tensor(x))
            assert_same(ours, theirs)
    assert len(FITTING) == 60


@pytest.mark.parametrize(
    ("rank", "size", "stride", "padding", "dilation"),
    [
        (2, (3, 2), (2, 1), (1, 0), (1, 2)),
        (2, 2, (3, 2), (0, 1), 3),
        (3, (2, 3, 1), (1, 2, 2), (1, 1, 0), (2, 1, 1)),
    ],
)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool_takes_an_option_per_axis(
    rank: int, size: object, stride: object, padding: int | str, dilation: object, ceil_mode: bool
) -> None:
    assert_twins(
        lambda x: functional.max_pool(x, size, stride, padding, dilation, ceil_mode=ceil_mode),
        image(lambda x: MAX[rank](x, size, stride, padding, dilation, ceil_mode)),
        batch(rank),
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
def test_the_first_of_equal_maxima_takes_the_gradient_as_in_torch(
    rank: int, padding: int | str
) -> None:
    """Integers from three values: nearly every window has a tie."""
    x = np.random.default_rng(0).integers(0, 3, (2, *SPACE[rank], 3)).astype(np.float64)
    assert_twins(
        lambda x: functional.max_pool(x, 3, 2, padding),
        image(lambda x: MAX[rank](x, 3, 2, padding)),
        x,
    )


def test_max_pool_passes_nan_on() -> None:
    x = batch(2)
    x[0, 2, 3, 1] = x[1, 0, 0, 0] = x[1, 1, 1, 0] = np.nan
    with jax.enable_x64(True):
        ours = functional.max_pool(x, 3, 2, 1)
        assert_same(ours, image(lambda t: F.max_pool2d(t, 3, 2, 1))(torch.tensor(x)))
    assert np.isnan(ours).sum() > 2


def test_max_pool_of_minus_infinity_is_minus_infinity() -> None:
    x = np.full((1, 4, 1), -np.inf)
    with jax.enable_x64(True):
        ours = functional.max_pool(x, 2, 2, 1)
        assert_same(ours, image(lambda t: F.max_pool1d(t, 2, 2, 1))(torch.tensor(x)))


def test_max_pool_takes_integers() -> None:
    x = np.random.default_rng(0).integers(-9, 0, (1, 7, 2)).astype(np.int32)
    ours = functional.max_pool(jnp.asarray(x), 3, 2, 1)
    assert ours.dtype == jnp.int32
    theirs = image(lambda t: F.max_pool1d(t, 3, 2, 1))(torch.tensor(x.astype(np.float64)))
    np.testing.assert_array_equal(ours, theirs)


def _second(pool: Callable[..., object], x: jax.Array) -> object:
    """A Hessian-vector product of sum(pool(x)³), by PyTorch."""
    tensor = torch.tensor(x, requires_grad=True)
    (first,) = torch.autograd.grad((pool(tensor) ** 3).sum(), tensor, create_graph=True)
    direction = torch.tensor(values(*x.shape, seed=3))
    return torch.autograd.grad((first * direction).sum(), tensor)[0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (functional.max_pool, F.max_pool2d),
        (functional.avg_pool, F.avg_pool2d),
        (lambda x, *_: functional.adaptive_avg_pool(x, 5), lambda x, *_: ADAPTIVE[2](x, 5)),
    ],
    ids=["max", "avg", "adaptive"],
)
def test_pooling_is_twice_differentiable(
    ours: Callable[..., object], theirs: Callable[..., object]
) -> None:
    x = batch(2)
    expected = _second(image(lambda t: theirs(t, 3, 2, 1)), x)
    with jax.enable_x64(True):
        first = jax.grad(lambda x: jnp.sum(ours(x, 3, 2, 1) ** 3))
        direction = values(*x.shape, seed=3)
        found = jax.jit(jax.grad(lambda x: jnp.sum(first(x) * direction)))(x)
        assert_same(found, expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("size", "stride", "padding"), WINDOWS)
def test_avg_pool_is_torchs(rank: int, size: object, stride: object, padding: int | str) -> None:
    assert_twins(
        lambda x: functional.avg_pool(x, size, stride, padding),
        image(lambda x: AVG[rank](x, size, stride, padding)),
        batch(rank),
    )


def test_avg_pool_has_torchs_divisors_for_every_option() -> None:
    """All windows of one axis, with and without ceil_mode and count_include_pad."""
    x = values(1, 13, 2)
    options = [(*o[:3], o[4], include) for o in FITTING if o[3] == 1 for include in (False, True)]
    with jax.enable_x64(True):
        for size, stride, padding, ceil_mode, include in options:
            ours = functional.avg_pool(
                x, size, stride, padding, ceil_mode=ceil_mode, count_include_pad=include
            )
            given = (size, stride, padding, ceil_mode, include)
            theirs = image(lambda t, o=given: F.avg_pool1d(t, *o))(torch.tensor(x))
            assert_same(ours, theirs)
    assert len(options) == 60


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("include", "divisor"), [(True, None), (False, None), (True, 5)])
def test_avg_pool_takes_an_option_per_axis(
    rank: int, ceil_mode: bool, include: bool, divisor: int | None
) -> None:
    size, stride, padding = ((3, 2, 4)[:rank], (2, 3, 1)[:rank], (1, 0, 2)[:rank])
    assert_twins(
        lambda x: functional.avg_pool(
            x, size, stride, padding,
            ceil_mode=ceil_mode, count_include_pad=include, divisor_override=divisor,
        ),
        image(lambda x: AVG[rank](x, size, stride, padding, ceil_mode, include, divisor)),
        batch(rank),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "size"),
    [(1, 1), (1, 3), (1, 4), (1, 11), (1, 13), (2, (3, 5)), (2, 4), (3, (3, 2, 5))],
)
def test_adaptive_avg_pool_is_torchs(rank: int, size: object) -> None:
    assert_twins(
        lambda x: functional.adaptive_avg_pool(x, size),
        image(lambda x: ADAPTIVE[rank](x, size)),
        batch(rank),
    )


def test_averages_add_up_in_float32() -> None:
    """512 ones in bfloat16 arithmetic stay 256 when another is added."""
    x = jnp.ones((1, 1024, 1), jnp.bfloat16)
    assert functional.avg_pool(x, 1024).tolist() == [[[1.0]]]
    assert functional.adaptive_avg_pool(x, 1).tolist() == [[[1.0]]]


POOLS = {
    "max": functional.max_pool,
    "avg": functional.avg_pool,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "pool", [*POOLS.values(), functional.adaptive_avg_pool], ids=lambda pool: pool.__name__
)
def test_pooling_keeps_the_dtype(pool: Callable[..., object], dtype: str) -> None:
    assert pool(jnp.ones((1, 4, 1), dtype), 2).dtype == dtype


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 2), (2,), "at least one spatial axis"),
        ((1, 4, 2), (0,), "kernel_size must be an integer or 1 integers, each at least 1"),
        ((1, 4, 2), ((2, 2),), "kernel_size must be an integer or 1 integers"),
        ((1, 4, 2), (2, 0), "stride must be an integer or 1 integers, each at least 1"),
        ((1, 4, 2), (2, 1, -1), "padding must be an integer or 1 integers, each at least 0"),
        ((1, 4, 2), (3, 1, 2), "padding must be at most half of kernel_size, got padding=2"),
        ((1, 4, 2), (7, 1, 1), "kernel_size must fit into the padded input"),
    ],
)
def test_bad_windows_are_refused(
    pool: Callable[..., object], shape: tuple[int, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pool(jnp.ones(shape), *options)


def test_max_pool_refuses_a_bad_dilation() -> None:
    with pytest.raises(ValueError, match="dilation must be an integer or 1 integers"):
        functional.max_pool(jnp.ones((1, 4, 1)), 2, dilation=0)


def test_avg_pool_refuses_to_divide_by_zero() -> None:
    with pytest.raises(ValueError, match="divisor_override must not be 0"):
        functional.avg_pool(jnp.ones((1, 4, 1)), 2, divisor_override=0)


@pytest.mark.parametrize("size", [0, (2, 2)])
def test_adaptive_avg_pool_refuses_a_bad_size(size: object) -> None:
    with pytest.raises(ValueError, match="output_size must be an integer or 1 integers"):
        functional.adaptive_avg_pool(jnp.ones((1, 4, 1)), size)


def test_adaptive_avg_pool_needs_a_spatial_axis() -> None:
    with pytest.raises(ValueError, match="at least one spatial axis"):
        functional.adaptive_avg_pool(jnp.ones((4, 1)), 2)
