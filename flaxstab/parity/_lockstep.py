"""Runs two training systems step by step and judges every tensor at every step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._typing import Array, DTypeLike, PyTree
from flaxstab.parity._inputs import Values, is_float, largest, round_to
from flaxstab.parity._magnitude import BITS, DRAWS, UNIT, moved, rounded
from flaxstab.parity._precision import Precision, jax_at
from flaxstab.parity._replay import Draws
from flaxstab.parity._report import Departure, Report, Tolerance, factor_of
from flaxstab.parity._verdict import (
    SEMANTICS,
    Finding,
    Verdict,
    differ,
    distance_between,
    judge_numerics,
    places_that_differ,
    repeated_draws,
    the_wrong_one,
)

STEPS = 10  # of an ordinary comparison
LONG = 1e-10  # of a tensor's size, in float64, for as long as training goes
CHAOS = 0.1  # of a tensor's size: where perturbed runs part by as much, nothing can be compared
AMPLIFIED = 64  # eps of a tensor's size by which perturbed runs part where training is unstable
NOISE = 16.0  # there one run may be 4 times as far off as others by chance, and Adam squares it

Batch = tuple[np.ndarray, ...]
# After a step of a precision: both sides' values, and how far perturbed runs ever were apart.
Watch = Callable[
    [int, str, Mapping[str, np.ndarray], Mapping[str, np.ndarray], dict[str, float]], None
]
Advance = Callable[[PyTree, list[Array]], tuple[Mapping[str, Array], PyTree]]


class JaxSystem(Protocol):
    """A pure training step with its state."""

    def start(self, precision: Precision) -> PyTree:
        """Returns the state before the first step."""

    def advance(self, state: PyTree, batch: list[Array]) -> tuple[Mapping[str, Array], PyTree]:
        """Returns what a step reports by name, such as the loss, and the state after it."""

    def named(self, state: PyTree) -> Values:
        """Returns parameters, buffers and optimizer state in PyTorch's names and layouts."""

    def unnamed(self, state: PyTree) -> list[str]:
        """Returns the floating-point parts of the state that have no name in PyTorch."""


class TorchSystem(Protocol):
    """PyTorch's training step."""

    optional: set[str]  # quantities that JAX's side may do without; they become notes
    draws: Draws  # of the random layers, in all steps

    def start(self, precision: Precision) -> Callable[[Batch, PyTree], Values]:
        """Returns a function that does one step, given a batch and the state of JAX's side."""


class _JaxRun:
    """One run of JAX's side; perturbed, if it has a seed."""

    def __init__(
        self, system: JaxSystem, advance: Advance, precision: Precision, seed: int | None = None,
        unit: float = UNIT,
    ) -> None:  # fmt: skip
        self._system, self._advance, self._precision = system, advance, precision
        self._seed, self._unit = seed, unit
        with self._mode():
            self.state = self._moved(system.start(precision))
            self._params = _params(system.named(self.state))

    def _mode(self) -> AbstractContextManager[None]:
        return jax_at(self._precision)

    def _moved(self, tree: PyTree) -> PyTree:
        if self._seed is None:
            return tree
        self._seed += 1
        return moved(tree, self._seed, self._unit)

    def step(self, batch: Batch) -> Values:
        dtype = self._precision.compute
        with self._mode():
            arrays = [jnp.asarray(a, dtype) if is_float(a) else jnp.asarray(a) for a in batch]
            told, self.state = self._advance(self.state, self._moved(arrays))
            named = self._system.named(self.state)
            found = {n: np.asarray(a) for n, a in {**told, **named}.items()}
        changes = updates(self._params, found)
        self._params = _params(found)
        return {**found, **changes}


def _params(values: Values) -> dict[str, np.ndarray]:
    return {n: np.array(a) for n, a in values.items() if n.startswith("param ")}


def updates(before: Values, after: Values) -> dict[str, np.ndarray]:
    """Returns what a step added to each parameter, in float64."""
    return {
        n.replace("param", "update", 1): np.asarray(after[n], np.float64) - before[n]
        for n in before
    }


