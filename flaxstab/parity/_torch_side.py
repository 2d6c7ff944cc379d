"""Runs a PyTorch module or function at any precision."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab._typing import DTypeLike
from flaxstab.parity._inputs import (
    STEPS,
    Inputs,
    Layout,
    Values,
    channels_first,
    channels_last,
    growth,
    is_integral,
    named_leaves,
)
from flaxstab.parity._place import Names, located
from flaxstab.parity._precision import EXACT, Precision, jax_at
from flaxstab.parity._replay import Draws, replayed

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

Rename = Callable[[str], str]


def torch_dtype(dtype: DTypeLike) -> "torch.dtype":
    """Returns PyTorch's dtype of the same name."""
    import torch

    return getattr(torch, np.dtype(dtype).name)


class TorchSide:
    """A PyTorch module or function, ready to be run at any precision.

    Args:
      target: the module (it is copied, never changed, and set to training mode), or the function.
      rename: from this module's names to the names that the results go by.

    Attributes:
      recorded: false; see :class:`flaxstab.parity._recorded.RecordedSide`.

    Raises:
      ValueError: if the target is neither.
    """

    recorded = False

    def __init__(
        self,
        target: "torch.nn.Module | Callable[..., torch.Tensor]",
        rename: Rename | None = None,
    ) -> None:
        import torch

        if not callable(target) or isinstance(target, type):
            raise ValueError(
                "torch_side must be a torch.nn.Module or a function, got "
                f"{target!r:.60} of {type(target).__name__}. Pass an instance."
            )
        self.function = target
        self.module = copy.deepcopy(target) if isinstance(target, torch.nn.Module) else None
        self.rename = rename or (lambda name: name)
        self.draws = Draws()
        if self.module is not None:
            self.module.train()

    def tensors(self) -> Values:
        """Returns the module's tensors by name; of a function, none."""
        state = {} if self.module is None else self.module.state_dict()
        return {self.rename(name): numpy_of(tensor.cpu()) for name, tensor in state.items()}

    def buffer_names(self) -> set[str]:
        """Returns the names of the module's tensors that are no parameters."""
        if self.module is None:
            return set()
        params = {self.rename(name) for name, _ in self.module.named_parameters()}
        return self.tensors().keys() - params

    def load(self, tensors: Values) -> None:
        """Gives the module other tensors of the same names; those it lacks keep their values.

        Raises:
          ValueError: if a name or a shape does not fit.
        """
        import torch

        state = {} if self.module is None else self.module.state_dict()
        own = {self.rename(name): tensor for name, tensor in state.items()}
        wrong = [
            f"{name} {array.shape} for {tuple(own[name].shape) if name in own else 'none'}"
            for name, array in tensors.items()
            if name not in own or tuple(own[name].shape) != array.shape
        ]
        absent = own.keys() - tensors.keys() - self.buffer_names()
        wrong += [f"none for {name}" for name in sorted(absent)]
        if wrong:
            raise ValueError(
                f"the Flax weights must fit the PyTorch module, got {', '.join(wrong[:5])}. "
                "Give both modules the same layers, or pass rename=."
            )
        with torch.no_grad():
            for name, array in tensors.items():
                own[name].copy_(torch.tensor(array))

    def run(
        self, fed: Inputs, precision: Precision = EXACT, flax: nnx.Module | None = None
    ) -> Values:
        """Returns every quantity, computed with inputs and parameters of a dtype.

        Layers with running statistics keep them, and their parameters, in float32 or wider.
        Random layers replay the draws of ``flax``, if that is an NNX module.
        """
        with self.ready(fed, precision, flax) as (module, tensors):
            outputs = self.call(module, tensors, fed)
            found = {n: channels_last(numpy_of(a), fed.layout) for n, a in outputs.items()}
            found |= self.gradients(module, tensors, outputs, fed)
            if module is None:
                evaluated: Values = {n: a for n, a in found.items() if n.startswith("output")}
            else:
                steps, outputs = self._trained(module, tensors, fed)
                found |= steps
                evaluated = {n: channels_last(numpy_of(a), fed.layout) for n, a in outputs.items()}
        return found | {n.replace("output", "evaluation", 1): a for n, a in evaluated.items()}

    @contextmanager
    def ready(
        self, fed: Inputs, precision: Precision, flax: nnx.Module | None
    ) -> "Iterator[tuple[torch.nn.Module | None, list[torch.Tensor]]]":
        """Yields a copy of the module at a precision, replaying draws, and its inputs."""
        import torch

        kind = torch_dtype(precision.compute)
        module = None if self.module is None else at_precision(self.module, precision)
        arrays = [torch_tensor(channels_first(a, fed.layout)) for a in fed.arrays]
        tensors = [a.to(kind).requires_grad_() if a.is_floating_point() else a for a in arrays]
        replaying: AbstractContextManager[object] = nullcontext()
        if flax is not None and module is not None:
            self.draws = Draws()
            replaying = replayed(flax, module, fed.layout, self.draws, self.rename)
        # As the run of JAX's side whose draws are replayed.
        with jax_at(precision), torch.enable_grad(), replaying:
            yield module, tensors

    def call(
        self, module: "torch.nn.Module | None", tensors: "list[torch.Tensor]", fed: Inputs
    ) -> "Tensors":
        """Returns the outputs of the module, or of the function, by name."""
        with located("PyTorch", self.names(), fed.arrays):
            # Clones: a model may change its input in place.
            output = (self.function if module is None else module)(*(t.clone() for t in tensors))
        outputs = named_leaves("output", output)
        _check_outputs(outputs, fed)
        return outputs

    def names(self) -> Names | None:
        """Returns how submodules are named, to say where an error came from."""
        import torch

        def name_of(root: "torch.nn.Module", module: "torch.nn.Module") -> str:
            return next((n for n, found in root.named_modules() if found is module), "")

        return None if self.module is None else Names(torch.nn.Module, name_of)

    def gradients(
        self,
        module: "torch.nn.Module | None",
        tensors: "list[torch.Tensor]",
        outputs: "Tensors",
        fed: Inputs,
    ) -> dict[str, np.ndarray]:
        """Returns the gradients of inputs and parameters for the cotangents."""
        import torch

        floats = [t for t in tensors if t.requires_grad]
        named = {} if module is None else dict(module.named_parameters())
        smooth = {n: a for n, a in outputs.items() if a.requires_grad}
        wanted = [*floats, *named.values()]
        pulled = [
            torch_tensor(channels_first(fed.cotangents[n], fed.layout)).to(a.dtype)
            for n, a in smooth.items()
        ]
        grads = [torch.zeros_like(t) for t in wanted]
        if smooth and wanted:
            grads = torch.autograd.grad(
                list(smooth.values()), wanted, pulled, allow_unused=True, materialize_grads=True
            )
        found = {
            f"grad input {i}": channels_last(numpy_of(g), fed.layout)
            for i, g in enumerate(grads[: len(floats)])
        }
        params = zip(named, grads[len(floats) :], strict=True)
        return found | {f"grad {self.rename(n)}": numpy_of(g) for n, g in params}

    def _trained(
        self, module: "torch.nn.Module", tensors: "list[torch.Tensor]", fed: Inputs
    ) -> "tuple[dict[str, np.ndarray], Tensors]":
        """Returns buffers after some training steps, and the output in evaluation after them."""
        import torch

        found: dict[str, np.ndarray] = {}
        with torch.no_grad():
            for step in range(1, max(STEPS) + 1):
                if step > 1:
                    outputs = self.call(module, [_grown(t, step - 1) for t in tensors], fed)
                    late = {n: channels_last(numpy_of(a), fed.layout) for n, a in outputs.items()}
                    found |= {f"step {step} {n}": a for n, a in late.items() if step in STEPS}
                if step in STEPS:
                    found |= {f"step {step} {n}": b for n, b in self.buffers(module).items()}
        module.eval()
        with torch.no_grad():
            evaluated = self.call(module, tensors, fed)
        left = {f"after evaluation {n}": b for n, b in self.buffers(module).items()}
        return found | left, evaluated

    def buffers(self, module: "torch.nn.Module") -> dict[str, np.ndarray]:
        """Returns copies of a module's buffers, those that its state_dict holds."""
        kept = module.state_dict().keys()
        named = ((n, b) for n, b in module.named_buffers() if n in kept)
        return {self.rename(n): numpy_of(b).copy() for n, b in named}

    def slope(
        self, fed: Inputs, name: str, direction: np.ndarray, flax: nnx.Module | None = None
    ) -> float:
        """Returns the slope of <cotangents, outputs> along a direction, in float64; NaN at a kink.

        Args:
          fed: the inputs.
          name: what moves, as its gradient is named: ``'grad input 0'`` or ``'grad weight'``.
          direction: like the gradient.
          flax: see :meth:`run`.
        """
        totals, step = [], 0.0
        layout: Layout = fed.layout if name.startswith("grad input ") else None
        for sign in (-1, 0, 1):
            with self.ready(fed, EXACT, flax) as (module, tensors):
                moving = self._variable(module, tensors, name).detach()  # of the same memory
                step = 1e-5 * max(float(moving.abs().max()), 1e-3)
                moving += sign * step * torch_tensor(channels_first(direction, layout))
                outputs = self.call(module, tensors, fed)
                pairs = [
                    (outputs[n], channels_first(c, fed.layout)) for n, c in fed.cotangents.items()
                ]
                totals.append(sum(float((a.detach() * torch_tensor(c)).sum()) for a, c in pairs))
        before, after = ((b - a) / step for a, b in itertools.pairwise(totals))
        kink = abs(after - before) > 1e-2 * max(abs(before), abs(after))
        return np.nan if kink else (before + after) / 2

    def _variable(
        self, module: "torch.nn.Module | None", tensors: "list[torch.Tensor]", name: str
    ) -> "torch.Tensor":
        if name.startswith("grad input "):
            return [t for t in tensors if t.requires_grad][int(name.removeprefix("grad input "))]
        named = {} if module is None else dict(module.named_parameters())
        return next(p for n, p in named.items() if f"grad {self.rename(n)}" == name)


