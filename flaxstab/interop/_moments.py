"""An optimizer's moments under PyTorch's names: they move as the parameters do."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import Shape
from flaxstab.functional._paths import Names
from flaxstab.interop._entries import Arrays, Entry, Leaf
from flaxstab.interop._flattened import Flattened
from flaxstab.interop._matching import expected_shapes
from flaxstab.interop._walk import walk


class Group(NamedTuple):
    """Tensors of torch's and the parameters here that hold the same numbers.

    Attributes:
      tensors: the tensors' names.
      paths: where the parameters lie in the model.
      at: which part of them, by their first axes, where they hold a stack of layers.
      leaves: the parameters, or these parts.
      shapes: the tensors' shapes.
      entry: how they travel.
    """

    tensors: tuple[str, ...]
    paths: tuple[Names, ...]
    at: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    shapes: tuple[Shape, ...]
    entry: Entry

    @property
    def sizes(self) -> list[int]:
        """How many numbers each parameter, or part of one, has."""
        return [math.prod(leaf.shape) for leaf in self.leaves]

    def to_torch(self, arrays: Arrays) -> Arrays:
        """Returns moments of the parameters as those of the tensors."""
        if self.entry.gradient is None:
            return self.entry.to_torch(arrays)
        order = self._order()
        flat = np.concatenate([array.ravel() for array in arrays])
        return tuple(flat[places] for places in order)

    def to_flax(self, tensors: Arrays) -> Arrays:
        """Returns moments of the tensors as those of the parameters."""
        if self.entry.gradient is None:
            return self.entry.to_flax(tensors)
        order = np.concatenate([places.ravel() for places in self._order()])
        flat = np.empty(len(order), np.result_type(*tensors))
        flat[order] = np.concatenate([tensor.ravel() for tensor in tensors])
        parts = np.split(flat, np.cumsum(self.sizes)[:-1])
        return tuple(a.reshape(v.shape) for a, v in zip(parts, self.leaves, strict=True))

    def _order(self) -> Arrays:
        """Returns where each number of the tensors is among the parameters' own.

        Raises:
          ValueError: if the tensors are not the same numbers in another order. What squares a
            gradient knows nothing of a sum.
        """
        starts = np.cumsum([0, *self.sizes])
        places = tuple(
            np.arange(start, start + size, dtype=np.int32).reshape(leaf.shape)
            for start, size, leaf in zip(starts[:-1], self.sizes, self.leaves, strict=True)
        )
        gradient = self.entry.gradient or self.entry.to_torch
        moved = tuple(np.asarray(array) for array in gradient(places))
        flat = np.concatenate([array.ravel() for array in moved])
        check(
            np.array_equal(np.sort(flat), np.arange(starts[-1])),
            "an optimizer's state can be carried where torch's tensors are the parameters here, "
            "moved and not computed",
            fix="Two biases that are one here move twice as far in torch; freeze them, or begin "
            "with a new state.",
            tensors=self.tensors,
        )
        return tuple(array.astype(np.int64) for array in moved)


class Moments:
    """The parameters of a model and torch's names for them, each under all its names.

    Args:
      model: the model.
      flattened: as of :func:`load_state_dict`.

    Raises:
      ValueError: if a variable belongs to a module type without a rule.
    """

    def __init__(self, model: nnx.Module, flattened: Flattened | None) -> None:
        self._groups: dict[str, Group] = {}
        for layer in (found.layer for found in walk(model, flattened)):
            for entry in layer.entries:
                group = Group(
                    tuple(layer.prefix + name for name in entry.tensors),
                    tuple(tuple(map(str, layer.paths[name])) for name in entry.variables),
                    layer.at,
                    tuple(layer.values[name] for name in entry.variables),
                    expected_shapes(layer, entry),
                    entry,
                )
                self._groups |= dict.fromkeys(group.tensors, group)

    def groups(self, names: Iterable[str]) -> list[Group]:
        """Returns what holds the tensors of those names, each group once.

        Raises:
          ValueError: if the model has no such tensor, a group is not complete, or two of the names
            are of one parameter.
        """
        asked = dict.fromkeys(names)
        unknown = [name for name in asked if name not in self._groups]
        check(
            not unknown,
            "the optimizer's parameters must be tensors of the model",
            fix="Pass rename= for other names.",
            unknown=unknown[:3],
            number=len(unknown),
        )
        found: dict[object, Group] = {}
        for name in asked:
            group = self._groups[name]
            known = found.setdefault((group.paths, group.at), group)
            absent = [other for other in group.tensors if other not in asked]
            check(
                known.tensors == group.tensors and not absent,
                "the optimizer must hold tensors that belong together, and none twice",
                tensor=name,
                others=known.tensors if known.tensors != group.tensors else absent,
            )
        return list(found.values())
