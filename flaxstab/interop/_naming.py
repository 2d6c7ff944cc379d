"""Trees that look like a model's variables, by PyTorch's names."""

import jax
import numpy as np
from flax import nnx

from flaxstab._typing import PyTree
from flaxstab.interop._entries import part
from flaxstab.interop._flattened import Flattened
from flaxstab.interop._walk import walk


class Naming:
    """PyTorch's names for the variables of one model, worked out once.

    For trees of the same paths: gradients, moments of an optimizer, statistics.

    Args:
      model: a module built of layers that have a rule.
      flattened: as for :func:`flaxstab.interop.load_state_dict`.

    Raises:
      ValueError: if a variable belongs to a module type without a rule, or the order of a norm's
        axes must be told.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> model = linear.Linear(2, 5, rngs=nnx.Rngs(0))
      >>> naming = Naming(model)
      >>> {n: a.shape for n, a in naming.tensors(nnx.state(model)).items()}
      {'weight': (5, 2), 'bias': (5,)}
    """

    def __init__(self, model: nnx.Module, *, flattened: Flattened | None = None) -> None:
        self._layers = [found.layer for found in walk(model, flattened) if not found.again]

    def tensors(self, tree: PyTree, *, gradients: bool = False) -> dict[str, np.ndarray]:
        """Returns the arrays of a tree by PyTorch's names, in PyTorch's layouts.

        Args:
          tree: an ``nnx.State`` with some of the model's paths, of variables or arrays.
          gradients: whether they are gradients: both of two biases that torch adds up have that
            of their sum.
        """
        known = {path for layer in self._layers for path in layer.paths.values()}
        flat: dict[tuple[object, ...], np.ndarray] = {
            path: np.asarray(leaf[...] if isinstance(leaf, nnx.Variable) else leaf)
            for path, leaf in nnx.to_flat_state(tree)
            if path in known and isinstance(leaf, nnx.Variable | jax.Array | np.ndarray)
        }
        found: dict[str, np.ndarray] = {}
        for layer in self._layers:
            for entry in layer.entries:
                paths = [layer.paths[name] for name in entry.variables]
                if all(path in flat for path in paths):
                    move = entry.gradient if gradients and entry.gradient else entry.to_torch
                    arrays = move(tuple(part(flat[path], layer.at) for path in paths))
                    names = (layer.prefix + name for name in entry.tensors)
                    found |= dict(zip(names, arrays, strict=True))
        return found
