"""A Flax module, a Linen module with its variables or a JAX function as pure functions."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Protocol

import flax.linen
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import unfreeze

from flaxstab import interop
from flaxstab._typing import Array, PyTree
from flaxstab.parity._inputs import Values
from flaxstab.parity._place import Names, located

REST = nnx.All(nnx.Not(nnx.Param), nnx.Not(nnx.Intermediate))  # sown values come and go


class Modes(Protocol):
    """Pure functions of parameters, other variables and inputs, one for each mode."""

    def train(self, params: PyTree, rest: PyTree, inputs: list[Array]) -> tuple[object, PyTree]:
        """Returns the output in training mode and the other variables after it."""

    def evaluate(self, params: PyTree, rest: PyTree, inputs: list[Array]) -> tuple[object, PyTree]:
        """Returns the output in evaluation mode and the other variables after it."""


class Program(Modes, Protocol):
    """What is compared."""

    is_module: bool  # whether there is a mode, and statistics may change

    def variables(self) -> tuple[PyTree, PyTree]:
        """Returns the parameters and the other variables."""

    def load(self, tensors: Values, optional: Collection[str] = ()) -> tuple[str, ...]:
        """Takes PyTorch's tensors; returns the names of optional ones that it does without."""

    def tensors(self) -> Values:
        """Returns parameters and buffers in PyTorch's names and layouts."""

    def named(self, tree: PyTree, *, gradients: bool = False) -> Values:
        """Names the arrays of a tree like the parameters or like the other variables."""

    def names(self) -> Names | None:
        """Returns how submodules are named, to say where an error came from."""

    def pinned(self) -> tuple[str, ...]:
        """Returns the submodules that compute in a dtype of their own, in words."""


class Linen(NamedTuple):
    """A Linen module with its variables, to be compared with a PyTorch module.

    Attributes:
      module: the module.
      variables: its variables, such as ``{'params': ..., 'batch_stats': ...}``.
      training: keyword arguments of ``module.apply`` in training mode, such as
        ``{'train': True}``.
      evaluation: the same in evaluation mode.
    """

    module: flax.linen.Module
    variables: Mapping[str, PyTree]
    training: Mapping[str, PyTree] = {}
    evaluation: Mapping[str, PyTree] = {}


class FunctionProgram:
    """A function of arrays: no variables, one mode."""

    is_module = False

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def variables(self) -> tuple[PyTree, PyTree]:
        return {}, {}

    def train(self, params: PyTree, rest: PyTree, inputs: list[Array]) -> tuple[object, PyTree]:
        del params
        return self._function(*inputs), rest

    def evaluate(self, params: PyTree, rest: PyTree, inputs: list[Array]) -> tuple[object, PyTree]:
        return self.train(params, rest, inputs)

    def load(self, tensors: Values, optional: Collection[str] = ()) -> tuple[str, ...]:
        if tensors.keys() - optional:
            raise ValueError(
                "a function has no parameters, got a PyTorch module with "
                f"{', '.join(list(tensors)[:5])}. Compare it with a Flax module."
            )
        return ()

    def tensors(self) -> Values:
        return {}

    def named(self, tree: PyTree, *, gradients: bool = False) -> Values:
        del tree, gradients
        return {}

    def names(self) -> Names | None:
        return None

    def pinned(self) -> tuple[str, ...]:
        return ()


class NNXProgram:
    """An NNX module; it is copied, never changed, and set to either mode."""

    is_module = True

    def __init__(self, module: nnx.Module) -> None:
        self.module = nnx.clone(module)
        nnx.pop(self.module, nnx.Intermediate)
        evaluating = nnx.clone(self.module)
        self.module.train()
        evaluating.eval()
        self._training, self._evaluating = nnx.graphdef(self.module), nnx.graphdef(evaluating)
        self._naming = interop.Naming(self.module)

    def variables(self) -> tuple[PyTree, PyTree]:
        _, params, *rest = nnx.split(self.module, nnx.Param, ...)
        return params, rest[0]

    def merged(self, params: PyTree, rest: PyTree, *, training: bool = True) -> nnx.Module:
        """Returns a model of its own in either mode."""
        graph = self._training if training else self._evaluating
        return nnx.merge(graph, params, rest, copy=True)

    def train(self, params: PyTree, rest: PyTree, inputs: list[Array]) -> tuple[object, PyTree]:
        model = self.merged(params, rest)
        return model(*inputs), nnx.state(model, REST)

    def evaluate(self, params: PyTree, rest: PyTree, inputs: list[Array]) -> tuple[object, PyTree]:
        model = self.merged(params, rest, training=False)
        return model(*inputs), nnx.state(model, REST)

    def load(self, tensors: Values, optional: Collection[str] = ()) -> tuple[str, ...]:
        report = interop.load_state_dict(self.module, tensors, strict=False)
        needless = tuple(name for name in report.unexpected if name in optional)
        if report.missing or report.mismatched or len(needless) < len(report.unexpected):
            raise ValueError(
                f"PyTorch's weights must fit the Flax model, got {report}. Give both the same "
                "layers, pass rename= for other names, or weights=None to load them yourself."
            )
        return report.ignored + needless

    def tensors(self) -> Values:
        return interop.state_dict(self.module)

    def named(self, tree: PyTree, *, gradients: bool = False) -> Values:
        return self._naming.tensors(tree, gradients=gradients)

    def names(self) -> Names | None:
        return Names(nnx.Module, _nnx_name)

    def pinned(self) -> tuple[str, ...]:
        modules = interop.named_modules(self.module).items()
        found = [f"{name or 'the model'} ({why})" for name, m in modules for why in _pins(m)]
        return tuple(found)


