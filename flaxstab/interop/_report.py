"""What became of every tensor of a state_dict and every variable of a model: the report."""

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from flaxstab._typing import Shape

_SHOWN = 3  # names of each kind in a printed report


class Outcome(StrEnum):
    """What became of a tensor or a variable."""

    LOADED = "loaded"
    MISSING = "missing"
    UNEXPECTED = "unexpected"
    MISMATCHED = "mismatched"
    IGNORED = "ignored"
    KEPT = "kept"


class LoadEntry(NamedTuple):
    """One tensor of a state_dict with the variables that it fills, or the lack of either.

    Attributes:
      source: the tensor's name in the state_dict; '' for a missing one.
      name: the tensor's name in the model, after ``rename``.
      variable: the path of the variable in the model; several are joined by ', '; '' for a
        tensor that has none. ``kernel[2]`` is one layer of a stack.
      source_shape: the tensor's shape; ``None`` for a missing one.
      target_shape: the shape that the model has for it, in torch's layout.
      source_dtype: the tensor's dtype; '' for a missing one.
      target_dtype: the variable's dtype.
      outcome: what became of it.
      transform: how the tensor becomes the variable, in words.
      rounded: whether the variable's dtype could not hold every number.
      reason: why it does not fit.
      variable_shapes: the variables' shapes, in Flax's layout.
      suspicion: what is odd about the tensor's numbers: NaN or infinities, weights that are all
        zero or all the same, a variance that is negative or all zero.
      nearest: for a missing tensor those without a place that may be it, for one without a place
        those missing: of the same shape first, then by name.
    """

    source: str
    name: str
    variable: str
    source_shape: Shape | None
    target_shape: Shape | None
    source_dtype: str
    target_dtype: str
    outcome: Outcome
    transform: str = ""
    rounded: bool = False
    reason: str = ""
    variable_shapes: tuple[Shape, ...] = ()
    suspicion: str = ""
    nearest: tuple[str, ...] = ()


class LoadWarning(NamedTuple):
    """What the modules of a model do otherwise than the PyTorch layers that tensors came from.

    Attributes:
      modules: their names in PyTorch.
      text: what differs, and the fix.
    """

    modules: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{_first(name or 'the model' for name in self.modules)}: {self.text}"


class LoadReport(NamedTuple):
    """What became of every tensor of a state_dict and every variable of a model.

    Printed it is a few lines; :meth:`table` has a line for each tensor, :meth:`to_dict` the same
    as plain data.

    Attributes:
      entries: one for each tensor, and for each that the model has and the state_dict lacks.
      warnings: what stock NNX layers of the model cannot do as PyTorch's, or do by default
        otherwise, where a state_dict does not tell.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> from flaxstab import interop, linear
      >>> model = linear.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> tensors = {"weight": np.zeros((3, 2), "f"), "beta": np.zeros(3, "f")}
      >>> report = interop.load_state_dict(model, tensors, strict=False)
      >>> print(report)
      1 tensors loaded
        1 missing: bias (perhaps beta)
        1 unexpected: beta (perhaps bias)
        1 suspicious: weight all zero
    """

    entries: tuple[LoadEntry, ...]
    warnings: tuple[LoadWarning, ...] = ()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the tensors that were loaded."""
        return self._names(Outcome.LOADED)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names that the model has and the state_dict lacks."""
        return self._names(Outcome.MISSING)

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Names that the state_dict has and the model lacks."""
        return self._names(Outcome.UNEXPECTED)

    @property
    def mismatched(self) -> tuple[str, ...]:
        """Names that do not fit, each with the reason: both shapes, in torch's layout."""
        return self._names(Outcome.MISMATCHED)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of tensors that the Flax layer does without.

        ``num_batches_tracked`` of the stock ``nnx.BatchNorm``, for example.
        """
        return self._names(Outcome.IGNORED)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names that the state_dict lacks and PyTorch does without: the variable keeps its value.

        ``num_batches_tracked`` of old checkpoints.
        """
        return self._names(Outcome.KEPT)

    @property
    def rounded(self) -> tuple[str, ...]:
        """Names of loaded tensors whose numbers the variable's dtype could not all hold."""
        return tuple(e.name for e in self.entries if e.rounded)

    @property
    def suspicious(self) -> tuple[str, ...]:
        """Names of tensors with odd numbers, each with what is odd."""
        return tuple(f"{e.name} {e.suspicion}" for e in self.entries if e.suspicion)

    @property
    def complete(self) -> bool:
        """Whether every tensor found its place and every variable its tensor."""
        return not (self.missing or self.unexpected or self.mismatched)

    def _names(self, outcome: Outcome) -> tuple[str, ...]:
        return tuple(_with_reason(e) for e in self.entries if e.outcome == outcome)

    def __str__(self) -> str:
        lines = (f"{len(self.loaded)} tensors loaded", *self.others())
        return "; ".join(lines) if self.complete and not self.warnings else "\n  ".join(lines)

    def others(self) -> tuple[str, ...]:
        """Returns one line for each other fate, with the number of tensors and the first few."""
        outcomes = (Outcome.MISSING, Outcome.UNEXPECTED, Outcome.MISMATCHED)
        listed = {
            str(outcome): [
                f"{_with_reason(e)} (perhaps {e.nearest[0]})" if e.nearest else _with_reason(e)
                for e in self.entries
                if e.outcome == outcome
            ]
            for outcome in outcomes
        }
        listed |= {
            "suspicious": [*self.suspicious],
            "rounded": [*self.rounded],
            "ignored": [*self.ignored],
        }
        lines = [f"{len(names)} {kind}: {_first(names)}" for kind, names in listed.items() if names]
        return (*lines, *(f"warning: {warning}" for warning in self.warnings))

    def table(self) -> str:
        """Returns a line for each tensor: names, shapes, dtypes, its way and what is odd."""
        heads = ("outcome", "tensor", "shape", "dtype", "variable", "shape", "dtype", "how", "note")
        rows = [heads, *(_row(entry) for entry in self.entries)]
        widths = [max(len(row[n]) for row in rows) for n in range(len(heads))]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )
        return "\n".join((*(line.rstrip() for line in lines), *map(str, self.warnings)))

    def to_dict(self) -> dict[str, object]:
        """Returns the report as numbers, strings, lists and dicts, as JSON has them."""
        return {
            "complete": self.complete,
            "counts": {
                str(outcome): sum(e.outcome == outcome for e in self.entries) for outcome in Outcome
            },
            "entries": [
                {name: _plain(value) for name, value in entry._asdict().items()}
                for entry in self.entries
            ],
            "warnings": [{"modules": [*w.modules], "text": w.text} for w in self.warnings],
        }


def _with_reason(entry: LoadEntry) -> str:
    return f"{entry.name} {entry.reason}" if entry.reason else entry.name


def _first(names: Iterable[str]) -> str:
    known = [*names]
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"{', '.join(known[:_SHOWN])}{more}"


def _row(entry: LoadEntry) -> tuple[str, ...]:
    renamed = entry.source and entry.source != entry.name
    perhaps = f"perhaps {' or '.join(entry.nearest)}" if entry.nearest else ""
    notes = (entry.reason, entry.suspicion, "rounded" if entry.rounded else "", perhaps)
    return (
        str(entry.outcome),
        f"{entry.source} = {entry.name}" if renamed else entry.name,
        "" if entry.source_shape is None else str(entry.source_shape),
        entry.source_dtype,
        entry.variable,
        ", ".join(map(str, entry.variable_shapes)),
        entry.target_dtype,
        entry.transform,
        "; ".join(filter(None, notes)),
    )


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Outcome) else value