class _Wide(NamedTuple):
    """The float64 runs, which are also the oracle of the low precisions."""

    jax: _JaxRun
    torch: Callable[[Batch, PyTree], Values]
    moved: list[_JaxRun]
    witness: Callable[[Batch, PyTree], Values] | None


class _Low(NamedTuple):
    """The runs at one lower precision."""

    dtype: DTypeLike
    jax: _JaxRun
    torch: Callable[[Batch, PyTree], Values]
    moved: list[_JaxRun]


def lockstep(
    ours: JaxSystem,
    theirs: TorchSystem,
    batches: Iterable[Batch],
    *,
    dtypes: Sequence[DTypeLike],
    tolerances: tuple[Tolerance, ...] = (),
    witness: TorchSystem | None = None,
    watch: Watch | None = None,
) -> Report:
    """Trains both systems and judges every quantity after every step.

    In float64 both sides must agree to 1e-12 of each tensor's magnitude, or to as many 1e-12 of
    its size as there were steps, 100 at most; where training amplifies rounding beyond that, the
    verdict is ill-conditioned. In float32 and below JAX's side may be off its float64 run by
    twice what torch's is off its own, plus 2 + steps times eps of the tensor's size or of what
    rounding every operation to that precision does to JAX's float64 run, whichever is more.

    Args:
      ours: JAX's side.
      theirs: PyTorch's.
      batches: one for each step, as float64 or integers.
      dtypes: the lower precisions.
      tolerances: see :func:`compare`.
      witness: see :func:`compare`.
      watch: is shown what both sides computed, step by step, float64 first.
    """
    stored = max(dtypes, key=lambda kind: float(jnp.finfo(kind).eps), default=np.float64)
    advance = jax.jit(ours.advance)
    exact = Precision(np.float64, stored)
    wide = _Wide(
        _JaxRun(ours, advance, exact),
        theirs.start(exact),
        _perturbed(ours, BITS, exact, UNIT),
        None if witness is None else witness.start(exact),
    )
    lows = [_low(ours, theirs, advance, dtype, stored) for dtype in dtypes]
    book = _Book(tolerances, theirs.optional, watch)
    for step, batch in enumerate(batches, 1):
        _one_step(step, tuple(round_to(a, stored) for a in batch), wide, lows, book)
    unnamed = ours.unnamed(wide.jax.state)
    book.notes |= dict.fromkeys(f"{where} (of no name in PyTorch)" for where in unnamed)
    for finding in repeated_draws(theirs.draws.repeated):
        book.findings[finding.name, finding.dtype] = finding
    return Report(tuple(book.findings.values()), tuple(book.notes), tolerances, book.departure)


def _low(
    ours: JaxSystem, theirs: TorchSystem, advance: Advance, dtype: DTypeLike, stored: DTypeLike
) -> _Low:
    info, low = jnp.finfo(dtype), Precision(dtype, stored)
    exact = Precision(np.float64, stored)
    runs = _perturbed(ours, info.nmant, exact, float(info.eps))
    return _Low(dtype, _JaxRun(ours, advance, low), theirs.start(low), runs)


def _perturbed(ours: JaxSystem, bits: int, precision: Precision, unit: float) -> list[_JaxRun]:
    advance = jax.jit(rounded(ours.advance, bits))
    return [_JaxRun(ours, advance, precision, 10_000 * (i + 1), unit) for i in range(DRAWS)]


