"""Which tensor of a state_dict goes to which variable of a model, and what does not fit."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check
from flaxstab._typing import Shape
from flaxstab.interop._entries import Entry, Kind, Layer, Leaf, Path, check_distinct
from flaxstab.interop._nearest import nearest
from flaxstab.interop._report import LoadEntry, LoadReport, Outcome
from flaxstab.interop._suspicions import suspicion
from flaxstab.interop._torch import to_numpy

Rename = Callable[[str], str]
Spot = tuple[Path, tuple[int, ...]]  # a variable, and which layer of a stack


class Loading(NamedTuple):
    """A report, and the new values of the variables, in their dtype.

    Attributes:
      report: what became of every tensor.
      values: by the variable's path and the index of the layer in a stack. They may share memory
        with the tensors, and be of any strides.
    """

    report: LoadReport
    values: Mapping[Spot, np.ndarray]

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
    expected: tuple[Shape, ...]
    spots: tuple[Spot, ...]
    variable: str


def _places(layer: Layer) -> list[_Place]:
    places = []
    index = str([*layer.at]) if layer.at else ""
    for entry in layer.entries:
        names = tuple(layer.prefix + tensor for tensor in entry.tensors)
        paths = [layer.paths[v] for v in entry.variables]
        spots = tuple((path, layer.at) for path in paths)
        variable = ", ".join(".".join(map(str, path)) + index for path in paths)
        places.append(_Place(layer, entry, names, expected_shapes(layer, entry), spots, variable))
    return places


def expected_shapes(layer: Layer, entry: Entry) -> tuple[Shape, ...]:
    """Returns the tensors' shapes, without a look at the model's values."""
    if entry.shapes is not None:
        return entry.shapes
    blanks = tuple(_blank(layer.values[variable]) for variable in entry.variables)
    return tuple(tensor.shape for tensor in entry.to_torch(blanks))


def _blank(leaf: Leaf) -> np.ndarray:
    """Returns an array of a variable's shape that takes the memory of one number."""
    one = np.zeros(1, leaf.dtype)
    return np.ndarray(leaf.shape, leaf.dtype, one, strides=(0,) * len(leaf.shape))


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
        self.values: dict[Spot, np.ndarray] = {}
        self.giver: dict[Spot, str] = {}
        self.named: set[Spot] = set()

    def match(self, layers: list[Layer]) -> Loading:
        places = [place for layer in layers for place in _places(layer)]
        check_distinct(name for place in places for name in place.names)
        # Values first: a variable that has several names lacks a tensor only if all are missing.
        found = {i: self._given(p) for i, p in enumerate(places) if self._any(p)}
        entries: list[LoadEntry] = []
        for i, place in enumerate(places):
            if i not in found and not self.named.issuperset(place.spots):
                fate = Outcome.KEPT if place.entry.optional else Outcome.MISSING
                found[i] = [
                    self._entry(place, name, shape, fate)
                    for name, shape in zip(place.names, place.expected, strict=True)
                ]
                self.named.update(place.spots)
            entries += found.get(i, [])
        entries += self._others(layers, places)
        return Loading(LoadReport(_with_nearest(entries)), self.values)

    def _any(self, place: _Place) -> bool:
        return any(name in self.tensors for name in place.names)

    def _given(self, place: _Place) -> list[LoadEntry]:
        """Returns the entries of a place some of whose tensors are there, and takes them."""
        pairs = [*zip(place.names, place.expected, strict=True)]
        reasons = [self._misfit(name, shape, place) for name, shape in pairs]
        rounded = False
        if not any(reasons):
            arrays = place.entry.to_flax(tuple(self.tensors[n].array for n in place.names))
            rounded, conflict = self._take(place, arrays)
            reasons = [conflict] * len(reasons)
        self.named.update(place.spots)
        entries = []
        for (name, shape), reason in zip(pairs, reasons, strict=True):
            entry = self._entry(place, name, shape, Outcome.LOADED)._replace(rounded=rounded)
            if name not in self.tensors:
                entry = entry._replace(outcome=Outcome.MISSING)
            elif any(reasons):
                unpaired = f"is of no use without {' and '.join(place.names)}"
                entry = entry._replace(outcome=Outcome.MISMATCHED, reason=reason or unpaired)
            entries.append(entry)
        return entries

    def _misfit(self, name: str, expected: Shape, place: _Place) -> str:
        if name not in self.tensors:
            return "is missing"
        array, entry = self.tensors[name].array, place.entry
        shape = array.shape
        if shape == expected:
            target = place.layer.values[entry.variables[0]].dtype
            own = entry.rank is None  # a rule of the user's own says what it takes
            fits = own or _kind(array.dtype) == _kind(target)
            return "" if fits else f"{_dtype(array.dtype)} for {_dtype(target)}"
        found = f"{shape} for {expected}"
        if entry.features > 1 and shape == (expected[-1], *expected[:-1]):
            module = name.rpartition(".")[0]
            return f"{found}; if its axes are an image's, pass flattened={{{module!r}: {expected}}}"
        return found

    def _take(self, place: _Place, arrays: tuple[np.ndarray, ...]) -> tuple[bool, str]:
        """Takes a place's values; says whether one was rounded and what they conflict with."""
        rounded, new = False, {}
        for variable, spot, array in zip(place.entry.variables, place.spots, arrays, strict=True):
            old = place.layer.values[variable]
            check(
                array.shape == old.shape,
                "a rule must give values of the right shape",
                variable=variable,
                shape=array.shape,
                needed=old.shape,
            )
            value, inexact = _cast(array, old.dtype)
            rounded |= inexact
            if spot in self.values and not _equal(self.values[spot], value):
                giver = self.giver[spot]
                return False, f"differs from {giver} (one variable in the model)"
            new[spot] = value
        self.values |= new
        for spot in new:
            self.giver.setdefault(spot, place.names[0])
        return rounded, ""

    def _entry(self, place: _Place, name: str, expected: Shape, outcome: Outcome) -> LoadEntry:
        leaves = [place.layer.values[v] for v in place.entry.variables]
        dtypes = {_dtype(leaf.dtype) for leaf in leaves}
        return self._bare(name, outcome, place.entry.kind)._replace(
            variable=place.variable,
            target_shape=expected,
            target_dtype=", ".join(sorted(dtypes)),
            transform=place.entry.words,
            variable_shapes=tuple(leaf.shape for leaf in leaves),
        )

    def _bare(self, name: str, outcome: Outcome, kind: Kind = Kind.OTHER) -> LoadEntry:
        if name not in self.tensors:
            return LoadEntry("", name, "", None, None, "", "", outcome)
        source, array = self.tensors[name]
        odd = suspicion(array, kind)
        shape, dtype = array.shape, _dtype(array.dtype)
        return LoadEntry(source, name, "", shape, None, dtype, "", outcome, suspicion=odd)

    def _others(self, layers: list[Layer], places: list[_Place]) -> list[LoadEntry]:
        known = {name for place in places for name in place.names}
        ignored = {layer.prefix + name for layer in layers for name in layer.ignored} - known
        return [
            self._bare(name, Outcome.IGNORED if name in ignored else Outcome.UNEXPECTED)
            for name in self.tensors
            if name not in known
        ]


