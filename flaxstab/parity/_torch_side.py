"""Runs a PyTorch module or function at any precision."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from flaxstab._typing import DTypeLike
from flaxstab.parity._inputs import (
    STEPS,
    Inputs,
    Values,
    channels_first,
    channels_last,
    growth,
)

if TYPE_CHECKING:
    import torch


def torch_dtype(dtype: DTypeLike) -> "torch.dtype":
    """Returns PyTorch's dtype of the same name."""
    import torch

    return getattr(torch, np.dtype(dtype).name)


class TorchSide:
    """A PyTorch module or function, ready to be run at any precision.

    Args:
      target: the module, in training mode (it is copied, never changed), or the function.
    """

    def __init__(self, target: "torch.nn.Module | Callable[..., torch.Tensor]") -> None:
        import torch

        self.function = target
        self.module = copy.deepcopy(target) if isinstance(target, torch.nn.Module) else None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns the module's tensors by name; of a function, none."""
        state = {} if self.module is None else self.module.state_dict()
        return {name: tensor.numpy() for name, tensor in state.items()}

    def run(self, inputs: Inputs, dtype: DTypeLike) -> Values:
        """Returns every quantity, computed with inputs, parameters and statistics of a dtype."""
        import torch

        kind = torch_dtype(dtype)
        arrays = [torch.tensor(channels_first(a, inputs.layout)) for a in inputs.arrays]
        tensors = [a.to(kind).requires_grad_() if a.is_floating_point() else a for a in arrays]
        module = None if self.module is None else copy.deepcopy(self.module).to(kind)
        output = (self.function if module is None else module)(*tensors)
        cotangent = torch.tensor(channels_first(inputs.cotangent, inputs.layout)).to(output.dtype)
        if output.shape != cotangent.shape:
            raise ValueError(
                "both sides must have outputs of one shape, "
                f"got {tuple(cotangent.shape)} from Flax (in torch's layout) and "
                f"{tuple(output.shape)} from PyTorch. For images pass layout='image'."
            )
        floats = [t for t in tensors if t.requires_grad]
        named = {} if module is None else dict(module.named_parameters())
        grads = torch.autograd.grad(
            output, [*floats, *named.values()], cotangent, allow_unused=True, materialize_grads=True
        )
        found = {"output": channels_last(_numpy(output), inputs.layout)}
        for i, grad in enumerate(grads[: len(floats)]):
            found[f"grad input {i}"] = channels_last(_numpy(grad), inputs.layout)
        for name, grad in zip(named, grads[len(floats) :], strict=True):
            found[f"grad {name}"] = _numpy(grad)
        if module is None:
            return {**found, "evaluation": found["output"]}
        return {**found, **_trained(module, tensors, inputs)}


def _trained(
    module: "torch.nn.Module", tensors: "list[torch.Tensor]", inputs: Inputs
) -> dict[str, np.ndarray]:
    """Returns buffers after some training steps, and evaluation after them."""
    import torch

    found: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for step in range(1, max(STEPS) + 1):
            if step in STEPS:
                found |= {f"step {step} {n}": _numpy(b).copy() for n, b in module.named_buffers()}
            module(*(t * growth(step) if t.is_floating_point() else t for t in tensors))
        module.eval()
        evaluated = channels_last(_numpy(module(*tensors)), inputs.layout)
    return {**found, "evaluation": evaluated}


def _numpy(tensor: "torch.Tensor") -> np.ndarray:
    array = tensor.detach()
    return (
        array.float() if array.dtype.itemsize < 4 and array.is_floating_point() else array
    ).numpy()
