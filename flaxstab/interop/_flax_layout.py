"""A model's tensors by Flax's paths and in Flax's layouts, in whatever dtype they have."""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from flaxstab._checks import check
from flaxstab.interop._entries import Layer, Leaf, Path, tensors_of
from flaxstab.interop._matching import Rename, sort_out
from flaxstab.interop._report import LoadReport
from flaxstab.interop._walk import walk

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
    shapes = {path: v.shape for walked in found for path, v in walked.variables.items()}
    arrays: dict[str, np.ndarray] = {}
    for (path, at), array in loading.values.items():
        if at:  # one layer of a stack
            whole = arrays.setdefault(_dotted(path), np.zeros(shapes[path], array.dtype))
            whole[at] = array
        else:
            arrays[_dotted(path)] = array
    return arrays, loading.report


def to_torch_names(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays by Flax's paths as PyTorch's tensors, by PyTorch's names.

    Raises:
      ValueError: if the model has other paths or shapes.
    """
    found = [walked for walked in walk(model) if not walked.again]
    wanted = {_dotted(path): v.shape for walked in found for path, v in walked.variables.items()}
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


def _holding(layer: Layer, arrays: Mapping[str, np.ndarray]) -> Layer:
    """Returns a layer with values from elsewhere."""

    def leaf(name: str) -> Leaf:
        array = arrays[_dotted(layer.paths[name])][layer.at]
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
