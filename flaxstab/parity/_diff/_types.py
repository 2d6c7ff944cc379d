"""What has moved between two baselines, as data."""

from enum import StrEnum
from typing import Literal, NamedTuple

from flaxstab.parity._record._baseline import Origin
from flaxstab.parity._verdict import Side


class Outcome(StrEnum):
    """What an upgrade does to whoever makes it.

    Attributes:
      SAFE: nothing has moved, or only the last digits; new names may have come.
      CHANGES: something else changed, which is listed: random streams, public names or defaults,
        larger errors within their bounds, precisions or cases that are gone or cannot be compared.
      BREAKS: a result has another meaning, is less exact than its bound, or is gone.
    """

    SAFE = "safe"
    CHANGES = "safe with changes"
    BREAKS = "breaks"


class Effect(StrEnum):
    """How a value has moved, or a case as a whole; from the gravest."""

    MEANING = "mathematics changed"
    WORSE = "error above its bound"
    FAILS = "does not run"
    LARGER = "error larger, within its bound"
    STREAM = "random stream changed"
    APART = "not comparable"
    EMPTY = "not compared"
    GONE = "gone"
    BETTER = "passes now"
    ROUNDING = "rounding moved"
    NEW = "new"
    NEITHER = "runs in neither"
    SAME = "same"


BREAKING = (Effect.MEANING, Effect.WORSE, Effect.FAILS)
CHANGING = (Effect.LARGER, Effect.STREAM, Effect.APART, Effect.EMPTY, Effect.GONE, Effect.BETTER)
GRAVITY = {effect: place for place, effect in enumerate(Effect)}


class Move(NamedTuple):
    """How one quantity of one side has moved.

    Attributes:
      name: the quantity, by PyTorch's names.
      precision: the dtype in which it was computed.
      side: the side that computed it.
      effect: what that means.
      size: the largest difference between old and new, in eps of the quantity's magnitude (in
        float64) or of its sensitivity (below).
      bound: of ``size`` in float64; below that, of the new error.
      errors: the old and the new error against that side's own float64, in the same unit; 0 in
        float64.
      words: one sentence.
    """

    name: str
    precision: str
    side: Side
    effect: Effect
    size: float
    bound: float
    errors: tuple[float, float]
    words: str

    @property
    def excess(self) -> float:
        """How much of its bound is used: the difference in float64, else the new error."""
        used = self.size if self.precision == "float64" else self.errors[1]
        return used / self.bound if self.bound else (float("inf") if used else 0.0)


class Square(NamedTuple):
    """Which pairs agree in float64, each of old and new with each; None if not comparable.

    Attributes:
      old_old: old JAX with old PyTorch.
      new_old: new JAX with old PyTorch.
      old_new: old JAX with new PyTorch.
      new_new: new JAX with new PyTorch.
    """

    old_old: bool | None = None
    new_old: bool | None = None
    old_new: bool | None = None
    new_new: bool | None = None


class CaseDiff(NamedTuple):
    """What became of one case.

    Attributes:
      name: the case's.
      effect: the gravest.
      mover: the side that did it: 'jax', 'torch', 'both', or '' if none did.
      words: one sentence; of the worst move, if there is one.
      square: which pairs agree.
      moves: what is not bitwise the same, the worst first.
      compared: how many values of both sides were compared.
      torch: where PyTorch's new values come from.
    """

    name: str
    effect: Effect
    mover: Literal["jax", "torch", "both", ""] = ""
    words: str = ""
    square: Square = Square()
    moves: tuple[Move, ...] = ()
    compared: int = 0
    torch: Origin = "live"

    @property
    def breaks(self) -> bool:
        """Whether what was right is so no longer."""
        return self.effect in BREAKING


class NameDiff(NamedTuple):
    """What became of a public name.

    Attributes:
      name: such as ``'torch.nn.LayerNorm'``.
      change: 'new', 'gone', 'default', 'parameter gone', 'parameter new' or 'order'.
      words: what exactly.
    """

    name: str
    change: Literal["new", "gone", "default", "parameter gone", "parameter new", "order"]
    words: str

    @property
    def matters(self) -> bool:
        """Whether a call that was right may now fail, or mean something else."""
        return self.change not in ("new", "parameter new")


class StreamDiff(NamedTuple):
    """What became of a random function's draws.

    Attributes:
      name: such as ``'jax.random.normal'``.
      effect: STREAM, ROUNDING, GONE or NEW.
      words: what exactly.
    """

    name: str
    effect: Effect
    words: str = ""


class Setting(NamedTuple):
    """A part of the environment that differs.

    Attributes:
      name: such as ``'jax'`` or ``'settings XLA_FLAGS'``.
      old: what it was; '' if it was absent.
      new: what it is.
    """

    name: str
    old: str
    new: str


def counted(cases: int) -> str:
    """Returns a number of cases in words.

    Example:
      >>> counted(1), counted(2)
      ('1 case', '2 cases')
    """
    return f"{cases} case{'s' * (cases != 1)}"
