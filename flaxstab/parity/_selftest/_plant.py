"""What a planted fault is, and how one is planted in code that ships and taken out again."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from flaxstab._typing import DTypeLike
from flaxstab.functional import _attention, _standardize
from flaxstab.parity._inputs import Layout

if TYPE_CHECKING:
    import types

    import torch

Function: TypeAlias = Callable[..., "torch.Tensor"]  # of arrays of either framework
Planted: TypeAlias = AbstractContextManager[None]
Plant: TypeAlias = Callable[[], Planted]


class Sides(NamedTuple):
    """Two implementations, what they are fed, and a third one to tell which of them is right.

    Attributes:
      ours: the Flax side, as :func:`flaxstab.parity.compare` takes it.
      theirs: the PyTorch side.
      inputs: what both are fed; the clean run and every faulty run take the same.
      witness: the formula once more, in code that no fault is planted in.
      layout: as of ``compare``.
      dtypes: the precisions judged below float64.
    """

    ours: object
    theirs: object
    inputs: tuple[np.ndarray, ...]
    witness: object
    layout: Layout = None
    dtypes: tuple[DTypeLike, ...] = ()


@dataclass(frozen=True)
class Build:
    """Builds two sides anew, each alone if need be: Flax's side needs no PyTorch.

    Attributes:
      ours: builds the Flax side.
      theirs: builds the PyTorch side.
      inputs: as of :class:`Sides`.
      witness: makes the witness of the PyTorch side that was built.
      layout: as of :class:`Sides`.
      dtypes: as of :class:`Sides`.
    """

    ours: Callable[[], object]
    theirs: Callable[[], "torch.nn.Module | Function"]
    inputs: tuple[np.ndarray, ...]
    witness: Callable[..., object] = lambda _: None
    layout: Layout = None
    dtypes: tuple[DTypeLike, ...] = ()

    def __call__(self) -> Sides:
        """Builds both."""
        theirs = self.theirs()
        witness = self.witness(theirs)
        return Sides(self.ours(), theirs, self.inputs, witness, self.layout, self.dtypes)


class Fault(NamedTuple):
    """A mistake that a port makes, at the smallest size at which it matters.

    Attributes:
      name: the mistake.
      claim: what it breaks, in one line.
      case: where it shows, a name in the table of cases.
      check: what the names of the quantities that must catch it begin with.
      jax: plants it in the JAX side; ``None`` where that side has no such code.
      torch: plants it in the PyTorch side.
      limit: why the comparison cannot see it; '' if it must.
    """

    name: str
    claim: str
    case: str
    check: str
    jax: Plant | None
    torch: Plant | None
    limit: str = ""

    @property
    def plants(self) -> Mapping[str, Plant]:
        """The plants there are, by side."""
        both = {"jax": self.jax, "torch": self.torch}
        return {side: plant for side, plant in both.items() if plant is not None}


@contextmanager
def replaced(owner: object, name: str, make: Callable[[Function], Function]) -> Iterator[None]:
    """Replaces a function of a module or class by ``make`` of it, inside a ``with`` block.

    Args:
      owner: the module or class that defines it, or whose attribute its users look up.
      name: the function's name there.
      make: from the original to the faulty function.
    """
    original = vars(owner)[name]
    setattr(owner, name, make(original))
    _forget_compiled()  # or what was compiled before goes on without the fault, and after with it
    try:
        yield
    finally:
        setattr(owner, name, original)
        _forget_compiled()


def argument(owner: object, name: str, **changes: Function) -> Planted:
    """Changes arguments in every call of a function, inside a ``with`` block.

    Args:
      owner: as of :func:`replaced`.
      name: the function's name there.
      **changes: by parameter, a function from the right argument to the faulty one.
    """
    signature = inspect.signature(vars(owner)[name])

    def make(original: Function) -> Function:
        def faulty(*args: object, **named: object) -> object:
            call = signature.bind(*args, **named)
            call.apply_defaults()
            for parameter, change in changes.items():
                call.arguments[parameter] = change(call.arguments[parameter])
            return original(*call.args, **call.kwargs)

        return faulty

    return replaced(owner, name, make)


def result(owner: object, name: str, change: Function) -> Planted:
    """Changes what every call of a function returns, inside a ``with`` block.

    Args:
      owner: as of :func:`replaced`.
      name: the function's name there.
      change: from the right result to the faulty one.
    """
    return replaced(owner, name, lambda original: lambda *args, **named: change(
        original(*args, **named)
    ))  # fmt: skip


def told(owner: object, **changes: object) -> Plant:
    """Plants other options than an optimizer was given.

    Args:
      owner: the module that makes the optimizer.
      **changes: options by name, see ``flaxstab.optim._core.Options``.
    """
    return lambda: argument(
        owner, "transformation", options=lambda options: options._replace(**changes)
    )


def torch_functional() -> "types.ModuleType":
    """Returns ``torch.nn.functional``, where torch's modules look their functions up."""
    from torch.nn import functional

    return functional


def _forget_compiled() -> None:
    for module in (_attention, _standardize):
        module.forget_compiled()