def _check_outputs(outputs: "Tensors", fed: Inputs) -> None:
    """Refuses outputs that are no tensors, or whose names or shapes differ from Flax's."""
    import torch

    for name, value in outputs.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"PyTorch's outputs must be tensors, got {name} of {type(value).__name__}. "
                "Wrap that side to return tensors."
            )
    if not fed.cotangents.keys() <= outputs.keys():
        raise ValueError(
            f"both sides must return the same structure, got {', '.join(fed.cotangents)} from "
            f"Flax and {', '.join(outputs)} from PyTorch. Wrap one side to return what the other "
            "returns."
        )
    for name, cotangent in fed.cotangents.items():
        expected = channels_first(cotangent, fed.layout).shape
        if tuple(outputs[name].shape) != expected:
            raise ValueError(
                f"both sides must have outputs of one shape, got {name} {expected} from Flax "
                f"(in torch's layout) and {tuple(outputs[name].shape)} from PyTorch. "
                "For images pass layout='image'."
            )


def _grown(tensor: "torch.Tensor", step: int) -> "torch.Tensor":
    still = not tensor.is_floating_point() or is_integral(numpy_of(tensor))
    return tensor if still else tensor * growth(step)


def at_precision(module: "torch.nn.Module", precision: Precision) -> "torch.nn.Module":
    """Returns a copy at a dtype; layers with running statistics stay in float32, as ours do."""
    import torch

    kind, stored = torch_dtype(precision.compute), torch_dtype(precision.stored)
    result = copy.deepcopy(module)
    for tensor in [*result.parameters(), *result.buffers()]:
        if tensor.is_floating_point():
            tensor.requires_grad_(isinstance(tensor, torch.nn.Parameter))  # frozen ones, too
            tensor.data = tensor.data.to(stored).to(torch.promote_types(tensor.dtype, stored))
    result = result.to(kind)
    for layer in result.modules():
        statistical = isinstance(layer, torch.nn.modules.batchnorm._NormBase)
        statistical |= any(name == "running_mean" for name, _ in layer.named_buffers(recurse=False))
        if statistical and kind.itemsize < 4:
            layer.float()
    return result


def torch_tensor(array: np.ndarray) -> "torch.Tensor":
    """Returns an array as a tensor of its own memory."""
    import torch

    return torch.tensor(np.asarray(array))


def numpy_of(tensor: "torch.Tensor") -> np.ndarray:
    """Returns a tensor as an array of the same dtype, bfloat16 included."""
    import torch

    array = tensor.detach()
    if array.dtype == torch.bfloat16:
        return array.float().numpy().astype(jnp.bfloat16)
    return array.numpy()
