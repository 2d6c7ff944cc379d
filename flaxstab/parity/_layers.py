"""What is known of each layer of a pair of models, and where the first one differs."""

from typing import Literal, NamedTuple

Direction = Literal["forward", "backward"]
Kind = Literal["own", "inherited", "agrees", "unknown"]


class LayerError(NamedTuple):
    """How far one layer is off, and how much of it it was given.

    Attributes:
      name: of the layer, as PyTorch spells it; '' for the model itself.
      direction: 'forward' for outputs and buffers, 'backward' for gradients.
      own: the error over its bound when the layer is fed what PyTorch's was fed; NaN if it could
        not be run alone.
      inherited: the error over its bound where the layer stands, both models running freely, which
        what comes before has a share in; NaN if it could not be captured.
      differs: whether the layer itself is outside its bound.
      kind: 'own' if it is at fault, 'inherited' if only what comes before is, 'agrees', or
        'unknown' where it was not run alone.
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
      layers: each layer forward, in the order of PyTorch's calls, then backward, in reverse.
      first: the smallest module that differs first; '' if none does.
      direction: in which direction it differs; 'forward' if in both.
      notes: what could not be judged, and whether capturing changed a result.
    """

    layers: tuple[LayerError, ...]
    first: str = ""
    direction: Direction | Literal[""] = ""
    notes: tuple[str, ...] = ()
