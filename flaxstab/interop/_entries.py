"""What a layer's variables are called and laid out as in PyTorch: the entries of every table."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from flaxstab._typing import Shape

Arrays = tuple[np.ndarray, ...]
Move = Callable[[np.ndarray], np.ndarray]


class Entry(NamedTuple):
    """Variables of a layer and the tensors of torch's layer that hold the same numbers.

    Most entries are one variable and one tensor; a packed tensor holds several variables.

    Attributes:
      variables: their names in Flax, with dots for those of submodules.
      tensors: the tensors' names in torch.
      to_torch: from the variables' values to the tensors, in torch's layout.
      to_flax: back.
      words: what ``to_flax`` does, for the report.
      rank: the number of axes of each variable, where the layer's type fixes it. More of them
        are a stack of layers.
      gradient: from the variables' gradients to the tensors', where it is not ``to_torch``.
    """

    variables: tuple[str, ...]
    tensors: tuple[str, ...]
    to_torch: Callable[[Arrays], Arrays]
    to_flax: Callable[[Arrays], Arrays]
    words: str
    rank: int | None = None
    gradient: Callable[[Arrays], Arrays] | None = None


class Layer(NamedTuple):
    """One layer of a model: its variables' values, and how they travel.

    Attributes:
      prefix: what its tensors' names begin with in torch.
      entries: how its variables travel; every one of them is in ``values``.
      values: the variables' values, by the names that the entries use.
      paths: where each variable lies in the model. Two layers that share a variable give it the
        same path.
      ignored: tensors that torch's layer has and this one does without.
    """

    prefix: str
    entries: tuple[Entry, ...]
    values: Mapping[str, np.ndarray]
    paths: Mapping[str, tuple[object, ...]]
    ignored: tuple[str, ...] = ()


def tensors_of(layers: Iterable[Layer]) -> dict[str, np.ndarray]:
    """Returns the tensors of layers by name, in torch's layout."""
    found = [
        (layer.prefix + name, array)
        for layer in layers
        for entry in layer.entries
        for name, array in zip(
            entry.tensors,
            entry.to_torch(tuple(layer.values[v] for v in entry.variables)),
            strict=True,
        )
    ]
    check_distinct(name for name, _ in found)
    return dict(found)


def check_distinct(names: Iterable[str]) -> None:
    """Raises a ``ValueError`` if two tensors of a model have one name."""
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(
                f"every tensor must have a name of its own, got {name!r} twice. "
                "Rename a submodule: dots and nnx.Sequential make their names one."
            )
        seen.add(name)


def one(
    variable: str,
    tensor: str,
    to_torch: Move = np.asarray,
    to_flax: Move = np.asarray,
    words: str = "as is",
    rank: int | None = None,
) -> Entry:
    """Returns the entry of one variable that is one tensor."""
    return Entry(
        (variable,),
        (tensor,),
        lambda values: (to_torch(values[0]),),
        lambda tensors: (to_flax(tensors[0]),),
        words,
        rank,
    )


def _swapped_to_front(kernel: np.ndarray) -> np.ndarray:
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _swapped_to_back(weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _moved_to_front(kernel: np.ndarray) -> np.ndarray:
    return np.moveaxis(kernel, (-2, -1), (0, 1))


def _moved_to_back(weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(weight, (0, 1), (-2, -1))


def _flipped_to_torch(kernel: np.ndarray) -> np.ndarray:
    window = tuple(range(kernel.ndim - 2))
    # Contiguous: torch takes no array that runs backwards.
    return np.ascontiguousarray(_moved_to_front(np.flip(kernel, window)))


def _flipped_to_flax(weight: np.ndarray) -> np.ndarray:
    window = tuple(range(weight.ndim - 2))
    return np.flip(_moved_to_back(weight), window)


def reshaped(shape: Shape) -> Move:
    """Returns the function that gives an array another shape."""
    return lambda array: np.reshape(array, shape)


KERNEL = one(
    "kernel",
    "weight",
    _swapped_to_front,
    _swapped_to_back,
    "(out, in, *window) -> (*window, in, out)",
)
MOVED = one(
    "kernel",
    "weight",
    _moved_to_front,
    _moved_to_back,
    "(in, out, *window) -> (*window, in, out)",
)
FLIPPED = one(
    "kernel",
    "weight",
    _flipped_to_torch,
    _flipped_to_flax,
    "(in, out, *window) -> (*window, in, out), the window flipped",
)
TRANSPOSED = KERNEL._replace(words="(in, out, *window) -> (*window, out, in)")
MATRIX = KERNEL._replace(words="(out, in) -> (in, out)", rank=2)
BIAS = one("bias", "bias")
SCALE = one("scale", "weight")
MEAN = one("mean", "running_mean", rank=1)
VAR = one("var", "running_var", rank=1)
COUNT = one("count", "num_batches_tracked", lambda count: np.asarray(count, np.int64), rank=0)
GAMMA = one("gamma", "gamma", rank=1)
EMBEDDING = one("embedding", "weight", rank=2)
SLOPE = one("negative_slope", "weight", reshaped((1,)), reshaped(()), "(1,) -> ()", rank=0)


def inside(entry: Entry, module: str, suffix: str = "") -> Entry:
    """Returns the entry of a submodule's variables, as its owner sees it."""
    return entry._replace(
        variables=tuple(f"{module}.{name}" for name in entry.variables),
        tensors=tuple(name + suffix for name in entry.tensors),
    )
