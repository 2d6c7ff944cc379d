"""PyTorch's side as it was recorded, where PyTorch itself is absent."""

from collections.abc import Callable, Mapping
from typing import NoReturn

import numpy as np
from flax import nnx

from flaxstab._typing import PyTree
from flaxstab.parity._inputs import Inputs, Values
from flaxstab.parity._precision import EXACT, Precision
from flaxstab.parity._replay import Draws
from flaxstab.parity._torch_side import TorchSide


class RecordedSide(TorchSide):
    """A PyTorch module or function of which only weights and results are left.

    Stands for a :class:`TorchSide` that is fed the same inputs.

    Args:
      values: results by precision, see :class:`flaxstab.parity._watched.Watched`.
      weights: the module's tensors, by the names that the results go by.
      buffers: names of those that are no parameters.
    """

    recorded = True

    def __init__(
        self, values: Mapping[str, Values], weights: Values, buffers: tuple[str, ...]
    ) -> None:
        self._values, self._weights, self._buffers = values, weights, buffers
        self.module, self.function, self.rename = None, _absent, str
        self.draws = Draws()

    def tensors(self) -> Values:
        """Returns the recorded tensors."""
        return self._weights

    def buffer_names(self) -> set[str]:
        """Returns the names of the tensors that are no parameters."""
        return {*self._buffers}

    def names(self) -> None:
        """Returns nothing: no error comes from a module that does not run."""

    def load(self, tensors: Values) -> None:
        """Takes nothing: what was recorded had these weights."""
        del tensors

    def run(
        self, fed: Inputs, precision: Precision = EXACT, flax: nnx.Module | None = None
    ) -> Values:
        """Returns what was recorded at a precision.

        Raises:
          ValueError: if nothing was.
        """
        del fed, flax
        return self.at(precision)

    def at(self, precision: Precision) -> Values:
        """Returns what was recorded at a precision; see :meth:`run`."""
        name, stored = (np.dtype(kind).name for kind in precision)
        special = f"{name} of {stored}"
        key = special if special in self._values else name
        if key not in self._values:
            raise ValueError(
                f"PyTorch's side must have been recorded in {name}, got "
                f"{', '.join(self._values) or 'nothing'}. Record it there again."
            )
        return self._values[key]

    def slope(
        self, fed: Inputs, name: str, direction: np.ndarray, flax: nnx.Module | None = None
    ) -> float:
        """Returns NaN: what was recorded cannot be run at other places."""
        del fed, name, direction, flax
        return float("nan")


def _absent(*inputs: object) -> NoReturn:
    """Stands for a function that was recorded."""
    raise ValueError(
        f"PyTorch's side must run to be called, got {len(inputs)} inputs for a record."
    )


class RecordedSteps:
    """PyTorch's training steps, as recorded; only the steps that a baseline keeps.

    Args:
      side: what was recorded.
      optional: names of quantities that JAX's side may do without.
    """

    def __init__(self, side: RecordedSide, optional: tuple[str, ...]) -> None:
        self.side, self.optional, self.draws = side, {*optional}, Draws()

    def applies(self) -> bool:
        """Whether an optimizer was recorded, rather than a function that changes gradients."""
        return any(name.startswith("step 1 param ") for name in self.side.at(EXACT))

    def start(self, precision: Precision) -> Callable[[tuple[np.ndarray, ...], PyTree], Values]:
        """Returns what tells the recorded values of one step after the other."""
        values, done = self.side.at(precision), 0

        def step(batch: tuple[np.ndarray, ...], state: PyTree) -> Values:
            nonlocal done
            del batch, state
            done += 1
            start = f"step {done} "
            return {n.removeprefix(start): a for n, a in values.items() if n.startswith(start)}

        return step
