"""How a side computes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import jax
import numpy as np

from flaxstab._typing import DTypeLike


class Precision(NamedTuple):
    """How a side computes.

    Attributes:
      compute: the inputs' dtype; Flax's parameters and statistics are float64 with float64, else
        float32.
      stored: the dtype to which parameters and statistics are rounded first, so that every
        precision starts from the same numbers and rounding them is nobody's error.
    """

    compute: DTypeLike = np.float64
    stored: DTypeLike = np.float64

    @property
    def wide(self) -> DTypeLike:
        """The dtype of Flax's parameters and statistics."""
        return np.float64 if self.compute == np.float64 else np.float32


EXACT = Precision()


@contextmanager
def jax_at(precision: Precision) -> Iterator[None]:
    """Sets JAX's x64 mode, and for float64, which is the oracle, exact matrix products."""
    exact = precision.compute == np.float64
    with jax.enable_x64(exact), jax.default_matmul_precision("highest") if exact else nullcontext():
        yield
