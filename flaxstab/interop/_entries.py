"""What a layer's variables are called and laid out as in PyTorch: the entries of every table."""

from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto
from types import EllipsisType
from typing import NamedTuple

import numpy as np

from flaxstab._typing import Shape

Arrays = tuple[np.ndarray, ...]
Move = Callable[[np.ndarray], np.ndarray]
Path = tuple[object, ...]


class Kind(Enum):
    """What the numbers of a tensor are.

    Attributes:
      KERNEL: weights that start at random, so that equal ones are suspicious.
      VARIANCE: a running variance, which is positive.
      OTHER: anything else: biases, gammas and means may all be equal.
    """

    KERNEL = auto()
    VARIANCE = auto()
    OTHER = auto()


class Entry(NamedTuple):
    """Variables of a layer and the tensors of torch's layer that hold the same numbers.

    Most entries are one variable and one tensor; a packed tensor holds several variables.

    Attributes:
      variables: their names in Flax, with dots for those of submodules.
      tensors: the tensors' names in torch.
      to_torch: from the variables' values to the tensors, in torch's layout.
      to_flax: back.
      words: what ``to_flax`` does, for the report.
      rank: the number of axes of each variable; ``None`` where a rule of the user's own does not
        say. More of them are a stack of layers.
      gradient: from the variables' gradients to the tensors', where it is not ``to_torch``.
      kind: what the numbers are, for the report's suspicions.
      features: how many of the variables' first axes are features of the layer's input, of
        which the order is torch's or Flax's: 1 of a linear layer's kernel, all of a LayerNorm's.
      shapes: the tensors' shapes, where they are known without ``to_torch``.
      optional: whether PyTorch loads a layer without the tensor, and keeps what it has.
    """

    variables: tuple[str, ...]
    tensors: tuple[str, ...]
    to_torch: Callable[[Arrays], Arrays]
    to_flax: Callable[[Arrays], Arrays]
    words: str
    rank: int | None = None
    gradient: Callable[[Arrays], Arrays] | None = None
    kind: Kind = Kind.OTHER
    features: int = 0
    shapes: tuple[Shape, ...] | None = None
    optional: bool = False


class Leaf(NamedTuple):
    """One variable of one layer; of a stack of layers, its part.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      read: returns the value, which may lie on another device or be promised only.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Layer(NamedTuple):
    """One layer of a model: its variables, and how they travel.

    Attributes:
      prefix: what its tensors' names begin with in torch.
      entries: how its variables travel; every one of them is in ``values``.
      values: the variables by the names that the entries use.
      paths: where each variable lies in the model. Two layers that share a variable give it the
        same path.
      ignored: tensors that torch's layer has and this one does without.
      at: which part of the variables, by their first axes, where they hold a stack of layers.
    """

    prefix: str
    entries: tuple[Entry, ...]
    values: Mapping[str, Leaf]
    paths: Mapping[str, Path]
    ignored: tuple[str, ...] = ()
    at: tuple[int, ...] = ()


def part(array: np.ndarray, at: tuple[int, ...]) -> np.ndarray:
    """Returns one layer of a stack, in the same memory, also where that is a single number."""
    place: tuple[EllipsisType | int, ...] = (*at, ...)
    return array[place]


def tensors_of(layers: Iterable[Layer]) -> dict[str, np.ndarray]:
    """Returns the tensors of layers by name, in torch's layout."""
    found = [
        (layer.prefix + name, array)
        for layer in layers
        for entry in layer.entries
        for name, array in zip(
            entry.tensors,
            entry.to_torch(tuple(layer.values[v].read() for v in entry.variables)),
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
    kind: Kind = Kind.OTHER,
) -> Entry:
    """Returns the entry of one variable that is one tensor."""
    return Entry(
        (variable,),
        (tensor,),
        lambda values: (to_torch(values[0]),),
        lambda tensors: (to_flax(tensors[0]),),
        words,
        rank,
        kind=kind,
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
    kind=Kind.KERNEL,
)
MOVED = one(
    "kernel",
    "weight",
    _moved_to_front,
    _moved_to_back,
    "(in, out, *window) -> (*window, in, out)",
    kind=Kind.KERNEL,
)
FLIPPED = one(
    "kernel",
    "weight",
    _flipped_to_torch,
    _flipped_to_flax,
    "(in, out, *window) -> (*window, in, out), the window flipped",
    kind=Kind.KERNEL,
)
TRANSPOSED = KERNEL._replace(words="(in, out, *window) -> (*window, out, in)")
MATRIX = KERNEL._replace(words="(out, in) -> (in, out)", rank=2)
BIAS = one("bias", "bias", rank=1)
SCALE = one("scale", "weight", rank=1)
MEAN = one("mean", "running_mean", rank=1)
VAR = one("var", "running_var", rank=1, kind=Kind.VARIANCE)
COUNT = one(
    "count", "num_batches_tracked", lambda count: np.asarray(count, np.int64), rank=0
)._replace(optional=True)
GAMMA = one("gamma", "gamma", rank=1)
EMBEDDING = one("embedding", "weight", rank=2, kind=Kind.KERNEL)
SLOPE = one("negative_slope", "weight", reshaped((1,)), reshaped(()), "(1,) -> ()", rank=0)


def inside(entry: Entry, module: str, suffix: str = "") -> Entry:
    """Returns the entry of a submodule's variables, as its owner sees it."""
    return entry._replace(
        variables=tuple(f"{module}.{name}" for name in entry.variables),
        tensors=tuple(name + suffix for name in entry.tensors),
    )
