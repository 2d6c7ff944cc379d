"""What becomes of every tensor of a state_dict and every variable of a model."""

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from flaxstab._checks import check
from flaxstab._typing import Shape
from flaxstab.interop._entries import Entry, Layer, check_distinct
from flaxstab.interop._torch import to_numpy

_SHOWN = 3  # names of each kind in a printed report

Path = tuple[object, ...]
Rename = Callable[[str], str]


class Outcome(StrEnum):
    """What became of a tensor or a variable."""

    LOADED = "loaded"
    MISSING = "missing"
    UNEXPECTED = "unexpected"
    MISMATCHED = "mismatched"
    IGNORED = "ignored"


class LoadEntry(NamedTuple):
    """One tensor of a state_dict with the variables that it fills, or the lack of either.

    Attributes:
      source: the tensor's name in the state_dict; '' for a missing one.
      name: the tensor's name in the model, after ``rename``.
      variable: the path of the variable in the model; several are joined by ', '; '' for a
        tensor that has none.
      source_shape: the tensor's shape; ``None`` for a missing one.
      target_shape: the shape that the model has for it, in torch's layout.
      source_dtype: the tensor's dtype; '' for a missing one.
      target_dtype: the variable's dtype.
      outcome: what became of it.
      transform: how the tensor becomes the variable, in words.
      rounded: whether the variable's dtype could not hold every number.
      reason: why it does not fit.
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


class LoadReport(NamedTuple):
    """What became of every tensor of a state_dict and every variable of a model.

    Attributes:
      entries: one for each tensor, and for each that the model has and the state_dict lacks.
    """

    entries: tuple[LoadEntry, ...]

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
    def rounded(self) -> tuple[str, ...]:
        """Names of loaded tensors whose numbers the variable's dtype could not all hold."""
        return tuple(e.name for e in self.entries if e.rounded)

    @property
    def complete(self) -> bool:
        """Whether every tensor found its place and every variable its tensor."""
        return not (self.missing or self.unexpected or self.mismatched)

    def _names(self, outcome: Outcome) -> tuple[str, ...]:
        found = (e for e in self.entries if e.outcome == outcome)
        return tuple(f"{e.name} {e.reason}" if e.reason else e.name for e in found)

    def __str__(self) -> str:
        others = self.others()
        loaded = f"{len(self.loaded)} tensors loaded"
        return "; ".join((loaded, *others)) if self.complete else "\n  ".join((loaded, *others))

    def others(self) -> tuple[str, ...]:
        """Returns one line for each other fate, with the number of tensors and the first few."""
        listed = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": self.mismatched,
            "rounded": self.rounded,
            "ignored": self.ignored,
        }
        lines = []
        for kind, names in listed.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines += [f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}"] if names else []
        return tuple(lines)


class Loading(NamedTuple):
    """A report, and the new values of the variables by path, in their dtype."""

    report: LoadReport
    values: Mapping[Path, np.ndarray]

    def require(self, advice: str) -> None:
        """Raises a ``ValueError`` unless everything fits.

        Args:
          advice: what to do otherwise.
        """
        if not self.report.complete:
            found = "\n  ".join((f"{len(self.report.loaded)} that fit", *self.report.others()))
            raise ValueError(
                f"every tensor must fit the model, got {found}\nNothing was loaded. {advice}"
            )


class _Given(NamedTuple):
    source: str
    array: np.ndarray


def sort_out(
    layers: Iterable[Layer], state_dict: Mapping[str, object], rename: Rename | None
) -> Loading:
    """Says what becomes of each tensor, and which value each variable would get.

    Args:
      layers: the model's layers. Of several that share a variable the first one names it when
        its tensor is missing.
      state_dict: tensors by name.
      rename: from a name in ``state_dict`` to the name in the model.

    Raises:
      ValueError: if ``state_dict`` is no mapping, or ``rename`` gives two tensors one name.
    """
    return _Matcher(_renamed(state_dict, rename)).match(list(layers))


def _renamed(state_dict: Mapping[str, object], rename: Rename | None) -> dict[str, _Given]:
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"state_dict must be a mapping from names to arrays, got {type(state_dict).__name__}. "
            "Pass module.state_dict()."
        )
    tensors: dict[str, _Given] = {}
    for name, value in state_dict.items():
        new = name if rename is None else rename(name)
        if new in tensors:
            raise ValueError(f"rename must keep names apart, got {new!r} twice.")
        tensors[new] = _Given(name, to_numpy(value))
    return tensors


class _Place(NamedTuple):
    """One entry of one layer: the names and shapes that it expects, and its variables."""

    layer: Layer
    entry: Entry
    names: tuple[str, ...]
    expected: tuple[np.ndarray, ...]
    paths: tuple[Path, ...]


def _places(layer: Layer) -> list[_Place]:
    places = []
    for entry in layer.entries:
        expected = entry.to_torch(tuple(layer.values[v] for v in entry.variables))
        names = tuple(layer.prefix + tensor for tensor in entry.tensors)
        paths = tuple(layer.paths[v] for v in entry.variables)
        places.append(_Place(layer, entry, names, expected, paths))
    return places


