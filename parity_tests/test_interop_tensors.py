"""Arrays that become PyTorch's tensors."""

from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from flaxstab import interop


class Pair(NamedTuple):
    left: object
    right: object


def test_whatever_is_an_array_becomes_a_tensor() -> None:
    tree = {
        "jax": jnp.arange(3, dtype=jnp.bfloat16),
        "scalar": np.float32(1.5),
        "of ml_dtypes": ml_dtypes.bfloat16(2.5),
        "big": np.arange(3, dtype=">f8"),
        "none": np.empty((0, 2), ">i4"),
        "pair": Pair([np.int64(3)], (np.bool_(True), None)),
        "plain": (2, "adam", 0.5, None),
    }
    found = interop.to_tensors(tree)
    expected = {
        "jax": torch.tensor([0.0, 1.0, 2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "of ml_dtypes": torch.tensor(2.5, dtype=torch.bfloat16),
        "big": torch.arange(3, dtype=torch.float64),
        "none": torch.empty((0, 2), dtype=torch.int32),
    }
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    assert isinstance(found["pair"], Pair)
    assert torch.equal(found["pair"].left[0], torch.tensor(3))
    assert torch.equal(found["pair"].right[0], torch.tensor(True))
    assert found["pair"].right[1] is None
    assert found["plain"] == tree["plain"]
    found["big"][0] = 7  # memory of its own
    assert tree["big"][0] == 0


@pytest.mark.parametrize("odd", [np.array(["a"]), np.array([None]), np.ones(1, np.clongdouble)])
def test_what_torch_cannot_have_is_refused(odd: np.ndarray) -> None:
    with pytest.raises(ValueError, match="arrays must have a dtype that PyTorch has, got dtype="):
        interop.to_tensors({"a": odd})
