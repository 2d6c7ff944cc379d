"""The twins of PyTorch's containers."""

from collections.abc import Iterable, Mapping

from flax import nnx

from flaxstab._typing import Array
from flaxstab.interop._torch_functions import Applied, Place, moved


class Ordered(nnx.Module):
    """Modules that run one behind the other, by the names that PyTorch's ``Sequential`` has.

    What ``nnx.Sequential`` cannot hold: names that are no numbers, and moves of the features
    between two layers that want them in different places.

    Args:
      parts: the modules by name, in order.
      moves: for each of them, where the features are moved to before it; ``None`` = nowhere.
      after: where they are moved to behind the last.
    """

    def __init__(
        self,
        parts: Mapping[str, nnx.Module],
        moves: Iterable[Place | None],
        after: Place | None = None,
    ) -> None:
        self.names = tuple(parts)
        self.moves = tuple(moves)
        self.after = after
        for name, part in parts.items():
            setattr(self, name, part)

    @property
    def layers(self) -> tuple[nnx.Module, ...]:
        """The modules in order, as ``nnx.Sequential`` has them."""
        return tuple(getattr(self, name) for name in self.names)

    def __call__(self, x: Array) -> Array:
        """Maps an array through all of them."""
        for name, place in zip(self.names, self.moves, strict=True):
            x = getattr(self, name)(moved(x, place))
        return moved(x, self.after)


def in_order(
    parts: Mapping[str, nnx.Module], moves: list[Place | None], after: Place | None
) -> nnx.Module:
    """Returns modules that run one behind the other, as ``nnx.Sequential`` wherever that will do.

    Args:
      parts: the modules by name, in order.
      moves: as of :class:`Ordered`. A layer without parameters makes its move itself.
      after: as of :class:`Ordered`.
    """
    parts, moves = dict(parts), list(moves)
    for place, (name, part) in enumerate(parts.items()):
        if isinstance(part, Applied) and moves[place] is not None:
            parts[name], moves[place] = Applied(part.function, moves[place], part.after), None
    numbered = list(parts) == [str(i) for i in range(len(parts))]
    if numbered and parts and after is None and not any(moves):
        return nnx.Sequential(*parts.values())
    return Ordered(parts, moves, after)
