"""A model's tensors by Flax's paths and in Flax's layouts, in whatever dtype they have."""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from flaxstab._checks import check
from flaxstab.interop._entries import Layer, tensors_of
from flaxstab.interop._report import LoadReport, Path, Rename, sort_out
from flaxstab.interop._state_dict import walk

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
    return {_dotted(path): array for path, array in loading.values.items()}, loading.report


def to_torch_names(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays by Flax's paths as PyTorch's tensors, by PyTorch's names.

    Raises:
      ValueError: if the model has other paths or shapes.
    """
    layers = [found.layer for found in walk(model) if not found.again]
    wanted = {
        _dotted(layer.paths[name]): value.shape
        for layer in layers
        for name, value in layer.values.items()
    }
    given = {name: array.shape for name, array in arrays.items()}
    odd = sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n))
    check(
        not odd,
        "the file must hold the model's variables, in their shapes",
        fix="Build the model with the options that it had.",
        odd=odd[:3],
        number=len(odd),
    )
    return tensors_of(
        layer._replace(values={n: arrays[_dotted(layer.paths[n])] for n in layer.values})
        for layer in layers
    )


def _in_dtypes(layer: Layer, dtypes: Mapping[str, np.dtype]) -> Layer:
    """Returns a layer of which every variable has the dtype of its tensor, if there is one."""
    values = dict(layer.values)
    for entry in layer.entries:
        kind, *others = {dtypes.get(layer.prefix + name) for name in entry.tensors}
        if kind is not None and not others:
            values |= {v: values[v].astype(kind) for v in entry.variables}
    return layer._replace(values=values)


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