class _Matcher:
    """Matches tensors to places.

    Attributes:
      tensors: the tensors by their names in the model.
      values: each variable's new value.
      giver: the name of the tensor that gave it.
      named: the variables of which some tensor, fitting or not, has been seen or missed.
    """

    def __init__(self, tensors: Mapping[str, _Given]) -> None:
        self.tensors = tensors
        self.values: dict[Path, np.ndarray] = {}
        self.giver: dict[Path, str] = {}
        self.named: set[Path] = set()

    def match(self, layers: list[Layer]) -> Loading:
        places = [place for layer in layers for place in _places(layer)]
        check_distinct(name for place in places for name in place.names)
        # Values first: a variable that has several names lacks a tensor only if all are missing.
        found = {i: self._given(p) for i, p in enumerate(places) if self._any(p)}
        entries: list[LoadEntry] = []
        for i, place in enumerate(places):
            if i not in found and not self.named.issuperset(place.paths):
                found[i] = [
                    self._entry(place, name, array, Outcome.MISSING)
                    for name, array in zip(place.names, place.expected, strict=True)
                ]
                self.named.update(place.paths)
            entries += found.get(i, [])
        return Loading(LoadReport((*entries, *self._others(layers, places))), self.values)

    def _any(self, place: _Place) -> bool:
        return any(name in self.tensors for name in place.names)

    def _given(self, place: _Place) -> list[LoadEntry]:
        """Returns the entries of a place some of whose tensors are there, and takes them."""
        reasons = [self._misfit(n, a) for n, a in zip(place.names, place.expected, strict=True)]
        rounded = False
        if not any(reasons):
            arrays = place.entry.to_flax(tuple(self.tensors[n].array for n in place.names))
            rounded, conflict = self._take(place, arrays)
            reasons = [conflict] * len(reasons)
        self.named.update(place.paths)
        entries = []
        for name, array, reason in zip(place.names, place.expected, reasons, strict=True):
            entry = self._entry(place, name, array, Outcome.LOADED)._replace(rounded=rounded)
            if name not in self.tensors:
                entry = entry._replace(outcome=Outcome.MISSING)
            elif any(reasons):
                unpaired = f"is of no use without {' and '.join(place.names)}"
                entry = entry._replace(outcome=Outcome.MISMATCHED, reason=reason or unpaired)
            entries.append(entry)
        return entries

    def _misfit(self, name: str, expected: np.ndarray) -> str:
        if name not in self.tensors:
            return "is missing"
        shape = self.tensors[name].array.shape
        return "" if shape == expected.shape else f"{shape} for {expected.shape}"

    def _take(self, place: _Place, arrays: tuple[np.ndarray, ...]) -> tuple[bool, str]:
        """Takes a place's values; says whether one was rounded and what they conflict with."""
        rounded, new = False, {}
        for variable, path, array in zip(place.entry.variables, place.paths, arrays, strict=True):
            old = place.layer.values[variable]
            check(
                array.shape == old.shape,
                "a rule must give values of the right shape",
                variable=variable,
                shape=array.shape,
                needed=old.shape,
            )
            with np.errstate(over="ignore", invalid="ignore"):  # the report says so
                value = array.astype(old.dtype)
                rounded |= not _equal(value.astype(array.dtype), array)
            if path in self.values and not _equal(self.values[path], value):
                giver = self.giver[path]
                return False, f"differs from {giver} (one variable in the model)"
            new[path] = value
        self.values |= new
        self.giver |= dict.fromkeys(new.keys() - self.giver.keys(), place.names[0])
        return rounded, ""

    def _entry(self, place: _Place, name: str, expected: np.ndarray, outcome: Outcome) -> LoadEntry:
        dtypes = {str(place.layer.values[v].dtype) for v in place.entry.variables}
        return self._bare(name, outcome)._replace(
            variable=", ".join(".".join(map(str, path)) for path in place.paths),
            target_shape=expected.shape,
            target_dtype=", ".join(sorted(dtypes)),
            transform=place.entry.words,
        )

    def _bare(self, name: str, outcome: Outcome) -> LoadEntry:
        if name not in self.tensors:
            return LoadEntry("", name, "", None, None, "", "", outcome)
        source, array = self.tensors[name]
        return LoadEntry(source, name, "", array.shape, None, str(array.dtype), "", outcome)

    def _others(self, layers: list[Layer], places: list[_Place]) -> list[LoadEntry]:
        known = {name for place in places for name in place.names}
        ignored = {layer.prefix + name for layer in layers for name in layer.ignored} - known
        return [
            self._bare(name, Outcome.IGNORED if name in ignored else Outcome.UNEXPECTED)
            for name in self.tensors
            if name not in known
        ]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers, NaN in the same places."""
    return bool(np.all((a == b) | (_is_nan(a) & _is_nan(b))))


def _is_nan(array: np.ndarray) -> np.ndarray:
    return np.not_equal(array, array)  # also for bfloat16, without np.isnan
