"""Which array of a PyTorch layer's call is which of its Flax twin's, and how it is laid out."""

import inspect
from collections.abc import Mapping, Sequence
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

# Keywords of one framework alone: of modes, draws, and what else is returned.
_MODES = ("deterministic", "rngs", "train", "training", "use_running_average", "sow_weights",
          "need_weights", "average_attn_weights")  # fmt: skip


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
      ours: how Flax calls its layer, which is given PyTorch's values of keywords that both calls
        have; None if that is not known: then with PyTorch's arrays alone.
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
    order = _order(theirs.arrays, ours.arrays, _by_name(theirs, ours))
    moved = tuple(
        bool(_moves(module, layout, a, ours.arrays[order.index(i)].shape))
        for i, a in enumerate(theirs.arrays)
    )
    slots = tuple(Slot(order[v.place]) if isinstance(v, Slot) else v for v in ours.form.leaves)
    args, kwargs = jax.tree.unflatten(ours.form.tree, slots)
    given = {n: v for n, v in _keywords(theirs).items() if n in kwargs and _plain(v, kwargs[n])}
    leaves, tree = jax.tree.flatten((args, kwargs | given), is_leaf=_is_slot)
    return Fit(_last(theirs.arrays, moved), Form(tree, tuple(leaves)), theirs.form, moved)


def unmatched(
    theirs: Call, ours: Asked | None, module: "torch.nn.Module", flax: object
) -> tuple[str, ...]:
    """Returns the keywords, arrays apart, that only one side's call gives a value that matters.

    Args:
      theirs: PyTorch's call.
      ours: Flax's; None if that is not known.
      module: PyTorch's layer.
      flax: Flax's layer.
    """
    yours, mine = _keywords(theirs), {} if ours is None else _keywords(ours)
    wrong = [n for n in yours.keys() & mine.keys() if not _alike(yours[n], mine[n])]
    kinds = ((yours, mine, module.forward), (mine, yours, type(flax).__call__))
    for some, others, function in kinds:
        known = inspect.signature(function).parameters
        wrong += [
            name
            for name, value in some.items()
            if name not in {*others, *_MODES}
            and not _is_slot(value)
            and not (name in known and _equal(value, known[name].default))
        ]
    return tuple(sorted(wrong))


def _keywords(call: Call | Asked) -> dict[str, object]:
    _, kwargs = jax.tree.unflatten(call.form.tree, call.form.leaves)
    return dict(kwargs)


def _is_slot(value: object) -> bool:
    return isinstance(value, Slot)


def _plain(*values: object) -> bool:
    return all(isinstance(v, bool | int | float | complex | str | None) for v in values)


def _equal(one: object, other: object) -> bool:
    return one is other or (_plain(one, other) and one == other)


def _alike(one: object, other: object) -> bool:
    return _plain(one, other) or (_is_slot(one) and _is_slot(other)) or one is other


def _by_name(theirs: Call, ours: Asked) -> dict[int, int]:
    """Returns the place of Flax's arrays among PyTorch's where both are given by one name."""
    yours, found = _keywords(theirs), {}
    for name, value in _keywords(ours).items():
        twin = yours.get(name)
        if isinstance(value, Slot) and isinstance(twin, Slot):
            found[value.place] = twin.place
    return found


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


def _order(
    theirs: Sequence[np.ndarray], ours: Sequence[jax.ShapeDtypeStruct], known: Mapping[int, int]
) -> list[int]:
    """Returns the place of each of Flax's arrays among PyTorch's: as known, or by kind in order."""
    kinds = [[i for i, a in enumerate(theirs) if is_float(a) == k] for k in (True, False)]
    floats = [bool(jnp.issubdtype(a.dtype, jnp.floating)) for a in ours]
    counts = [sum(f == k for f in floats) for k in (True, False)]
    if [len(k) for k in kinds] != counts:
        raise UnfitError(f"it is given {len(theirs)} arrays in PyTorch and {len(ours)} in Flax")
    same = all(is_float(theirs[b]) == floats[a] for a, b in known.items())
    if not same or len({*known.values()}) < len(known):
        known = {}
    left = [iter([i for i in kind if i not in known.values()]) for kind in kinds]
    return [known[p] if p in known else next(left[not f]) for p, f in enumerate(floats)]


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
