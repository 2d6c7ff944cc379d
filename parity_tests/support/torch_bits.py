"""The one comparison of ``torch_rng`` with PyTorch: every bit, and the streams in step."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from flaxstab.torch_rng import Generator

same_processor = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="PyTorch draws other normals where it has no AVX2 and FMA",
)

DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Returns a tensor as an array of the same dtype."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same_bits(ours: np.ndarray, theirs: Tensor) -> None:
    """Same shape, same dtype, same bits."""
    expected = to_numpy(theirs)
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    raw = f"V{ours.itemsize}"
    np.testing.assert_array_equal(
        np.ascontiguousarray(ours).reshape(-1).view(raw), expected.reshape(-1).view(raw)
    )


def seeded(seed: int) -> Generator:
    """Seeds PyTorch and returns our generator of the same seed."""
    torch.manual_seed(seed)
    return Generator(seed)


def assert_in_step(generator: Generator) -> None:
    """The next draws agree: one that takes the kept normal, and one that takes raw bits."""
    assert_same_bits(generator.normal(3), torch.empty(3).normal_())
    assert_same_bits(generator.uniform(5), torch.empty(5).uniform_())