def _one_step(step: int, batch: Batch, wide: _Wide, lows: list[_Low], book: "_Book") -> None:
    # PyTorch goes first: it replays the draws that JAX's state is about to make.
    theirs = wide.torch(batch, wide.jax.state)
    third = {} if wide.witness is None else wide.witness(batch, wide.jax.state)
    ours = wide.jax.step(batch)
    moves = [run.step(batch) for run in wide.moved]
    book.order = {name: place for place, name in enumerate(theirs)}
    # Of some steps nothing was recorded, where PyTorch is absent.
    for name in [*ours, *(n for n in theirs if n not in ours)] if theirs else []:
        if name in ours and name in theirs:
            sides = ours[name], theirs[name]
            book.judge_wide(step, name, sides, [m[name] for m in moves], third.get(name))
        else:
            book.alone(step, name, "Flax" if name in ours else "PyTorch")
    book.show(step, np.float64, ours, theirs)
    for low in lows:
        theirs_low = low.torch(batch, low.jax.state)
        ours_low = low.jax.step(batch)
        moves = [run.step(batch) for run in low.moved]
        for name in (n for n in ours_low if n in theirs_low and n in theirs):
            oracles, sides = (ours[name], theirs[name]), (ours_low[name], theirs_low[name])
            if name in ours and is_float(ours[name]):
                book.judge_low(step, name, low.dtype, sides, oracles, [m[name] for m in moves])
        book.show(step, low.dtype, ours_low, theirs_low)


