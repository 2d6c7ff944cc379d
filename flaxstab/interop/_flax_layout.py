"""A model's tensors by Flax's paths and in Flax's layouts, in whatever dtype they have."""

import math
from collections.abc import Mapping

import numpy as np
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import Shape
from flaxstab.interop._entries import Layer, Leaf, Path, part, tensors_of
from flaxstab.interop._matching import Rename, Spot, sort_out
from flaxstab.interop._report import LoadReport
from flaxstab.interop._walk import Walked, walk

TAG = {"format": "flaxstab", "layout": "flax"}
"""The metadata of a file with Flax's names."""


def is_tagged(metadata: Mapping[str, str]) -> bool:
    """Whether a file says that its names are Flax's."""
    return TAG.items() <= metadata.items()


def to_flax_names(
    model: nnx.Module, tensors: Mapping[str, np.ndarray], rename: Rename | None
) -> tuple[dict[str, np.ndarray], LoadReport]:
    """Returns PyTorch's tensors as the model would hold them, by path, and how each got there.

    Args:
      model: built of layers that have a rule; its own numbers and dtypes do not count.
      tensors: by PyTorch's names.
      rename: from their names to the model's.
    """
    found = sorted(walk(model), key=lambda walked: walked.again)
    names = {name if rename is None else rename(name): a.dtype for name, a in tensors.items()}
    loading = sort_out([_in_dtypes(w.layer, names) for w in found], tensors, rename)
    return _whole(loading.values, _shapes(found)), loading.report


def to_torch_names(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays by Flax's paths as PyTorch's tensors, by PyTorch's names.

    Raises:
      ValueError: if the model has other paths or shapes.
    """
    found = [walked for walked in walk(model) if not walked.again]
    wanted = {_dotted(path): shape for path, shape in _shapes(found).items()}
    given = {name: array.shape for name, array in arrays.items()}
    odd = sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n))
    check(
        not odd,
        "the file must hold the model's variables, in their shapes",
        fix="Build the model with the options that it had.",
        odd=odd[:3],
        number=len(odd),
    )
    return tensors_of(_holding(walked.layer, arrays) for walked in found)


def _shapes(found: list[Walked]) -> dict[Path, Shape]:
    """Returns the shapes of the variables; those of a stack have all its layers."""
    return {path: v.shape for walked in found for path, v in walked.variables.items()}


def _whole(
    values: Mapping[Spot, np.ndarray], shapes: Mapping[Path, Shape]
) -> dict[str, np.ndarray]:
    """Returns the variables that are complete by path, the layers of a stack in one."""
    parts: dict[Path, dict[tuple[int, ...], np.ndarray]] = {}
    for (path, at), array in values.items():
        parts.setdefault(path, {})[at] = array
    done = {}
    for path, by_place in parts.items():
        first = next(iter(by_place.values()))
        if () in by_place:
            done[_dotted(path)] = first
        elif sum(array.size for array in by_place.values()) == math.prod(shapes[path]):
            done[_dotted(path)] = stack = np.empty(shapes[path], first.dtype)
            for at, array in by_place.items():
                stack[at] = array
    return done


def _holding(layer: Layer, arrays: Mapping[str, np.ndarray]) -> Layer:
    """Returns a layer with other values, by Flax's paths."""

    def leaf(name: str) -> Leaf:
        array = part(arrays[_dotted(layer.paths[name])], layer.at)
        return Leaf(array.shape, array.dtype, lambda: array)

    return layer._replace(values={name: leaf(name) for name in layer.values})


def _in_dtypes(layer: Layer, dtypes: Mapping[str, np.dtype]) -> Layer:
    """Returns a layer of which every variable has the dtype of its tensor, if there is one."""
    values = dict(layer.values)
    for entry in layer.entries:
        kind, *others = {dtypes.get(layer.prefix + name) for name in entry.tensors}
        if kind is not None and not others:
            values |= {v: values[v]._replace(dtype=kind) for v in entry.variables}
    return layer._replace(values=values)


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
