"""Judges how the values of one case have moved, by float64."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from flaxstab.parity._diff._types import GRAVITY, CaseDiff, Effect, Move, Square
from flaxstab.parity._inputs import Values, is_float
from flaxstab.parity._record._baseline import Errors, Record
from flaxstab.parity._verdict import (
    SEMANTICS,
    Finding,
    Side,
    Verdict,
    gaps,
    of_cancelling,
    places_that_differ,
)

_SIDES: tuple[Side, ...] = ("jax", "torch")
_TINY = float(jnp.finfo(np.float64).eps)


def compare_records(name: str, old: Record, new: Record) -> CaseDiff:
    """Returns what became of a case that both baselines hold."""
    origin = new.facts.torch
    refused = _refused(old, new)
    if refused is not None:
        return CaseDiff(name, refused[0], words=refused[1], torch=origin)
    drawn = old.facts.draws != new.facts.draws
    case = _Case(old, new, drawn)
    moves = sorted(case.moves(), key=lambda m: (GRAVITY[m.effect], -m.excess, -m.size))
    effect, words = Effect.SAME, "every value is bitwise the same"
    if moves:
        effect, words = moves[0].effect, _words(moves[0])
    elif drawn:
        effect, words = Effect.STREAM, "random layers draw other numbers"
    if not case.count() and GRAVITY[Effect.EMPTY] < GRAVITY[effect]:
        effect, words = Effect.EMPTY, "the files have no value of it in a common precision"
    verdict = _passing(old, new)
    if verdict is not None and GRAVITY[verdict[0]] < GRAVITY[effect]:
        effect, words = verdict
    found = CaseDiff(name, effect, _mover(moves, effect), words, case.square(), tuple(moves))
    return found._replace(compared=case.count(), torch=origin)


def _refused(old: Record, new: Record) -> tuple[Effect, str] | None:
    """Returns why two records cannot be compared, if they cannot."""
    kinds = old.facts.kind, new.facts.kind
    if kinds == ("none", "none"):
        return Effect.NEITHER, new.facts.error
    if "none" in kinds:
        fails = kinds[1] == "none"
        words = new.facts.error if fails else f"runs now; before: {old.facts.error}"
        return Effect.FAILS if fails else Effect.BETTER, words
    words = f"one is a {kinds[0]} and one a {kinds[1]}" if kinds[0] != kinds[1] else ""
    words = words or _other_source(old, new)
    return (Effect.APART, words) if words else None


def _other_source(old: Record, new: Record) -> str:
    """Says that two records started from other numbers, or nothing."""
    for what, a, b in (("inputs", old.inputs, new.inputs), ("weights", old.weights, new.weights)):
        apart = sorted(n for n in a.keys() | b.keys() if n not in a or n not in b)
        apart += sorted(n for n in a if n in b and not _equal(a[n], b[n]))
        if apart:
            return f"{what} differ ({apart[0]}): record NEW with --inputs-from OLD"
    hashes = [
        {m.name: m.word for m in record.facts.hashes if m.name.startswith("weights ")}
        for record in (old, new)
    ]
    same = hashes[0] == hashes[1]
    return "" if same else "large weights differ by their hashes: load the same ones"


def _passing(old: Record, new: Record) -> tuple[Effect, str] | None:
    """Returns what the comparisons in each environment say of the case."""
    if old.facts.passed and not new.facts.passed:
        worst = next(f for f in new.facts.findings if not f.passed)
        kind = Effect.MEANING if worst.verdict is Verdict.SEMANTICS_DIFFER else Effect.WORSE
        return kind, f"JAX and PyTorch agreed and do not now: {worst.name} in {worst.dtype}"
    if new.facts.passed and not old.facts.passed:
        return Effect.BETTER, "JAX and PyTorch did not agree and do now"
    return None


def _words(move: Move) -> str:
    return f"{move.name} in {move.precision}: {move.words}"


def _mover(moves: list[Move], effect: Effect) -> Literal["jax", "torch", "both", ""]:
    sides = {move.side for move in moves if move.effect is effect} or {m.side for m in moves}
    sides = sides & {*_SIDES}
    if len(sides) == 2:
        return "both"
    return next(iter(sides)) if sides else ""


class _Sides(NamedTuple):
    """One quantity of one side, old and new."""

    name: str
    precision: str
    side: Side
    old: np.ndarray
    new: np.ndarray


class _Case:
    """Two records of one case, from equal inputs and weights."""

    def __init__(self, old: Record, new: Record, drawn: bool) -> None:
        self._old, self._new, self._drawn = old, new, drawn
        self._errors = [{(e.precision, e.name): e for e in r.facts.errors} for r in (old, new)]
        self._hashes = [{m.name: m.word for m in r.facts.hashes} for r in (old, new)]
        self._findings = {(f.name, f.dtype): f for f in new.facts.findings}

    def count(self) -> int:
        """Returns how many values are compared."""
        return sum(1 for _ in self._both())

    def _both(self) -> Iterator[_Sides]:
        for precision in (p for p in self._old.precisions if p in self._new.precisions):
            for side in _SIDES:
                group = f"{side} {precision}"
                a, b = self._old.values.get(group, {}), self._new.values.get(group, {})
                for name in (n for n in a if n in b):
                    yield _Sides(name, precision, side, a[name], b[name])

    def moves(self) -> Iterator[Move]:
        """Yields what is not bitwise the same; float64 comes first and explains what follows."""
        told: set[tuple[str, str]] = set()
        for sides in self._both():
            move = self._move(sides)
            key = sides.name, sides.side
            if move is None or (key in told and sides.precision != "float64"):
                continue
            if move.effect is Effect.MEANING:
                told.add(key)
            yield move
        yield from self._one_sided()
        yield from self._one_precision()

    def _one_precision(self) -> Iterator[Move]:
        """Yields precisions that only one of the records has."""
        a, b = self._old.precisions, self._new.precisions
        for precision in (p for p in a if p not in b):
            yield _precision(precision, "only OLD has this precision")
        for precision in (p for p in b if p not in a):
            yield _precision(precision, "only NEW has this precision")

    def _one_sided(self) -> Iterator[Move]:
        """Yields quantities that only one of the records has."""
        for side in _SIDES:
            group = f"{side} float64"
            a, b = self._old.values.get(group, {}), self._new.values.get(group, {})
            for name in sorted(a.keys() - b.keys()):
                yield _move(name, side, Effect.MEANING, np.inf, "it is no longer there")
            for name in sorted(b.keys() - a.keys()):
                yield _move(name, side, Effect.NEW, 0.0, "it was not there")

    def _move(self, sides: _Sides) -> Move | None:
        if self._same(sides):
            return None
        if self._drawn and not self._is_fixed(sides.name):
            words = "random layers draw other numbers, so that values cannot be compared"
            return Move(sides.name, sides.precision, sides.side, Effect.STREAM, 0, 0, (0, 0), words)
        words = _shapes(sides) or places_that_differ(sides.old, sides.new)
        if not words and not is_float(sides.old):
            words = "integers differ"
        if words:
            return _move(sides.name, sides.side, Effect.MEANING, np.inf, words, sides.precision)
        return self._exact(sides) if sides.precision == "float64" else self._low(sides)

    def _same(self, sides: _Sides) -> bool:
        hashes = [h.get(f"{sides.side} {sides.precision} {sides.name}") for h in self._hashes]
        return hashes[0] == hashes[1] and _equal(sides.old, sides.new)

    def _is_fixed(self, name: str) -> bool:
        """Whether a quantity does not depend on what random layers drew."""
        return name.startswith("evaluation") and not self._old.facts.buffers

    def _exact(self, sides: _Sides) -> Move:
        unit = self._unit(sides)
        ratio = _worst(gaps(sides.old, sides.new), unit)
        size, bound = ratio / _TINY, SEMANTICS / _TINY
        words = f"moved by {ratio:.1e} of its magnitude ({SEMANTICS:.0e} is rounding)"
        effect = Effect.ROUNDING if ratio <= SEMANTICS else Effect.MEANING
        return Move(sides.name, "float64", sides.side, effect, size, bound, (0, 0), words)

    def _unit(self, sides: _Sides) -> np.ndarray:
        """Returns what the quantity is judged by: the old unit, or its size if it has none."""
        size = np.asarray(np.max(np.abs(np.asarray(sides.old, np.float64)), initial=0))
        return self._old.units[sides.precision].get(sides.name, size)

    def _low(self, sides: _Sides) -> Move:
        key = sides.precision, sides.name
        old, new = (errors.get(key) for errors in self._errors)
        units = float(jnp.finfo(sides.precision).eps) * self._low_unit(sides)
        size = _worst(gaps(sides.old, sides.new), units)
        slack = 2.0 if old is None else old.slack
        before, after = _error(old, sides.side), _error(new, sides.side)
        if self._shares_oracle(sides):
            exact = self._exact_values(sides)
            values = sides.old, sides.new
            before, after = (_worst(gaps(*p), units) for p in zip(values, exact, strict=True))
        bound = 2 * before + slack
        words = f"{after:.2g} eps off float64, was {before:.2g}"
        effect = Effect.ROUNDING
        if not after <= bound:
            effect = Effect.LARGER if self._within(sides, after) else Effect.WORSE
        both = before, after
        return Move(sides.name, sides.precision, sides.side, effect, size, bound, both, words)

    def _exact_values(self, sides: _Sides) -> list[np.ndarray]:
        """Returns the quantity's old and new float64 values, if there are both."""
        group = f"{sides.side} float64"
        found = [r.values.get(group, {}).get(sides.name) for r in (self._old, self._new)]
        return [a for a in found if a is not None and a.shape == sides.old.shape]

    def _shares_oracle(self, sides: _Sides) -> bool:
        """Whether errors can be told from the values that are kept: whole, and of one oracle."""
        apart = f"torch float64 of {sides.precision}" in self._old.values
        large = f"{sides.side} {sides.precision} {sides.name}" in self._hashes[0]
        return not apart and not large and len(self._exact_values(sides)) == 2

    def _low_unit(self, sides: _Sides) -> np.ndarray:
        """Returns the units of a lower precision, of elements that cancel their terms."""
        unit, exact = self._unit(sides), self._exact_values(sides)
        magnitude = self._old.units.get("float64", {}).get(sides.name)
        if magnitude is None or len(exact) < 2 or magnitude.shape not in ((), exact[0].shape):
            return unit
        return of_cancelling(sides.name, unit, exact[0], magnitude, sides.precision)

    def _within(self, sides: _Sides, after: float) -> bool:
        """Whether the comparison in the new environment finds the error within its bound."""
        finding, new = self._finding(sides), self._errors[1].get((sides.precision, sides.name))
        if finding is None or after > 2 * _error(new, sides.side):
            return False  # it was not this error that the comparison judged
        if sides.side == "torch":
            return finding.verdict is not Verdict.TORCH_WORSE
        return finding.passed

    def _finding(self, sides: _Sides) -> Finding | None:
        """Returns the finding of a quantity; of trainings, that of all steps."""
        found = self._findings.get((sides.name, sides.precision))
        if found is not None or not sides.name.startswith("step "):
            return found
        return self._findings.get((sides.name.split(" ", 2)[-1], sides.precision))

    def square(self) -> Square:
        """Returns which pairs agree in float64."""
        records = {"old": self._old, "new": self._new}
        found = {}
        for ours, a in records.items():
            for theirs, b in records.items():
                crossed = ours != theirs and self._drawn
                both = a.values.get("jax float64", {}), b.values.get("torch float64", {})
                found[f"{ours}_{theirs}"] = None if crossed else self._agree(*both)
        return Square(**found)

    def _agree(self, ours: Values, theirs: Values) -> bool | None:
        units = self._old.units.get("float64", {})
        both = [name for name in units if name in ours and name in theirs]
        if not both:
            return None
        return all(_agrees(ours[name], theirs[name], units[name]) for name in both)


