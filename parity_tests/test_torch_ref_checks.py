"""The helpers that judge ``torch_ref`` can fail."""

import pytest
import torch

from parity_tests.support.torch_checks import SLACK, assert_close, draw, norm_magnitude

EPS = torch.finfo(torch.float64).eps


def test_inputs_repeat_with_the_seed_and_have_the_offset() -> None:
    assert torch.equal(draw(4, 5, seed=1), draw(4, 5, seed=1))
    assert not torch.equal(draw(4, 5, seed=1), draw(4, 5, seed=2))
    assert draw(1000, seed=1, offset=100.0).mean() > 99
    assert draw(2, seed=1, dtype="float32").dtype == torch.float32


def test_an_error_within_the_bound_passes_and_one_above_fails() -> None:
    one = torch.ones(3, dtype=torch.float64)
    assert_close(one + SLACK * EPS / 2, one)
    with pytest.raises(AssertionError, match="above the bound"):
        assert_close(one + SLACK * EPS * 2, one)
    assert_close(one + SLACK * EPS * 2, one, magnitude=4.0)


def test_the_magnitude_of_a_norm_counts_offset_spread_and_affine() -> None:
    x, variance = torch.tensor([1.0, -6.0]), torch.tensor([4.0, 9.0])
    assert norm_magnitude(x, variance) == 3
    assert norm_magnitude(x, variance, torch.tensor([-2.0]), torch.tensor([0.0, -5.0])) == 11


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(1, 3, dtype=torch.float64),
        torch.ones(3, dtype=torch.float32),
        torch.full((3,), float("nan"), dtype=torch.float64),
    ],
    ids=["shape", "dtype", "nan"],
)
def test_wrong_shape_dtype_and_nan_fail_on_either_side(wrong: torch.Tensor) -> None:
    one = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close(wrong, one)
    with pytest.raises(AssertionError):
        assert_close(one, wrong)
