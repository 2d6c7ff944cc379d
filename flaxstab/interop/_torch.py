"""PyTorch's tensors as NumPy arrays, without importing PyTorch."""

import sys

import numpy as np


def to_numpy(value: object) -> np.ndarray:
    """Returns an array or a tensor (also one on a device, with a gradient, or bfloat16) as NumPy.

    bfloat16, which NumPy does not know, becomes float32: every value is exact.

    Args:
      value: a ``torch.Tensor`` or anything that ``np.asarray`` takes.
    """
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is None or not isinstance(value, torch.Tensor):
        return np.asarray(value)
    tensor = value.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
