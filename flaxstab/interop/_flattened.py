"""Features in the order in which PyTorch counts those of an image: channels first."""

import math
from collections.abc import Mapping

import numpy as np

from flaxstab._checks import check
from flaxstab._typing import Shape
from flaxstab.interop._entries import Arrays, Entry, Layer

Flattened = Mapping[str, Shape | None]

_WORDS = "(C, *space) -> (*space, C)"


def is_ambiguous(layer: Layer) -> bool:
    """Whether a norm's axes are all of one size: its shape is then no proof of their order."""
    return any(
        len(set(layer.values[variable].shape)) == 1 < layer.values[variable].shape[0]
        for entry in layer.entries
        for variable in entry.variables
        if entry.features > 1
    )


def channels_first(layer: Layer, shape: Shape | None) -> Layer:
    """Returns a layer whose input's features are an image's, which torch counts channels first.

    Args:
      layer: a linear layer or a norm.
      shape: the image's, in Flax's order, channels last; ``None`` where torch's order is ours.

    Raises:
      ValueError: if the layer is another one, or the shape is not that of its features.
    """
    check(
        any(entry.features for entry in layer.entries),
        "flattened must name linear layers, batch norms, LayerNorms or RMSNorms with parameters",
        layer=layer.prefix.rstrip("."),
    )
    if shape is None:
        return layer
    for entry in layer.entries:
        for variable in entry.variables if entry.features else ():
            _check_fits(layer, layer.values[variable].shape[: entry.features], shape)
    return layer._replace(entries=tuple(_permuted(e, shape) for e in layer.entries))


def _check_fits(layer: Layer, axes: Shape, shape: Shape) -> None:
    alone = len(axes) == 1
    sizes = all(isinstance(n, int | np.integer) and n >= 1 for n in shape)
    check(
        len(shape) > 1 and sizes and (math.prod(shape) == axes[0] if alone else axes == (*shape,)),
        "flattened must give the shape of a layer's features in Flax's order: (*space, C)",
        fix=f"It has {axes[0]} features." if alone else f"Its axes are {axes}.",
        layer=layer.prefix.rstrip("."),
        shape=shape,
    )


def _permuted(entry: Entry, shape: Shape) -> Entry:
    if not entry.features:
        return entry
    alone, last = entry.features == 1, len(shape) - 1

    def moved(array: np.ndarray, axes: Shape, source: int, target: int) -> np.ndarray:
        rest = array.shape[entry.features :]
        image = np.moveaxis(array.reshape(*axes, *rest), source, target)
        return image.reshape(array.shape) if alone else image

    def to_torch(values: Arrays) -> Arrays:
        return entry.to_torch(tuple(moved(value, shape, last, 0) for value in values))

    def to_flax(tensors: Arrays) -> Arrays:
        first = (shape[-1], *shape[:-1])
        return tuple(moved(value, first, 0, last) for value in entry.to_flax(tensors))

    words = _WORDS if entry.words == "as is" else f"{entry.words}, in: {_WORDS}"
    return entry._replace(to_torch=to_torch, to_flax=to_flax, words=words)