class _Book:
    """The worst finding of every quantity, and the first that left its bound."""

    def __init__(
        self, tolerances: tuple[Tolerance, ...], optional: set[str], watch: Watch | None
    ) -> None:
        self.findings: dict[tuple[str, str], Finding] = {}
        self.notes: dict[str, None] = {}  # an ordered set
        self._optional = optional
        self.departure: Departure | None = None
        self.order: dict[str, int] = {}  # of PyTorch's quantities: of a kind, as they are defined
        self._tolerances, self._watch = tolerances, watch
        self._spread: dict[tuple[str, str], float] = {}
        self._size: dict[str, float] = {}

    def add(self, step: int, finding: Finding) -> None:
        """Keeps a finding if it is worse than the one of its name, and the first failure."""
        key = finding.name, finding.dtype
        if _gravity(finding) > 1:
            found, first = (
                Departure(step, finding.name, finding.dtype, finding.excess),
                self.departure,
            )
            if first is None or (step == first.step and self._order(found) < self._order(first)):
                self.departure = found
        finding = finding._replace(explanation=f"at step {step} {finding.explanation}")
        old = self.findings.get(key)
        # Of a failure the first step is told, not the worst.
        if old is None or (
            _gravity(old) < 2 and (_gravity(finding), finding.excess) > (_gravity(old), old.excess)
        ):
            self.findings[key] = finding

    def show(self, step: int, dtype: DTypeLike, ours: Values, theirs: Values) -> None:
        """Shows a step's values to whoever watches."""
        if self._watch is not None:
            name = jnp.dtype(dtype).name
            spreads = {n: gap for (n, kind), gap in self._spread.items() if kind == name}
            self._watch(step, name, ours, theirs, spreads)

    def _order(self, departure: Departure) -> tuple[int, int]:
        """Orders what parts in one step from cause to effect, then as the program computes it.

        Buffers move in the forward pass, from the first layer on; gradients reach the last layer
        first, and so does what is made of them.
        """
        causes = ("loss", "gradient", "buffer")
        effects = ("step", "update", "param")  # moments stand between
        kind = departure.name.split(" ", maxsplit=1)[0]
        place = self.order.get(departure.name, len(self.order))
        place = place if kind in causes else -place
        if kind in causes:
            return causes.index(kind) - len(causes), place
        return effects.index(kind) + 1 if kind in effects else 0, place

    def alone(self, step: int, name: str, owner: str) -> None:
        """Notes a quantity that one side has, or finds fault with it."""
        state = name.split(" ", maxsplit=1)[0] not in ("loss", "param", "update", "buffer")
        if name in self._optional or (state and owner == "Flax"):
            self.notes[f"{name} (only {owner} keeps it)"] = None
        else:
            self.add(step, differ(name, "float64", f"only {owner} has it"))

    def judge_wide(
        self, step: int, name: str, sides: tuple[np.ndarray, np.ndarray],
        moves: list[np.ndarray], third: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Judges a float64 quantity after a step."""
        spread = self._grow(name, "float64", sides[0], moves) / UNIT
        factor = factor_of(name, self._tolerances)
        finding = judge_step(step, name, *sides, spread, factor)
        if not finding.passed and spread * UNIT > CHAOS * max(map(largest, sides)):
            finding = _chaotic(name, "float64")
        if not finding.passed and third is not None:
            right = [judge_step(step, name, side, third, spread, factor).passed for side in sides]
            finding = finding._replace(side=the_wrong_one(*right))
        self.add(step, finding)

    def judge_low(
        self, step: int, name: str, dtype: DTypeLike, sides: tuple[np.ndarray, np.ndarray],
        oracles: tuple[np.ndarray, np.ndarray], moves: list[np.ndarray],
    ) -> None:  # fmt: skip
        """Judges a quantity of a lower precision after a step."""
        kind = jnp.dtype(dtype)
        factor = factor_of(name, self._tolerances)
        spread = self._grow(name, kind.name, oracles[0], moves) / float(jnp.finfo(dtype).eps)
        # The largest so far: moments remember gradients that were larger.
        self._size[name] = max(largest(oracles[0]), self._size.get(name, 0.0))
        if spread == np.inf:
            self.add(step, _chaotic(name, kind.name))
            return
        if spread > AMPLIFIED * self._size[name]:
            factor *= NOISE
        size, slack = max(spread, self._size[name]), 2.0 + step  # a step adds one rounding more
        self.add(step, judge_numerics(name, *sides, oracles, size, kind, factor, slack))

    def _grow(self, name: str, dtype: str, plain: np.ndarray, moves: list[np.ndarray]) -> float:
        """Returns how far the perturbed runs ever were from the plain one."""
        gap = max(
            np.inf if places_that_differ(plain, move) else distance_between(plain, move)
            for move in moves
        )
        self._spread[name, dtype] = max(gap, self._spread.get((name, dtype), 0.0))
        return self._spread[name, dtype]


def _chaotic(name: str, dtype: str) -> Finding:
    words = "perturbed runs differ by as much as it is large: this training amplifies rounding"
    return Finding(name, Verdict.ILL_CONDITIONED, dtype, 0.0, 0.0, np.inf, words)


def _gravity(finding: Finding) -> int:
    """Returns 0 for agreement, 1 for nobody's fault, 2 and more for somebody's."""
    if finding.verdict is Verdict.ILL_CONDITIONED:
        return 1
    return 2 * (not finding.passed) + 2 * bool(finding.side)


def judge_step(
    step: int, name: str, ours: np.ndarray, theirs: np.ndarray, spread: float, factor: float = 1.0
) -> Finding:
    """Judges a float64 quantity after some training steps; see :func:`lockstep`.

    Args:
      step: how many steps there were.
      name: the quantity.
      ours: JAX's value.
      theirs: PyTorch's value.
      spread: how far perturbed runs are from each other, in units of the perturbation.
      factor: by which somebody, with a reason, widens the bound.
    """
    mismatch = places_that_differ(ours, theirs)
    if mismatch:
        return differ(name, "float64", mismatch)
    gap, size = distance_between(ours, theirs), largest(theirs)
    plain = factor * size * max(SEMANTICS, min(SEMANTICS * step, LONG))
    bound = max(plain, factor * SEMANTICS * spread)
    unit = max(size, spread)
    words = f"the sides differ by {gap:.1e} in float64, of a size of {size:.1e}"
    kind = Verdict.AGREE
    if not gap <= bound:
        kind = Verdict.SEMANTICS_DIFFER
    elif gap > factor * LONG * size:
        kind = Verdict.ILL_CONDITIONED
        words += (
            f"; perturbed runs differ by {spread:.0e} perturbations: it is amplified rounding (a "
            "parameter without gradient, such as a bias before BatchNorm, gets Adam steps from it)"
        )
    error = gap / unit if unit else (np.inf if gap else 0.0)
    relative = bound / unit if unit else SEMANTICS
    return Finding(name, kind, "float64", error, error, relative, words)