def _with_nearest(entries: list[LoadEntry]) -> tuple[LoadEntry, ...]:
    """Returns entries with what those without a counterpart may have meant."""
    wanting = (Outcome.MISSING, Outcome.MISMATCHED)
    lacking = {e.name: e.target_shape for e in entries if e.outcome in wanting}
    left = {e.name: e.source_shape for e in entries if e.outcome == Outcome.UNEXPECTED}
    found = nearest(lacking, left) | nearest(left, lacking)
    return (
        tuple(e._replace(nearest=found.get(e.name, ())) for e in entries) if found else (*entries,)
    )


@cache
def _kind(dtype: np.dtype) -> str:
    """Returns what a dtype's numbers are: no loader may turn one kind into another."""
    kinds = {"float": np.floating, "integer": np.integer}
    return next((name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)), str(dtype))


@cache
def _dtype(dtype: np.dtype) -> str:
    return str(dtype)  # NumPy takes its time


def _cast(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """Returns an array in a dtype, and whether that could not hold every number."""
    if np.can_cast(array.dtype, dtype, "safe"):
        return array.astype(dtype, copy=False), False
    with np.errstate(over="ignore", invalid="ignore"):  # the report says so
        value = array.astype(dtype)
        return value, not _equal(value.astype(array.dtype), array)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers, NaN in the same places."""
    return bool(np.all((a == b) | (_is_nan(a) & _is_nan(b))))


def _is_nan(array: np.ndarray) -> np.ndarray:
    return np.not_equal(array, array)  # also for bfloat16, without np.isnan