def _pins(module: nnx.Module) -> list[str]:
    """Says how a module computes in less than its inputs' precision."""
    dtype, found = vars(module).get("dtype"), []
    if dtype is not None and jnp.dtype(dtype) != np.float64:
        found.append(f"dtype={jnp.dtype(dtype).name}")
    if vars(module).get("attention_fn") is nnx.dot_product_attention:
        found.append("JAX's attention takes its softmax in float32")
    return found


def _nnx_name(root: nnx.Module, module: nnx.Module) -> str:
    places = interop.named_modules(root)
    return next((name for name, found in places.items() if found is module), "")


class LinenProgram:
    """A Linen module with its variables."""

    is_module = True

    def __init__(self, linen: Linen, inputs: tuple[np.ndarray, ...]) -> None:
        self._linen = linen
        self._variables: Mapping[str, PyTree] = unfreeze(dict(linen.variables))
        with located("Flax", self.names(), inputs):
            self._places = interop.linen_places(
                linen.module, self._variables, inputs, linen.training, mutable=self._collections()
            )

    def _collections(self) -> list[str]:
        return [name for name in self._variables if name != "params"]

    def variables(self) -> tuple[PyTree, PyTree]:
        rest = {name: self._variables[name] for name in self._collections()}
        return {"params": self._variables.get("params", {})}, rest

    def train(self, params: PyTree, rest: PyTree, inputs: list[Array]) -> tuple[object, PyTree]:
        output, changed = self._linen.module.apply(
            {**params, **rest}, *inputs, mutable=self._collections(), **self._linen.training
        )
        return output, {**rest, **changed}

    def evaluate(self, params: PyTree, rest: PyTree, inputs: list[Array]) -> tuple[object, PyTree]:
        variables = {**params, **rest}  # which apply does not change, as nothing is mutable
        return self._linen.module.apply(variables, *inputs, **self._linen.evaluation), rest

    def load(self, tensors: Values, optional: Collection[str] = ()) -> tuple[str, ...]:
        del optional
        loaded = interop.load_linen_state_dict(self._places, self._variables, tensors)
        self._variables, report = loaded
        return report.ignored

    def tensors(self) -> Values:
        return interop.linen_state_dict(self._places, self._variables)

    def named(self, tree: PyTree, *, gradients: bool = False) -> Values:
        del gradients  # no Linen rule adds tensors up
        return interop.linen_state_dict(self._places, tree)

    def names(self) -> Names | None:
        return Names(flax.linen.Module, lambda _, module: ".".join(module.path))

    def pinned(self) -> tuple[str, ...]:
        return ()


def program(target: object, inputs: tuple[np.ndarray, ...]) -> Program:
    """Makes a program of a module, a :class:`Linen`, or a function.

    Args:
      target: what is compared.
      inputs: what it will be called with.

    Raises:
      ValueError: if the target is none of these.
    """
    if isinstance(target, nnx.Module):
        return NNXProgram(target)
    if isinstance(target, Linen):
        return LinenProgram(target, inputs)
    if isinstance(target, flax.linen.Module):
        raise ValueError(
            "a Linen module must come with its variables, got the module alone. "
            "Pass parity.Linen(module, variables)."
        )
    if callable(target) and not isinstance(target, type):
        return FunctionProgram(target)
    raise ValueError(
        "flax_side must be an nnx.Module, a parity.Linen, a function, an optax transformation or "
        f"a parity.TrainStep, got {target!r:.60} of {type(target).__name__}. Pass an instance."
    )
