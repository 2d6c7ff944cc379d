"""Which array of a PyTorch layer's call is which of its Flax twin's, and how it is laid out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._typing import Shape
from flaxstab.parity._calls import Asked, Call, Form, Slot
from flaxstab.parity._inputs import Layout, is_float

if TYPE_CHECKING:
    import torch

# torch.nn's names: these have the channels at axis 1 ...
_FIRST = ("Conv", "BatchNorm", "GroupNorm", "InstanceNorm", "Pool", "PixelShuffle", "Upsample")
# ... and these the features last, whatever the number of axes.
_LAST = ("Linear", "LayerNorm", "RMSNorm", "Embedding", "Attention", "Transformer", "GRU", "LSTM")


class UnfitError(ValueError):
    """A layer's calls on both sides cannot be matched; the message says why."""


class Fit(NamedTuple):
    """How one layer is fed alone.

    Attributes:
      arrays: what both sides are given, features last.
      ours: how Flax's layer is called.
      theirs: how PyTorch's is.
      moved: which of the arrays PyTorch has with the channels at axis 1.
    """

    arrays: tuple[np.ndarray, ...]
    ours: Form
    theirs: Form
    moved: tuple[bool, ...]


def fit(theirs: Call, ours: Asked | None, module: "torch.nn.Module", layout: Layout) -> Fit:
    """Matches a call of PyTorch's layer with one of its Flax twin.

    Args:
      theirs: PyTorch's call.
      ours: how Flax calls its layer; None if that is not known: then with PyTorch's arrays alone.
      module: PyTorch's layer.
      layout: that of the model's inputs.

    Raises:
      UnfitError: if they are given different numbers of arrays, or of other shapes.
    """
    if ours is None:
        tree = jax.tree.structure((tuple(range(len(theirs.arrays))), {}))
        moved = tuple(_moves(module, layout, a, None) for a in theirs.arrays)
        form = Form(tree, tuple(map(Slot, range(len(theirs.arrays)))))
        return Fit(_last(theirs.arrays, moved), form, theirs.form, moved)
    order = _order(theirs.arrays, ours.arrays)
    moved = tuple(
        bool(_moves(module, layout, a, ours.arrays[order.index(i)].shape))
        for i, a in enumerate(theirs.arrays)
    )
    slots = tuple(Slot(order[v.place]) if isinstance(v, Slot) else v for v in ours.form.leaves)
    form = Form(ours.form.tree, slots)
    return Fit(_last(theirs.arrays, moved), form, theirs.form, moved)


def outputs_of(
    outputs: Sequence[np.ndarray],
    shapes: Sequence[Shape],
    module: "torch.nn.Module",
    layout: Layout,
) -> tuple[bool | None, ...]:
    """Returns which of PyTorch's outputs have the channels at axis 1; None where no shape fits."""
    if len(outputs) != len(shapes):
        raise UnfitError(f"it returns {len(outputs)} arrays in PyTorch and {len(shapes)} in Flax")
    found: list[bool | None] = []
    for array, shape in zip(outputs, shapes, strict=True):
        try:
            found.append(_moves(module, layout, array, shape))
        except UnfitError:
            found.append(None)
    return tuple(found)


def _order(theirs: Sequence[np.ndarray], ours: Sequence[jax.ShapeDtypeStruct]) -> list[int]:
    """Returns the place of each of Flax's arrays among PyTorch's, by kind and in order."""
    kinds = [[i for i, a in enumerate(theirs) if is_float(a) == k] for k in (True, False)]
    floats = [bool(jnp.issubdtype(a.dtype, jnp.floating)) for a in ours]
    counts = [sum(f == k for f in floats) for k in (True, False)]
    if [len(k) for k in kinds] != counts:
        raise UnfitError(f"it is given {len(theirs)} arrays in PyTorch and {len(ours)} in Flax")
    left = [iter(kind) for kind in kinds]
    return [next(left[0] if f else left[1]) for f in floats]


def _moves(
    module: "torch.nn.Module", layout: Layout, array: np.ndarray, shape: Shape | None
) -> bool:
    """Whether PyTorch has an array's channels at axis 1, by Flax's shape if that is known.

    Where both arrangements have that shape the layer's type decides, or else the layout.
    """
    usual = array.ndim > 2 and is_float(array) and _usual(module, layout, array.ndim)
    if shape is None:
        return usual
    arranged = {False: array.shape, True: np.moveaxis(array, 1, -1).shape if array.ndim > 2 else ()}
    fits = [moves for moves, found in arranged.items() if tuple(found) == tuple(shape)]
    if not fits:
        raise UnfitError(f"its shapes are {array.shape} in PyTorch and {tuple(shape)} in Flax")
    return usual if usual in fits else fits[0]


def _usual(module: "torch.nn.Module", layout: Layout, axes: int) -> bool:
    kind = type(module).__name__
    if any(word in kind for word in _LAST):
        return False
    if any(word in kind for word in _FIRST):
        return True
    inside = (type(m).__name__ for m in module.modules())
    return layout == "image" or (axes > 3 and any("Conv2d" in k or "Pool2d" in k for k in inside))


def _last(arrays: Sequence[np.ndarray], moved: Sequence[bool]) -> tuple[np.ndarray, ...]:
    return tuple(
        np.moveaxis(a, 1, -1) if moves else a for a, moves in zip(arrays, moved, strict=True)
    )