def _agrees(a: np.ndarray, b: np.ndarray, unit: np.ndarray) -> bool:
    if a.shape != b.shape or places_that_differ(a, b):
        return False
    if not is_float(a):
        return bool(np.array_equal(a, b))
    return unit.shape in ((), a.shape) and _worst(gaps(a, b), unit) <= SEMANTICS


def _error(errors: Errors | None, side: Side) -> float:
    if errors is None:
        return 0.0
    return errors.jax if side == "jax" else errors.torch


def _move(
    name: str, side: Side, effect: Effect, size: float, words: str, precision: str = "float64"
) -> Move:
    return Move(name, precision, side, effect, size, SEMANTICS / _TINY, (0.0, size), words)


def _precision(precision: str, words: str) -> Move:
    return Move("every value", precision, "", Effect.EMPTY, 0.0, 0.0, (0.0, 0.0), words)


def _shapes(sides: _Sides) -> str:
    a, b = sides.old, sides.new
    if a.dtype != b.dtype:
        return f"the dtypes differ: {a.dtype} and {b.dtype}"
    return f"the shapes differ: {a.shape} and {b.shape}" if a.shape != b.shape else ""


def _worst(gap: np.ndarray, unit: np.ndarray) -> float:
    """Returns the largest gap in units; infinity where a unit of 0 has one."""
    if not gap.size:
        return 0.0
    units = np.broadcast_to(np.asarray(unit, np.float64), gap.shape)
    safe = np.where(units > 0, units, 1.0)
    return float(np.max(np.where(units > 0, gap / safe, np.where(gap > 0, np.inf, 0.0))))


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
