"""Runs a PyTorch module or function at any precision."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab._typing import DTypeLike
from flaxstab.parity._inputs import (
    STEPS,
    Inputs,
    Values,
    channels_first,
    channels_last,
    growth,
)
from flaxstab.parity._replay import replayed_dropout

if TYPE_CHECKING:
    import torch


def torch_dtype(dtype: DTypeLike) -> "torch.dtype":
    """Returns PyTorch's dtype of the same name."""
    import torch

    return getattr(torch, np.dtype(dtype).name)


class TorchSide:
    """A PyTorch module or function, ready to be run at any precision.

    Args:
      target: the module (it is copied, never changed, and set to training mode), or the function.
    """

    def __init__(self, target: "torch.nn.Module | Callable[..., torch.Tensor]") -> None:
        import torch

        self.function = target
        self.module = copy.deepcopy(target) if isinstance(target, torch.nn.Module) else None
        if self.module is not None:
            self.module.train()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns the module's tensors by name; of a function, none."""
        state = {} if self.module is None else self.module.state_dict()
        return {name: tensor.numpy() for name, tensor in state.items()}

    def rounded(self, dtype: DTypeLike) -> "TorchSide":
        """Returns a copy whose parameters and buffers are rounded to a dtype, and kept as wide.

        So every precision starts from the same numbers, and rounding them is nobody's error.
        """
        side = TorchSide(self.function if self.module is None else self.module)
        tensors = [] if side.module is None else [*side.module.parameters(), *side.module.buffers()]
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch_dtype(dtype)).to(tensor.dtype)
        return side

    def run(self, inputs: Inputs, dtype: DTypeLike, masks: object = None) -> Values:
        """Returns every quantity, computed with inputs and parameters of a dtype.

        Layers with running statistics keep them, and their parameters, in float32 or wider.
        Dropout layers replay the masks of ``masks``, if that is a Flax module.
        """
        module = None if self.module is None else _at_precision(self.module, torch_dtype(dtype))
        if module is None or not isinstance(masks, nnx.Module):
            return self._run(module, inputs, dtype)
        with replayed_dropout(masks, module, inputs.layout):
            return self._run(module, inputs, dtype)

    def _run(
        self, module: "torch.nn.Module | None", inputs: Inputs, dtype: DTypeLike
    ) -> dict[str, np.ndarray]:
        import torch

        kind = torch_dtype(dtype)
        arrays = [torch.tensor(channels_first(a, inputs.layout)) for a in inputs.arrays]
        tensors = [a.to(kind).requires_grad_() if a.is_floating_point() else a for a in arrays]
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


def _at_precision(module: "torch.nn.Module", kind: "torch.dtype") -> "torch.nn.Module":
    """Returns a copy at a dtype; batch and instance norms stay in float32 at least, as ours do."""
    import torch

    result = copy.deepcopy(module).to(kind)
    for layer in result.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._NormBase) and kind.itemsize < 4:
            layer.float()
    return result


def _numpy(tensor: "torch.Tensor") -> np.ndarray:
    import torch

    array = tensor.detach()
    if array.dtype == torch.bfloat16:
        return array.float().numpy().astype(jnp.bfloat16)
    return array.numpy()
