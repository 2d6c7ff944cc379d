"""Bare parameters of models, which PyTorch's counterparts hold under the same names."""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from flaxstab import interop


def carry_as_they_are(module_type: type[nnx.Module], *names: str) -> None:
    """Teaches interop that a model's own parameters have PyTorch's names and layouts.

    Args:
      module_type: the model's type.
      *names: its parameters' attributes.
    """

    def to_torch(module: nnx.Module) -> dict[str, np.ndarray]:
        return {name: np.asarray(vars(module)[name][...]) for name in names}

    def to_flax(module: nnx.Module, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        del module
        return {name: tensors[name] for name in names}

    interop.register(module_type, to_torch=to_torch, to_flax=to_flax)
