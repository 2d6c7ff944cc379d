"""What is known of each layer of a pair of models, and where the first one differs."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

from flaxstab.parity._words import aligned

Direction = Literal["forward", "backward"]
_ROWS = 30  # of a table that fits one screen
_WIDTH = 70  # of what is said about a layer there
WHOLE = "(model)"  # the name of the model itself
Kind = Literal["own", "inherited", "agrees", "unknown"]


class LayerError(NamedTuple):
    """How far one layer is off, and how much of it it was given.

    Attributes:
      name: of the layer, as PyTorch spells it; '(model)' for the model itself.
      direction: 'forward' for outputs and buffers, 'backward' for gradients.
      own: the error over its bound when the layer is fed what PyTorch's was fed; NaN if it could
        not be run alone.
      inherited: the error over its bound where the layer stands, both models running freely, which
        what comes before has a share in; NaN if it could not be captured.
      differs: whether the layer itself is outside its bound.
      kind: 'own' if it is at fault, 'inherited' if only what comes before is, 'agrees', or
        'unknown' where it was not run alone: because it cannot be, or because a layer inside it
        is at fault.
      note: which tensor is furthest off, or why the layer could not be judged.
    """

    name: str
    direction: Direction
    own: float
    inherited: float
    differs: bool
    kind: Kind = "agrees"
    note: str = ""


class Location(NamedTuple):
    """Where two models differ, layer by layer.

    Attributes:
      layers: each layer forward, in the order in which PyTorch's calls end (what is inside a layer
        comes before it), then backward, in reverse. :func:`compare` stops at the first that differs
        forward; then nothing is told backward.
      first: the smallest module that differs first, '(model)' for the model itself; '' if none.
      direction: in which direction it differs first; '' if in none.
      notes: what could not be judged, and whether capturing changed a result.
    """

    layers: tuple[LayerError, ...]
    first: str = ""
    direction: Direction | Literal[""] = ""
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> LayerError | None:
        """What was found of the first layer that differs."""
        wanted = (self.first, self.direction)
        return next((e for e in self.layers if (e.name, e.direction) == wanted), None)

    @property
    def line(self) -> str:
        """The first layer that differs, in one line."""
        error = self.error
        unknown = dict.fromkeys(
            e.name for e in self.layers if e.kind == "unknown" and e.direction == "forward"
        )
        if error is not None:
            return (
                f"first layer that differs: {error.name} ({error.direction}, own error "
                f"{error.own:.2g} x the bound: {error.note})"
            )
        rest = f"; not run alone: {', '.join(list(unknown)[:3])}" if unknown else ""
        return f"no layer differs when it is given what PyTorch's is given{rest}"

    def __str__(self) -> str:
        rows = [("layer", "direction", "own error", "inherited", "")]
        rows += [
            (e.name, e.direction, _times(e.own), _times(e.inherited), _word(e))
            for e in _shown(self.layers)
        ]
        lines = [self.line, "", *aligned(rows)]
        hidden = len(self.layers) - (len(rows) - 1)
        lines += [f"... and {hidden} more in location.layers"] if hidden else []
        return "\n".join([*lines, *(f"not compared: {note}" for note in self.notes)])


def _shown(layers: Sequence[LayerError]) -> list[LayerError]:
    """Returns what fits one screen: the layers that differ, and those around the first of them."""
    if len(layers) <= _ROWS:
        return list(layers)
    first = next((i for i, e in enumerate(layers) if e.differs), 0)
    near = range(max(0, first - _ROWS // 2), first + _ROWS // 2)
    return [e for i, e in enumerate(layers) if i in near]


def _times(error: float) -> str:
    return "-" if math.isnan(error) else f"{error:.2g}"


def _word(error: LayerError) -> str:
    if error.kind in ("own", "unknown"):
        return f"{error.kind}: {error.note}"[:_WIDTH]
    return error.kind


class Search:
    """Looks for the first layer that differs when it is first asked, and once.

    Two are equal: what they find follows from what was compared.

    Args:
      find: looks for it.
    """

    def __init__(self, find: Callable[[], Location]) -> None:
        self._find = find

    @cached_property
    def _found(self) -> Location:
        return self._find()

    def __call__(self) -> Location:
        return self._found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Search)

    def __hash__(self) -> int:
        return hash(Search)
