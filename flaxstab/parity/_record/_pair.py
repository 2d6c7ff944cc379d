"""Two models, of which all that they compute is kept."""

from collections.abc import Sequence

import numpy as np

from flaxstab._typing import DTypeLike
from flaxstab.parity._inputs import Values
from flaxstab.parity._models import Pair
from flaxstab.parity._options import lower
from flaxstab.parity._watched import Watched


class WatchedPair(Pair):
    """A pair that also tells what its sides compute, and from which weights."""

    def watch(
        self, inputs: Sequence[np.ndarray], *, dtypes: Sequence[DTypeLike], seed: int
    ) -> Watched:
        """Runs both sides as :meth:`judge` does; returns all values and what judges them."""
        fed, watched = self.fed(inputs, seed), Watched()
        kinds, stored = lower(fed.arrays, dtypes)
        exact = self._exact(fed, stored)
        magnitudes = self._flax.magnitudes(exact.fed, exact.ours, exact.precision)
        watched.add("float64", exact.ours, exact.theirs, magnitudes)
        for kind in kinds:
            oracle = exact if kind == stored else self._exact(fed, kind)
            low = self._low(oracle, kind, magnitudes)
            watched.add(kind.name, low.ours, low.theirs, low.units)
            if oracle is not exact:  # what judges PyTorch's side where it is absent
                watched.torch[f"float64 of {kind.name}"] = oracle.theirs
            for finding in self._judged(low, oracle, kind, ()):
                errors = finding.jax_error, finding.torch_error
                watched.errors[kind.name, finding.name] = errors
        return watched

    def tensors(self) -> Values:
        """Returns the weights and statistics that both sides start from, by PyTorch's names."""
        return self._torch.tensors()

    def buffer_names(self) -> set[str]:
        """Returns the names of the tensors that are no parameters."""
        return self._torch.buffer_names()
