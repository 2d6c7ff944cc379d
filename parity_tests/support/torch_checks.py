"""Inputs and the one comparison for the tests of ``torch_ref``."""

import numpy as np
import torch
from torch import Tensor

SLACK = 64
"""Bound in eps of the magnitude: roundings in a row that the small cases here can add up."""


def draw(
    *shape: int, seed: int, offset: float = 3.0, scale: float = 2.0, dtype: str = "float64"
) -> Tensor:
    """Normal numbers from numpy with a mean and a spread that hide no fault."""
    values = np.random.default_rng(seed).normal(offset, scale, shape)
    return torch.from_numpy(values.astype(dtype))


def norm_magnitude(
    x: Tensor, variance: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> float:
    """Largest term of ``(x - mean) / std * weight + bias``: x itself over the smallest std."""
    standardised = x.detach().abs().max() / variance.detach().min().sqrt()
    scale = 1.0 if weight is None else weight.detach().abs().max()
    shift = 0.0 if bias is None else bias.detach().abs().max()
    return float(standardised * scale + shift)


def assert_close(actual: Tensor, expected: Tensor, magnitude: float | Tensor = 1.0) -> None:
    """Same shape and dtype, finite, and within ``SLACK`` eps of ``magnitude``.

    Args:
        actual: What is tested.
        expected: The oracle.
        magnitude: Largest absolute term that was added up on the way.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert torch.isfinite(expected).all(), "the oracle is not finite"
    assert torch.isfinite(actual).all(), "the result is not finite"
    bound = SLACK * torch.finfo(expected.dtype).eps * float(magnitude)
    error = float((actual - expected).detach().abs().max())
    assert error <= bound, f"error {error:.3g} is above the bound {bound:.3g}"
