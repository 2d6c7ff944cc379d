"""One comparison in float64 for the tests of the layers, and the constants it is judged by."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import ArrayLike

from parity_tests.support.cases import values

SEMANTICS = 1e-12
"""Of the magnitude, in float64 (DESIGN, "How parity is judged", 1)."""

OFFSET_ERROR = 2e-6
"""Output error of a norm on float32 data of std 1 at any mean (DESIGN, "Conventions")."""

TorchFunction = Callable[..., torch.Tensor]


def assert_same(ours: ArrayLike, theirs: ArrayLike, size: float = 0.0) -> None:
    """Same shape, same dtype, NaN and infinity in the same places, float64 within 1e-12 of M.

    Args:
      ours: what is tested.
      theirs: the oracle.
      size: the largest absolute term, if that is more than the largest value of the oracle.
    """
    a, b = (t.detach().numpy() if isinstance(t, torch.Tensor) else t for t in (ours, theirs))
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    assert a.dtype == np.float64 or not jnp.issubdtype(a.dtype, jnp.floating), a.dtype
    finite = np.isfinite(b)
    np.testing.assert_array_equal(a[~finite], b[~finite])
    assert np.isfinite(a[finite]).all(), "the oracle is finite and the result is not"
    error = np.max(np.abs(a[finite] - b[finite]), initial=0)
    bound = SEMANTICS * max(np.max(np.abs(b[finite]), initial=0), size)
    assert error <= bound, f"error {error:.3g} is above the bound {bound:.3g}"


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """Moves the last axis to 1: (N, *space, C) -> (N, C, *space)."""
    return x.movedim(-1, 1)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Moves axis 1 to the end: (N, C, *space) -> (N, *space, C)."""
    return x.movedim(1, -1)


def image(function: TorchFunction) -> TorchFunction:
    """Makes a channels-first function of one tensor features-last."""
    return lambda x: channels_last(function(channels_first(x)))


def assert_twins(
    ours: Callable[..., jax.Array], theirs: TorchFunction, *inputs: np.ndarray
) -> None:
    """Output, and input gradients for a random cotangent, agree in float64.

    Args:
      ours: a function of arrays.
      theirs: its counterpart of tensors in the same layout.
      *inputs: float64 arrays.
    """
    tensors = [torch.tensor(a, requires_grad=True) for a in inputs]
    expected = theirs(*tensors)
    cotangent = values(*expected.shape, seed=1)
    gradients = torch.autograd.grad(expected, tensors, torch.tensor(cotangent))

    def quantities(*arrays: jax.Array) -> dict[str, object]:
        output, pullback = jax.vjp(ours, *arrays)
        return {"output": output, "gradients": pullback(jnp.asarray(cotangent, output.dtype))}

    with jax.enable_x64(True):
        found = jax.jit(quantities)(*inputs)
        assert_same(found["output"], expected)
        # Terms of the gradient that cancel are at least of the cotangent's size in these cases.
        size = np.abs(cotangent).max()
        for own, other in zip(found["gradients"], gradients, strict=True):
            assert_same(own, other, size)
